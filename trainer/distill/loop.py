"""The training loop of one stage: a generator that yields a StepResult and prints nothing.

Of each step's global batch a process computes its rows, in micro-batches; the gradient is that of the mean over the
global batch, however it is divided. A step whose loss or gradient is not finite changes nothing: its batch is saved and
the run stops.
"""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hypersd_export.errors import DataError, HypersdError
from hypersd_export.model.files import write_tensors
from trainer.batch import Batch, Source
from trainer.distill.engine import Engine
from trainer.distill.feedback import FeedbackDraws, FeedbackStep
from trainer.distill.networks import Role
from trainer.distill.score import ScoreDraws, ScoreStep
from trainer.distill.snapshot import writing
from trainer.distill.step import DistillStep, Draws
from trainer.losses.tscd import Boundary

Step = DistillStep | ScoreStep | FeedbackStep
AnyDraws = Draws | ScoreDraws | FeedbackDraws


@dataclass(frozen=True, slots=True)
class StepResult:
    """One optimiser step: its number within the stage, from 0; logs by name (means over the global batch, and gradient
    norms before clipping); the learning rate; seconds since this process began the stage."""

    step: int
    logs: dict[str, float]
    lr: float
    seconds: float


def learning_rate(lr: float, step: int, *, steps: int, warmup: int, cooldown: float) -> float:
    """The rate of step `step` of `steps`: a linear rise over the first `warmup`, and a linear fall towards 0 over the
    last share `cooldown` of them."""
    return lr * min(1.0, (step + 1) / max(1, warmup), (steps - step) / max(1.0, cooldown * steps))


class StageLoop:
    """The loop of one stage: `number` from 1; `offset` student steps lie behind it; `out` is the run's folder."""

    def __init__(
        self, engine: Engine, step: Step, source: Source, *, number: int, offset: int, out: Path
    ) -> None:  # fmt: skip
        self.engine, self.step, self.source = engine, step, source
        self.number, self.offset, self.out = number, offset, out

    def run(self, first: int) -> Iterator[StepResult]:
        """Steps `first` to the stage's last. DataError, with nothing changed, at a step that is not finite."""
        begin, stage, config = time.monotonic(), self.step.stage, self.engine.config
        for index in range(first, stage.steps):
            lr = learning_rate(stage.lr, index, steps=stage.steps, warmup=config.warmup, cooldown=config.cooldown)
            logs = self._one(index, lr)
            yield StepResult(index, logs, lr, time.monotonic() - begin)

    def _one(self, index: int, lr: float) -> dict[str, float]:
        engine, step = self.engine, self.step
        engine.set_lr(lr)
        draws = step.draw(index, self.source.latent_shape)
        sums: dict[str, torch.Tensor] = {}
        for rows in engine.share.slices():
            for name, value in self._micro(index, rows, draws).items():
                sums[name] = sums[name] + value if name in sums else value
        logs = engine.mean(sums)
        logs |= engine.gradient_norms(student=draws.student)
        if not all(map(math.isfinite, logs.values())):
            losses_fine = all(math.isfinite(value) for name, value in logs.items() if not name.endswith("grad_norm"))
            if not losses_fine or not engine.overflowed({n: v for n, v in logs.items() if n.endswith("grad_norm")}):
                engine.forget_gradients()
                raise DataError(self._stop(index, draws, logs))
            logs = {**{n: v for n, v in logs.items() if math.isfinite(v)}, "overflow": 1.0}
        engine.update(student=draws.student)
        if draws.student:
            step.updated()
        return logs

    def _micro(self, index: int, rows: slice, draws: Any) -> dict[str, torch.Tensor]:
        """Forward and backward of one micro-batch, student first, then the discriminator."""
        engine, step = self.engine, self.step
        batch = self.source.batch(self._positions(index, rows)).to(engine.device)
        part = draws.rows(rows).to(engine.device)
        if engine.kind == "FSDP":
            self._keep_in_step(rows, draws, batch)
        with engine.accelerator.accumulate(step.networks.call):
            with engine.autocast():
                output = step(batch, part)
            if output.loss is not None:
                if engine.kind == "DEEPSPEED" and not engine.finite_everywhere(output.loss):
                    raise DataError(self._stop(index, draws, {"loss": math.nan}))  # its backward also updates
                engine.backward(output.loss)
        logs = dict(output.logs) if output.loss is None else {"loss": output.loss.detach(), **output.logs}
        if output.look is not None:
            assert not isinstance(step, FeedbackStep), "feedback has no critic"
            with engine.autocast():
                loss, critic_logs = step.critic_loss(output.look)
            engine.critic_backward(loss)
            logs |= critic_logs
        return logs

    def _keep_in_step(self, rows: slice, draws: Draws, batch: Batch) -> None:
        """FSDP gathers weights from all processes in every pass, so that all must make equally many. A process skips
        the target's where none of its samples needs it: it makes one for nothing if any other process does need it.
        """
        engine, lcm = self.engine, self.step.config.boundary is Boundary.LCM
        start, end = draws.indices.start, draws.indices.end
        needed = start > 1 if lcm else end < start - 1
        first = rows.start - engine.share.start
        span = engine.share.micro * engine.share.count
        everyone = [needed[at + first : at + first + engine.share.micro] for at in range(0, len(needed), span)]
        if not needed[rows].any() and any(bool(theirs.any()) for theirs in everyone):
            t = torch.zeros(1, dtype=torch.long, device=engine.device)
            with engine.autocast():
                self.step.networks.frozen(Role.TARGET, batch.latents[:1], t, batch.conditioning.rows(slice(0, 1)))

    def _positions(self, index: int, rows: slice) -> range:
        """Where these rows of the step's global batch stand in the source's stream."""
        begin = (self.offset + index) * self.engine.config.batch
        return range(begin + rows.start, begin + rows.stop)

    def _stop(self, index: int, draws: AnyDraws, logs: dict[str, float]) -> str:
        """Save the global batch of a bad step (main process) and say what happened, in one line."""
        path = self.out / "bad" / f"stage{self.number}-step{index:06d}.safetensors"
        figures = ", ".join(f"{name} {value:g}" for name, value in logs.items())
        where = f"stage {self.number} (k={self.step.stage.segments}), step {index}: {figures}: not finite"
        try:
            if self.engine.is_main:
                self._save_batch(path, index, draws, logs)
        except HypersdError as error:
            return f"{where}; nothing was updated, and its batch could not be saved: {error}"
        return (
            f"{where}; nothing was updated, and its batch is in {path}; look at its names, or lower the learning rate"
        )

    def _save_batch(self, path: Path, index: int, draws: AnyDraws, logs: dict[str, float]) -> None:
        batch = self.source.batch(self._positions(index, slice(0, self.engine.config.batch)))
        tensors = {"latents": batch.latents, **draws.tensors()}
        metadata = {
            "stage": str(self.number), "step": str(index), "names": json.dumps(batch.names),
            "captions": json.dumps(batch.captions), "logs": json.dumps({n: repr(v) for n, v in logs.items()}),
        }  # fmt: skip
        with writing(path) as partial:
            write_tensors(partial, {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, metadata)

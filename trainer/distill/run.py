"""A distillation from base and data to one LoRA a stage: construct `Distillation`, then iterate `run()`.

out/run.json                     configuration, base, versions
out/stage1-k8-lora.safetensors   a finished stage's LoRA (kohya's form; diffusers' under out/diffusers/)
out/checkpoints/                 what `--resume` goes on from
out/log.jsonl, tensorboard/, validation/, bad/
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from hypersd_export.errors import DataError, OptionError
from trainer.batch import Source
from trainer.config import as_json
from trainer.discriminator import Discriminator
from trainer.distill.config import FEEDBACK, METHODS, SCORE, DistillConfig, StageConfig
from trainer.distill.engine import DTYPES, Engine
from trainer.distill.feedback_run import Feedback, check_feedback
from trainer.distill.logs import JsonLog, check_log_with, log_grid, start_tracker
from trainer.distill.loop import StageLoop, Step, StepResult
from trainer.distill.lora_file import Origin, load_student, public_recipe, save_student, updates_of
from trainer.distill.networks import Networks
from trainer.distill.pairs import Pairs, open_pairs
from trainer.distill.plans import plans_for
from trainer.distill.resume import open_run, write_run
from trainer.distill.score import FakeScore, ScoreStep
from trainer.distill.snapshot import Place, Snapshot, disk, save_snapshot, set_aside_newer, writing
from trainer.distill.state import Gathered, collect, restore, restore_networks
from trainer.distill.step import DistillStep

ENCODED_EVERY = 1000
VERSIONS = ("hypersd", "torch", "diffusers", "peft", "accelerate")


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """One step of stage `number` (from 1) of `stages`, which has `of_steps`; figures: a validation's, if there was one;
    wrote: the LoRA, after the stage's last step."""

    number: int
    stages: int
    segments: int
    of_steps: int
    result: StepResult
    figures: Mapping[str, float] = field(default_factory=dict)
    wrote: Path | None = None


def lora_name(config: DistillConfig, number: int) -> str:
    """stage1-k8-lora.safetensors and so on for tscd; lcm-k1-lora.safetensors and so on for the methods of one stage."""
    first = f"stage{number}" if config.method == "tscd" else config.method
    if config.method != "tscd" and len(config.stages) > 1:
        first = f"{config.method}-stage{number}"
    return f"{first}-k{config.stages[number - 1].segments}-lora.safetensors"


class Distillation:
    """The run in `out`. `resume`: latest, never, or a checkpoint's path (see `trainer.distill.resume`).

    Construction checks what can be checked without loading anything; `base` and `source` are opened by the
    configuration unless they are given (a `TrainingBase`, a `Source`). `say` is called, by the main process, with
    lines of text about what happens before the first step (bool: nothing comes of them).
    """

    def __init__(
        self, config: DistillConfig, out: Path, *, resume: str = "latest", base: Any = None,
        source: Source | None = None, say: Callable[[str], object] = bool,
    ) -> None:  # fmt: skip
        known = (*METHODS, SCORE, FEEDBACK)
        if config.method not in known:
            raise OptionError(f"method {config.method!r} is not a method; there are: {', '.join(known)}")
        if config.method == FEEDBACK:
            check_feedback(config)
        if source is None and not config.data.source:
            raise OptionError("no data: this recipe needs --data, an image folder, a dataset or a shard pattern")
        from trainer.data import is_prompts

        if is_prompts(config.data.source) and config.needs_pictures:
            raise OptionError(f"data {config.data.source}: prompts alone, and this learns from pictures; pass --data")
        if config.validate_every and not config.validation_prompts and config.base != "builtin":
            raise OptionError("validate_every needs prompts: --set validation_prompts='[\"a fox\", …]'")
        if config.mixed_precision == "no" and config.base_precision != "fp32":
            raise OptionError(
                f"base_precision {config.base_precision} with mixed_precision no: set mixed_precision to fp16 or bf16"
            )
        check_log_with(config.log_with)
        self.config, self.out, self.resume = config, out, resume
        self._base, self._told = base, 0
        self._source: Any = source
        self.engine = Engine(config)
        if config.method in (SCORE, FEEDBACK) and self.engine.kind in ("FSDP", "DEEPSPEED"):
            raise OptionError(f"method {config.method} with {self.engine.kind}: has two adapters in use; take DDP")
        self._say = say if self.engine.is_main else bool

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that prints."""
        return self.engine.is_main

    def run(self) -> Iterator[Progress]:
        """Train every stage that is not finished, yield after every step, write a LoRA at each stage's end."""
        config, engine = self.config, self.engine
        snapshot = self._open_run()
        self._load()
        begin = self._begin(snapshot)
        if begin.stage > len(config.stages):
            self._say("every stage is finished")
            return
        if snapshot is not None:
            self._say(f"going on from stage {begin.stage}, step {begin.step}")
        self._log = JsonLog(self.out, begin) if engine.is_main else None
        done = sum(stage.steps for stage in config.stages[: begin.stage - 1]) + begin.step
        tracker = config.log_with if engine.is_main else "none"
        self._tracker = start_tracker(tracker, self.out, first_step=done, config=as_json(config))
        try:
            self._pending, snapshot = (snapshot if snapshot and snapshot.place == begin else None), None
            for number in range(begin.stage, len(config.stages) + 1):
                yield from self._stage(number)
        finally:
            if self._log is not None:
                self._log.close()
            if self._tracker is not None:
                self._tracker.finish()

    def _open_run(self) -> Snapshot | None:
        """Every process looks for itself, before any of them writes, so that all stop at the same error."""
        snapshot = open_run(self.out, self.config, self.resume)
        self.engine.accelerator.wait_for_everyone()
        if self.is_main and snapshot is not None and self.resume not in ("latest", "never"):
            set_aside_newer(self.out, snapshot.place)
        self.engine.accelerator.wait_for_everyone()
        return snapshot

    def _load(self) -> None:
        config, engine = self.config, self.engine
        with engine.accelerator.main_process_first():
            if self._base is None:
                from trainer.base import open_training_base

                self._base = open_training_base(config.base)
            if self._source is None:
                from trainer.data import open_source

                cache = Path(config.data.cache) if config.data.cache else self.out / "cache"
                self._source = open_source(
                    config.data, self._base, seed=config.seed, cache=cache, progress=self._encoded,
                    device=str(engine.device),
                )  # fmt: skip
        self._skipped = getattr(self._source, "skipped", None)
        for line in self._skipped.lines() if self._skipped else ():
            self._say(f"data: left out {line}")
        base = self._base
        unet = base.load_unet(DTYPES[config.base_precision])
        torch.manual_seed(config.seed)
        self._feedback = Feedback(config) if config.method == FEEDBACK else None
        networks = Networks.build(
            unet, config.lora, alphas_cumprod=base.alphas_cumprod, prediction_type=base.prediction_type,
            under=None if self._feedback is None else self._feedback.deltas,
        )  # fmt: skip
        self._inherited = updates_of(Path(config.init_lora)) if config.init_lora else 0
        if config.init_lora and self._feedback is None:
            load_student(Path(config.init_lora), networks)
        if config.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        self._critic: Any = None
        self._untrained: dict[str, torch.Tensor] = {}
        if any(stage.w_adv for stage in config.stages):
            self._critic = Discriminator(unet, config.adversarial)
            self._untrained = {name: tensor.clone() for name, tensor in self._critic.state().items()}
            self._critic.to(engine.device)
        self.networks = engine.prepare(networks)
        self._empty = self._source.empty.to(engine.device)
        if config.method == SCORE:
            self._critic, self._pairs = FakeScore(self.networks, self._critic), self._open_pairs()
        if self._feedback is not None:
            self._feedback.open(base, self.networks, self._source, engine)
        self._validator = self._make_validator() if config.validate_every else None

    def _begin(self, snapshot: Snapshot | None) -> Place:
        """Where to go on; a stage whose checkpoint is its last, and whose LoRA is missing, gets it written here."""
        if snapshot is not None and snapshot.extra.get("base") != self._base.digest:
            raise DataError(f"the checkpoint is of another base than {self.config.base}: its weights have changed")
        if self.is_main:
            write_run(self.out, self.config, self._facts())
        if snapshot is None:
            return Place(1, 0)
        place = snapshot.place
        if place.step < self.config.stages[place.stage - 1].steps:
            return place
        restore_networks(snapshot.tensors, self.networks)
        if self._feedback is not None:
            self._feedback.kept = int(snapshot.extra.get("kept", -1))
        if not (self.out / lora_name(self.config, place.stage)).exists():
            self._write_lora(place.stage)
        return Place(place.stage + 1, 0)

    def _stage(self, number: int) -> Iterator[Progress]:
        config, stage, engine = self.config, self.config.stages[number - 1], self.engine
        critic = self._critic if stage.w_adv or config.method == SCORE else None
        if critic is not None:
            critic.load_state(self._untrained)
        engine.start_stage(critic)
        self.networks.start_stage(stage.teacher)
        first = 0
        if self._pending is not None:
            restore(self._pending.tensors, self._pending.extra, engine, self.networks, critic)
            first, self._pending = self._pending.place.step, None  # not held in memory while the stage trains
        step = self._make_step(number, critic)
        offset = sum(before.steps for before in config.stages[: number - 1])
        loop = StageLoop(engine, step, self._source, number=number, offset=offset, out=self.out)
        for result in loop.run(first):
            done = result.step + 1
            self._record(Place(number, result.step), offset, result)
            figures = self._validate(number, result.step, offset, last=done == stage.steps)
            wrote, stopped = None, False
            if self._feedback is not None:
                figures, stopped = self._look(number, done, figures)
                done = stage.steps if stopped else done
            if done == stage.steps or (config.save_every and done % config.save_every == 0):
                self._save(Place(number, done), critic)
            if done == stage.steps:
                wrote = self._write_lora(number)
            yield Progress(
                number=number, stages=len(config.stages), segments=stage.segments, of_steps=stage.steps, result=result,
                figures=figures, wrote=wrote,
            )  # fmt: skip
            if stopped:
                return
        if stage.steps == 0:
            self._save(Place(number, 0), critic)
            self._write_lora(number)

    def _look(self, number: int, done: int, figures: dict[str, float]) -> tuple[dict[str, float], bool]:
        """The guard's figures beside a validation's, and whether it ends the run, with the weights of before."""
        assert self._feedback is not None
        of = self.config.stages[number - 1].steps
        seen, stopped = self._feedback.look(done, of, self.networks, self.engine)
        if seen and self._log is not None:
            self._log.write(Place(number, done - 1), {"guard": True, "stopped": stopped, **seen})
        if seen and self._tracker is not None:
            self._tracker.log({name.replace("_", "/", 1): value for name, value in seen.items()}, step=done - 1)
        if stopped:
            self._say(f"the guard stops after {done} updates; the LoRA is that of {self._feedback.kept}")
        return {**figures, **seen}, stopped

    def _make_step(self, number: int, critic: Any) -> Step:
        config, stage = self.config, self.config.stages[number - 1]
        if self._feedback is not None:
            return self._feedback.step(self.networks, stage, number=number)
        if config.method == SCORE:
            return ScoreStep(
                self.networks, config, stage, self._empty, critic, plans=self._plans(stage), pairs=self._pairs,
                number=number,
            )  # fmt: skip
        return DistillStep(self.networks, config, stage, self._empty, critic, number=number)

    def _open_pairs(self) -> Pairs | None:
        """The teacher's own solutions, solved by the first process and read by the others."""
        config, engine = self.config, self.engine
        if not config.score.pairs:
            return None
        cache = Path(config.data.cache) if config.data.cache else self.out / "cache"
        with engine.accelerator.main_process_first(), engine.autocast():
            return open_pairs(
                self.networks, self._source, config, cache=cache, base=self._base.digest,
                progress=self._solved,
            )  # fmt: skip

    def _record(self, place: Place, offset: int, result: StepResult) -> None:
        if self._log is not None:
            self._log.write(place, {"lr": result.lr, "seconds": round(result.seconds, 3), **result.logs})
        if self._tracker is not None:
            values = {f"train/{name}": value for name, value in {**result.logs, "lr": result.lr}.items()}
            self._tracker.log({**values, "train/segments": self._segments(place)}, step=offset + place.step)

    def _segments(self, place: Place) -> int:
        return self.config.stages[place.stage - 1].segments

    def _save(self, place: Place, critic: Discriminator | None) -> None:
        tensors, extra = collect(self.engine, self.networks, critic)
        if self.is_main:
            extra |= {"config": as_json(self.config), "base": self._base.digest}
            if self._feedback is not None:
                extra["kept"] = self._feedback.kept
            save_snapshot(self.out, Snapshot(place=place, tensors=tensors, extra=extra), keep=self.config.keep)
        self.engine.accelerator.wait_for_everyone()

    def _write_lora(self, number: int) -> Path:
        config, stage, path = self.config, self.config.stages[number - 1], self.out / lora_name(self.config, number)
        student: Any = Gathered(self.networks)
        feedback, updates = self._feedback, sum(before.steps for before in config.stages[:number])
        if feedback is not None and feedback.kept >= 0:
            updates = feedback.kept
        if self.is_main:
            origin = Origin(
                plans=self._plans(stage), base_name=self._base.name, base_digest=self._base.digest,
                recipe=public_recipe(config), steps=self._inherited + updates,
                over="" if feedback is None else feedback.lora.digest,
            )  # fmt: skip
            with disk(path):
                save_student(path, student, config.lora, origin)
        self.engine.accelerator.wait_for_everyone()
        return path

    def _plans(self, stage: StageConfig) -> list[Any]:
        base = self._base
        if self._feedback is not None:
            return self._feedback.plans
        from trainer.base import schedule_of

        schedule = schedule_of(base.model.scheduler_config)
        return list(plans_for(self.config, stage, schedule=schedule, prediction_type=base.prediction_type))

    def _make_validator(self) -> Any:
        from trainer.distill.validate import BUILTIN_PROMPTS, STEPS, Validator

        least = min(stage.points for stage in self.config.stages)  # a plan has no more steps than its grid has points
        steps = tuple(count for count in STEPS if count <= least)
        if self._feedback is not None:
            steps = tuple(plan.num_steps for plan in self._feedback.plans)
        return Validator(
            self._base, self.config.validation_prompts or BUILTIN_PROMPTS, latent_shape=self._source.latent_shape,
            steps=steps, device=self.engine.device,
        )  # fmt: skip

    def _validate(self, number: int, step: int, offset: int, *, last: bool) -> dict[str, float]:
        """Pictures and figures of the student as it is, every `validate_every` steps and at the stage's end; FSDP needs
        every process for a pass, elsewhere the main one does it."""
        if self._validator is None or not (last or (step + 1) % self.config.validate_every == 0):
            return {}
        if not (self.is_main or self.engine.kind == "FSDP"):
            return {}
        stage = self.config.stages[number - 1]
        validation = self._validator(_Autocast(self.networks, self.engine), self._plans(stage))
        if self._log is not None:
            self._log.write(Place(number, step), {"validation": True, **validation.figures})
            name = f"stage{number}-k{stage.segments}-step{step + 1:06d}.png"
            with writing(self.out / "validation" / name) as partial:
                validation.grid.save(partial, format="PNG")
        if self._tracker is not None:
            self._tracker.log({f"validation/{n}": v for n, v in validation.figures.items()}, step=offset + step)
            log_grid(self._tracker, validation.grid, offset + step)
        return dict(validation.figures)

    def _encoded(self, done: int, of: int) -> None:
        """A line now and then while the data are encoded for the first time."""
        if done >= self._told + ENCODED_EVERY:
            self._told = done
            self._say(f"data: encoded {done}{f' of {of}' if of else ''}")

    def _solved(self, done: int) -> None:
        if done % 512 == 0:
            self._say(f"pairs: solved {done} of {self.config.score.pairs}")

    def _facts(self) -> dict[str, Any]:
        skipped = self._skipped.names if self._skipped else {}
        return {
            "skipped": {reason: len(names) for reason, names in skipped.items()},
            "base": {"name": self._base.name, "digest": self._base.digest},
            "versions": {name: _version(name) for name in VERSIONS},
            "processes": self.engine.accelerator.num_processes,
            **({} if self._feedback is None else {"guard_begin": dict(self._feedback.begin)}),
        }  # fmt: skip


class _Autocast:
    """Networks whose frozen passes run in the configured precision: the VAE of a validation must not."""

    def __init__(self, networks: Networks, engine: Engine) -> None:
        self._networks, self._engine = networks, engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._networks, name)

    def frozen(self, *arguments: Any, **settings: Any) -> torch.Tensor:
        with self._engine.autocast():
            return self._networks.frozen(*arguments, **settings)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""

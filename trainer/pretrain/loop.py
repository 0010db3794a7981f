"""The one training loop of `trainer/pretrain`: a generator that yields a StepResult and logs nothing.

Learning rate: linear warm-up, constant, linear cool-down (WSD), so that a long training is a chain of runs: each run
ends in a cooled EMA that can be shipped, and saves the state from before its cool-down, from which the next goes on.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from trainer.checkpoint import load_state, save_state
from trainer.ema import Ema


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """How long and how fast. `max_minutes` (0: no limit) moves the cool-down forward so that the run ends in time."""

    steps: int
    lr: float
    warmup: int = 100
    cooldown: int = 0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0
    ema_decay: float = 0.999
    max_minutes: float = 0.0
    save_every: int = 500
    bf16: bool = True


@dataclass(frozen=True, slots=True)
class StepResult:
    """One optimiser step: its number from 0, losses by name, the learning rate, seconds since the run began."""

    step: int
    losses: dict[str, float]
    lr: float
    seconds: float


Losses = Callable[[int], dict[str, torch.Tensor]]
"""step → losses by name; "loss" is the one that is minimised, the others are for the log."""


def learning_rate(schedule: Schedule, step: int, cool_from: int) -> float:
    """The rate at `step`: warm-up, then constant, then linear to zero from `cool_from` over `cooldown` steps."""
    warm = min(1.0, (step + 1) / max(1, schedule.warmup))
    cool = 1.0 if step < cool_from else max(0.0, 1 - (step - cool_from + 1) / (schedule.cooldown + 1))
    return schedule.lr * warm * cool


def train(
    module: nn.Module, losses: Losses, schedule: Schedule, *, state: Path, ema: Ema, resume: bool = True
) -> Iterator[StepResult]:
    """Minimise `losses(step)["loss"]` over the parameters of `module` that require gradients.

    Goes on from `state` if it exists and `resume` holds. The forward pass runs under bfloat16 autocast if the
    schedule says so; parameters, gradients of the loss and the EMA stay float32.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=schedule.lr, betas=schedule.betas, weight_decay=schedule.weight_decay, foreach=True
    )
    first = 0
    if resume and state.exists():
        first = int(load_state(state, module=module, optimizer=optimizer, ema=ema)["step"])
    cool_from, step, begin = max(first, schedule.steps - schedule.cooldown), first, time.monotonic()
    while step < cool_from + schedule.cooldown:
        seconds = time.monotonic() - begin
        if step < cool_from and _must_cool(schedule, seconds, step - first):
            cool_from = step
        if step == cool_from or (step > first and step < cool_from and step % schedule.save_every == 0):
            save_state(state, module=module, optimizer=optimizer, ema=ema, meta={"step": step})
        lr = learning_rate(schedule, step, cool_from)
        for group in optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast("cpu", torch.bfloat16, enabled=schedule.bf16):
            values = losses(step)
        optimizer.zero_grad(set_to_none=True)
        values["loss"].backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, schedule.clip)
        optimizer.step()
        ema.update(module)
        yield StepResult(step, {k: float(v.detach()) for k, v in values.items()}, lr, time.monotonic() - begin)
        step += 1


def _must_cool(schedule: Schedule, seconds: float, done: int) -> bool:
    """Is the time that is left just enough for the cool-down, at the pace so far? The first steps tell no pace yet."""
    if not schedule.max_minutes or done < min(50, schedule.cooldown):
        return False
    return seconds + schedule.cooldown * seconds / done >= schedule.max_minutes * 60

"""What does a training step cost beyond the network passes that it needs? `python -m benchmarks.overhead`

In turn, in one process: a step of the real loop (data, draws, losses, logs, clipping, optimiser, EMA), and the bare
passes of that step: every call of the UNet and of the discriminator that it made, with the same inputs, rows, adapter
and gradient mode, backward where the call has a gradient, and the optimisers' steps. Rows that the step had computed
already are left out of the bare passes: it does not need them. Writes overhead.json: the ratio of the medians with a
95 % bootstrap interval over the turns, for which at most LIMIT is wanted.
"""

import argparse
import hashlib
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.results import one_line_error, write_result
from benchmarks.stats import ratio
from benchmarks.teacher import RESULTS
from hypersd_export.bundle.cache import default_cache_dir
from hypersd_export.errors import OptionError
from trainer.base import open_training_base
from trainer.batch import Conditioning, Source
from trainer.config import override
from trainer.data import open_source
from trainer.discriminator import Discriminator
from trainer.distill.config import Backend, DistillConfig, StageConfig, recipe
from trainer.distill.engine import DTYPES, Engine
from trainer.distill.loop import StageLoop
from trainer.distill.networks import Networks, Role
from trainer.distill.step import DistillStep

LIMIT = 1.10
WARMUP = 3


@dataclass(frozen=True, slots=True)
class Call:
    """A recorded pass: what was called, with which arguments, under which adapter, with or without gradient; of the
    discriminator, whether its weights took gradients; and how many rows the step had computed before."""

    network: Callable[..., Any]
    arguments: tuple[Any, ...]
    settings: dict[str, Any]
    role: Role
    grad: bool
    learning: bool
    repeated: int = 0

    @property
    def rows(self) -> int:
        """Samples in the pass."""
        first: Any = self.arguments[0]
        return len(first[0] if isinstance(first, tuple) else first)

    @property
    def kind(self) -> str:
        """student, target, teacher or base for the UNet; critic features and critic logits for the discriminator."""
        name = getattr(self.network, "__name__", "")
        return f"critic {name}" if name in ("features", "logits") else self.role.value


@dataclass(slots=True)
class Recorder:
    """Keeps the passes of the latest step; install it with `watching`."""

    networks: Networks
    critic: Discriminator | None
    calls: list[Call] = field(default_factory=list)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While this lasts, every pass of the UNet, and of the discriminator's encoder and heads, is kept."""
        unet, critic = self.networks.unet, self.critic
        handle = unet.register_forward_pre_hook(self._unet_call, with_kwargs=True)
        watched = {} if critic is None else {name: getattr(critic, name) for name in ("features", "logits")}
        for name, method in watched.items():
            setattr(critic, name, self._watch(method))
        try:
            yield
        finally:
            handle.remove()
            for name in watched:
                delattr(critic, name)  # the class's own method shows again

    def _unet_call(self, unet: Any, arguments: tuple[Any, ...], settings: dict[str, Any]) -> None:
        self._keep(unet, arguments, settings, self._role(), learning=False)

    def _watch(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **settings: Any) -> Any:
            assert self.critic is not None
            learning = self.critic.trainable_parameters()[0].requires_grad
            self._keep(method, arguments, settings, Role.STUDENT, learning=learning)
            return method(*arguments, **settings)

        return called

    def _keep(
        self, network: Any, arguments: tuple[Any, ...], settings: dict[str, Any], role: Role, *, learning: bool
    ) -> None:
        kept = tuple(_detached(argument) for argument in arguments)
        self.calls.append(Call(network, kept, dict(settings), role, torch.is_grad_enabled(), learning))

    def _role(self) -> Role:
        """Which adapter is active, by peft's own properties."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        layer = next(module for module in self.networks.unet.modules() if isinstance(module, BaseTunerLayer))
        return Role.BASE if layer.disable_adapters else Role(layer.active_adapters[0])


def _detached(value: Any) -> Any:
    """The same values as leaves that want a gradient where the original was on the way to one."""
    if isinstance(value, tuple):
        return tuple(_detached(item) for item in value)
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value


def needed(calls: Sequence[Call], *, critic_frozen: bool) -> list[Call]:
    """The calls without the rows that an equal network gave before: same adapter, sample, timestep and conditioning.

    The student's own pass, the heads', and those of a critic that is trained always count. A call of which no row is
    left is kept out; `repeated` says how many rows a call has lost.
    """
    seen: set[bytes] = set()
    kept = []
    for call in calls:
        name = call.kind
        if name in ("student", "critic logits") or (name == "critic features" and not critic_frozen):
            kept.append(call)
            continue
        keys = [hashlib.sha256(f"{name}/".encode() + _row_bytes(call, row)).digest() for row in range(call.rows)]
        new = torch.tensor([key not in seen for key in keys])
        seen.update(keys)
        if new.all():
            kept.append(call)
        elif new.any():
            arguments, settings = _pick(call.arguments, new, call.rows), _pick(call.settings, new, call.rows)
            repeated = int((~new).sum())
            kept.append(replace(call, arguments=arguments, settings=settings, repeated=repeated))
    return kept


def _row_bytes(call: Call, row: int) -> bytes:
    tensors = _tensors((call.arguments, call.settings))
    rows = [tensor.detach()[row] if len(tensor) == call.rows else tensor.detach() for tensor in tensors if tensor.ndim]
    return b"".join(tensor.float().cpu().contiguous().numpy().tobytes() for tensor in rows)


def _pick(value: Any, keep: torch.Tensor, count: int) -> Any:
    """The kept rows of everything that has `count` of them."""
    if isinstance(value, torch.Tensor):
        picked = value.detach()[keep.to(value.device)] if value.ndim and len(value) == count else value.detach()
        return picked.requires_grad_(value.requires_grad)
    if isinstance(value, Conditioning):
        return value.rows(keep)
    if isinstance(value, dict):
        return {key: _pick(item, keep, count) for key, item in value.items()}
    return tuple(_pick(item, keep, count) for item in value) if isinstance(value, tuple) else value


class BarePasses:
    """Replays the recorded calls, with optimisers of its own that change nothing (learning rate 0)."""

    def __init__(self, engine: Engine, networks: Networks, critic: Discriminator | None) -> None:
        self._engine, self._networks, self._critic = engine, networks, critic
        settings: dict[str, Any] = {"lr": 0.0, "weight_decay": 0.0, "foreach": True}
        self._optimizers = [torch.optim.AdamW(networks.student_parameters(), **settings)]
        if critic is not None:
            self._optimizers.append(torch.optim.AdamW(critic.trainable_parameters(), **settings))

    def __call__(self, calls: Sequence[Call]) -> float:
        """Seconds that the passes took; the optimisers' steps come after them."""
        begin = _now()
        for _, part in groupby(calls, key=lambda call: call.learning):  # the student's loss, then the critic's
            with self._engine.autocast():
                outputs = [tensor for call in part for tensor in self._pass(call)]
            wanted = [tensor for tensor in outputs if tensor.requires_grad]
            if wanted:
                torch.autograd.backward(wanted, [torch.ones_like(tensor) for tensor in wanted])
        seconds = _now() - begin
        for optimizer in self._optimizers:
            optimizer.step()
        self.forget(calls)
        return seconds

    def forget(self, calls: Sequence[Call]) -> None:
        """Leave no gradient behind, and the adapters and the discriminator as they are at a step's beginning."""
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
        for call in calls:
            for tensor in _tensors(call.arguments):
                tensor.grad = None
        self._networks._activate(Role.STUDENT)

    def _pass(self, call: Call) -> list[torch.Tensor]:
        self._networks._activate(call.role)
        if self._critic is not None:
            for parameter in self._critic.trainable_parameters():
                parameter.requires_grad_(call.learning)
        with torch.set_grad_enabled(call.grad):
            return _tensors(call.network(*call.arguments, **call.settings))


def _tensors(value: Any) -> list[torch.Tensor]:
    """All tensors in nested tuples, dicts and conditionings."""
    if isinstance(value, Conditioning):
        value = (value.states, value.pooled, value.time_ids)
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    return [value] if isinstance(value, torch.Tensor) else []


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass(frozen=True, slots=True)
class Turns:
    """Seconds of each turn: the real step, the bare passes with the optimisers' steps, the passes alone; and the last
    step's calls, all of them and those that it needs."""

    real: list[float]
    bare: list[float]
    passes: list[float]
    calls: list[Call]
    needed: list[Call]


def take_turns(
    engine: Engine, networks: Networks, stage: StageConfig, source: Source, critic: Discriminator | None, *, turns: int,
    out: Path,
) -> Turns:  # fmt: skip
    """Real step and bare passes in turn, the one first that was second before; the first WARMUP turns do not count."""
    stage = replace(stage, steps=turns + WARMUP + 1)
    engine.start_stage(critic)
    networks.start_stage(stage.teacher)
    step = DistillStep(networks, engine.config, stage, source.empty.to(engine.device), critic)
    source.batch(range(stage.steps * engine.config.batch))  # what is made once is not a step's
    loop = StageLoop(engine, step, source, number=1, offset=0, out=out).run(0)
    recorder, bare = Recorder(networks, critic), BarePasses(engine, networks, critic)

    def real() -> float:
        recorder.calls.clear()
        begin = _now()
        with recorder.watching():
            next(loop)
        return _now() - begin

    def replay() -> tuple[float, float]:
        calls = needed(recorder.calls, critic_frozen=engine.config.adversarial.backend is Backend.FROZEN)
        begin = _now()
        passes = bare(calls)
        return _now() - begin, passes

    real()
    result = Turns([], [], [], [], [])
    for turn in range(turns + WARMUP):
        if turn % 2:
            seconds, (whole, passes) = real(), replay()
        else:
            (whole, passes), seconds = replay(), real()
        if turn >= WARMUP:
            for kept, value in ((result.real, seconds), (result.bare, whole), (result.passes, passes)):
                kept.append(value)
    result.calls.extend(recorder.calls)
    frozen = engine.config.adversarial.backend is Backend.FROZEN
    result.needed.extend(needed(recorder.calls, critic_frozen=frozen))
    return result


def summary(stage: StageConfig, config: DistillConfig, turns: Turns) -> dict[str, Any]:
    """One stage's part of overhead.json; `passes` are those of the last step."""
    whole = ratio(turns.real, turns.bare).to_json()
    return {
        "segments": stage.segments, "points": stage.points, "w_adv": stage.w_adv, "batch": config.batch,
        "turns": len(turns.real), "step_ms": 1000 * float(np.median(turns.real)),
        "bare_ms": 1000 * float(np.median(turns.bare)), "ratio": whole, "limit": LIMIT, "holds": whole["high"] <= LIMIT,
        "ratio_to_passes_without_optimizer": ratio(turns.real, turns.passes).to_json(),
        "passes": [{"of": c.kind, "rows": c.rows, "gradient": _has_gradient(c)} for c in turns.calls],
        "passes_needed": [{"of": c.kind, "rows": c.rows, "repeated": c.repeated} for c in turns.needed],
    }  # fmt: skip


def _has_gradient(call: Call) -> bool:
    trained = call.learning if call.kind.startswith("critic") else call.role is Role.STUDENT
    return call.grad and (trained or any(tensor.requires_grad for tensor in _tensors(call.arguments)))


def measure(config: DistillConfig, stages: Sequence[int], *, turns: int, cache: Path) -> dict[str, Any]:
    """Every one of these stages (numbers from 1) of a configuration, each on fresh networks."""
    base = open_training_base(config.base)
    source = open_source(config.data, base, seed=config.seed, cache=cache)
    result: dict[str, Any] = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {name: version(name) for name in ("torch", "diffusers", "peft", "accelerate")},
        "base": base.name, "mixed_precision": config.mixed_precision, "stages": [],
    }  # fmt: skip
    engine = Engine(config)
    for number in stages:
        if not 1 <= number <= len(config.stages):
            raise OptionError(f"--stages {number}: the recipe has stages 1 to {len(config.stages)}")
        stage, unet = config.stages[number - 1], base.load_unet(DTYPES[config.base_precision])
        torch.manual_seed(config.seed)
        networks = Networks.build(
            unet, config.lora, alphas_cumprod=base.alphas_cumprod, prediction_type=base.prediction_type
        )
        critic = Discriminator(unet, config.adversarial).to(engine.device) if stage.w_adv else None
        prepared = engine.prepare(networks)
        timed = take_turns(engine, prepared, stage, source, critic, turns=turns, out=cache)
        result["stages"].append({"number": number, **summary(stage, config, timed)})
        print(json.dumps({k: v for k, v in result["stages"][-1].items() if k != "passes"}), flush=True)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and write docs/results/overhead.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="builtin")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as hypersd-train's")
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 4], help="numbers from 1")
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--cache", type=Path, default=default_cache_dir() / "overhead")
    options = parser.parse_args(arguments)
    with one_line_error() as ended:
        if options.turns < 2:
            raise OptionError(f"--turns {options.turns}: must be at least 2")
        config = override(recipe(options.recipe), options.set)
        result = measure(config, options.stages, turns=options.turns, cache=options.cache)
        options.out.mkdir(parents=True, exist_ok=True)
        write_result(options.out, "overhead", result)
    return ended.code


if __name__ == "__main__":
    sys.exit(main())

"""The anchor of a score distillation: noises, and where the teacher's ODE leads from them (DMD, arXiv 2311.18828).

Pair j has the j-th sample's caption and a noise of its own; the teacher's solution is computed once, kept in the cache
under the digest of all that it depends on, and read from there.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from hypersd_export.diffusion import grid_timesteps
from hypersd_export.errors import DataError
from hypersd_export.model.files import read_tensors, write_tensors
from trainer.batch import Conditioning, Source, keyed_generator
from trainer.distill.config import DistillConfig
from trainer.distill.networks import Networks, Role
from trainer.distill.snapshot import writing
from trainer.losses.tscd import level, psi

ROWS = 32
"""How many are solved at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pairs:
    """solutions: float32 [P, C, h, w]; their captions are those of the first P samples of `source`."""

    source: Source
    solutions: torch.Tensor
    seed: int

    def put(self, numbers: torch.Tensor, conditioning: Conditioning) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
        """For numbers int64 [B], -1 for none: noise and solution [B, C, h, w] (0 where there is none), and the
        conditioning with the pairs' captions in its rows. All on the numbers' device."""
        chosen = torch.nonzero(numbers >= 0).flatten()
        mine = numbers[chosen].tolist()
        theirs = self.source.batch(mine).conditioning.to(numbers.device)
        place = torch.zeros(len(numbers), dtype=torch.long, device=numbers.device)
        place[chosen] = torch.arange(len(chosen), device=numbers.device)
        mixed = conditioning.where(numbers >= 0, theirs.rows(place))
        noise = torch.zeros(len(numbers), *self.solutions.shape[1:], device=numbers.device)
        solution = noise.clone()
        noise[chosen] = pair_noise(self.seed, mine, self.source.latent_shape).to(numbers.device)
        solution[chosen] = self.solutions[mine].to(numbers.device)
        return noise, solution, mixed


def pair_noise(seed: int, numbers: list[int], shape: tuple[int, int, int]) -> torch.Tensor:
    """The noises of these pairs, float32 [n, C, h, w]: each a function of (seed, number) alone."""
    return torch.stack([torch.randn(shape, generator=keyed_generator(f"{seed}/pair/{number}")) for number in numbers])


def open_pairs(
    networks: Networks, source: Source, config: DistillConfig, *, cache: Path, base: str,
    progress: Callable[[int], object] = bool,
) -> Pairs:  # fmt: skip
    """The pairs from the cache, or solved now: DDIM on `score.pair_steps` points with the middle of the guidance range.

    base: digest of the base model. DataError for a damaged file in the cache, DestinationError if it cannot be written.
    """
    score, shape = config.score, source.latent_shape
    guidance = sum(config.guidance) / 2
    key = [base, config.data.source, config.seed, score.pairs, score.pair_steps, guidance, list(shape)]
    path = cache / f"pairs-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.safetensors"
    if path.exists():
        solutions = read_tensors(path, DataError).get("solutions", torch.empty(0)).float()
        if solutions.shape != (score.pairs, *shape):
            raise DataError(f"{path}: not the pairs of this run; delete it")
        return Pairs(source=source, solutions=solutions, seed=config.seed)
    parts = []
    for start in range(0, score.pairs, ROWS):
        numbers = list(range(start, min(start + ROWS, score.pairs)))
        parts.append(solve(networks, source, config, numbers, guidance).cpu())
        progress(start + len(numbers))
    solutions = torch.cat(parts).half()  # not before: autocast refuses to join halves on a CPU
    with writing(path) as partial:
        write_tensors(partial, {"solutions": solutions}, {"key": json.dumps(key)})
    return Pairs(source=source, solutions=solutions.float(), seed=config.seed)


@torch.no_grad()
def solve(
    networks: Networks, source: Source, config: DistillConfig, numbers: list[int], guidance: float
) -> torch.Tensor:
    """The teacher's solutions of these pairs, float32 [n, C, h, w], at the path's first level."""
    device = networks.unet.device
    alphas = networks.alphas_cumprod.to(device, torch.float32)
    times = torch.from_numpy(grid_timesteps(config.score.pair_steps, len(alphas))).to(device).flip(0)
    conditioning = source.batch(numbers).conditioning.to(device)
    weights = torch.full((len(numbers),), guidance, device=device)
    x = pair_noise(config.seed, numbers, source.latent_shape).to(device)
    for t, to in pairwise(times):
        out = networks.frozen(
            Role.BASE, x, t.expand(len(x)), conditioning, guidance=None if guidance == 1 else weights,
            empty=source.empty.to(device),
        )  # fmt: skip
        x = psi(x, out, level(alphas[t]), level(alphas[to]), networks.prediction_type)
    return x

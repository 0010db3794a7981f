"""Trajectory-segmented consistency distillation (TSCD; arXiv 2404.13686, sec. 3.1, eq. 11 and 12), and its relatives.

One function serves four methods, because they differ in two choices alone (the presets in `trainer.distill.config`):

    method    segments    where the jump ends           boundary
    LCM       1           the end of the trajectory     c_skip, c_out
    TCD/CTM   1           anywhere up to t_{n-1}        DDIM jump
    PCM       k           the segment's lower edge      DDIM jump
    TSCD      8→4→2→1     anywhere in the segment       DDIM jump

All in index space (`hypersd_export.diffusion.segments`): a boundary point belongs to the segment below it, and the
range of t_end is inclusive at both ends. Where t_end = t_{n-1} the target's jump is the identity, its pass skipped.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import torch

from hypersd_export.diffusion import PredictionType, ddim_jump, grid_timesteps, segment_length, target_range, x0_and_eps
from hypersd_export.diffusion.solver import add_noise, jump, lcm_denoise

Net = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(x [b, …], timesteps int64 [b], rows int64 [b]: which samples of the batch these are) → the network's output."""


class End(StrEnum):
    """Where a jump ends: drawn from [t_b, t_{n-1}] (CTM, TCD, TSCD), or always the segment's lower edge (LCM, PCM)."""

    RANDOM = "random"
    EDGE = "edge"


class Boundary(StrEnum):
    """How f(x, t → t) = x holds: a DDIM jump does it by itself; LCM mixes with c_skip and c_out and ends at x̂0."""

    DDIM = "ddim"
    LCM = "lcm"


class Distance(StrEnum):
    """d in eq. 12: the squared error, or pseudo-Huber sqrt(δ² + c²) − c (arXiv 2310.14189, eq. 9), by element."""

    MSE = "mse"
    HUBER = "huber"


@dataclass(frozen=True, slots=True)
class Grid:
    """The trajectory's N + 1 points: timesteps int64 [N + 1], their alphas_cumprod [N + 1], and the segment count k."""

    timesteps: torch.Tensor
    alphas: torch.Tensor
    segments: int

    @classmethod
    def of(
        cls, alphas_cumprod: torch.Tensor, *, points: int, segments: int, device: torch.device | str = "cpu"
    ) -> "Grid":
        """From the noise schedule [T]; `PlanError` unless `segments` divides `points` and `points` is at most T."""
        segment_length(points, segments)
        timesteps = torch.from_numpy(grid_timesteps(points, len(alphas_cumprod)))
        return cls(timesteps.to(device), alphas_cumprod[timesteps].to(device), segments)

    @property
    def points(self) -> int:
        """N: the highest index."""
        return len(self.timesteps) - 1


@dataclass(frozen=True, slots=True)
class Indices:
    """Grid indices of each sample, int64 [B]: the start i_n in 1 … N and the end i_end in [i_b, i_n − 1]."""

    start: torch.Tensor
    end: torch.Tensor

    def rows(self, index: slice) -> "Indices":
        """The samples that a slice picks."""
        return Indices(self.start[index], self.end[index])


def draw_indices(
    count: int, grid: Grid, end: End, generator: torch.Generator, edge_share: float = 0.0
) -> Indices:  # fmt: skip
    """i_n uniform in 1 … N (the paper: t_1 … t_{N−1} of its N points), i_end uniform in [i_b, i_n − 1], inclusive.

    edge_share (ours): the probability that a random end is i_b instead, where the stage's few-step samplers land.
    """
    start = torch.randint(1, grid.points + 1, (count,), generator=generator)
    low, high = target_range(start, grid.points, grid.segments)
    share = torch.rand(count, generator=generator, dtype=torch.float64)
    drawn = low + torch.floor(share * (high - low + 1)).long()
    if edge_share:
        drawn = torch.where(torch.rand(count, generator=generator) < edge_share, low, drawn)
    return Indices(start, low if end is End.EDGE else drawn)


@dataclass(frozen=True, slots=True)
class Pair:
    """The two sides of eq. 12 and where they come from: `x_start` at the start index and the teacher's output there,
    `student` (with gradient) and `target` (without) at the end index; all [B, C, h, w]."""

    x_start: torch.Tensor
    taught: torch.Tensor
    student: torch.Tensor
    target: torch.Tensor
    indices: Indices


def consistency_pair(
    x0: torch.Tensor, noise: torch.Tensor, indices: Indices, grid: Grid, *,
    student: Net, target: Net, teacher: Net, prediction_type: PredictionType, boundary: Boundary = Boundary.DDIM,
) -> Pair:  # fmt: skip
    """Both sides of eq. 12 for a batch: x0 and noise [B, C, h, w].

    One student pass with gradient; without gradient one teacher step (eq. 1; the network behind `teacher` applies its
    guidance itself) and a target pass over those samples alone whose end lies below t_{n-1}. The student goes last.
    """
    start, previous, end = indices.start, indices.start - 1, indices.end
    everyone = torch.arange(len(x0), device=x0.device)

    def move(net: Net, x: torch.Tensor, origin: torch.Tensor, goal: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        out = net(x, grid.timesteps[origin], rows)
        return psi(x, out, level(grid.alphas[origin], x.ndim), level(grid.alphas[goal], x.ndim), prediction_type)

    def arrive(net: Net, x: torch.Tensor, origin: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        if boundary is Boundary.DDIM:
            return move(net, x, origin, end[rows], rows)
        t = grid.timesteps[origin]
        x0_hat, _ = x0_and_eps(net(x, t, rows), x, level(grid.alphas[origin], x.ndim), prediction_type)
        return lcm_denoise(x, x0_hat, level(t, x.ndim).to(x.dtype))

    x_start = add_noise(x0, noise, level(grid.alphas[start], x0.ndim))
    with torch.no_grad():
        taught = teacher(x_start, grid.timesteps[start], everyone)
        levels = level(grid.alphas[start], x0.ndim), level(grid.alphas[previous], x0.ndim)
        goal = psi(x_start, taught, *levels, prediction_type)
        unfinished = torch.nonzero(end < previous if boundary is Boundary.DDIM else previous > 0).flatten()
        if len(unfinished):
            goal = goal.index_copy(0, unfinished, arrive(target, goal[unfinished], previous[unfinished], unfinished))
    return Pair(x_start, taught, arrive(student, x_start, start, everyone), goal, indices)


def psi(
    x: torch.Tensor, out: torch.Tensor, a_from: torch.Tensor, a_to: torch.Tensor, prediction_type: PredictionType
) -> torch.Tensor:
    """Ψ(x_t, f, t → s) of eq. 1: the DDIM jump for any prediction type; exactly x where a_to = a_from."""
    if prediction_type is PredictionType.EPSILON:
        moved = ddim_jump(x, out, a_from, a_to)
    else:
        moved = jump(*x0_and_eps(out, x, a_from, prediction_type), a_to)
    return torch.where(a_from == a_to, x, moved)


def consistency_distance(pair: Pair, distance: Distance, huber_c: float = 1e-3) -> torch.Tensor:
    """d(student, target) of eq. 12 per sample [B]: the mean over its elements."""
    return elementwise_distance(pair.student, pair.target, distance, huber_c)


def elementwise_distance(a: torch.Tensor, b: torch.Tensor, distance: Distance, huber_c: float = 1e-3) -> torch.Tensor:
    """The squared error or pseudo-Huber of a and b [B, …], its mean over each sample's elements: [B]."""
    difference = a - b
    if distance is Distance.MSE:
        each = difference.square()
    else:
        each = (difference.square() + huber_c * huber_c).sqrt() - huber_c
    return each.flatten(1).mean(1)


def level(values: torch.Tensor, ndim: int = 4) -> torch.Tensor:
    """One value per sample [B], of a shape that broadcasts to samples of `ndim` dimensions."""
    return values.view(-1, *[1] * (ndim - 1))

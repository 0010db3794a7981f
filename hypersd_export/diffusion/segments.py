"""The trajectory's grid and its k segments, in index space (TSCD: arXiv 2404.13686, sec. 3.1 and eq. 11).

The grid has N + 1 points: index i = 1 … N stands at timestep round(i * T / N) - 1, so that index N is T - 1 and the
segment edges are exactly the DDIM-trailing timesteps; index 0 is the end of the trajectory, at alphas_cumprod[0]. The k
segments are equal in index space, which needs k | N.

Deviation: eq. 11, floor(t / (T/k)) * (T/k), puts a boundary point into the segment above it, where no target is left
(t_end <= t_{n-1} < t_b). Here a boundary point belongs to the segment *below*, and all is integer arithmetic.
The functions of an index work on ints, NumPy arrays and torch tensors.
"""

import numpy as np
import numpy.typing as npt

from hypersd_export.diffusion.arrays import Array
from hypersd_export.errors import PlanError


def grid_timesteps(num_points: int, num_train_timesteps: int = 1000) -> npt.NDArray[np.int64]:
    """The timestep of each grid index: int64 [num_points + 1], rising, from 0 (index 0) to num_train_timesteps - 1.

    Index 0 means alphas_cumprod[0]; with num_points = num_train_timesteps it coincides with index 1.
    """
    if not 1 <= num_points <= num_train_timesteps:
        raise PlanError(f"grid of {num_points} points: must be from 1 to num_train_timesteps = {num_train_timesteps}")
    steps = np.round(np.arange(num_points + 1) * num_train_timesteps / num_points).astype(np.int64) - 1
    steps[0] = 0
    return steps


def segment_length(num_points: int, segments: int) -> int:
    """Grid points per segment, N / k; `PlanError` unless k divides N."""
    if segments < 1 or num_points < 1 or num_points % segments:
        raise PlanError(f"{segments} segments on a grid of {num_points} points: the segments must divide the grid")
    return num_points // segments


def segment_of(index: Array, num_points: int, segments: int) -> Array:
    """The segment (0 is the cleanest) of grid index 1 … N; a boundary belongs to the segment below it."""
    return (index - 1) // segment_length(num_points, segments)


def lower_edge(index: Array, num_points: int, segments: int) -> Array:
    """The lower edge, as a grid index, of the segment that index 1 … N is in: always below the index itself."""
    return segment_of(index, num_points, segments) * segment_length(num_points, segments)


def target_range(index: Array, num_points: int, segments: int) -> tuple[Array, Array]:
    """The inclusive range [t_b, t_{n-1}] of target indices for a start at index 1 … N; never empty."""
    return lower_edge(index, num_points, segments), index - 1


def edge_timesteps(segments: int, num_train_timesteps: int = 1000) -> tuple[int, ...]:
    """The upper edges of the k segments as timesteps, falling: where a k-step student is called (DDIM trailing)."""
    return tuple(int(t) for t in grid_timesteps(segments, num_train_timesteps)[:0:-1])

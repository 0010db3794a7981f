"""The sampling loop: all that is left of a scheduler once there is a table.

    out = net(k x, t);   x = a x + b out + c z

`net` closes over prompt and guidance: with CFG it returns u + w (c - u). Samples are NumPy arrays or torch tensors.
"""

from collections.abc import Callable, Iterator

from hypersd_export.diffusion.arrays import Array
from hypersd_export.diffusion.table import Row, StepTable
from hypersd_export.errors import PlanError

Net = Callable[[Array, float], Array]
"""(scaled sample, timestep) -> output of the sample's shape."""

StepNoise = Callable[[int], Array]
"""1-based row number (the noise stream) -> standard normal noise of the sample's shape."""


def steps(
    table: StepTable, net: Net, x: Array, *, step_noise: StepNoise | None = None, start: int = 0
) -> Iterator[tuple[int, Row, Array]]:
    """Yield (row index, row, sample after the row) for each row from `start` on.

    `x` is the sample before row `start`: `init_noise_sigma * noise`, or `start_sample` for image-to-image. `step_noise`
    is called only where c != 0; without it such a row is a `PlanError`. One row at a time is computed, so a caller can
    stop, time or show progress.
    """
    if not 0 <= start < len(table.rows):
        raise PlanError(f"start row {start}: the table has rows 0 to {len(table.rows) - 1}")
    for index in range(start, len(table.rows)):
        row = table.rows[index]
        out = net(x if row.k == 1.0 else row.k * x, row.t)
        x = row.a * x + row.b * out
        if row.c != 0.0:
            if step_noise is None:
                raise PlanError(f"row {index + 1} adds noise (c = {row.c:.4g}): pass step_noise")
            x = x + row.c * step_noise(index + 1)
        yield index, row, x


def run(table: StepTable, net: Net, x: Array, *, step_noise: StepNoise | None = None, start: int = 0) -> Array:
    """The sample after the last row; arguments as for `steps`."""
    for _, _, sample in steps(table, net, x, step_noise=step_noise, start=start):
        x = sample
    return x


def start_sample(table: StepTable, *, start: int, latents: Array, noise: Array) -> Array:
    """The image-to-image sample before row `start`: p z0 + q noise, at that row's noise level."""
    if not 0 <= start < len(table.rows):
        raise PlanError(f"start row {start}: the table has rows 0 to {len(table.rows) - 1}")
    row = table.rows[start]
    return row.p * latents + row.q * noise

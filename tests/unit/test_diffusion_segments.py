"""The TSCD grid and its segments, in index space."""

import numpy as np
import pytest
import torch

from hypersd_export.diffusion import (
    FewStepPlan,
    Solver,
    edge_timesteps,
    grid_timesteps,
    lower_edge,
    segment_length,
    segment_of,
    target_range,
)
from hypersd_export.errors import PlanError

GRIDS = [(8, 8), (8, 4), (8, 2), (8, 1), (40, 8), (40, 4), (64, 8), (50, 2), (200, 8), (1000, 8), (1000, 1), (16, 16)]


def test_grid():
    assert grid_timesteps(4).tolist() == [0, 249, 499, 749, 999]
    assert grid_timesteps(50)[:4].tolist() == [0, 19, 39, 59]
    assert grid_timesteps(1).tolist() == [0, 999]
    assert grid_timesteps(1000).tolist() == [0, *range(1000)]
    assert grid_timesteps(4, 500).tolist() == [0, 124, 249, 374, 499]


@pytest.mark.parametrize(("points", "segments"), GRIDS)
def test_every_index(points, segments):
    """The edge lies below, the index within the segment above it, and a boundary belongs to the segment below."""
    length = segment_length(points, segments)
    grid = grid_timesteps(points)
    assert (np.diff(grid) >= 0).all()
    for index in range(1, points + 1):
        edge = lower_edge(index, points, segments)
        assert edge == ((index - 1) // (points // segments)) * (points // segments)
        assert edge < index <= edge + length
        assert edge % length == 0
        assert 0 <= segment_of(index, points, segments) < segments
        low, high = target_range(index, points, segments)
        assert (low, high) == (edge, index - 1)
        assert low <= high
        if edge > 0:
            # Idempotent: the edge, as a starting point, is the top of the segment below, not the bottom of its own.
            assert lower_edge(edge, points, segments) == edge - length
        if index % length == 0:
            assert segment_of(index, points, segments) == index // length - 1


@pytest.mark.parametrize(("points", "segments"), GRIDS)
def test_edges_are_the_timesteps_of_ddim_trailing(points, segments):
    """A student with k segments is sampled at their upper edges: diffusers' DDIM, trailing, k steps."""
    edges = edge_timesteps(segments)
    plan = FewStepPlan(solver=Solver.DDIM, num_steps=segments)
    assert list(edges) == plan.net_timesteps().tolist()
    on_grid = grid_timesteps(points)[[segments * 0 + i * (points // segments) for i in range(segments, 0, -1)]]
    if 1000 % segments == 0:
        np.testing.assert_array_equal(on_grid, edges)


def test_one_segment_targets_everything_below():
    for index in range(1, 51):
        assert target_range(index, 50, 1) == (0, index - 1)


def test_arrays_and_tensors():
    index = np.arange(1, 41)
    expected = [lower_edge(int(i), 40, 8) for i in index]
    np.testing.assert_array_equal(lower_edge(index, 40, 8), expected)
    low, high = target_range(torch.from_numpy(index), 40, 8)
    assert low.tolist() == expected
    assert high.tolist() == (index - 1).tolist()


@pytest.mark.parametrize(("points", "segments"), [(50, 8), (50, 4), (10, 3), (10, 0), (0, 1), (4, 8), (10, -2)])
def test_segments_that_do_not_divide_the_grid(points, segments):
    with pytest.raises(PlanError, match=f"^{segments} segments on a grid of {points} points"):
        lower_edge(1, points, segments)


@pytest.mark.parametrize("points", [0, 1001])
def test_impossible_grid(points):
    with pytest.raises(PlanError, match=f"^grid of {points} points: must be from 1 to num_train_timesteps = 1000"):
        grid_timesteps(points)

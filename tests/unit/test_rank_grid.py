"""The arithmetic of a mesh, for any world size, without processes."""

from __future__ import annotations

import math
import time
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dsp import UsageError
from megatron_dsp.mesh import AXES, RankGrid

GROUPS = [("pipe",), ("data",), ("sequence",), ("tensor",), ("data", "sequence"), ("pipe", "tensor")]


@st.composite
def grids(draw):
    """A grid, with its data degree given or left to fill the world."""
    degrees = {axis: draw(st.integers(1, 5)) for axis in AXES}
    given = degrees if draw(st.booleans()) else {axis: degrees[axis] for axis in AXES if axis != "data"}
    grid = RankGrid(math.prod(degrees.values()), **given)
    assert grid.degrees == degrees
    return grid


@given(grids())
def test_groups_partition_the_world_and_agree_with_coordinates(grid):
    for axes in GROUPS:
        groups = grid.groups(*axes)
        assert sorted(chain(*groups)) == list(range(grid.world_size))
        for group in groups:
            # Apart along exactly these axes, and in their order: the position in the group is the coordinate.
            coordinates = [{axis: grid.coordinate(rank, axis) for axis in AXES} for rank in group]
            for axis in set(AXES) - set(axes):
                assert len({coordinate[axis] for coordinate in coordinates}) == 1
            positions = [[coordinate[axis] for axis in AXES if axis in axes] for coordinate in coordinates]
            assert positions == sorted(positions)
            assert len(group) == math.prod(grid.degrees[axis] for axis in axes)
            if len(axes) == 1:
                assert positions == [[position] for position in range(grid.degrees[axes[0]])]


def test_tensor_is_innermost_then_sequence_data_pipe():
    grid = RankGrid(16, tensor=2, sequence=2, pipe=2)
    assert grid.groups("tensor") == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11], [12, 13], [14, 15]]
    assert grid.groups("sequence") == [[0, 2], [1, 3], [4, 6], [5, 7], [8, 10], [9, 11], [12, 14], [13, 15]]
    assert grid.groups("data") == [[0, 4], [1, 5], [2, 6], [3, 7], [8, 12], [9, 13], [10, 14], [11, 15]]
    assert grid.groups("pipe") == [[0, 8], [1, 9], [2, 10], [3, 11], [4, 12], [5, 13], [6, 14], [7, 15]]
    assert grid.groups("data", "sequence") == [[0, 2, 4, 6], [1, 3, 5, 7], [8, 10, 12, 14], [9, 11, 13, 15]]
    assert grid.groups("pipe", "tensor") == [[0, 1, 8, 9], [2, 3, 10, 11], [4, 5, 12, 13], [6, 7, 14, 15]]
    assert grid.groups("sequence", "data") == grid.groups("data", "sequence")
    assert [grid.coordinate(11, axis) for axis in AXES] == [1, 0, 1, 1]


@pytest.mark.parametrize("degree", [0, -1, True, 2.5, "2", None])
@pytest.mark.parametrize("axis", ["tensor", "pipe", "sequence"])
def test_a_degree_is_a_whole_number_of_at_least_one(axis, degree):
    with pytest.raises(UsageError, match=rf"{axis}={degree!r}.*at least 1"):
        RankGrid(8, **{axis: degree})


def test_degrees_that_do_not_fit_the_world_name_the_product():
    with pytest.raises(UsageError, match=r"world size 8 .*tensor 2 .*sequence 3 = 6; start a multiple of 6 ranks"):
        RankGrid(8, tensor=2, sequence=3)
    with pytest.raises(UsageError, match=r"world size 8 .*tensor 2 .*data 2 = 4; start 4 ranks"):
        RankGrid(8, tensor=2, data=2)
    with pytest.raises(UsageError, match="data=0"):
        RankGrid(8, data=0)


def test_unknown_axes_are_refused():
    with pytest.raises(UsageError, match="no axis time; a mesh has pipe, data, sequence, tensor"):
        RankGrid(4).groups("data", "time")
    with pytest.raises(UsageError, match="none given"):
        RankGrid(4).groups()


def test_512_ranks_take_no_time():
    start = time.process_time()
    grid = RankGrid(512, tensor=8, pipe=4, sequence=4)
    for axes in GROUPS:
        grid.groups(*axes)
    assert [grid.coordinate(511, axis) for axis in AXES] == [3, 3, 3, 7]
    assert time.process_time() - start < 0.1

"""How stages are cut into chunks: sizes, ranges of ranks, and what a schedule says of itself."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dsp.layout import RankRanges, shard_ranges
from megatron_dsp.reshard.stages.schedule import SHARDED, Schedule, chunk_ranges, chunk_sizes

SIZES_AND_CHUNKS = st.integers(1, 2000).flatmap(lambda size: st.tuples(st.just(size), st.integers(1, min(size, 64))))
SHRINKS = st.floats(0.01, 2.0)


@given(SIZES_AND_CHUNKS, SHRINKS)
def test_chunks_sum_to_the_size_and_none_is_empty(size_and_chunks, shrink):
    size, chunks = size_and_chunks
    sizes = chunk_sizes(size, chunks, shrink)
    assert (len(sizes), sum(sizes)) == (chunks, size)
    assert min(sizes) >= 1


@given(SIZES_AND_CHUNKS)
def test_chunks_are_equal_without_shrink(size_and_chunks):
    sizes = chunk_sizes(*size_and_chunks)
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(2, 6), st.floats(0.3, 1.0), st.integers(1, 50))
def test_each_chunk_is_the_shrink_of_the_one_before(chunks, shrink, factor):
    # Big enough for the last one to be at least 1, so that nothing but rounding stands between.
    weights = [shrink**index for index in range(chunks)]
    size = factor * round(sum(weights) / weights[-1] + 1)
    sizes = chunk_sizes(size, chunks, shrink)
    for index, part in enumerate(sizes):
        assert abs(part - size * weights[index] / sum(weights)) <= 1
    assert all(after <= before + 1 for before, after in pairwise(sizes))


@pytest.mark.parametrize(
    ("size", "chunks", "shrink", "sizes"),
    [
        (7, 1, 0.5, [7]),
        (12, 4, 1.0, [3, 3, 3, 3]),
        (14, 3, 0.5, [8, 4, 2]),
        (4, 4, 0.5, [1, 1, 1, 1]),
        (6, 4, 0.1, [3, 1, 1, 1]),
        (5, 3, 2.0, [1, 1, 3]),
        (0, 1, 0.5, [0]),
    ],
)
def test_sizes_of_chunks(size, chunks, shrink, sizes):
    assert chunk_sizes(size, chunks, shrink) == sizes


@pytest.mark.parametrize(("size", "chunks"), [(4, 5), (4, 0), (1, 2), (0, 2), (0, 0), (3, -1)])
def test_numbers_of_chunks_that_a_size_does_not_have_are_refused(size, chunks):
    with pytest.raises(ValueError, match=rf"size={size} into chunks={chunks}: there must be 1 to {max(size, 1)}"):
        chunk_sizes(size, chunks)
    with pytest.raises(ValueError, match="cannot cut"):
        chunk_ranges(RankRanges(((0, 9), (9, 9 + size))), chunks)


@given(st.integers(1, 8), st.integers(1, 200), st.integers(1, 9), SHRINKS)
def test_chunks_of_all_ranks_cover_their_shards_in_order(ranks, size, chunks, shrink):
    shards = shard_ranges(size, ranks)
    chunks = max(1, min(chunks, size // ranks))
    of_chunks = chunk_ranges(shards, chunks, shrink)
    assert len(of_chunks) == chunks
    for rank, (start, stop) in enumerate(shards.parts):
        of_rank = [ranges.parts[rank] for ranges in of_chunks]
        assert [b - a for a, b in of_rank] == chunk_sizes(stop - start, chunks, shrink)
        assert [index for a, b in of_rank for index in range(a, b)] == list(range(start, stop))


def test_a_schedule_is_plain_where_nothing_is_cut():
    assert Schedule().plain
    assert Schedule(SHARDED, chunks={"time": 1, "space": 1}).plain
    assert not Schedule(SHARDED, chunks={"time": 1, "space": 2}).plain
    assert not Schedule("batch", True, {"batch": 3}).plain


def test_the_dim_that_a_stage_is_cut_along():
    along_sharded = Schedule(SHARDED, chunks={"time": 3, "space": 2, "rows": 1})
    assert {dim: along_sharded.cut_dim(dim) for dim in ("time", "space", "rows", "other")} == {
        "time": "time",
        "space": "space",
        "rows": None,
        "other": None,
    }
    along_time = Schedule("time", chunks={"time": 4})
    assert (along_time.cut_dim("time"), along_time.cut_dim("space")) == ("time", None)
    along_batch = Schedule("batch", True, {"batch": 2})
    assert (along_batch.cut_dim("time"), along_batch.cut_dim("space")) == ("batch", "batch")
    assert Schedule("batch", True, {"batch": 1}).cut_dim("time") is None
    # A dim of this name is not taken for one that no stage mixes.
    assert Schedule("batch", False, {"batch": 2}).cut_dim("time") is None


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        (Schedule(), "whole stages"),
        (Schedule(chunks={"time": 1}, shrink=0.5, reason="one frame"), "whole stages: one frame"),
        (Schedule(chunks={"time": 3, "space": 4, "rows": 1}), "3 chunks of time, 4 chunks of space"),
        (Schedule(chunks={"time": 3}, shrink=0.5), "3 chunks of time, each 0.5 of the one before"),
        (Schedule("batch", True, {"batch": 2}, reason="as asked for"), "2 chunks of batch: as asked for"),
    ],
)
def test_a_schedule_in_words(schedule, text):
    assert str(schedule) == text


def test_schedules_are_the_same_whatever_their_reason():
    assert Schedule(chunks={"time": 2}, reason="a") == Schedule(chunks={"time": 2}, reason="b")
    assert Schedule(chunks={"time": 2}) != Schedule(chunks={"time": 2}, shrink=0.5)

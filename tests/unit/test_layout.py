from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_dsp.layout import Layout, shard_range, shard_sizes


@given(st.integers(0, 1000), st.integers(1, 70))
def test_shards_follow_tensor_split(size, parts):
    pieces = torch.arange(size).tensor_split(parts)
    assert shard_sizes(size, parts) == [len(piece) for piece in pieces]
    for rank, piece in enumerate(pieces):
        start, stop = shard_range(size, parts, rank)
        assert list(range(start, stop)) == piece.tolist()


def test_layout_says_what_a_rank_holds():
    layout = Layout(("time", "batch", "space"), (5, 2, 8), sharded="time")
    assert [layout.local_sizes(2, rank) for rank in (0, 1)] == [(3, 2, 8), (2, 2, 8)]
    assert layout.with_sharded("space").local_sizes(3, 2) == (5, 2, 2)
    assert layout.with_sharded(None).local_sizes(3, 2) == (5, 2, 8)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: shard_sizes(4, 0),
        lambda: shard_range(4, 2, 2),
        lambda: Layout(("time",), (1, 2)),
        lambda: Layout(("time", "time"), (1, 2)),
        lambda: Layout(("time", "space"), (1, 2), sharded="tiem"),
    ],
)
def test_impossible_layouts_are_refused(wrong):
    with pytest.raises(ValueError, match=r"needs|must|no dim"):
        wrong()

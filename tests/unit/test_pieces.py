"""The pieces of ranks in flat memory: how few copies take them all, in elements how wide, and that they are the slices."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_dsp.layout import RankRanges, shard_ranges
from megatron_dsp.reshard.transport.move import Move
from megatron_dsp.reshard.transport.pieces import find_side, pack, rows, unpack
from megatron_dsp.reshard.transport.torch_transport import AllToAll, _ends
from megatron_dsp.training.fake_world import fake_world

RANKS = st.integers(1, 12)
SIZES = st.integers(0, 40)
SHAPES = st.lists(st.integers(0, 5), min_size=1, max_size=4).map(tuple)
NARROW = (torch.bfloat16, torch.float16, torch.uint8, torch.bool)
DTYPES = st.sampled_from([*NARROW, torch.float32, torch.float64, torch.complex64])


@st.composite
def tensors(draw: st.DrawFn, sizes: st.SearchStrategy[int] = SIZES) -> tuple[Tensor, int]:
    """One of any storage order, whose elements differ, and a dim of it."""
    shape, dtype = list(draw(SHAPES)), draw(DTYPES)
    dim = draw(st.integers(0, len(shape) - 1))
    shape[dim] = draw(sizes)
    order = draw(st.permutations(range(len(shape))))
    numbers = torch.arange(math.prod(shape)).view([shape[each] for each in order])
    stored = numbers % 2 == 0 if dtype == torch.bool else (numbers % 251).to(dtype)
    return stored.permute([order.index(each) for each in range(len(shape))]), dim


def _slices(x: Tensor, dim: int, ranges: RankRanges) -> list[Tensor]:
    return [x.narrow(dim, start, stop - start) for start, stop in ranges.parts]


def _packed(xs: list[Tensor], dims: list[int], ranges: list[RankRanges], dtype: torch.dtype) -> tuple[Tensor, list[int]]:
    """The message, and the elements of it that are each rank's; made and unmade by the copies of `find_side`."""
    side = find_side(xs, dims, ranges, dtype)
    assert len(side.splits) == len(ranges[0].parts)
    assert sum(side.splits) == side.size
    message = torch.zeros(side.size, dtype=dtype)
    if side.copies is None:
        assert len(xs) == 1
        return xs[0].view(-1).view(dtype), side.splits
    for copy in side.copies:
        in_message, piece = _ends(copy, message, xs)
        in_message.copy_(piece)
    again = [torch.zeros_like(x) for x in xs]  # in the same storage order
    for copy in side.copies:
        in_message, piece = _ends(copy, message, again)
        piece.copy_(in_message)
    for x, found, dim, each in zip(xs, again, dims, ranges, strict=True):
        assert all(map(torch.equal, _slices(found, dim, each), _slices(x, dim, each)))
    return message, side.splits


# --- Rows.


@given(SIZES, RANKS)
def test_shards_make_at_most_two_rows(size, ranks):
    found = rows(shard_ranges(size, ranks))
    assert len(found) == (1 if size % ranks == 0 else 2)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 4)), min_size=1, max_size=10).map(tuple), RANKS)
def test_rows_are_the_ranges(starts_and_sizes, size):
    """Any ranges, beside those of shards, which all ranks' rows suit as well."""
    ranges = RankRanges(tuple((start, start + size) for start, size in starts_and_sizes))
    both = [ranges, shard_ranges(size, len(ranges.parts))]
    found: list[list[tuple[int, int]]] = [[], []]
    for row in rows(*both):
        assert row[0].ranks == row[1].ranks
        for parts, (count, start, step, length) in zip(found, row, strict=True):
            parts += [(start + rank * step, start + rank * step + length) for rank in range(count)]
    assert [tuple(parts) for parts in found] == [each.parts for each in both]


# --- Packing one tensor.


@given(tensors(), RANKS)
def test_packed_shards_lie_one_after_another_and_come_back(x_and_dim, ranks):
    x, dim = x_and_dim
    ranges = shard_ranges(x.shape[dim], ranks)
    flat = pack(x, dim, ranges)
    assert torch.equal(flat, torch.cat([piece.reshape(-1) for piece in _slices(x, dim, ranges)]))
    again = torch.zeros_like(x)  # in the same storage order
    unpack(flat, again, dim, ranges)
    assert torch.equal(again, x)


@pytest.mark.parametrize("ranks", [2, 3])
def test_what_lies_in_order_is_not_copied(ranks):
    x = torch.arange(1 * 7 * 3).view(1, 7, 3)
    flat = pack(x, 1, shard_ranges(7, ranks))
    assert flat.data_ptr() == x.data_ptr()
    assert find_side([x], [1], [shard_ranges(7, ranks)], x.dtype).copies is None


# --- Sides of an all-to-all.


@given(tensors(), RANKS)
def test_a_message_is_the_slices_in_the_order_of_ranks(x_and_dim, ranks):
    x, dim = x_and_dim
    ranges = shard_ranges(x.shape[dim], ranks)
    message, splits = _packed([x], [dim], [ranges], x.dtype)
    assert torch.equal(message, torch.cat([piece.reshape(-1) for piece in _slices(x, dim, ranges)]))
    assert splits == [piece.numel() for piece in _slices(x, dim, ranges)]


@given(st.lists(tensors(), min_size=2, max_size=4), RANKS)
def test_a_message_of_several_tensors_has_each_ranks_pieces_together(xs_and_dims, ranks):
    xs, dims = map(list, zip(*xs_and_dims, strict=True))
    ranges = [shard_ranges(x.shape[dim], ranks) for x, dim in xs_and_dims]
    message, splits = _packed(xs, dims, ranges, torch.uint8)
    of_rank = message.split(splits)
    for rank in range(ranks):
        at = 0
        for x, dim, each in zip(xs, dims, ranges, strict=True):
            piece = _slices(x, dim, each)[rank].clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)
            assert torch.equal(of_rank[rank][at : at + piece.numel()], piece)
            at += -(-piece.numel() // 16) * 16
        assert at == of_rank[rank].numel()


@pytest.mark.parametrize("ranks", [2, 7, 64, 512])
@pytest.mark.parametrize("tensors", [1, 3])
def test_no_number_of_ranks_takes_more_than_two_copies_a_tensor(ranks, tensors):
    for size, most in ((2 * ranks, 1), (2 * ranks + 1, 2)):
        xs = [torch.zeros(3, size, 2) for _ in range(tensors)]
        side = find_side(xs, [1] * tensors, [shard_ranges(size, ranks)] * tensors, torch.uint8)
        assert len(side.copies) == most * tensors
        assert [copy.tensor for copy in side.copies].count(0) == most


@given(st.integers(1, 4), st.integers(2, 4), st.integers(0, 4), st.integers(1, 4))
def test_chunks_of_shards_take_few_copies_too(ranks, chunk, lost, outer):
    """A part of every shard: the ranks' parts are alike, and there is something between them."""
    ranges = RankRanges(tuple((rank * (chunk + lost), rank * (chunk + lost) + chunk) for rank in range(ranks)))
    x = torch.arange(outer * ranks * (chunk + lost) * 2.0).view(outer, -1, 2)
    message, _ = _packed([x], [1], [ranges], x.dtype)
    assert torch.equal(message, torch.cat([piece.reshape(-1) for piece in _slices(x, 1, ranges)]))
    assert len(find_side([x], [1], [ranges], x.dtype).copies or ()) <= 1


def test_parts_as_large_together_as_the_whole_are_copied_where_they_are_not_it():
    x = torch.arange(8.0)
    ranges = RankRanges(((0, 4), (2, 6)))
    assert torch.equal(pack(x, 0, ranges), torch.cat(_slices(x, 0, ranges)))
    assert len(find_side([x], [0], [ranges], x.dtype).copies) == 1


# --- In how wide elements.


def _copied_as(x: Tensor, dim: int = 1, ranks: int = 4) -> set[torch.dtype]:
    return {copy.dtype for copy in find_side([x], [dim], [shard_ranges(x.shape[dim], ranks)], x.dtype).copies}


@pytest.mark.parametrize("size", [8, 9], ids=["even", "uneven"])
@pytest.mark.parametrize(
    ("inner", "dtype"),
    [(1152, torch.complex128), (1156, torch.int64), (1154, torch.int32), (1153, torch.bfloat16), (8, torch.complex128)],
)
def test_elements_of_two_bytes_are_copied_in_the_widest_that_fit(inner, dtype, size):
    assert _copied_as(torch.zeros(3, size, inner, dtype=torch.bfloat16)) == {dtype}


def test_what_does_not_lie_wide_is_copied_as_it_is():
    whole = torch.zeros(1 + 3 * 8 * 1152, dtype=torch.bfloat16)
    assert _copied_as(whole[:-1].view(3, 8, 1152)) == {torch.complex128}
    assert _copied_as(whole[1:].view(3, 8, 1152)) == {torch.bfloat16}  # starts two bytes late
    assert _copied_as(torch.zeros(3, 1152, 8, dtype=torch.bfloat16).transpose(1, 2)) == {torch.bfloat16}  # no inner run
    assert _copied_as(torch.zeros(3, 8, 2304, dtype=torch.bfloat16)[..., ::2]) == {torch.bfloat16}
    assert _copied_as(torch.zeros(3, 8, 1160, dtype=torch.bfloat16)[..., :1152]) == {torch.complex128}  # rows apart
    assert _copied_as(torch.zeros(3, 8, 1153, dtype=torch.bfloat16)[..., :1152]) == {torch.bfloat16}  # rows oddly apart
    assert _copied_as(torch.zeros(1152, dtype=torch.bfloat16).expand(3, 8, 1152)) == {torch.complex128}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.complex64], ids=str)
def test_elements_of_four_bytes_and_more_are_copied_as_they_are(dtype):
    assert _copied_as(torch.zeros(3, 8, 1152, dtype=dtype)) == {dtype}


def test_parts_of_the_innermost_dim_are_as_wide_as_where_they_start():
    x = torch.arange(3 * 24).view(3, 24).to(torch.bfloat16)
    ranges = RankRanges(((4, 12), (12, 20)))
    message, _ = _packed([x], [1], [ranges], x.dtype)
    assert torch.equal(message, torch.cat([piece.reshape(-1) for piece in _slices(x, 1, ranges)]))
    assert [copy.dtype for copy in find_side([x], [1], [ranges], x.dtype).copies] == [torch.int64]


def test_shards_of_the_innermost_dim_are_as_wide_as_each_of_them():
    assert _copied_as(torch.zeros(3, 64, dtype=torch.bfloat16), dim=1) == {torch.complex128}  # of 16
    assert _copied_as(torch.zeros(3, 16, dtype=torch.bfloat16), dim=1) == {torch.int64}  # of 4


@given(st.integers(1, 3), st.sampled_from([4, 6, 8, 16, 24]), st.integers(1, 4), st.sampled_from(NARROW))
def test_wide_elements_carry_the_bits(outer, inner, ranks, dtype):
    """NaN of all kinds among them, at both ends and in a tensor whose pieces are uneven."""
    shape = outer, 2 * ranks + 1, inner
    bits = torch.randint(0, 2 if dtype == torch.bool else 256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8)
    x = bits.view(dtype).view(shape)
    ranges = shard_ranges(shape[1], ranks)
    side = find_side([x], [1], [ranges], dtype)
    message = x.view(-1) if side.copies is None else torch.zeros(side.size, dtype=dtype)
    for copy in side.copies or ():
        in_message, piece = _ends(copy, message, [x])
        in_message.copy_(piece)
    right = torch.cat([piece.reshape(-1) for piece in _slices(x, 1, ranges)])
    assert torch.equal(message.view(torch.uint8), right.view(torch.uint8))


@pytest.mark.parametrize(("inner", "dtype"), [(1152, torch.complex128), (1151, torch.bfloat16)])
def test_a_switch_between_inner_dims_is_wide_at_both_ends(inner, dtype):
    with fake_world(8, 0):
        move = Move(torch.zeros(4, 2, 16, inner, dtype=torch.bfloat16), 1, 2, shard_ranges(16, 8), shard_ranges(16, 8))
        route = AllToAll([move], 0)
    for side in (route._sent, route._received):
        assert [copy.dtype for copy in side.copies] == [dtype]
        assert side.splits == []  # even


def test_parts_of_the_innermost_dim_of_which_some_alone_are_wide():
    """As of a chunk of it: one rank's part is of 8 elements, the other's of 7, and there is more behind them."""
    x = torch.arange(48).view(3, 16).to(torch.bfloat16)
    ranges = RankRanges(((0, 8), (8, 15)))
    message, _ = _packed([x], [1], [ranges], x.dtype)
    assert torch.equal(message, torch.cat([piece.reshape(-1) for piece in _slices(x, 1, ranges)]))

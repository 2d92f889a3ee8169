"""The pieces of a tensor that belong to each rank, many at a time, and their copies in flat memory.

The shards of ranks in a row that have one size lie equally far apart. Seen with the ranks as one more dim they are one strided
tensor, and one copy takes them all: one where shards are even, two where they are not, however many ranks there are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_dsp.layout import RankRanges

# What narrow elements are copied as where several fit into one: a copy of strided memory takes an element an access.
_WIDE = {16: torch.complex128, 8: torch.int64, 4: torch.int32, 2: torch.int16}


class RankRow(NamedTuple):
    """Ranks in a row whose parts of a dim have one size, and starts that lie ``step`` apart."""

    ranks: int
    start: int
    step: int
    size: int


@lru_cache(maxsize=4096)
def rows(*ranges: RankRanges) -> tuple[tuple[RankRow, ...], ...]:
    """The ranks in rows that suit all of ``ranges``; for each row, that of each of them."""
    found: list[tuple[RankRow, ...]] = []
    first, ranks = 0, len(ranges[0].parts)
    while first < ranks:
        stop = first + 1
        while stop < ranks and all(_goes_on(each.parts, first, stop) for each in ranges):
            stop += 1
        found.append(tuple(_row(each.parts, first, stop) for each in ranges))
        first = stop
    return tuple(found)


def _goes_on(parts: Sequence[tuple[int, int]], first: int, rank: int) -> bool:
    same_size = parts[rank][1] - parts[rank][0] == parts[first][1] - parts[first][0]
    return same_size and parts[rank][0] - parts[rank - 1][0] == parts[first + 1][0] - parts[first][0]


def _row(parts: Sequence[tuple[int, int]], first: int, stop: int) -> RankRow:
    step = parts[first + 1][0] - parts[first][0] if stop - first > 1 else 0
    return RankRow(stop - first, parts[first][0], step, parts[first][1] - parts[first][0])


class Strided(NamedTuple):
    """Where elements lie from the beginning of a tensor on."""

    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def of(self, tensor: Tensor) -> Tensor:
        """These elements: a view."""
        start, shape, strides = self
        return tensor.as_strided(shape, strides, tensor.storage_offset() + start)


def locate_pieces(x: Tensor, dim: int, row: RankRow) -> Strided:
    """Where the pieces of a row of ranks lie in ``x``: dim 0 counts the ranks, the others are those of ``x``."""
    stride = x.stride(dim)
    shape = (*x.shape[:dim], row.size, *x.shape[dim + 1 :])
    return Strided(row.start * stride, (row.ranks, *shape), (row.step * stride, *x.stride()))


def lie_in_order(x: Tensor, dim: int, ranges: RankRanges) -> bool:
    """Whether the ranks' parts of ``dim`` are all of ``x`` and lie one after another in its memory."""
    whole = ranges.consecutive and ranges.total == x.shape[dim]
    # A tensor of one element is contiguous with any stride, but only stride 1 can be viewed as bytes.
    return whole and x.is_contiguous() and math.prod(x.shape[:dim]) == 1 and (x.numel() != 1 or x.view(-1).stride(0) == 1)


class PieceCopy(NamedTuple):
    """A copy between a tensor, the ``tensor``-th of several, and a message, in elements of ``dtype``.

    ``in_message`` without strides is all of the message.
    """

    tensor: int
    dtype: torch.dtype
    in_tensor: Strided
    in_message: Strided


class Side(NamedTuple):
    """What an all-to-all sends, or receives: for each rank its pieces of all tensors, one after another.

    Attributes:
        copies: between the tensors and the message; None: the only tensor is the message, as it lies.
        size: elements of the message.
        splits: those of each rank.
    """

    copies: tuple[PieceCopy, ...] | None
    size: int
    splits: list[int]


def find_side(tensors: Sequence[Tensor], dims: Sequence[int], ranges: Sequence[RankRanges], dtype: torch.dtype) -> Side:
    """The message of elements of ``dtype`` for the ranks' parts of ``dims``."""
    # Where one tensor's pieces follow another's, they start at a multiple of 16 bytes. Alone they leave no gaps, as in place.
    aligned = 16 if len(tensors) > 1 else 1
    copies: list[PieceCopy] = []
    splits: list[int] = []
    used = 0
    for row in rows(*ranges):
        places = [locate_pieces(x, dim, each) for x, dim, each in zip(tensors, dims, row, strict=True)]
        sizes = [math.prod(place.shape[1:]) * x.element_size() for x, place in zip(tensors, places, strict=True)]
        steps = [-(-size // aligned) * aligned for size in sizes]
        start = used
        for index, (x, place, size, step) in enumerate(zip(tensors, places, sizes, steps, strict=True)):
            if size:
                width = x.element_size()
                inner = Strided(start // width, place.shape, (sum(steps) // width, *contiguous_strides(place.shape[1:])))
                copies.append(PieceCopy(index, x.dtype, place, inner))
            start += step
        used += sum(steps) * row[0].ranks
        splits += [sum(steps) // dtype.itemsize] * row[0].ranks
    size = used // dtype.itemsize
    if len(tensors) == 1 and lie_in_order(tensors[0], dims[0], ranges[0]):
        return Side(None, size, splits)
    copies = [_widen(copy, tensors[copy.tensor], used) for copy in copies]
    if len(tensors) == len(copies) == 1:  # a view of all is made faster than one with strides
        copies[0] = copies[0]._replace(in_message=copies[0].in_message._replace(strides=()))
    return Side(tuple(copies), size, splits)


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Those of a contiguous tensor of this shape."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _widen(copy: PieceCopy, x: Tensor, message_bytes: int) -> PieceCopy:
    """The same copy in the widest elements that fit at both ends, where those of ``x`` are narrower than 4 bytes.

    The 32 threads of a warp fill lines of 128 bytes with elements of 4; with narrower ones they leave bandwidth unused.
    """
    if x.element_size() >= 4:
        return copy
    for width, dtype in _WIDE.items():
        by = width // x.element_size()
        if by > 1 and message_bytes % width == 0 and _is_wide(Strided(0, x.shape, x.stride()), by) and is_aligned(x):
            ends = copy.in_tensor, copy.in_message
            if all(_is_wide(end, by) for end in ends):
                return PieceCopy(copy.tensor, dtype, *(_divide(end, by) for end in ends))
    return copy


def _is_wide(place: Strided, by: int) -> bool:
    """Whether each ``by`` elements in a row are one of a wider dtype."""
    *outer, inner = place.strides or (0,)
    return inner == 1 and place.shape[-1] % by == 0 and place.start % by == 0 and all(stride % by == 0 for stride in outer)


def _divide(place: Strided, by: int) -> Strided:
    outer = (stride // by for stride in place.strides[:-1])
    return Strided(place.start // by, (*place.shape[:-1], place.shape[-1] // by), (*outer, 1))


def is_aligned(x: Tensor) -> bool:
    """Whether ``x`` starts at a multiple of 16 bytes, and can be seen as elements of so many."""
    return not (x.data_ptr() | x.storage_offset()) & 15  # type: ignore[operator]


def pack(x: Tensor, dim: int, ranges: RankRanges) -> Tensor:
    """The ranks' parts of ``dim`` one after another in a flat tensor: a view where they lie so already, else copies."""
    if lie_in_order(x, dim, ranges):
        return x.view(-1)
    flat = x.new_empty(x.numel())
    for (row,), part in zip(rows(ranges), _parts_of(flat, x.shape, dim, ranges), strict=True):
        part.copy_(locate_pieces(x, dim, row).of(x))
    return flat


def unpack(flat: Tensor, x: Tensor, dim: int, ranges: RankRanges) -> None:
    """Copy the ranks' parts of ``dim``, which lie one after another in ``flat``, to their places in ``x``."""
    for (row,), part in zip(rows(ranges), _parts_of(flat, x.shape, dim, ranges), strict=True):
        locate_pieces(x, dim, row).of(x).copy_(part)


def _parts_of(flat: Tensor, shape: Sequence[int], dim: int, ranges: RankRanges) -> list[Tensor]:
    shapes = [(row.ranks, *shape[:dim], row.size, *shape[dim + 1 :]) for (row,) in rows(ranges)]
    return [part.view(each) for part, each in zip(flat.split([math.prod(each) for each in shapes]), shapes, strict=True)]

"""The pieces of a tensor that belong to each rank, many at a time, and their copies in flat memory.

The shards of ranks in a row that have one size lie equally far apart. Seen with the ranks as one more dim they are one strided
tensor, and one copy takes them all: one where shards are even, two where they are not, however many ranks there are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_dsp.layout import RankRanges

# What elements are copied as where several fit into one: a copy of strided memory takes an element an access.
_WIDE = {16: torch.complex128, 8: torch.int64, 4: torch.int32, 2: torch.int16}


class Row(NamedTuple):
    """Ranks in a row whose parts of a dim have one size, and starts that lie ``step`` apart."""

    ranks: int
    start: int
    step: int
    size: int


def rows(ranges: Sequence[RankRanges]) -> list[tuple[Row, ...]]:
    """The ranks in rows that suit all of ``ranges``; for each row, that of each of them."""
    found: list[tuple[Row, ...]] = []
    first, ranks = 0, len(ranges[0].parts)
    while first < ranks:
        stop = first + 1
        while stop < ranks and all(_goes_on(each.parts, first, stop) for each in ranges):
            stop += 1
        found.append(tuple(_row(each.parts, first, stop) for each in ranges))
        first = stop
    return found


def _goes_on(parts: Sequence[tuple[int, int]], first: int, rank: int) -> bool:
    same_size = parts[rank][1] - parts[rank][0] == parts[first][1] - parts[first][0]
    return same_size and parts[rank][0] - parts[rank - 1][0] == parts[first + 1][0] - parts[first][0]


def _row(parts: Sequence[tuple[int, int]], first: int, stop: int) -> Row:
    step = parts[first + 1][0] - parts[first][0] if stop - first > 1 else 0
    return Row(stop - first, parts[first][0], step, parts[first][1] - parts[first][0])


class Strided(NamedTuple):
    """Where elements lie from the beginning of a tensor on."""

    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def of(self, tensor: Tensor) -> Tensor:
        """These elements: a view."""
        start, shape, strides = self
        if start:
            return tensor.as_strided(shape, strides, tensor.storage_offset() + start)
        return tensor.as_strided(shape, strides)


def pieces(x: Tensor, dim: int, row: Row) -> Strided:
    """Where the pieces of a row of ranks lie in ``x``: dim 0 counts the ranks, the others are those of ``x``."""
    stride = x.stride(dim)
    shape = (*x.shape[:dim], row.size, *x.shape[dim + 1 :])
    return Strided(row.start * stride, (row.ranks, *shape), (row.step * stride, *x.stride()))


def lie_in_order(x: Tensor, dim: int, ranges: RankRanges) -> bool:
    """Whether the ranks' parts of ``dim`` are all of ``x`` and lie one after another in its memory."""
    starts_and_stops = [number for part in ranges.parts for number in part]
    whole = starts_and_stops[1:-1:2] == starts_and_stops[2::2] and (starts_and_stops[0], starts_and_stops[-1]) == (
        0,
        x.shape[dim],
    )
    # A tensor of one element is contiguous with any stride, but only stride 1 can be viewed as bytes.
    return whole and x.is_contiguous() and math.prod(x.shape[:dim]) == 1 and (x.numel() != 1 or x.view(-1).stride(0) == 1)


class Copy(NamedTuple):
    """A copy between a tensor, the ``tensor``-th of several, and a message, in elements of ``dtype``."""

    tensor: int
    dtype: torch.dtype
    in_tensor: Strided
    in_message: Strided


class Side(NamedTuple):
    """What an all-to-all sends, or receives: for each rank its pieces of all tensors, one after another.

    Attributes:
        copies: between the tensors and the message; none: the only tensor is the message, as it lies.
        size: elements of the message.
        splits: those of each rank.
    """

    copies: tuple[Copy, ...]
    size: int
    splits: list[int]


def find_side(tensors: Sequence[Tensor], dims: Sequence[int], ranges: Sequence[RankRanges], dtype: torch.dtype) -> Side:
    """The message of elements of ``dtype`` for the ranks' parts of ``dims``."""
    # Where one tensor's pieces follow another's, they start at a multiple of 16 bytes. Alone they leave no gaps, as in place.
    aligned = 16 if len(tensors) > 1 else 1
    copies: list[Copy] = []
    splits: list[int] = []
    used = 0
    for row in rows(ranges):
        places = [pieces(x, dim, each) for x, dim, each in zip(tensors, dims, row, strict=True)]
        sizes = [math.prod(place.shape[1:]) * x.element_size() for x, place in zip(tensors, places, strict=True)]
        steps = [-(-size // aligned) * aligned for size in sizes]
        start = used
        for index, (x, place, size, step) in enumerate(zip(tensors, places, sizes, steps, strict=True)):
            if size:
                width = x.element_size()
                inner = Strided(start // width, place.shape, (sum(steps) // width, *_contiguous(place.shape[1:])))
                copies.append(_widened(Copy(index, x.dtype, place, inner), x))
            start += step
        used += sum(steps) * row[0].ranks
        splits += [sum(steps) // dtype.itemsize] * row[0].ranks
    if len(tensors) == 1 and lie_in_order(tensors[0], dims[0], ranges[0]):
        copies.clear()
    return Side(tuple(copies), used // dtype.itemsize, splits)


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _widened(copy: Copy, x: Tensor) -> Copy:
    """The same copy in the widest elements that fit at both ends."""
    for width, dtype in _WIDE.items():
        by = width // x.element_size()
        if by > 1 and _is_wide(Strided(0, x.shape, x.stride()), by) and is_aligned(x):
            ends = copy.in_tensor, copy.in_message
            if all(_is_wide(end, by) for end in ends):
                return Copy(copy.tensor, dtype, *(_divide(end, by) for end in ends))
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
    for (row,), part in zip(rows([ranges]), _parts_of(flat, x.shape, dim, ranges), strict=True):
        part.copy_(pieces(x, dim, row).of(x))
    return flat


def unpack(flat: Tensor, shape: Sequence[int], dim: int, ranges: RankRanges) -> Tensor:
    """The tensor of this shape whose ranks' parts of ``dim`` lie one after another in ``flat``: a view, or copies."""
    if math.prod(shape[:dim]) == 1:
        return flat.view(tuple(shape))
    x = flat.new_empty(tuple(shape))
    for (row,), part in zip(rows([ranges]), _parts_of(flat, shape, dim, ranges), strict=True):
        pieces(x, dim, row).of(x).copy_(part)
    return x


def _parts_of(flat: Tensor, shape: Sequence[int], dim: int, ranges: RankRanges) -> list[Tensor]:
    shapes = [(row.ranks, *shape[:dim], row.size, *shape[dim + 1 :]) for (row,) in rows([ranges])]
    return [part.view(each) for part, each in zip(flat.split([math.prod(each) for each in shapes]), shapes, strict=True)]

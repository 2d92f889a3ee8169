"""How the moves of a switch are carried: as messages, or as an all-to-all. It depends on shapes alone: found once, and kept."""

from __future__ import annotations

import itertools
import math
import operator
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from megatron_dsp.reshard.buffers import BufferPool
from megatron_dsp.reshard.moves import Move

Value = TypeVar("Value")


class Kept(Generic[Value]):
    """Values by key, the ``most`` that were used last; ``drop`` is told of those that are given up."""

    def __init__(self, most: int, drop: Callable[[Value], object] = lambda value: None):
        self._most, self._drop = most, drop
        self._values: OrderedDict[Hashable, Value] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of ``key``, made where it is not there."""
        value = self._values.get(key)
        if value is None:
            value = self._values[key] = make()
            if len(self._values) > self._most:
                self._drop(self._values.popitem(last=False)[1])
        else:
            self._values.move_to_end(key)
        return value


class Place(NamedTuple):
    """Where a piece lies: in which of several tensors, from which element on, and how."""

    tensor: int
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        """The piece."""
        index, start, shape, strides = self
        tensor = tensors[index]
        return tensor.as_strided(shape, strides, tensor.storage_offset() + start)


class Staging(NamedTuple):
    """Memory for copies of pieces: so many bytes, with a view of each dtype. No dtypes: none is needed."""

    dtypes: tuple[torch.dtype, ...]
    size: int

    def after(self, tensors: Sequence[Tensor], buffers: BufferPool) -> list[Tensor]:
        """``tensors``, the bytes, and the views: what places are given in."""
        if not self.dtypes:
            return list(tensors)
        memory = buffers.empty([self.size], torch.uint8, tensors[0].device)
        return [*tensors, memory, *(memory.view(dtype) for dtype in self.dtypes)]


class Message(NamedTuple):
    """A piece that travels between this rank and ``peer``: in place, or as a contiguous copy in staging memory."""

    peer: int
    place: Place
    staged: Place | None


class Messages(NamedTuple):
    """A switch as sends and receives. The rank's own pieces go from place to place."""

    sends: tuple[Message, ...]
    send_staging: Staging
    receives: tuple[Message, ...]
    receive_staging: Staging
    own: tuple[tuple[Place, Place], ...]


class Side(NamedTuple):
    """What an all-to-all sends, or receives.

    ``parts`` are each rank's, or all in one; ``copies`` are the places of pieces of which a part holds copies, and of these.
    """

    parts: tuple[Place, ...]
    copies: tuple[tuple[Place, Place], ...]
    staging: Staging


class AllToAll(NamedTuple):
    """A switch as an all-to-all, which the rank's own pieces pass through.

    ``single``: of one tensor on each side, in which the ranks' parts have these bytes (None: all the same, on every rank).
    Else of lists of the ranks' parts.
    """

    send: Side
    receive: Side
    single: bool
    send_sizes: list[int] | None
    receive_sizes: list[int] | None


def find_messages(moves: Sequence[Move], results: Sequence[Tensor], rank: int, least_run: int) -> Messages:
    """The messages for ``rank`` of ``moves`` into ``results``.

    They go to the nearest rank first, and come from the nearest one: not all to the same one at once. Contiguous runs of at
    least ``least_run`` bytes travel one by one, in place.
    """
    sources, targets = _pieces(moves, results)
    ranks = len(moves[0].split_ranges)

    def messages(tensors: Sequence[Tensor], pieces: list[list[Tensor]], step: int) -> tuple[tuple[Message, ...], Staging]:
        made: list[Message] = []
        stage = _Stage(tensors)
        for peer in ((rank + step * distance) % ranks for distance in range(1, ranks)):
            for index, (move, tensor) in enumerate(zip(moves, tensors, strict=True)):
                whole = pieces[index][peer]
                if not whole.numel():
                    continue
                for piece in move.runs(whole) if move.run(whole) >= least_run else [whole]:
                    staged = None if piece.is_contiguous() else stage.copy(piece)
                    made.append(Message(peer, _place(index, piece, tensor), staged))
        return tuple(made), stage.staging()

    own = [
        (_place(index, source[rank], move.x), _place(index, target[rank], result))
        for index, (source, target, move, result) in enumerate(zip(sources, targets, moves, results, strict=True))
    ]
    return Messages(*messages([move.x for move in moves], sources, 1), *messages(results, targets, -1), tuple(own))


def find_all_to_all(moves: Sequence[Move], results: Sequence[Tensor], *, single: bool) -> AllToAll:
    """The all-to-all of ``moves`` into ``results``; ``single``, of one move, as in `AllToAll`: the same on all ranks."""
    sources, targets = _pieces(moves, results)
    send, receive = _side([move.x for move in moves], sources, single), _side(results, targets, single)
    sizes: list[list[int] | None] = [None, None]
    if single and not moves[0].even():
        sizes = [[piece.nbytes for piece in of_ranks] for of_ranks in (sources[0], targets[0])]
    return AllToAll(send, receive, single, *sizes)


def _side(tensors: Sequence[Tensor], pieces: list[list[Tensor]], single: bool) -> Side:
    stage, ranks = _Stage(tensors), len(pieces[0])
    if len(tensors) > 1:
        copies, parts = [], []
        for of_rank in zip(*pieces, strict=True):
            start = stage.used
            for index, (tensor, piece) in enumerate(zip(tensors, of_rank, strict=True)):
                if piece.numel():
                    copies.append((_place(index, piece, tensor), stage.copy(piece)))
            parts.append(stage.part(start))
        return Side(tuple(parts), tuple(copies), stage.staging())
    (tensor,), (of_ranks,) = tensors, pieces
    places = [_place(0, piece, tensor) for piece in of_ranks]
    starts, count = [place.start for place in places], sum(piece.numel() for piece in of_ranks)
    in_place = [piece.is_contiguous() for piece in of_ranks]
    if single:
        stops = [start + piece.numel() for start, piece in zip(starts, of_ranks, strict=True)]
        if count == 0 or (all(in_place) and starts[1:] == stops[:-1]):
            return Side((_contiguous(0, starts[0], (count,)),), (), stage.staging())
        in_place = [False] * ranks
    steps = {then - now for now, then in itertools.pairwise(starts)}
    if not any(in_place) and len(steps) == len({place.shape for place in places}) == 1:
        # One copy of all pieces, the ranks being one more dim.
        shape = (ranks, *places[0].shape)
        copies = [(Place(0, starts[0], shape, (*steps, *of_ranks[0].stride())), stage.copy_of(tensor.dtype, shape))]
        size = stage.used // ranks
        parts = [stage.part(rank * size, (rank + 1) * size) for rank in range(ranks)]
    else:
        copies, parts = [], []
        for place, piece, is_in_place in zip(places, of_ranks, in_place, strict=True):
            if not is_in_place:
                start = stage.used
                copies.append((place, stage.copy(piece)))
                place = stage.part(start)
            parts.append(place)
    return Side((stage.part(0),) if single else tuple(parts), tuple(copies), stage.staging())


class _Stage:
    """Lays copies of pieces out in staging memory, which comes after ``tensors`` as in `Staging.after`."""

    def __init__(self, tensors: Sequence[Tensor]):
        self._dtypes = list(dict.fromkeys(tensor.dtype for tensor in tensors))
        self._bytes = len(tensors)
        # Where one dtype follows another, it starts at a multiple of 16 bytes. Alone it leaves no gaps, as in place.
        self._aligned = 16 if len(tensors) > 1 else 1
        self.used, self._needed = 0, False

    def copy(self, piece: Tensor) -> Place:
        """The place of a copy of ``piece``."""
        return self.copy_of(piece.dtype, tuple(piece.shape))

    def copy_of(self, dtype: torch.dtype, shape: tuple[int, ...]) -> Place:
        """The place of a copy of a piece of this dtype and shape."""
        self._needed = True
        place = _contiguous(self._bytes + 1 + self._dtypes.index(dtype), self.used // dtype.itemsize, shape)
        self.used += -(-math.prod(shape) * dtype.itemsize // self._aligned) * self._aligned
        return place

    def part(self, start: int, stop: int | None = None) -> Place:
        """The bytes from ``start`` to ``stop``, or to the end of what is laid out."""
        self._needed = True  # also for a part of no bytes
        return _contiguous(self._bytes, start, ((self.used if stop is None else stop) - start,))

    def staging(self) -> Staging:
        """What has been laid out."""
        return Staging(tuple(self._dtypes) if self._needed else (), self.used)


def _pieces(moves: Sequence[Move], results: Sequence[Tensor]) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Of each move, those that go to each rank, and the places of those that come from each."""
    targets = [move.targets(result) for move, result in zip(moves, results, strict=True)]
    return [move.sources() for move in moves], targets


def _place(index: int, piece: Tensor, tensor: Tensor) -> Place:
    """Where ``piece`` lies in ``tensor``, the ``index``-th."""
    start, shape = int(piece.storage_offset() - tensor.storage_offset()), tuple(piece.shape)
    # A tensor of one element is contiguous with any stride, but only stride 1 can be viewed as bytes.
    return _contiguous(index, start, shape) if piece.is_contiguous() else Place(index, start, shape, piece.stride())


def _contiguous(index: int, start: int, shape: tuple[int, ...]) -> Place:
    strides = itertools.accumulate(reversed(shape[1:]), operator.mul, initial=1)
    return Place(index, start, shape, tuple(strides)[::-1] if shape else ())

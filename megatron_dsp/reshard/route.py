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

    ``parts`` are each rank's; ``copies`` the places of pieces of which parts hold copies, with those of the copies.
    """

    parts: tuple[Place, ...]
    copies: tuple[tuple[Place, Place], ...]
    staging: Staging


class AllToAll(NamedTuple):
    """A switch as an all-to-all of lists, which the rank's own pieces pass through."""

    send: Side
    receive: Side


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
                    staged = None if piece.is_contiguous() else stage.copy(piece.dtype, tuple(piece.shape))
                    made.append(Message(peer, _place(index, piece, tensor), staged))
        return tuple(made), stage.staging()

    own = [
        (_place(index, source[rank], move.x), _place(index, target[rank], result))
        for index, (source, target, move, result) in enumerate(zip(sources, targets, moves, results, strict=True))
    ]
    return Messages(*messages([move.x for move in moves], sources, 1), *messages(results, targets, -1), tuple(own))


def find_all_to_all(moves: Sequence[Move], results: Sequence[Tensor]) -> AllToAll:
    """The all-to-all of ``moves`` into ``results``."""
    sources, targets = _pieces(moves, results)
    return AllToAll(_side([move.x for move in moves], sources), _side(results, targets))


def _side(tensors: Sequence[Tensor], pieces: list[list[Tensor]]) -> Side:
    stage, ranks = _Stage(tensors), len(pieces[0])
    parts: list[Place] = []
    copies: list[tuple[Place, Place]] = []
    if len(tensors) == 1 and (evenly_spaced := _as_one(pieces[0], tensors[0])) is not None:
        copies.append((evenly_spaced, stage.copy(tensors[0].dtype, evenly_spaced.shape)))
        size = stage.used // ranks
        parts += [stage.part(rank * size, (rank + 1) * size) for rank in range(ranks)]
        return Side(tuple(parts), tuple(copies), stage.staging())
    for of_rank in zip(*pieces, strict=True):
        start = stage.used
        places = [_place(index, *pair) for index, pair in enumerate(zip(of_rank, tensors, strict=True))]
        if len(tensors) == 1 and of_rank[0].is_contiguous():
            parts += places
        else:
            copies += [
                (place, stage.copy(piece.dtype, place.shape))
                for place, piece in zip(places, of_rank, strict=True)
                if piece.numel()
            ]
            parts.append(stage.part(start, stage.used))
    return Side(tuple(parts), tuple(copies), stage.staging())


def _as_one(pieces: list[Tensor], tensor: Tensor) -> Place | None:
    """The place of all ``pieces`` of ``tensor``, with the ranks as one more dim: where they need copies, and one takes all."""
    starts = [int(piece.storage_offset()) for piece in pieces]
    steps = {then - now for now, then in itertools.pairwise(starts)}
    if pieces[0].is_contiguous() or len(steps) > 1 or any(piece.shape != pieces[0].shape for piece in pieces):
        return None
    first = _place(0, pieces[0], tensor)
    return first._replace(shape=(len(pieces), *first.shape), strides=(*steps, *first.strides))


class _Stage:
    """Lays copies of pieces out in staging memory, which comes after ``tensors`` as in `Staging.after`."""

    def __init__(self, tensors: Sequence[Tensor]):
        self._dtypes = list(dict.fromkeys(tensor.dtype for tensor in tensors))
        self._bytes = len(tensors)
        # Where one dtype follows another, it starts at a multiple of 16 bytes. Alone it leaves no gaps, as in place.
        self._aligned = 16 if len(tensors) > 1 else 1
        self.used, self._needed = 0, False

    def copy(self, dtype: torch.dtype, shape: tuple[int, ...]) -> Place:
        """The place of a copy of a piece of this dtype and shape."""
        self._needed = True
        place = _contiguous(self._bytes + 1 + self._dtypes.index(dtype), self.used // dtype.itemsize, shape)
        self.used += -(-math.prod(shape) * dtype.itemsize // self._aligned) * self._aligned
        return place

    def part(self, start: int, stop: int) -> Place:
        """The bytes from ``start`` to ``stop``."""
        self._needed = True  # also for none
        return _contiguous(self._bytes, start, (stop - start,))

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

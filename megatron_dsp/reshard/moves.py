"""What a switch moves, and the messages that carry it between two ranks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_dsp.reshard.buffers import BufferPool

Ranges = Sequence[tuple[int, int]]  # of each rank, (start, stop)


class Move(NamedTuple):
    """A tensor whose shard goes from dim ``gather`` to dim ``split``; all of it, or one chunk.

    ``split_ranges`` are the parts of ``x`` that go to each rank, ``gather_ranges`` the places in the result of what comes from
    each. A result has memory of its own, or lies in ``into`` (contiguous), with those of other moves.
    """

    x: Tensor
    gather: int
    split: int
    gather_ranges: Ranges
    split_ranges: Ranges
    into: Tensor | None = None

    def result(self, rank: int, buffers: BufferPool) -> Tensor:
        """Memory for what ``rank`` holds afterwards; contiguous."""
        if self.into is not None:
            return self.into
        shape = list(self.x.shape)
        start, stop = self.split_ranges[rank]
        shape[self.gather], shape[self.split] = self.gather_ranges[-1][1], stop - start
        return buffers.empty(shape, self.x.dtype, self.x.device)

    def sources(self) -> list[Tensor]:
        """For each rank, the piece of ``x`` that goes to it."""
        return [self.x.narrow(self.split, start, stop - start) for start, stop in self.split_ranges]

    def targets(self, result: Tensor) -> list[Tensor]:
        """For each rank, the place in ``result`` of the piece that comes from it."""
        return [result.narrow(self.gather, start, stop - start) for start, stop in self.gather_ranges]

    def sent_to_others(self, rank: int) -> int:
        """The bytes that leave ``rank``."""
        size = self.x.shape[self.split]
        others = sum(stop - start for to, (start, stop) in enumerate(self.split_ranges) if to != rank)
        return self.x.nbytes // size * others if size else 0

    def run(self, piece: Tensor) -> int:
        """The bytes of ``piece`` that are contiguous at both ends: those from the later one of the two dims on."""
        return math.prod(piece.shape[max(self.gather, self.split) :]) * piece.element_size()

    def runs(self, piece: Tensor) -> list[Tensor]:
        """The pieces of one run each that ``piece`` consists of."""
        outer = piece.shape[: max(self.gather, self.split)]
        return [piece[index] for index in itertools.product(*map(range, outer))]


class Parcel:
    """The pieces that one message carries: in place where it is one contiguous piece, else through staging memory."""

    def __init__(self, pieces: list[Tensor]):
        self.pieces = self._staged = pieces
        self.in_place = len(pieces) == 1 and pieces[0].is_contiguous()
        if self.in_place:
            self.message = as_bytes(pieces[0])

    def stage(self, memory: Tensor, start: int) -> int:
        """Lay the message out in ``memory`` (bytes) from ``start`` on; the next multiple of 16 after its end is returned."""
        self._staged, first = [], start
        for piece in self.pieces:
            start = _aligned(start)
            stop = start + piece.numel() * piece.element_size()
            self._staged.append(memory[start:stop].view(piece.dtype).view(piece.shape))
            start = stop
        self.message = memory[first:start]
        return _aligned(start)

    def pack(self) -> Tensor:
        """The message, filled with the pieces."""
        if not self.in_place:
            for piece, staged in zip(self.pieces, self._staged, strict=True):
                staged.copy_(piece)
        return self.message

    def unpack(self) -> None:
        """Put what has come to its place."""
        if not self.in_place:
            for piece, staged in zip(self.pieces, self._staged, strict=True):
                piece.copy_(staged)


def parcels(pieces: list[list[Tensor]], buffers: BufferPool) -> list[Parcel]:
    """Messages of these pieces. Those that are not in place share one block of staging memory."""
    made = [Parcel(of_message) for of_message in pieces]
    staged = [parcel for parcel in made if not parcel.in_place]
    if staged:
        size = sum(_aligned(piece.numel() * piece.element_size()) for parcel in staged for piece in parcel.pieces)
        memory, start = buffers.empty([size], torch.uint8, staged[0].pieces[0].device), 0
        for parcel in staged:
            start = parcel.stage(memory, start)
    return made


def _aligned(size: int) -> int:
    """The next multiple of 16, after which any dtype may follow."""
    return -(-size // 16) * 16


def as_bytes(x: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, in place, as a flat tensor."""
    # A tensor of one element is contiguous with any stride, but only stride 1 can be viewed as bytes.
    return x.as_strided((x.numel(),), (1,)).view(torch.uint8)

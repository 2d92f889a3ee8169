"""What a switch moves, and the messages that carry it between two ranks."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_dsp.reshard.buffers import BufferPool


class Move(NamedTuple):
    """A tensor whose shard goes from dim ``gather`` to dim ``split``, and the sizes of all ranks' shards of the two."""

    x: Tensor
    gather: int
    split: int
    gather_sizes: list[int]
    split_sizes: list[int]

    def result(self, rank: int, buffers: BufferPool) -> Tensor:
        """Memory for what ``rank`` holds afterwards; contiguous."""
        shape = list(self.x.shape)
        shape[self.gather], shape[self.split] = sum(self.gather_sizes), self.split_sizes[rank]
        return buffers.empty(shape, self.x.dtype, self.x.device)

    def sources(self) -> tuple[Tensor, ...]:
        """For each rank, the piece of ``x`` that goes to it."""
        return self.x.split(self.split_sizes, self.split)

    def targets(self, result: Tensor) -> tuple[Tensor, ...]:
        """For each rank, the place in ``result`` of the piece that comes from it."""
        return result.split(self.gather_sizes, self.gather)

    def sent_to_others(self, rank: int) -> int:
        """The bytes that leave ``rank``."""
        return (self.x.numel() - self.sources()[rank].numel()) * self.x.element_size()

    def run(self, piece: Tensor) -> int:
        """The bytes of ``piece`` that are contiguous at both ends: those from the later one of the two dims on."""
        return math.prod(piece.shape[max(self.gather, self.split) :]) * piece.element_size()

    def runs(self, piece: Tensor) -> list[Tensor]:
        """The pieces of one run each that ``piece`` consists of."""
        outer = piece.shape[: max(self.gather, self.split)]
        return [piece[index] for index in itertools.product(*map(range, outer))]


class Parcel:
    """The pieces that one message carries: in place where it is one contiguous piece, else through a staging copy."""

    _ALIGNMENT = 16  # bytes: any dtype may follow any other

    def __init__(self, pieces: list[Tensor], buffers: BufferPool):
        self._pieces = self._staged = pieces
        if len(pieces) == 1 and pieces[0].is_contiguous():
            self.message = as_bytes(pieces[0])
            return
        starts, stop = [], 0
        for piece in pieces:
            starts.append(-(-stop // self._ALIGNMENT) * self._ALIGNMENT)
            stop = starts[-1] + piece.numel() * piece.element_size()
        self.message = buffers.empty([stop], torch.uint8, pieces[0].device)
        self._staged = [
            self.message[start : start + piece.numel() * piece.element_size()].view(piece.dtype).view(piece.shape)
            for start, piece in zip(starts, pieces, strict=True)
        ]

    def pack(self) -> Tensor:
        """The message, filled with the pieces."""
        for piece, staged in zip(self._pieces, self._staged, strict=True):
            if staged is not piece:
                staged.copy_(piece)
        return self.message

    def unpack(self) -> None:
        """Put what has come to its place."""
        for piece, staged in zip(self._pieces, self._staged, strict=True):
            if staged is not piece:
                piece.copy_(staged)


def as_bytes(x: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, in place, as a flat tensor."""
    # A tensor of one element is contiguous with any stride, but only stride 1 can be viewed as bytes.
    return x.as_strided((x.numel(),), (1,)).view(torch.uint8)

"""What a switch moves: from where in one tensor to where in another, for each rank."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_dsp.reshard.buffers import BufferPool

Ranges = tuple[tuple[int, int], ...]  # of each rank, (start, stop)


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

    def geometry(self, result: Tensor) -> Hashable:
        """All that the places of pieces in ``x`` and in ``result`` depend on: shapes, not memory."""
        x, gather, split, gather_ranges, split_ranges, _ = self
        return x.shape, x.stride(), x.dtype, x.device, result.shape, gather, split, gather_ranges, split_ranges

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


def as_bytes(x: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, in place, as a flat tensor."""
    # A tensor of one element is contiguous with any stride, but only stride 1 can be viewed as bytes.
    return x.as_strided((x.numel(),), (1,)).view(torch.uint8)

"""What a switch moves, and what carries it: a move says from where in one tensor to where in another, for each rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_dsp.layout import RankRanges
from megatron_dsp.reshard.labels import Label
from megatron_dsp.reshard.transport.buffers import BufferPool


class Move(NamedTuple):
    """A tensor whose shard goes from dim ``gather`` to dim ``split``; all of it, or one chunk.

    ``split_ranges`` are the parts of ``x`` that go to each rank, ``gather_ranges`` the places in the result of what comes from
    each. A result has memory of its own, or lies in ``into`` (contiguous), with those of other moves.
    """

    x: Tensor
    gather: int
    split: int
    gather_ranges: RankRanges
    split_ranges: RankRanges
    into: Tensor | None = None

    def result_like(self, rank: int) -> Tensor:
        """A tensor that lies as what ``rank`` holds afterwards, without memory where that is not there yet."""
        if self.into is not None:
            return self.into
        shape = list(self.x.shape)
        start, stop = self.split_ranges.parts[rank]
        shape[self.gather], shape[self.split] = self.gather_ranges.parts[-1][1], stop - start
        return self.x.new_empty(shape, device="meta")

    def result(self, rank: int, buffers: BufferPool) -> Tensor:
        """Memory for what ``rank`` holds afterwards; contiguous."""
        like = self.result_like(rank)
        return buffers.empty(like.shape, like.dtype, self.x.device) if self.into is None else self.into

    def sources(self) -> list[Tensor]:
        """For each rank, the piece of ``x`` that goes to it."""
        return [self.x.narrow(self.split, start, stop - start) for start, stop in self.split_ranges.parts]

    def targets(self, result: Tensor) -> list[Tensor]:
        """For each rank, the place in ``result`` of the piece that comes from it."""
        return [result.narrow(self.gather, start, stop - start) for start, stop in self.gather_ranges.parts]

    def run_bytes(self, piece: Tensor) -> int:
        """The bytes of ``piece`` that are contiguous at both ends: those from the later one of the two dims on."""
        return math.prod(piece.shape[max(self.gather, self.split) :]) * piece.element_size()


End = Callable[[], list[Tensor]]  # waits for what was begun and returns its results; to be called once


class Beside(Protocol):
    """Runs a transport's copies and waits beside compute, on other streams (`SideStreams`). Moves have ``into``."""

    def begin(self, transport: Transport, moves: Sequence[Move], label: Label) -> End:
        """As `Transport.begin`."""


class Transport(Protocol):
    """Moves the shards of tensors over the ranks of one group. It knows neither gradients nor stages; all dtypes travel."""

    name: str
    buffers: BufferPool  # of results and messages on the CPU

    def begin(self, moves: Sequence[Move], label: Label, *, at_once: bool = False, beside: Beside | None = None) -> End:
        """Start one collective that makes all ``moves``; its results are contiguous, those with ``into`` that very memory.

        Several may be under way, begun in the same order on every rank. Sources must not change before the end, which on CUDA
        is called with the stream of the begin as the current one.
        ``at_once``: the end is called before anything else is done, so on CUDA all may run in order on the current stream.
        ``beside``: what packs and unpacks, and waits for the collective, is another stream.
        ``label`` says what it is for, to a transport that wraps another one. A tensor that cannot be moved is a UsageError,
        raised before any rank enters the collective.
        """


def as_bytes(x: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, in place, as a flat tensor."""
    # A tensor of one element is contiguous with any stride, but only stride 1 can be viewed as bytes.
    return x.as_strided((x.numel(),), (1,)).view(torch.uint8)

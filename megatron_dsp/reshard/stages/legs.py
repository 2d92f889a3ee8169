"""A switch in chunks: each begins and ends on its own, forward and backward.

A *leg* is one chunk's way from where it is computed to where it is needed. Two autograd nodes make it: `begin` sends it off and
gives an empty token for it, `end` takes the token, waits, and gives the tensor. In backward, `end` sends the gradients off and
`begin` waits for them. Whatever is computed between the two travels beside it.

Create the ends of a switch after the last chunk is computed: autograd runs later-created nodes first, so in backward all
chunks' gradients are sent off before the first of them is waited for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_dsp.errors import UsageError
from megatron_dsp.layout import RankRanges
from megatron_dsp.reshard.exchange import Exchange, bytes_to_others
from megatron_dsp.reshard.labels import Label, Operation, StageName, profile_range
from megatron_dsp.reshard.stages.overlap import side_streams
from megatron_dsp.reshard.transport.move import End, Move


class Landing:
    """Memory in which the legs of one tensor arrive, from the first one's begin until the tensor is taken."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def open(self, shape: list[int], like: Tensor, exchange: Exchange) -> Tensor:
        """The memory; its first call says its shape."""
        if self._memory is None:
            self._memory = exchange.transport.buffers.empty(shape, like.dtype, like.device)
        return self._memory

    def take(self) -> Tensor:
        """The memory, which the next pass has anew."""
        memory, self._memory = self._memory, None
        assert memory is not None  # begun before it is ended
        return memory


class Leg:
    """One chunk of a switch: what goes where, and what is under way.

    ``split_ranges`` are the parts of the source that go to each rank, ``gather_ranges`` the places in the target of what comes
    from each. Legs that come from one tensor share ``source``, those that arrive in one tensor share ``target``.
    """

    def __init__(
        self,
        exchange: Exchange,
        gather: int,
        split: int,
        size: int,
        gather_ranges: RankRanges,
        split_ranges: RankRanges,
        source: Landing,
        target: Landing,
        stage: StageName,
        *,
        begins_again: bool = False,
        ends_again: bool = False,
    ):
        """``size`` is the global size of dim ``gather``.

        ``begins_again``, ``ends_again``: whether the stage that it leaves, or reaches, is computed again in backward. It
        travels once all the same.
        """
        self._exchange = exchange
        self._dims = gather, split
        self._size = size
        self._ranges = gather_ranges, split_ranges
        self.source, self.target = source, target
        self._stage = stage
        self._end: End | None = None
        self._source_shape: list[int] = []
        self.begins_again, self.ends_again = begins_again, ends_again
        self._begun = False
        self._kept: Tensor | None = None  # what has arrived, for a stage that is computed again

    def begin(self, x: Tensor) -> None:
        """Send ``x`` off; not again where it is computed again."""
        if self._begun and not self.begins_again:
            raise UsageError(
                f"what leaves for stage {str(self._stage)!r} was computed twice in one pass, as by activation checkpointing "
                "within the stage before it: say so there by Stage(..., has_ends=True, recomputes=True)"
            )
        if self._begun:
            return
        self._begun = True
        if self.begins_again:
            x = x.detach()  # the graph of a stage that is computed again holds this leg
        self._source_shape = list(x.shape)
        shape = list(x.shape)
        gather, split = self._dims
        gather_ranges, split_ranges = self._ranges
        start, stop = split_ranges.parts[self._exchange.rank]
        shape[gather], shape[split] = self._size, stop - start
        into = self.target.open(shape, x, self._exchange)
        self._begin(Move(x, gather, split, gather_ranges, split_ranges, into), Operation.SWITCH)

    def begin_back(self, gradient: Tensor) -> None:
        """Send the gradient of the target off."""
        self._kept = None
        into = self.source.open(self._source_shape, gradient, self._exchange)
        gather, split = self._dims
        gather_ranges, split_ranges = self._ranges
        self._begin(Move(gradient, split, gather, split_ranges, gather_ranges, into), Operation.SWITCH_ADJOINT)

    def take(self) -> Tensor:
        """The target, in which all has arrived; again where it is computed on again."""
        if self._kept is None:
            target = self.target.take()
            if not self.ends_again:
                return target
            self._kept = target
        return self._kept.detach()  # what is returned will hold the graph that holds this leg

    def _begin(self, move: Move, operation: Operation) -> None:
        exchange, label = self._exchange, Label(operation.value, *self._stage)
        with profile_range(f"begin {operation}", self._stage):
            sent, beside = bytes_to_others([move], exchange.rank), side_streams(exchange.group, move.x.device)
            self._end = exchange.begin([move], label, sent, beside=beside)

    def wait(self) -> None:
        """Until what was sent off last has arrived."""
        end, self._end = self._end, None
        if end is not None:
            with profile_range("wait for switch", self._stage):
                end()

    def __del__(self) -> None:
        # A pass that was given up half way, as by checkpointing, which stops when it has recomputed what it needs. The other
        # ranks have given it up too; memory may not be freed under a collective that still writes to it.
        with torch.inference_mode():  # it may write to tensors of that mode, and to all others
            self.wait()


def begin(legs: list[Leg], x: Tensor) -> tuple[Tensor, ...]:
    """Send ``x`` off on ``legs``; a token for each."""
    return _Departure.apply(legs, x)


def end(legs: list[Leg], tokens: list[Tensor]) -> Tensor:
    """Wait for ``legs``, which arrive in one tensor, and return it."""
    return _Arrival.apply(legs, *tokens)


class _Departure(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, legs: list[Leg], x: Tensor) -> tuple[Tensor, ...]:
        ctx.legs = legs
        for leg in legs:
            leg.begin(x)
        return tuple(x.new_empty(0) for _ in legs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *tokens: Tensor) -> tuple[Tensor | None, ...]:
        for leg in ctx.legs:
            leg.wait()
        return None, ctx.legs[0].source.take()


class _Arrival(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, legs: list[Leg], *tokens: Tensor) -> Tensor:
        ctx.legs = legs
        for leg in legs:
            leg.wait()
        return legs[0].take()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # The last chunk's first: its computation is the first that autograd goes back through.
        for leg in reversed(ctx.legs):
            leg.begin_back(gradient)
        return None, *(gradient.new_empty(0) for _ in ctx.legs)

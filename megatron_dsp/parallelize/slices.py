"""A module that runs in slices of a dim that it does not mix: a slice's switches travel while other slices are computed.

Each slice of a tensor travels on a leg of its own (`reshard.stages.legs`). All slices leave for the module before the first one
is waited for, and the ends of the way back are created after the last slice is computed. Autograd runs later-created nodes
first: in backward all gradients are sent off before the first of them is waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dsp.layout import shard_ranges
from megatron_dsp.parallelize.layout_changes import LayoutChange, change_layouts, join
from megatron_dsp.reshard import StageName
from megatron_dsp.reshard.exchange import exchange_of
from megatron_dsp.reshard.stages import legs

Range: TypeAlias = tuple[int, int]  # start and stop of a slice
Arrive: TypeAlias = Callable[[], Tensor]  # waits for a slice, and returns it in its new layout; to be called once


class SlicesToModule:
    """The slices ``ranges`` of ``dim`` of one tensor, which leave for a module one after another.

    What does not switch is changed whole, at once. What does not have ``dim`` is the same in all slices.
    """

    def __init__(self, change: LayoutChange, dim: str, ranges: Sequence[Range], group: dist.ProcessGroup, stage: str):
        self._change, self._dim, self._ranges = change, dim, ranges
        self._group, self._stage = group, stage
        self._senders = [self._find_sender(part) for part in change.parts()[0]]

    def send(self, number: int) -> Arrive:
        """Begin the change of a slice. Collective."""
        arrivals = [sender(number) for sender in self._senders]
        return lambda: join(self._change, [arrive() for arrive in arrivals])

    def _find_sender(self, part: LayoutChange) -> Callable[[int], Arrive]:
        pattern, group, stage = part.pattern, self._group, self._stage
        if part.is_switch and self._dim in pattern.names:
            # One split, whose gradient is one concatenation.
            sizes = [stop - start for start, stop in self._ranges]
            xs = pattern.unflatten(part.x, part.sizes).split(sizes, pattern.index(self._dim))
            return lambda number: _send(part, xs[number], group, stage)
        whole, sizes_inside = change_layouts({0: part}, group, stage)[0], part.sizes_after(group)
        return lambda number: lambda: pattern.narrow(whole, sizes_inside, self._dim, *self._ranges[number])


class SlicesFromModule:
    """The slices of ``dim`` of one tensor, which leave a module one after another."""

    def __init__(self, dim: str, group: dist.ProcessGroup, stage: str):
        self._dim, self._group, self._stage = dim, group, stage
        self._changes: list[LayoutChange] = []
        self._slices: list[list[tuple[LayoutChange, Arrive]]] = []  # the parts of each

    def send(self, change: LayoutChange) -> None:
        """Begin the change of the next slice. What does not switch waits for the last one. Collective."""
        self._changes.append(change)
        self._slices.append([(part, self._send_part(part)) for part in change.parts()[0]])

    def join(self) -> Tensor:
        """The whole tensor in its new layout, after the last slice was sent. Collective."""
        return join(self._changes[0], [self._join_part(of_part) for of_part in zip(*self._slices, strict=True)])

    def _send_part(self, part: LayoutChange) -> Arrive:
        if not part.is_switch:
            return lambda: part.x
        return _send(part, part.pattern.unflatten(part.x, part.sizes), self._group, self._stage)

    def _join_part(self, slices: Sequence[tuple[LayoutChange, Arrive]]) -> Tensor:
        first, pattern = slices[0][0], slices[0][0].pattern
        xs = []
        for part, arrive in slices:
            sizes = part.sizes_after(self._group) if part.is_switch else part.sizes
            xs.append(pattern.unflatten(arrive(), sizes))
        joined = pattern.flatten(torch.cat(xs, pattern.index(self._dim)))
        if first.is_switch:
            return joined
        sizes = {**first.sizes, self._dim: sum(part.sizes[self._dim] for part, _ in slices)}
        return change_layouts({0: replace(first, x=joined, sizes=sizes)}, self._group, self._stage)[0]


def _send(part: LayoutChange, x: Tensor, group: dist.ProcessGroup, stage: str) -> Arrive:
    """Begin the switch of a slice ``x`` of ``part``, unflattened."""
    exchange, pattern = exchange_of(group), part.pattern
    gather, split = str(part.source), str(part.target)
    leg = legs.Leg(
        exchange,
        pattern.index(gather),
        pattern.index(split),
        part.size,
        shard_ranges(part.size, exchange.size),
        shard_ranges(part.sizes[split], exchange.size),
        legs.Landing(),
        legs.Landing(),
        StageName(stage),
    )
    (token,) = legs.begin([leg], x)
    return lambda: pattern.flatten(legs.end([leg], [token]))

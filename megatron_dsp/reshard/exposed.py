"""Exposed communication: how much longer a step takes than it would if switches took no time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from megatron_dsp.reshard.exchange import exchange_of
from megatron_dsp.reshard.labels import Label, Operation
from megatron_dsp.reshard.transport.move import Beside, End, Move, Transport


class NoTransport:
    """A transport for measuring alone: switches to these kinds of stages (None: to all) move nothing but the rank's own piece.

    The rest of a result is whatever its memory held. Other switches go through ``transport``.
    """

    name = "none"

    def __init__(self, transport: Transport, rank: int, kinds: Sequence[str] | None = None):
        self._transport, self._rank = transport, rank
        self._kinds = None if kinds is None else frozenset(kinds)
        self.buffers = transport.buffers

    def begin(self, moves: Sequence[Move], label: Label, *, at_once: bool = False, beside: Beside | None = None) -> End:
        """As `Transport.begin`."""
        if self._kinds is not None and label.kind not in self._kinds:
            return self._transport.begin(moves, label, at_once=at_once, beside=beside)
        results = [move.result(self._rank, self.buffers) for move in moves]
        for move, result in zip(moves, results, strict=True):
            move.targets(result)[self._rank].copy_(move.sources()[self._rank])
        return lambda: results


@contextmanager
def without_communication(group: dist.ProcessGroup, kinds: Sequence[str] | None = None) -> Iterator[None]:
    """In the block, switches to stages of these kinds (None: to all) move nothing.

    Results are wrong there. The same on every rank of the group.
    """
    exchange = exchange_of(group)
    usual = exchange.transport
    exchange.transport = NoTransport(usual, exchange.rank, kinds)
    try:
        yield
    finally:
        exchange.transport = usual


def exposed_seconds(
    step: Callable[[], object], group: dist.ProcessGroup, device: torch.device, *, repetitions: int = 5
) -> dict[str, float]:
    """The medians, over interleaved runs, of the seconds of ``step`` and of those that its communication adds to it.

    ``step`` runs forward and backward, and keeps nothing of it. Keys: "step"; "all"; and each kind of stage, for the switches
    to it alone. Collective over the group; the slowest rank's time counts, on every rank.
    """
    counts = exchange_of(group).counts
    before = dict(counts)
    step()
    moved = [label for label, value in counts.items() if value != before.get(label)]
    kinds = sorted({label.kind for label in moved if Operation(label.operation).is_switch})
    removed: list[Sequence[str] | None] = [[], None, *([kind] for kind in kinds)]
    seconds: list[list[float]] = [[] for _ in removed]
    for _ in range(repetitions):
        for times, without in zip(seconds, removed, strict=True):
            with without_communication(group, without):
                times.append(_time(step, group, device))
    whole, *others = seconds
    differences = [statistics.median(a - b for a, b in zip(whole, other, strict=True)) for other in others]
    return dict(zip(["step", "all", *kinds], [statistics.median(whole), *differences], strict=True))


def _time(step: Callable[[], object], group: dist.ProcessGroup, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    dist.barrier(group)
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX, group=group)
    return seconds.item()

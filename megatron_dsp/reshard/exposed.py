"""Exposed communication: how much longer a step takes than it would if switches took no time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dsp.reshard.buffers import BufferPool
from megatron_dsp.reshard.exchange import Exchange
from megatron_dsp.reshard.moves import Move
from megatron_dsp.reshard.transports import End


class NoTransport:
    """Moves nothing but the rank's own piece; the rest of a result is whatever its memory held."""

    name = "none"

    def __init__(self, rank: int):
        self._rank = rank
        self.buffers = BufferPool()

    def check(self, x: Tensor) -> None:
        """Nothing is refused."""

    def begin(self, moves: list[Move]) -> End:
        results = [move.result(self._rank, self.buffers) for move in moves]
        for move, result in zip(moves, results, strict=True):
            move.targets(result)[self._rank].copy_(move.sources()[self._rank])
        return lambda: results


@contextmanager
def without_communication(exchange: Exchange, kinds: Sequence[str] | None = None) -> Iterator[None]:
    """In the block, switches to stages of these kinds (the first word of their names; None: to all) move nothing.

    Results are wrong there: for measuring alone. The same on every rank of the group.
    """
    exchange.removed = NoTransport(exchange.rank), None if kinds is None else frozenset(kinds)
    try:
        yield
    finally:
        exchange.removed = None


def exposed_seconds(
    step: Callable[[], object], exchange: Exchange, device: torch.device, *, repetitions: int = 5
) -> dict[str, float]:
    """The medians, over interleaved runs, of the seconds of ``step`` and of those that its communication adds to it.

    ``step`` runs forward and backward, and keeps nothing of it. Keys: "step"; "all"; and each kind of stage, for the switches
    to it alone. Collective over the group; the slowest rank's time counts, on every rank.
    """
    before = dict(exchange.counts)
    step()
    moved = [key for key, value in exchange.counts.items() if value != before.get(key)]
    kinds = sorted({stage.split(" ")[0] for stage, operation in moved if operation.startswith("switch")})
    removed: list[Sequence[str] | None] = [[], None, *([kind] for kind in kinds)]
    seconds: list[list[float]] = [[] for _ in removed]
    for _ in range(repetitions):
        for times, without in zip(seconds, removed, strict=True):
            with without_communication(exchange, without):
                times.append(_time(step, exchange.group, device))
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

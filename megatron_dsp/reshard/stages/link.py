"""What the link between the ranks of a group gives: measured, as switches use it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dsp.layout import shard_ranges
from megatron_dsp.reshard.exchange import exchange_of
from megatron_dsp.reshard.labels import Label, Operation
from megatron_dsp.reshard.transport.move import Move


class Link(NamedTuple):
    """Seconds that a small switch takes, bytes a second that a rank sends in a large one, and the part of a large one that
    goes on while the rank computes (1: all of it; 0: it waits until somebody waits for it)."""

    latency: float
    bandwidth: float
    beside: float

    def seconds(self, sent: int) -> float:
        """Of a switch in which a rank sends so many bytes to others."""
        return self.latency + sent / self.bandwidth

    def __str__(self) -> str:
        return (
            f"latency {self.latency * 1e6:.0f} us, bandwidth {self.bandwidth / 1e6:.0f} MB/s, "
            f"{self.beside:.0%} of a switch goes on beside compute"
        )


def measure_link(
    group: dist.ProcessGroup,
    device: torch.device,
    *,
    agree: dist.ProcessGroup | None = None,
    sent: int = 4 << 20,
    repetitions: int = 5,
) -> Link:
    """Measure with switches in which a rank sends ``sent`` bytes. Collective.

    Every rank of ``agree`` (the group itself where it is not given) gets the figures of the slowest of them.
    """
    agree = group if agree is None else agree
    ranks = group.size()
    rows = max(ranks, sent // (ranks - 1) // 1024 * ranks)
    small, large = (torch.zeros(1, size, 1024, dtype=torch.uint8, device=device) for size in (ranks, rows))
    latency = _median(repetitions, lambda: _switch_seconds(small, group, 0.0), agree)
    whole = _median(repetitions, lambda: _switch_seconds(large, group, 0.0), agree)
    left = _median(repetitions, lambda: _switch_seconds(large, group, whole), agree)
    sent = large.nbytes * (ranks - 1) // ranks
    return Link(latency, sent / max(whole - latency, 1e-9), max(0.0, 1 - left / whole))


def _switch_seconds(x: Tensor, group: dist.ProcessGroup, compute: float) -> float:
    """Seconds that this rank spends in a switch, ``compute`` seconds of computing in its middle aside."""
    transport = exchange_of(group).transport
    ranks = group.size()
    dist.barrier(group)
    start = time.perf_counter()
    move = Move(x, 0, 1, shard_ranges(ranks, ranks), shard_ranges(x.shape[1], ranks))
    end = transport.begin([move], Label(Operation.SWITCH.value))
    begun = time.perf_counter()
    if compute:
        _compute(compute, x.device)
    computed = time.perf_counter()
    end()
    if x.is_cuda:
        torch.cuda.current_stream(x.device).synchronize()
    return time.perf_counter() - computed + begun - start


def _compute(seconds: float, device: torch.device) -> None:
    """Keep a core, or the device, busy for so long."""
    matrix = torch.ones(256, 256, device=device)
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop:
        matrix @ matrix
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()


def _median(repetitions: int, measure: Callable[[], float], agree: dist.ProcessGroup) -> float:
    measure()  # the first one finds things cold
    seconds = torch.tensor(statistics.median(measure() for _ in range(repetitions)))
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX, group=agree)
    return seconds.item()

"""What the link between the ranks of a group gives: measured, as switches use it."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dsp.layout import shard_ranges
from megatron_dsp.reshard.exchange import exchange_of
from megatron_dsp.reshard.labels import Label, Operation
from megatron_dsp.reshard.stages.moment import Moment
from megatron_dsp.reshard.stages.timeline import SwitchSeconds
from megatron_dsp.reshard.transport.move import Move

Work = Callable[[float], None]  # computes for at least so many seconds; on CUDA it returns when that is issued

_OUTER = 16  # the size of the outermost dim of what is switched
_BUSY = 0.005  # seconds, longer than the host takes to issue a switch


class Link(NamedTuple):
    """Seconds that a small switch takes; and, for each byte that a rank sends in a large one, the seconds of three parts.

    ``pack`` is held up before it travels, ``unpack`` after it has arrived. What only goes on while somebody waits for it counts
    as ``unpack``; ``wire`` goes on while the rank computes.
    """

    latency: float
    pack: float
    wire: float
    unpack: float

    @property
    def bandwidth(self) -> float:
        """Bytes a second that a rank sends in a large switch."""
        return 1 / max(self.pack + self.wire + self.unpack, 1e-15)

    @property
    def beside(self) -> float:
        """The part of a large switch that goes on beside compute: 1 is all of it."""
        return self.wire * self.bandwidth

    def seconds(self, sent: int) -> SwitchSeconds:
        """Of a switch in which a rank sends so many bytes to others."""
        return SwitchSeconds(sent * self.pack, self.latency, sent * self.wire, sent * self.unpack)

    def __str__(self) -> str:
        return (
            f"latency {self.latency * 1e6:.0f} us, bandwidth {self.bandwidth / 1e6:.0f} MB/s, "
            f"{self.beside:.0%} of a switch goes on beside compute"
        )


def measure_link(
    group: dist.ProcessGroup,
    device: torch.device,
    *,
    agree: Sequence[dist.ProcessGroup] = (),
    sent: int = 4 << 20,
    repetitions: int = 5,
) -> Link:
    """Measure with switches in which a rank sends ``sent`` bytes. Collective over ``group``, and over those of ``agree``.

    Every rank gets the figures of the slowest rank of the group and of ``agree``. On CUDA they are of the device: it is kept
    busy until all of a switch is issued.
    """
    ranks = group.size()
    # The pieces of the large one lie in the outermost dim at one end, and within another at the other: so one end is copied.
    shares = max(1, sent // (ranks - 1) // (_OUTER * 1024))
    shapes = (1, ranks, 1024), (_OUTER, shares * ranks, 1024)
    small, large = (torch.zeros(shape, dtype=torch.uint8, device=device) for shape in shapes)

    work = _find_work(device)

    def measure(x: Tensor, compute: float) -> list[float]:
        """The seconds of a switch's begin, of what is computed then, and of its end; medians of the slowest rank."""
        found = [_time_switch(x, group, work, compute) for _ in range(1 + repetitions)][1:]  # the first one finds things cold
        return slowest([statistics.median(part) for part in zip(*found, strict=True)], [group, *agree], device)

    latency, whole = (sum(measure(x, 0.0)) for x in (small, large))
    pack, _, unpack = measure(large, whole)
    sent = large.nbytes * (ranks - 1) // ranks
    wire = max(0.0, whole - latency - pack - unpack)
    return Link(latency, pack / sent, wire / sent, unpack / sent)


def slowest(seconds: Sequence[float], groups: Sequence[dist.ProcessGroup], device: torch.device) -> list[float]:
    """Of each of the ``seconds``, the most that any rank has. Over groups that are axes of a grid: any rank of the grid.

    Collective over each of ``groups`` in turn; waits for the device.
    """
    most = torch.tensor(seconds, dtype=torch.float64, device=device)
    for group in groups:
        if group.size() > 1:
            dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
    return most.tolist()


def _time_switch(x: Tensor, group: dist.ProcessGroup, work: Work, compute: float) -> list[float]:
    """The seconds of a switch's begin, of at least ``compute`` seconds of computing, and of the switch's end."""
    transport, ranks = exchange_of(group).transport, group.size()
    move = Move(x, 0, 1, shard_ranges(x.shape[0] * ranks, ranks), shard_ranges(x.shape[1], ranks))
    dist.barrier(group)
    if x.is_cuda:
        # The host issues the whole switch meanwhile: so events tell the time of the device alone.
        work(_BUSY)
    moments = [Moment(x.device)]
    end = transport.begin([move], Label(Operation.SWITCH.value))
    moments.append(Moment(x.device))
    if compute:
        work(compute)
    moments.append(Moment(x.device))
    end()
    moments.append(Moment(x.device))
    return [later.since(earlier) for earlier, later in pairwise(moments)]


def _find_work(device: torch.device) -> Work:
    """What keeps a core, or the device, busy."""
    if device.type != "cuda":
        small = torch.ones(256, 256)

        def until(seconds: float) -> None:
            stop = time.perf_counter() + seconds
            while time.perf_counter() < stop:
                small @ small

        return until
    matrix = torch.ones(4096, 4096, dtype=torch.float16, device=device)

    def multiply(times: int) -> float:
        begun = Moment(device)
        for _ in range(times):
            matrix @ matrix
        return Moment(device).since(begun)

    multiply(3)  # the first ones find things cold
    product = multiply(10) / 10

    def issue(seconds: float) -> None:
        for _ in range(math.ceil(seconds / product)):
            matrix @ matrix

    return issue

"""The choice of a schedule by measurement, on a network whose speed the test sets."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dsp.layout import Layout, shard_sizes
from megatron_dsp.reshard import Region, Stage, set_overlap
from megatron_dsp.reshard.exchange import bytes_to_others, exchange_of
from megatron_dsp.reshard.exposed import exposed_seconds
from megatron_dsp.reshard.stages.link import measure_link
from megatron_dsp.reshard.stages.measured_overlap import MeasuredOverlap
from megatron_dsp.reshard.transport.move import End, Move
from megatron_dsp.reshard.transport.torch_transport import TorchTransport

SIZES = (8, 2, 8, 4096)
SECONDS = 0.02  # of one stage's forward, and of its backward


class Network(TorchTransport):
    """Sends so many bytes a second, one switch after another; beside compute, or only while somebody waits."""

    def __init__(self, group: dist.ProcessGroup, bandwidth: float, beside: bool = True):
        super().__init__(group)
        self.bandwidth, self.beside = bandwidth, beside
        self._free = 0.0

    def begin(self, moves: list[Move], label: Any, **how: Any) -> End:
        end = super().begin(moves, label, **how)
        seconds = bytes_to_others(moves, self._rank) / self.bandwidth
        self._free = arrives = max(self._free, time.perf_counter()) + seconds

        def finish() -> list[Tensor]:
            time.sleep(max(0.0, arrives - time.perf_counter()) if self.beside else seconds)
            return end()

        return finish


class _Work(torch.autograd.Function):
    """As long as its share of the activation says, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, whole: int) -> Tensor:
        ctx.seconds = SECONDS * x.numel() / whole
        time.sleep(ctx.seconds)
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        time.sleep(ctx.seconds)
        return gradient * 2, None


def _pass(group: dist.ProcessGroup) -> None:
    rows = shard_sizes(SIZES[0], group.size())[group.rank()]
    x = torch.ones(rows, *SIZES[1:]).requires_grad_()
    region = Region(Layout(("t", "b", "s", "c"), SIZES, sharded="t"), group)
    whole = torch.Size(SIZES).numel() // group.size()
    stages = [Stage(lambda y: _Work.apply(y, whole), dim, f"{dim} {index}") for index, dim in enumerate("tsts")]
    y = region.run(stages, x, independent="b")
    assert y.eq(16).all()
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.eq(16).all()


def _choose(bandwidth: float, beside: bool) -> tuple[list[str], int]:
    group = dist.group.WORLD
    exchange = exchange_of(group)
    exchange.transport = Network(group, bandwidth, beside)
    set_overlap(group, overlap := MeasuredOverlap(group))
    passes = 0
    while not overlap.decisions and passes < 50:
        _pass(group)
        passes += 1
    with torch.no_grad():  # the choice serves other passes of the shape too
        _pass_forward_only(group)
    return overlap.decisions, passes


def _pass_forward_only(group: dist.ProcessGroup) -> None:
    rows = shard_sizes(SIZES[0], group.size())[group.rank()]
    region = Region(Layout(("t", "b", "s", "c"), SIZES, sharded="t"), group)
    y = region.run([Stage(lambda y: y * 2, "t"), Stage(lambda y: y + 1, "s")], torch.ones(rows, *SIZES[1:]))
    assert y.eq(3).all()


def test_a_slow_network_is_overlapped(ranks):
    # A switch takes half of a stage's time: a rank sends 512 KB of the 1 MB that it holds.
    (first, passes), (second, _) = ranks(2, _choose, (1 << 19) / (SECONDS / 2), True)
    assert first == second
    assert len(first) == 1
    assert "chunks of" in first[0].split(":")[0], first
    assert "whole stages" in first[0]  # beside which it was measured
    assert passes < 40


def test_a_fast_network_keeps_whole_stages(ranks):
    for decisions, _ in ranks(2, _choose, 1e12, True):
        assert decisions[0].startswith("whole stages"), decisions


def test_a_network_that_waits_to_be_waited_for_keeps_whole_stages(ranks):
    for decisions, _ in ranks(2, _choose, (1 << 19) / (SECONDS / 2), False):
        assert decisions[0].startswith("whole stages"), decisions


def _measure() -> tuple[float, float, dict[str, float]]:
    group = dist.group.WORLD
    exchange = exchange_of(group)
    exchange.transport = Network(group, (1 << 19) / (SECONDS / 2))
    link = measure_link(group, torch.device("cpu"))

    def step() -> None:
        rows = shard_sizes(SIZES[0], group.size())[group.rank()]
        region = Region(Layout(("t", "b", "s", "c"), SIZES, sharded="t"), group)
        region.run([Stage(lambda y: y * 2, "t", "first"), Stage(lambda y: y + 1, "s", "second")], torch.ones(rows, *SIZES[1:]))

    return link.bandwidth, link.beside, exposed_seconds(step, group, torch.device("cpu"))


def test_what_is_measured_is_what_the_network_does(ranks):
    for bandwidth, beside, seconds in ranks(2, _measure):
        assert 0.5 < bandwidth / ((1 << 19) / (SECONDS / 2)) < 1.5
        assert beside > 0.5
        # One switch, of half a stage's time, all of it exposed.
        assert set(seconds) == {"step", "all", "second"}
        assert 0.5 < seconds["all"] / (SECONDS / 2) < 2
        assert 0.5 < seconds["second"] / (SECONDS / 2) < 2

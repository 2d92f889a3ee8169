"""The simulated wire of `benchmarks/one_card.py` on a GPU, and its cells, captured and not."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from work import missing

from megatron_dsp.layout import shard_ranges
from megatron_dsp.reshard.exchange import exchange_of
from megatron_dsp.reshard.labels import Label, Operation
from megatron_dsp.reshard.transport.move import End, Move
from megatron_dsp.training.fake_world import fake_world

MISSING = missing(1)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(MISSING is not None, reason=MISSING or "")]

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
if str(BENCHMARKS) not in sys.path:
    sys.path.append(str(BENCHMARKS))
# By its path: there is a module of that name here too.
_spec = importlib.util.spec_from_file_location("benchmark_one_card", BENCHMARKS / "one_card.py")
assert _spec is not None
assert _spec.loader is not None
bench = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(bench)

RANKS = 4
SECONDS = 0.1  # that a switch takes
LABEL = Label(Operation.SWITCH.value)


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    """Of rank 0 of 4, whose others are not there; on a stream that is not the default one."""
    with fake_world(RANKS, rank=0), torch.cuda.stream(torch.cuda.Stream()):
        assert dist.group.WORLD is not None
        yield dist.group.WORLD


def _begin(wire: bench.Wire, *, at_once: bool) -> End:
    x = torch.zeros(2, 4 * RANKS, device="cuda")
    return wire.begin([Move(x, 0, 1, shard_ranges(2 * RANKS, RANKS), shard_ranges(4 * RANKS, RANKS))], LABEL, at_once=at_once)


def _seconds_until_idle() -> float:
    """Of the current stream."""
    begun = time.perf_counter()
    torch.cuda.current_stream().synchronize()
    return time.perf_counter() - begun


def _wire(group: dist.ProcessGroup, *, rate: float, latency: float) -> bench.Wire:
    exchange = exchange_of(group)
    wire = bench.Wire(exchange.transport, exchange.rank, torch.cuda.Stream(), rate, latency)
    _begin(wire, at_once=False)()  # kernels are loaded
    torch.cuda.synchronize()
    return wire


def test_a_switch_at_once_takes_its_bytes_over_the_rate_on_the_current_stream(group):
    sent = 2 * 4 * (RANKS - 1) * torch.float32.itemsize
    wire = _wire(group, rate=sent / (SECONDS / 2), latency=SECONDS / 2)
    (result,) = _begin(wire, at_once=True)()
    assert result.shape == (2 * RANKS, 4)
    assert _seconds_until_idle() == pytest.approx(SECONDS, rel=0.3)


def test_compute_goes_on_until_the_end_and_waits_there(group):
    wire = _wire(group, rate=float("inf"), latency=SECONDS)
    end = _begin(wire, at_once=False)
    assert _seconds_until_idle() < SECONDS / 2
    end()
    assert _seconds_until_idle() > SECONDS / 2


def test_switches_travel_one_after_another(group):
    wire = _wire(group, rate=float("inf"), latency=SECONDS)
    ends = [_begin(wire, at_once=False) for _ in range(3)]
    begun = time.perf_counter()
    for count, end in enumerate(ends, start=1):
        end()
        torch.cuda.current_stream().synchronize()
        assert time.perf_counter() - begun == pytest.approx(count * SECONDS, rel=0.3)


@pytest.mark.parametrize("mode", ["eager", "captured"])
def test_a_cell(group, mode, monkeypatch):
    milliseconds = 20
    monkeypatch.setattr(bench, "LATENCIES", {50: 1000 * milliseconds})
    monkeypatch.setattr(bench, "ROUNDS", 3)
    shape = bench.Shape(layers=1, hidden=64, heads=4, frames=8, tokens=16, batch_size=1)
    work = bench.Work(shape, torch.device("cuda", torch.cuda.current_device()), sample=0, dtype=torch.bfloat16)
    budget, cell = bench.Budget(600), bench.Cell(mode, "T64 S4096 B1", 50)
    rows = list(bench.measure(cell, lambda: work, group, partial(bench.make_wire, torch.cuda.Stream()), budget))
    assert budget.report() == []
    found = {row["method"]: row for row in rows}
    assert list(found) == list(bench.makers(group))
    # Two switches there and two back, beside which nothing runs.
    assert found["dsp"]["median_ms"] == pytest.approx(4 * milliseconds, rel=0.3)
    assert found["dsp"]["ratio_to_bound"] > 1
    if mode == "captured":
        assert found["dsp"]["host_ms"] < milliseconds


def test_a_step_in_a_graph_computes_what_it_computes_outside(group):
    x = torch.randn(8, 8, device="cuda", requires_grad=True)
    gradients: list[Tensor] = []

    def run() -> None:
        x.grad = None
        (x * x).sum().backward()
        assert x.grad is not None
        gradients.append(x.grad)

    for _ in range(2):
        run()
    replay = bench.capture(run)
    with torch.no_grad():
        x.fill_(3)
    replay()
    torch.cuda.synchronize()
    assert torch.equal(gradients[-1], torch.full_like(x, 6))

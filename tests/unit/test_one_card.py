"""`benchmarks/one_card.py` without a GPU: the order of its cells, its rows, and what becomes of methods that fail."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_dsp.errors import UsageError
from megatron_dsp.reshard import FixedOverlap
from megatron_dsp.reshard.labels import Label
from megatron_dsp.reshard.transport.move import End, Move, Transport
from megatron_dsp.training.fake_world import fake_world

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
if str(BENCHMARKS) not in sys.path:
    sys.path.append(str(BENCHMARKS))
# By its path: tests/gpu has a module of that name.
_spec = importlib.util.spec_from_file_location("benchmark_one_card", BENCHMARKS / "one_card.py")
assert _spec is not None
assert _spec.loader is not None
bench = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(bench)

RANKS = 4
CELL = bench.Cell("eager", "T64 S4096 B1", 50)
FIELDS = ["shape", "ranks", "rate_gbytes", "method", "mode", "median_ms", "ratio_to_bound", "host_ms"]


class Counted:
    """A transport that counts the switches that go through it."""

    def __init__(self, transport: Transport, begun: list[str]):
        self._transport, self._begun = transport, begun
        self.name, self.buffers = transport.name, transport.buffers

    def begin(self, moves: Sequence[Move], label: Label, **how: Any) -> End:
        """As `Transport.begin`."""
        self._begun.append(label.kind)
        return self._transport.begin(moves, label, **how)


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    """Of rank 0 of 4, whose others are not there."""
    with fake_world(RANKS, rank=0):
        assert dist.group.WORLD is not None
        yield dist.group.WORLD


def measure(group: dist.ProcessGroup, seconds: float = 600) -> tuple[list[dict[str, Any]], Any, list[str]]:
    """Rows of a tiny shape on the CPU, the budget, and the switches that went through the wire."""
    work = bench.Work(bench.Shape(1, 8, 4, 8, 8, 1), torch.device("cpu"), sample=0, dtype=torch.bfloat16)
    budget, begun = bench.Budget(seconds), []

    def wire(transport: Transport, rank: int, cell: Any) -> Transport:
        assert (rank, cell) == (0, CELL)
        return Counted(transport, begun)

    before = bench.exchange_of(group).transport
    rows = list(bench.measure(CELL, lambda: work, group, wire, budget))
    assert bench.exchange_of(group).transport is before
    return rows, budget, begun


def test_all_cells_come_once_and_those_of_the_goals_first():
    cells = bench.cells()
    assert len(cells) == len(set(cells)) == 48
    goals = {("captured", shape, rate) for shape in ("T64 S4096 B1", "T32 S1024 B1") for rate in (50, 200)}
    assert cells[0] == ("captured", "T64 S4096 B1", 50)
    assert goals < set(cells[:8])
    assert {cell.mode for cell in cells[:10]} == {"captured", "eager", "compiled"}


def test_rows_of_a_cell(group, monkeypatch):
    monkeypatch.setattr(bench, "WARM_UP", 1)
    monkeypatch.setattr(bench, "ROUNDS", 3)
    monkeypatch.setattr(bench, "OVERLAPS", {"in halves": lambda group: FixedOverlap(2, cut="stages")})
    rows, budget, begun = measure(group)
    methods = ["no_communication", "dsp", "in halves", "ulysses", "ulysses_overlap", "ulysses_flat"]
    assert [row["method"] for row in rows] == methods
    for row in rows:
        assert list(row) == FIELDS
        assert (row["shape"], row["ranks"], row["rate_gbytes"], row["mode"]) == ("T64 S4096 B1", RANKS, 50, "eager")
        assert 0 < row["host_ms"] <= row["median_ms"]
    assert rows[0]["ratio_to_bound"] == 1
    assert budget.report() == []
    # In a step two switches of whole stages, or four of halves, and as many back; the bound's own are no wire's.
    steps = {"dsp": 1 + 3, "in halves": 1 + 3 + 1}  # and one until its schedule is known
    assert begun[: 4 * steps["dsp"]].count("temporal") == 2 * steps["dsp"]
    of_halves = begun[4 * steps["dsp"] : 4 * steps["dsp"] + 8 * steps["in halves"]]
    assert of_halves.count("temporal") == of_halves.count("head") == 4 * steps["in halves"]


def test_ratios_are_of_the_same_round():
    timings = {"m": [bench.Timing(2, 1), bench.Timing(30, 1), bench.Timing(8, 3)]}
    timings["no_communication"] = [bench.Timing(1, 1), bench.Timing(10, 1), bench.Timing(8, 1)]
    row = bench.row_of(CELL, "m", 8, timings)
    assert (row["median_ms"], row["ratio_to_bound"], row["host_ms"]) == (8000, 2, 1000)


class Broken(FixedOverlap):
    """Raises when a region asks it."""

    def __init__(self, error: Exception):
        super().__init__(2)
        self._error = error

    def choose(self, *arguments: Any) -> Any:
        raise self._error


def test_a_method_that_fails_costs_no_other_one(group, monkeypatch, capsys):
    monkeypatch.setattr(bench, "WARM_UP", 0)
    monkeypatch.setattr(bench, "ROUNDS", 1)
    errors = {"broken": RuntimeError("a fault of ours"), "unfit": UsageError("not on this shape")}
    overlaps = {name: partial(lambda error, group: Broken(error), error) for name, error in errors.items()}
    monkeypatch.setattr(bench, "OVERLAPS", overlaps)
    rows, budget, _ = measure(group)
    assert [row["method"] for row in rows] == ["no_communication", "dsp", "ulysses", "ulysses_overlap", "ulysses_flat"]
    assert budget.failed == [f"broken in {CELL}"]
    printed = capsys.readouterr()
    assert f"left out unfit in {CELL}: not on this shape" in printed.out
    assert "a fault of ours" in printed.err
    assert "Traceback" in printed.err


def test_a_method_for_which_there_is_no_time_is_not_begun(group):
    rows, budget, begun = measure(group, seconds=bench.SECONDS["eager"] - 1)
    assert (rows, begun) == ([], [])
    assert "no time was left" in budget.report()[0]


def test_time_is_judged_by_what_the_method_took_before(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(bench.time, "monotonic", lambda: now[0])

    def take(seconds):
        now[0] += seconds
        return seconds

    budget = bench.Budget(100)
    assert budget.run(CELL, "slow", partial(take, 40)) == 40
    assert budget.run(CELL, "quick", partial(take, 1)) == 1
    now[0] = 65
    assert budget.run(CELL, "slow", partial(take, 40)) is None
    now[0] = 99
    assert budget.run(CELL, "quick", partial(take, 1)) == 1


def test_a_line_for_each_rate_says_what_overlap_brings():
    def row(method, ratio):
        return {"mode": "captured", "shape": "720m", "rate_gbytes": 50, "method": method, "ratio_to_bound": ratio}

    overlapped = [row(name, 1.1) for name in bench.OVERLAPS]
    overlapped[1]["ratio_to_bound"] = 1.02
    best = list(bench.OVERLAPS)[1]
    lines = bench.gains([row("no_communication", 1.0), row("dsp", 1.2), *overlapped])
    assert len(lines) == 4
    assert lines[0].startswith("50 GB/s")
    assert f"720m captured 1.20 -> 1.02 ({best})" in lines[0]
    assert all("not measured" in line for line in lines[1:])


def test_what_was_written_is_whole(tmp_path):
    path = tmp_path / "out" / "rows.json"
    for count in (1, 2):
        bench.write([{"method": "dsp"}] * count, path)
        assert json.loads(path.read_text()) == [{"method": "dsp"}] * count
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_one_line_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["one_card.py", "--output", str(tmp_path / "rows.json")])
    assert bench.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("one_card: torch")
    assert not (tmp_path / "rows.json").exists()

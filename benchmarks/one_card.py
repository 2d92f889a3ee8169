"""What overlap brings on one GPU, which is one rank of 8: real compute, packing, streams and launches, and a simulated wire.

    python benchmarks/one_card.py --minutes 10        # or make bench-one-card ARGS="--minutes 10"

The other ranks are not there (torch's fake process group). A switch takes a latency, and its bytes over a rate, on a stream of
its own. Each method takes turns with the bound, DSP whose switches take no time; ratios are those of one turn. The cells that
say most come first; each row is written when it is made.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch._dynamo
import torch.distributed as dist
from end_to_end import PRESETS, finish
from gpu_check import missing_gpu
from methods import Make, Method, Shape, Work, makers_by_name

from megatron_dsp.errors import UsageError
from megatron_dsp.reshard import FixedOverlap, Overlap
from megatron_dsp.reshard.exchange import bytes_to_others, exchange_of
from megatron_dsp.reshard.labels import Label
from megatron_dsp.reshard.stages.measured_overlap import MeasuredOverlap
from megatron_dsp.reshard.transport.move import Beside, End, Move, Transport
from megatron_dsp.training.fake_world import fake_world

RANKS = 8

# Cells whose mode, shape and rate stand early here come first.
MODES = ("captured", "eager", "compiled")
SHAPES = {
    "T64 S4096 B1": Shape(layers=2, hidden=1152, heads=16, frames=64, tokens=4096, batch_size=1),
    "T32 S1024 B1": Shape(layers=2, hidden=1152, heads=16, frames=32, tokens=1024, batch_size=1),
    "T32 S1024 B4": Shape(layers=2, hidden=1152, heads=16, frames=32, tokens=1024, batch_size=4),
    "720m": PRESETS["720m"],
}
# GB/s that a rank sends, and the microseconds that a switch takes beside: those of a network, and of links inside a host.
LATENCIES = {50: 15, 200: 8, 25: 15, 400: 8}

BOUND, PLAIN = "no_communication", "dsp"
# A line is one more method.
OVERLAPS: dict[str, Callable[[dist.ProcessGroup], Overlap]] = {
    "dsp_ends_2": lambda group: FixedOverlap(2, cut="ends"),
    "dsp_ends_4": lambda group: FixedOverlap(4, cut="ends"),
    "dsp_leave_2": lambda group: FixedOverlap(2, cut="leave"),
    "dsp_leave_4": lambda group: FixedOverlap(4, cut="leave"),
    "dsp_stages_2": lambda group: FixedOverlap(2, cut="stages"),
    "dsp_stages_4": lambda group: FixedOverlap(4, cut="stages"),
    "dsp_overlap": lambda group: MeasuredOverlap([group]),  # "auto", which decides by uncaptured steps
}

WARM_UP = 3  # steps
ROUNDS = 9
SECONDS = {"captured": 15.0, "eager": 10.0, "compiled": 60.0}  # that a method may take which was not measured yet

Run = Callable[[], object]
Result = TypeVar("Result")


class Cell(NamedTuple):
    """One comparison of methods; ``shape`` is a name in `SHAPES`, ``rate`` in GB/s."""

    mode: str
    shape: str
    rate: int

    def __str__(self) -> str:
        return f"{self.shape}, {self.rate} GB/s, {self.mode}"


class Timing(NamedTuple):
    """Seconds of a step, and those after which the host was through with it."""

    step: float
    host: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30, help="that all may take; what does not fit is left out")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/out/one_card.json"))
    arguments = parser.parse_args()
    lacking = missing_gpu()
    if lacking is not None:
        print(f"one_card: {lacking}", file=sys.stderr)
        return 2
    budget = Budget(60 * arguments.minutes)
    # Chunks have more shapes than the compiler would take for one function.
    torch._dynamo.config.recompile_limit = 256
    rows: list[dict[str, Any]] = []
    works: dict[tuple[str, bool], Work] = {}
    # Compute has a stream of its own, as capture asks for; two streams in all, as CUDA gives the same ones again after 32.
    with fake_world(RANKS, rank=0), torch.cuda.stream(torch.cuda.Stream()):
        group, wire = dist.group.WORLD, partial(make_wire, torch.cuda.Stream())
        assert group is not None
        for cell in cells():
            for row in measure(cell, partial(find_work, works, cell), group, wire, budget):
                rows.append({"card": torch.cuda.get_device_name(), **row})
                print(in_words(row), flush=True)
                write(rows, arguments.output)
    for line in (*gains(rows), *budget.report()):
        print(line)
    print(f"{len(rows)} rows in {arguments.output}")
    return int(bool(budget.failed) or not rows)


def cells() -> list[Cell]:
    """All of them, those that say most first."""
    places = itertools.product(enumerate(MODES), enumerate(SHAPES), enumerate(LATENCIES))
    in_order = sorted(places, key=lambda of_cell: sum(place for place, _ in of_cell))
    return [Cell(mode, shape, rate) for (_, mode), (_, shape), (_, rate) in in_order]


class Budget:
    """The time that is left, and what became of the methods that gave no row.

    Attributes:
        late: those for which no time was left, by the longest that the method took before.
        failed: those whose code failed here.
    """

    def __init__(self, seconds: float):
        self.late: list[str] = []
        self.failed: list[str] = []
        self._stop = time.monotonic() + seconds
        self._longest: dict[tuple[str, str], float] = {}

    def run(self, cell: Cell, method: str, measure: Callable[[], Result]) -> Result | None:
        """What ``measure`` returns; None where there is no time for it, or it cannot run here, or fails.

        One method's fault must not cost the others: it is printed, and kept in ``failed``.
        """
        what = f"{method} in {cell}"
        begun = time.monotonic()
        longest = self._longest.get((cell.mode, method))
        if begun + (SECONDS[cell.mode] if longest is None else longest) > self._stop:
            self.late.append(what)
            return None
        try:
            return measure()
        except (UsageError, torch.OutOfMemoryError) as error:
            print(f"left out {what}: {error}", flush=True)
        except Exception:
            print(f"failed: {what}", file=sys.stderr)
            traceback.print_exc()
            self.failed.append(what)
        finally:
            self._longest[cell.mode, method] = max(longest or 0.0, time.monotonic() - begun)
        return None

    def report(self) -> list[str]:
        """Lines about what gave no row."""
        lines = [f"no time was left for these, and --minutes gives more: {'; '.join(self.late)}"] if self.late else []
        return [*lines, *(f"failed: {what}" for what in self.failed)]


def find_work(works: dict[tuple[str, bool], Work], cell: Cell) -> Work:
    """The blocks and the sample of the cell's shape in bf16, compiled where its mode is; kept in ``works``."""
    key = cell.shape, cell.mode == "compiled"
    if key not in works:
        device = torch.device("cuda", torch.cuda.current_device())
        work = works[key] = Work(SHAPES[cell.shape], device, sample=0, dtype=torch.bfloat16)
        if cell.mode == "compiled":
            for block in work.blocks:
                block.compile(dynamic=False)
    return works[key]


class Wire:
    """A transport around one whose collectives take no time. Here they take ``latency`` seconds, and their bytes over ``rate``.

    As over NCCL: a collective that is to end at once runs on the current stream, others one after another on ``stream``. Time
    is made by a kernel that counts cycles of the GPU.
    """

    name = "simulated wire"

    def __init__(self, transport: Transport, rank: int, stream: torch.cuda.Stream, rate: float, latency: float):
        """``rank`` of the group; ``rate`` in bytes a second that a rank sends to the others."""
        self._transport, self._rank = transport, rank
        self.buffers = transport.buffers
        self._rate, self._latency = rate, latency
        self._stream = stream
        self._cycles_per_second = measure_clock()

    def begin(self, moves: Sequence[Move], label: Label, *, at_once: bool = False, beside: Beside | None = None) -> End:
        """As `Transport.begin`."""
        if beside is not None:
            return beside.begin(self, moves, label)
        seconds = self._latency + bytes_to_others(moves, self._rank) / self._rate
        cycles = round(seconds * self._cycles_per_second)
        end = self._transport.begin(moves, label, at_once=at_once)
        if at_once:
            # Behind what unpacks: all of it runs in order, and so takes as long as if it stood before.
            torch.cuda._sleep(cycles)
            return end
        packed = torch.cuda.current_stream().record_event()
        self._stream.wait_event(packed)
        with torch.cuda.stream(self._stream):
            torch.cuda._sleep(cycles)
        arrived = self._stream.record_event()

        def finish() -> list[torch.Tensor]:
            torch.cuda.current_stream().wait_event(arrived)
            return end()

        return finish


def make_wire(stream: torch.cuda.Stream, transport: Transport, rank: int, cell: Cell) -> Wire:
    """That of the cell's rate."""
    return Wire(transport, rank, stream, rate=1e9 * cell.rate, latency=1e-6 * LATENCIES[cell.rate])


def measure_clock() -> float:
    """Cycles of the GPU in a second."""
    cycles = 20_000_000
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(cycles)  # its first launch loads it
    start.record()
    torch.cuda._sleep(cycles)
    stop.record()
    stop.synchronize()
    return cycles / (start.elapsed_time(stop) / 1000)


def makers(group: dist.ProcessGroup) -> dict[str, Make]:
    """The methods that communicate by switches alone, as other collectives take no time here; the bound first."""
    usual = makers_by_name(None)
    overlapped = {name: makers_by_name(make(group))["dsp_overlap"] for name, make in OVERLAPS.items()}
    others = {name: usual[name] for name in ("ulysses", "ulysses_overlap", "ulysses_flat")}
    return {BOUND: usual[BOUND], PLAIN: usual[PLAIN], **overlapped, **others}


def measure(
    cell: Cell,
    get_work: Callable[[], Work],
    group: dist.ProcessGroup,
    wire: Callable[[Transport, int, Cell], Transport],
    budget: Budget,
) -> Iterator[dict[str, Any]]:
    """A row for each method that can run here, the bound first; without the bound there are none.

    Methods go through ``wire``, made around the group's transport.
    """
    exchange = exchange_of(group)
    usual = exchange.transport
    methods = makers(group)
    bounds: dict[str, Run] = {}

    def compare(name: str) -> dict[str, list[Timing]]:
        method = methods[name](get_work(), group)
        runs = {**bounds, name: prepare(method, cell.mode)}
        if name == BOUND:
            bounds.update(runs)
        return take_turns(runs, method.work.device)

    try:
        for name in methods:
            timings = budget.run(cell, name, partial(compare, name))
            gc.collect()  # graphs, and what failed, hold memory of the card
            if timings is not None:
                yield row_of(cell, name, group.size(), timings)
            if not bounds:
                return
            if name == BOUND:
                # Only now: under work the GPU's clock, by which the wire measures time, is another one than at rest.
                exchange.transport = wire(usual, exchange.rank, cell)
    finally:
        exchange.transport = usual


def prepare(method: Method, mode: str) -> Run:
    """A training step of ``method`` without the synchronisation of gradients, run until all further ones are alike."""
    run = partial(step, method)
    while not method.settled:
        run()
    for _ in range(WARM_UP):
        run()
    return capture(run) if mode == "captured" else run


def step(method: Method) -> None:
    """Forward and backward."""
    with method.ready() as x:
        method.forward(x).backward(method.gradient)


def capture(run: Run) -> Run:
    """A CUDA graph of all that ``run`` does, on the current stream, which is not the default one; ``run`` is warm."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        run()
    graph.replay()
    return graph.replay


def take_turns(runs: dict[str, Run], device: torch.device) -> dict[str, list[Timing]]:
    """The timings of each run, of one round after another."""
    timings: dict[str, list[Timing]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            finish(device)
            begun = time.perf_counter()
            run()
            launched = time.perf_counter()
            finish(device)
            timings[name].append(Timing(time.perf_counter() - begun, launched - begun))
    return timings


def row_of(cell: Cell, method: str, ranks: int, timings: dict[str, list[Timing]]) -> dict[str, Any]:
    """Medians over rounds; the ratio is that of the two steps of a round."""
    rounds = zip(timings[method], timings[BOUND], strict=True)
    return {
        "shape": cell.shape,
        "ranks": ranks,
        "rate_gbytes": cell.rate,
        "method": method,
        "mode": cell.mode,
        "median_ms": 1000 * statistics.median(timing.step for timing in timings[method]),
        "ratio_to_bound": statistics.median(own.step / bound.step for own, bound in rounds),
        "host_ms": 1000 * statistics.median(timing.host for timing in timings[method]),
    }


def in_words(row: dict[str, Any]) -> str:
    """A line."""
    cell = Cell(row["mode"], row["shape"], row["rate_gbytes"])
    return (
        f"{cell}: {row['method']} {row['median_ms']:.2f} ms, {row['ratio_to_bound']:.3f} x bound, host {row['host_ms']:.2f} ms"
    )


def gains(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each rate: the step over the bound, in whole stages and with the best overlap, by mode and shape."""
    ratios = {(Cell(row["mode"], row["shape"], row["rate_gbytes"]), row["method"]): row["ratio_to_bound"] for row in rows}
    lines = []
    for rate in LATENCIES:
        found = []
        for cell in (cell for cell in cells() if cell.rate == rate):
            overlapped = {name: ratios[cell, name] for name in OVERLAPS if (cell, name) in ratios}
            plain = ratios.get((cell, PLAIN))
            if plain is not None and overlapped:
                best = min(overlapped, key=lambda name: overlapped[name])
                found.append(f"{cell.shape} {cell.mode} {plain:.2f} -> {overlapped[best]:.2f} ({best})")
        lines.append(f"{rate} GB/s, x bound, whole stages -> best overlap: {'; '.join(found) or 'not measured'}")
    return lines


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """Never half a file, whenever the job is ended."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(rows, indent=1))
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main())

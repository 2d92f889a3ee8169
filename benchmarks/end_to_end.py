"""What layer pairs of the video transformer cost with each method of sequence parallelism, on the network that is there.

    torchrun --standalone --nproc_per_node 2 benchmarks/end_to_end.py --check
    mpirun -np 4 python benchmarks/end_to_end.py --methods no_communication dsp ulysses
    python benchmarks/shaped_network.py --network 200mbit --ranks 4 -- python benchmarks/end_to_end.py --network 200mbit

An ordinary job, under any launcher. All methods run interleaved; the time of a repetition is its slowest rank's, and ratios
and differences are those of one repetition. "fwd" is the forward part of a training step, "fwdbwd" both parts without the
synchronisation of weight gradients, whose time stands beside.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from methods import NAMES, Method, Shape, Work, largest_error, makers_by_name, one_process
from rich.console import Console
from rich.table import Table
from torch import Tensor

import megatron_dsp as dsp
from megatron_dsp import launch
from megatron_dsp.errors import UsageError
from megatron_dsp.reshard import overlap_of

PRESETS = {
    "small": Shape(layers=2, hidden=256, heads=8, frames=16, tokens=256, batch_size=4),
    "720m": Shape(layers=17, hidden=1152, heads=16, frames=32, tokens=1024, batch_size=1),
}
MODES = ("fwd", "fwdbwd")
TOLERANCE = 1e-4  # of fp32 results
UNCHECKED = "no_communication"
WITHOUT = "no sequence parallelism"
KINDS = {"DSP": ["dsp", "dsp_overlap"], "Ulysses": ["ulysses", "ulysses_overlap"], WITHOUT: ["whole_sample"]}
FOR_INFORMATION = {"ulysses_flat", "megatron_tp", "megatron_sp", "whole_sample"}  # so slow that it shows in few repetitions
FEW_REPETITIONS = 2
PROBE_BYTES = {"small": 1 << 10, "large": 4 << 20}

Sent = dict[str, tuple[int, int]]  # of a mode: collectives and bytes of a run


class Figures(NamedTuple):
    """What was measured of one method; ``seconds`` are, of a mode, those of each repetition."""

    seconds: dict[str, list[float]]
    sent: Sent
    synchronisation: Synchronisation


class Synchronisation(NamedTuple):
    """Of the gradients of all weights."""

    milliseconds: float
    bytes: int


def main() -> int:
    arguments = parse()
    process = launch.start()
    size = arguments.sequence_parallel_size or process.world_size
    mesh = dsp.initialize({"sequence_parallel": {"size": size, "overlap": {"chunks": arguments.chunks}}})
    shape = shape_of(arguments)
    methods, sent = make(arguments, shape, mesh)
    if arguments.check:
        return check(methods)
    fabric = measure_groups(mesh)
    figures = measure(methods, sent, mesh, arguments.repetitions)
    if dist.get_rank() == 0:
        about = {"network": arguments.network, "ranks": process.world_size, "sequence_parallel_size": mesh.size("sequence")}
        rows = [{**about, **row} for row in rows_of(figures, shape)]
        show(fabric, rows)
        for name, method in methods.items():
            if method.overlap is not None and method.overlap.decisions:
                print(f"{name} runs by", *method.overlap.decisions)
        print(advice(rows, mesh.size("sequence")), flush=True)
        write(rows, arguments.output)
        if arguments.summary is not None:
            arguments.summary.write_text(json.dumps(summary(rows, shape)))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--preset", choices=PRESETS, default="small")
    for field in dataclasses.fields(Shape):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, help="instead of the preset's")
    parser.add_argument("--sequence-parallel-size", type=int, help="default: all ranks; the others are the data axis")
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=NAMES, metavar="METHOD", help=", ".join(NAMES))
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--chunks", type=_chunks, default="auto", help="of what overlaps: a number, or auto")
    parser.add_argument("--network", default="local", help="a name for the network, in the rows")
    parser.add_argument("--check", action="store_true", help="compare each method with one process, and measure nothing")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("benchmarks/out/end_to_end.json"),
        help="rows of other networks and rank numbers are kept",
    )
    parser.add_argument("--summary", type=Path, help="write compute and communication of the method dsp as JSON")
    arguments = parser.parse_args()
    if arguments.summary is not None and not {"no_communication", "dsp"} <= set(arguments.methods):
        parser.error("--summary is about no_communication and dsp: --methods must have both")
    return arguments


def _chunks(text: str) -> int | str:
    return text if text == "auto" else int(text)


def shape_of(arguments: argparse.Namespace) -> Shape:
    """The preset, with what the command line changes of it."""
    names = (field.name for field in dataclasses.fields(Shape))
    changed = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    return dataclasses.replace(PRESETS[arguments.preset], **changed)


def make(arguments: argparse.Namespace, shape: Shape, mesh: dsp.Mesh) -> tuple[dict[str, Method], dict[str, Sent]]:
    """The methods that can run here, run once, and what they send. The others are left out, with the reason."""
    work = Work(shape, mesh.device, sample=mesh.rank("data"))
    makers = makers_by_name(overlap_of(mesh.group("sequence")))
    methods, sent = {}, {}
    for name in dict.fromkeys(arguments.methods):
        try:
            method = makers[name](work, mesh.group("sequence"))
            while not method.settled:
                run(method)
            sent[name] = count(method)
        except (ImportError, UsageError, torch.OutOfMemoryError) as error:  # all ranks come to the same one
            if dist.get_rank() == 0:
                print(f"left out {name}: {error}", flush=True)
        else:
            methods[name] = method
    if not methods:
        raise UsageError("none of the methods can run here; choose others with --methods")
    return methods, sent


def check(methods: dict[str, Method]) -> int:
    """Print each method's largest error over one process; the exit status."""
    first = next(iter(methods.values()))
    right = one_process(first.work, first.group)
    errors = {name: largest_error(method, right) for name, method in methods.items() if name != UNCHECKED}
    if dist.get_rank() == 0:
        table = Table("method", "largest relative error", title=f"{dist.get_world_size()} ranks over one process")
        for name, error in errors.items():
            table.add_row(name, f"{error:.1e}", style="red" if error > TOLERANCE else "")
        Console().print(table)
    return int(any(error > TOLERANCE for error in errors.values()))


def measure_groups(mesh: dsp.Mesh) -> list[dict[str, Any]]:
    """Latency and bandwidth of each axis with more than one rank, by collectives of few and of many bytes."""
    return [
        {"axis": axis, "ranks": mesh.size(axis), "collective": name, **_latency_and_bandwidth(collective, mesh, axis)}
        for axis in ("sequence", "data")
        if mesh.size(axis) > 1
        for name, collective in (("all_to_all", _all_to_all), ("all_reduce", _all_reduce))
    ]


def _all_to_all(x: Tensor, group: dist.ProcessGroup) -> float:
    dist.all_to_all_single(torch.empty_like(x), x, group=group)
    return x.nbytes * (group.size() - 1) / group.size()


def _all_reduce(x: Tensor, group: dist.ProcessGroup) -> float:
    dist.all_reduce(x, group=group)
    return 2 * x.nbytes * (group.size() - 1) / group.size()


def _latency_and_bandwidth(
    collective: Callable[[Tensor, dist.ProcessGroup], float], mesh: dsp.Mesh, axis: str
) -> dict[str, float]:
    group, seconds, sent = mesh.group(axis), {}, {}
    for name, size in PROBE_BYTES.items():
        x = torch.zeros(size // 4 // group.size() * group.size(), device=mesh.device)
        sent[name] = collective(x, group)
        seconds[name] = statistics.median(timed(partial(collective, x, group), mesh.device) for _ in range(5))
    return {"microseconds": seconds["small"] * 1e6, "megabytes_per_second": sent["large"] / seconds["large"] / 1e6}


def measure(methods: dict[str, Method], sent: dict[str, Sent], mesh: dsp.Mesh, repetitions: int) -> dict[str, Figures]:
    """Run all methods in turn, so often, and time the synchronisation of their gradients."""
    seconds: dict[str, dict[str, list[float]]] = {name: {mode: [] for mode in MODES} for name in methods}
    for repetition in range(repetitions):
        for name, method in methods.items():
            if name in FOR_INFORMATION and repetition >= FEW_REPETITIONS:
                continue
            for mode, elapsed in run(method).items():
                seconds[name][mode].append(elapsed)
    figures: dict[str, Figures] = {}
    synchronisations: dict[tuple[int, dist.ProcessGroup], Synchronisation] = {}  # equal ones are measured once
    for name, method in methods.items():
        what = sum(weight.numel() for weight in method.weights.values()), method.gradient_group(mesh)
        if what not in synchronisations:
            synchronisations[what] = time_synchronisation(*what, mesh.device)
        figures[name] = Figures(seconds[name], sent[name], synchronisations[what])
    return figures


def run(method: Method) -> dict[str, float]:
    """A training step without the synchronisation of gradients; seconds of each mode. Ranks meet in the middle."""
    outputs: list[Tensor] = []
    with method.ready() as x:
        forward = timed(lambda: outputs.append(method.forward(x)), x.device)
        backward = timed(lambda: outputs.pop().backward(method.gradient), x.device)
    return {"fwd": forward, "fwdbwd": forward + backward}


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds from a common start until the slowest rank has done ``run``."""
    dist.barrier()
    finish(device)
    start = time.perf_counter()
    run()
    finish(device)
    elapsed = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
    return elapsed.item()


def finish(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def count(method: Method) -> Sent:
    """Collectives and bytes of a run of each mode, on the rank that sends most."""
    with method.ready() as x:
        with dsp.ledger() as moved:
            y = method.forward(x)
        forward = method.sent(moved)
        with dsp.ledger() as moved:
            y.backward(method.gradient)
    sent = torch.tensor([forward, [a + b for a, b in zip(forward, method.sent(moved), strict=True)]])
    dist.all_reduce(sent, op=dist.ReduceOp.MAX)
    return {mode: (calls, size) for mode, (calls, size) in zip(MODES, sent.tolist(), strict=True)}


def time_synchronisation(elements: int, group: dist.ProcessGroup, device: torch.device) -> Synchronisation:
    """One all-reduce of the gradients of all weights, in one flat buffer."""
    if group.size() == 1:
        return Synchronisation(0.0, 0)
    gradients = torch.zeros(elements, device=device)
    seconds = [timed(partial(dist.all_reduce, gradients, group=group), device) for _ in range(3)]
    return Synchronisation(statistics.median(seconds) * 1000, 2 * gradients.nbytes * (group.size() - 1) // group.size())


def rows_of(figures: dict[str, Figures], shape: Shape) -> list[dict[str, Any]]:
    """A row for each method and mode. What is relative to a method that was not run is None."""
    rows = []
    for name, of_method in figures.items():
        for mode in MODES:
            calls, sent = of_method.sent[mode]
            exposed = _paired(float.__sub__, figures, name, "no_communication", mode)
            rows.append(
                {
                    "method": name,
                    "mode": mode,
                    "median_ms": statistics.median(of_method.seconds[mode]) * 1000,
                    "bytes_per_rank_per_pair": sent // shape.layers,
                    "calls_per_pair": calls / shape.layers,
                    "exposed_ms": None if exposed is None else exposed * 1000,
                    "ratio_to_no_communication": _paired(float.__truediv__, figures, name, "no_communication", mode),
                    "ratio_to_dsp_overlap": _paired(float.__truediv__, figures, name, "dsp_overlap", mode),
                    "gradient_sync_ms": of_method.synchronisation.milliseconds,
                    "gradient_sync_bytes": of_method.synchronisation.bytes,
                    "shape": list(shape.activation),
                    "layers": shape.layers,
                    "heads": shape.heads,
                }
            )
    return rows


def _paired(
    compare: Callable[[float, float], float], figures: dict[str, Figures], name: str, other: str, mode: str
) -> float | None:
    """The median of comparisons with another method's time of the same repetition."""
    if other not in figures:
        return None
    return statistics.median(map(compare, figures[name].seconds[mode], figures[other].seconds[mode]))


def show(fabric: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    """What the groups can do, and a line for each method and mode."""
    console = Console(width=150)
    if fabric:
        table = Table("axis", "ranks", "collective", "latency, us", "sent, MB/s", title="mesh groups")
        for found in fabric:
            speed = f"{found['microseconds']:.0f}", f"{found['megabytes_per_second']:.0f}"
            table.add_row(found["axis"], str(found["ranks"]), found["collective"], *speed)
        console.print(table)
    first = rows[0]
    title = f"{first['layers']} pairs of {first['shape']} (T, B, S, C), {first['ranks']} ranks, network {first['network']}"
    by_name = {(row["method"], row["mode"]): row for row in rows}
    columns = "ms", "exposed ms", "/ no comm.", "/ dsp_overlap", "with sync", "MB a pair", "calls a pair", "sync ms", "sync MB"
    table = Table("mode", "method", *columns, title=title)
    for mode in MODES:
        for row in (row for row in rows if row["mode"] == mode):
            with_sync = _with_synchronisation(row, by_name.get(("dsp_overlap", mode))) if mode == "fwdbwd" else None
            table.add_row(
                mode,
                row["method"],
                f"{row['median_ms']:.0f}",
                _text(row["exposed_ms"], ".0f"),
                _text(row["ratio_to_no_communication"], ".2f"),
                _text(row["ratio_to_dsp_overlap"], ".2f"),
                _text(with_sync, ".2f"),
                f"{row['bytes_per_rank_per_pair'] / 1e6:.2f}",
                f"{row['calls_per_pair']:g}",
                f"{row['gradient_sync_ms']:.0f}",
                f"{row['gradient_sync_bytes'] / 1e6:.1f}",
            )
        table.add_section()
    console.print(table)


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _step_ms(row: dict[str, Any]) -> float:
    return row["median_ms"] + row["gradient_sync_ms"]


def _with_synchronisation(row: dict[str, Any], other: dict[str, Any] | None) -> float | None:
    """The ratio of whole steps."""
    return None if other is None else _step_ms(row) / _step_ms(other)


def advice(rows: list[dict[str, Any]], ranks: int) -> str:
    """Which kind of method to use here, with the figures that say so."""
    steps = {row["method"]: _step_ms(row) for row in rows if row["mode"] == "fwdbwd"}
    if "whole_sample" in steps:
        steps["whole_sample"] /= ranks  # a step is one of so many samples
    found = {}
    for kind, names in KINDS.items():
        of_kind = {name: steps[name] for name in names if name in steps}
        if of_kind:
            found[kind] = min(of_kind.values())
    if len(found) < 2:
        return f"nothing to choose from: measure methods of at least two of {', '.join(KINDS)}"
    best, *others = sorted(found, key=lambda kind: found[kind])
    condition = ""
    if best == WITHOUT:
        condition = f" as long as a sample fits on one rank and a step has {ranks} of them, and {others[0]} otherwise"
    figures = " and ".join(f"{found[kind]:.0f} with {kind}" for kind in others)
    return f"use {best}{condition}: {found[best]:.0f} ms a sample, the synchronisation of gradients included, against {figures}"


def summary(rows: list[dict[str, Any]], shape: Shape) -> dict[str, float]:
    """What `shaped_network.py` needs to balance a network: of forward and backward, of the plain method."""
    by_name = {row["method"]: row for row in rows if row["mode"] == "fwdbwd"}
    return {
        "compute_ms": by_name["no_communication"]["median_ms"],
        "exposed_ms": by_name["dsp"]["exposed_ms"],
        "sent_bytes": by_name["dsp"]["bytes_per_rank_per_pair"] * shape.layers,
    }


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """Put the rows in the place of those of the same network and ranks."""
    kept = json.loads(path.read_text()) if path.exists() else []
    place = rows[0]["network"], rows[0]["ranks"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([row for row in kept if (row["network"], row["ranks"]) != place] + rows, indent=1))


if __name__ == "__main__":
    launch.run(main)

"""What one switch costs, over the bare collective of the same bytes into kept buffers.

    torchrun --standalone --nproc_per_node 2 benchmarks/reshard.py
    mpirun -np 4 python benchmarks/reshard.py          # measures the transport "mpi" too

An ordinary job, on whatever network and device is there. All methods run interleaved, in a new order each time, and a ratio is
the median over repetitions of the ratio to the bare collective of the same repetition. The time of a repetition is its slowest
rank's.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

import megatron_dsp as dsp
from megatron_dsp import launch
from megatron_dsp.launch import start_deepspeed
from megatron_dsp.reshard.exchange import exchange_of
from megatron_dsp.reshard.transport.buffers import BufferPool
from megatron_dsp.reshard.transport.mpi_transport import MpiTransport

SHAPES = [(1, 16, 256, 1152), (2, 32, 1024, 512)]  # B, T, S, C
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DIRECTIONS = {"T to S": (1, 2), "S to T": (2, 1)}  # of [B, T, S, C]: the dim that becomes whole, the dim that is sharded
STORAGE = {0: 1, 1: 0, 2: 2}  # where dims B, T, S lie in our order [T, B, S, C]

Run = Callable[[], Any]


class Case:
    """One shape, dtype, direction and mode: what each method is to run, as a function without arguments."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, direction: str, backward: bool, mesh: dsp.Mesh):
        self.group, self.mpi_group = mesh.group("sequence"), mesh.group("data", "sequence")
        self.whole, self.split = DIRECTIONS[direction]
        self.size = shape[self.whole]
        self.backward = backward
        local = list(shape)
        local[self.whole] //= self.group.size()
        self.x = torch.randn(local, device=mesh.device).to(dtype).requires_grad_(backward)
        self.ours = self.x.detach().transpose(0, 1).contiguous().requires_grad_(backward)
        self.shard_bytes = self.x.numel() * self.x.element_size()
        # Written to: memory that never was is one page of zeros to those who read it, and faster than any other.
        self._buffers = torch.zeros_like(self.x).detach(), self.x.detach().clone()

    def methods(self) -> dict[tuple[str, str], Run]:
        """(method, transport) -> run. The bare collectives are named raw."""
        runs: dict[tuple[str, str], Run] = {
            ("raw", "torch"): self._raw,
            ("ours", "torch"): lambda: self._differentiate(self.ours, self._switch(self.group)),
            ("videosys", "torch"): lambda: self._differentiate(self.x, _ListAllToAll.apply(self.x, self)),
        }
        try:
            from deepspeed.sequence.layer import _SeqAllToAll

            start_deepspeed("cpu" if not torch.cuda.is_available() else "cuda")
            runs["deepspeed", "torch"] = lambda: self._differentiate(
                self.x, _SeqAllToAll.apply(self.group, self.x, self.split, self.whole, 0)
            )
        except ImportError as error:
            _skip(f"deepspeed: {error}")
        try:
            from yunchang.comm.all_to_all import SeqAllToAll4D

            runs["yunchang", "torch"] = lambda: self._differentiate(
                self.x, SeqAllToAll4D.apply(self.group, self.x, self.split, self.whole, False)
            )
        except ImportError as error:
            _skip(f"yunchang: {error}; pip install --no-deps yunchang")
        if exchange_of(self.mpi_group).transport.name == "mpi":
            runs["raw", "mpi"] = self._raw_mpi
            runs["ours", "mpi"] = lambda: self._differentiate(self.ours, self._switch(self.mpi_group))
        return runs

    def _switch(self, group: dist.ProcessGroup) -> Tensor:
        gather, split = STORAGE[self.whole], STORAGE[self.split]
        return dsp.switch(self.ours, gather=gather, split=split, size=self.size, group=group)

    def _raw(self) -> None:
        for _ in range(1 + self.backward):
            dist.all_to_all_single(self._buffers[0].view(-1), self._buffers[1].view(-1), group=self.group)

    def _raw_mpi(self) -> None:
        transport = exchange_of(self.mpi_group).transport
        buffers = [buffer.view(torch.uint8).numpy() for buffer in self._buffers]
        for _ in range(1 + self.backward):
            transport._comm.Alltoall(*buffers)

    def _differentiate(self, x: Tensor, y: Tensor) -> Tensor:
        if self.backward:
            x.grad = None
            y.backward(y.detach())
        return y


class _ListAllToAll(torch.autograd.Function):
    """The way of the paper's own code: a list of contiguous pieces, an all-to-all of lists, and a concatenation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, case: Case) -> Tensor:
        ctx.case = case
        return _list_all_to_all(x, case.split, case.whole, case.group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _list_all_to_all(gradient, ctx.case.whole, ctx.case.split, ctx.case.group), None


def _list_all_to_all(x: Tensor, scatter: int, gather: int, group: dist.ProcessGroup) -> Tensor:
    pieces = [piece.contiguous() for piece in x.tensor_split(group.size(), scatter)]
    received = [torch.empty_like(pieces[0]) for _ in pieces]
    dist.all_to_all(received, pieces, group=group)
    return torch.cat(received, dim=gather).contiguous()


def measure(case: Case, repetitions: int) -> list[dict[str, Any]]:
    """Median time, median ratio to the bare collective, and peak extra memory in shards, of each method."""
    runs = case.methods()
    extra = {method: _extra_shards(run, case) for method, run in runs.items()}
    times: dict[tuple[str, str], list[float]] = {method: [] for method in runs}
    order, shuffle = list(runs), random.Random(0).shuffle  # in turn each finds the caches as another one left them
    for _ in range(repetitions):
        shuffle(order)
        for method in order:
            times[method].append(_time(runs[method], case.x.device))
    return [
        {
            "method": method,
            "transport": transport,
            "median_ms": statistics.median(measured) * 1000,
            "ratio_to_raw": statistics.median(mine / raw for mine, raw in zip(measured, times["raw", transport], strict=True)),
            "extra_shards": extra[method, transport],
        }
        for (method, transport), measured in times.items()
    ]


def _time(run: Run, device: torch.device) -> float:
    dist.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    elapsed = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(elapsed, op=dist.ReduceOp.MAX)
    return elapsed.item()


def _extra_shards(run: Run, case: Case) -> float:
    """Peak memory of a run beyond its output (and beyond its gradient), in shards. The bare collective's is 0 by definition."""
    # As if it were the first of all runs: memory that is kept counts too.
    case.x.grad = case.ours.grad = None
    for group in (case.group, case.mpi_group):
        exchange_of(group).transport.buffers = BufferPool()
    with torch.profiler.profile(profile_memory=True) as profile:
        result = run()
    if result is None:
        return 0.0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak / case.shard_bytes - (2 if case.backward else 1)


def _skip(reason: str) -> None:
    if dist.get_rank() == 0:
        print(f"left out {reason}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/out/reshard.json"), help="rows of other rank numbers are kept"
    )
    parser.add_argument("--repetitions", type=int, default=15)
    arguments = parser.parse_args()
    process = launch.start()
    size = process.world_size
    mesh = dsp.initialize({"sequence_parallel": {"size": size, "transport": "torch"}})
    if process.launcher == "mpirun" and mesh.device.type == "cpu":
        group = mesh.group("data", "sequence")  # the same ranks, with a transport of its own
        exchange_of(group).transport = MpiTransport(group)
    rows = []
    for shape in SHAPES:
        for name, dtype in DTYPES.items():
            for direction in DIRECTIONS:
                for mode in ("fwd", "fwdbwd"):
                    case = Case(shape, dtype, direction, mode == "fwdbwd", mesh)
                    about = {"ranks": size, "shape": list(shape), "dtype": name, "direction": direction, "mode": mode}
                    rows += [{**row, **about} for row in measure(case, arguments.repetitions)]
    if dist.get_rank() == 0:
        show(rows)
        kept = json.loads(arguments.output.read_text()) if arguments.output.exists() else []
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        rows = [row for row in kept if row["ranks"] != size] + rows
        arguments.output.write_text(json.dumps(rows, indent=1))


def show(rows: list[dict[str, Any]]) -> None:
    """A table of the ratios, one line a cell, and the medians of the grid."""
    methods = list(dict.fromkeys((row["method"], row["transport"]) for row in rows))
    table = Table("cell", *(f"{method}\n{transport}" for method, transport in methods), title="time / raw (extra shards)")
    cells: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
    for row in rows:
        cell = f"{row['shape']} {row['dtype']} {row['direction']} {row['mode']}"
        cells.setdefault(cell, {})[row["method"], row["transport"]] = row
    for cell, by_method in cells.items():
        table.add_row(cell, *(f"{by_method[m]['ratio_to_raw']:.2f} ({by_method[m]['extra_shards']:.1f})" for m in methods))
    medians = [statistics.median(by_method[m]["ratio_to_raw"] for by_method in cells.values()) for m in methods]
    table.add_row("median", *(f"{median:.2f}" for median in medians), style="bold")
    Console(width=160).print(table)


if __name__ == "__main__":
    launch.run(main)

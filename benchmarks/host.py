"""What a primitive costs the host, beside the least that a switch can be: an autograd function with a copy and an all-to-all.

    python benchmarks/host.py

One process as a rank of worlds that are not there (torch's fake process group, whose collectives send nothing), on tensors so
small that only the host's work counts. Switches take the route of CUDA tensors: an all-to-all. On a GPU these microseconds are
what it may have to wait for. Several tensors stand beside as many calls of the bare function. Runs are interleaved; a ratio is
the median over rounds of the ratio to the bare function in the same round. The fake group's own collectives take longer the
more ranks there are where it is given lists or sizes (uneven shards, gathers): python_calls and operators tell it apart.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

import megatron_dsp as dsp
from megatron_dsp.layout import shard_ranges
from megatron_dsp.reshard import StageName
from megatron_dsp.reshard.exchange import exchange_of
from megatron_dsp.reshard.stages import legs
from megatron_dsp.reshard.stages.schedule import chunk_ranges
from megatron_dsp.reshard.transport.torch_transport import AllToAll
from megatron_dsp.training.fake_world import fake_world

RANKS = (8, 16, 64)
FRAMES, TOKENS, CHANNELS = 2, 64, 16  # of rank 0's shard [T, B, S, C], with B = 1
CHUNKS = 2  # of a shard of two frames, on legs

Run = Callable[[], Any]


class Bare(torch.autograd.Function):
    """A switch from dim 0 to dim 2 as one copy and one all-to-all, and the way back: even shards, nothing is checked."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ranks = group, group.size()
        t, b, s, c = x.shape
        sent = x.new_empty((ranks, t, b, s // ranks, c))
        sent.copy_(x.view(t, b, ranks, s // ranks, c).permute(2, 0, 1, 3, 4))
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        return received.view(ranks * t, b, s // ranks, c)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ranks = ctx.group.size()
        t, b, s, c = gradient.shape
        received = gradient.new_empty((ranks, t // ranks, b, s, c))
        dist.all_to_all_single(received, gradient.view(received.shape), group=ctx.group)
        x = gradient.new_empty((t // ranks, b, ranks, s, c))
        x.copy_(received.permute(1, 2, 0, 3, 4))
        return x.view(t // ranks, b, ranks * s, c), None


def operations(group: dist.ProcessGroup) -> Iterator[tuple[dict[str, Any], Run, list[Tensor]]]:
    """What is measured: about it, a call, which gives one tensor or several, and the tensors whose gradients backward finds."""
    ranks = group.size()
    for even in (True, False):
        frames, tokens = FRAMES * ranks - (not even), TOKENS + (not even)  # rank 0 has as many frames of both
        x, y, z = (torch.randn(FRAMES, 1, tokens, CHANNELS, requires_grad=True) for _ in range(3))

        def switch(*xs: Tensor, frames: int = frames) -> Any:
            return dsp.switch(xs if len(xs) > 1 else xs[0], gather=0, split=2, size=frames, group=group)

        def gather(x: Tensor = x, frames: int = frames) -> Tensor:
            return dsp.gather(x, dim=0, size=frames, group=group)

        def mean(x: Tensor = x, frames: int = frames) -> Tensor:
            return dsp.mean(x, dim=0, size=frames, group=group)

        # The first of two chunks of a shard, on its way into the whole.
        where = chunk_ranges(shard_ranges(FRAMES * ranks, ranks), CHUNKS)[0], shard_ranges(tokens, ranks)
        chunk = torch.randn(FRAMES // CHUNKS, 1, tokens, CHANNELS, requires_grad=True)

        def leg(chunk: Tensor = chunk, where: Any = where) -> Tensor:
            landings = legs.Landing(), legs.Landing()
            way = legs.Leg(exchange_of(group), 0, 2, FRAMES * ranks, *where, *landings, StageName("temporal", 0))
            return legs.end([way], list(legs.begin([way], chunk)))

        def about(operation: str, tensors: int = 1, even: bool = even) -> dict[str, Any]:
            return {"operation": operation, "ranks": ranks, "even": even, "tensors": tensors}

        yield about("switch"), lambda x=x, switch=switch: switch(x), [x]
        yield about("switch", 3), lambda xs=(x, y, z), switch=switch: switch(*xs), [x, y, z]
        yield about("gather"), gather, [x]
        yield about("mean"), mean, [x]
        yield about("leg"), leg, [chunk]


def with_backward(forward: Run, inputs: list[Tensor]) -> Run:
    """Forward and backward, with gradients of the results that are there before."""
    results = forward()
    results = [results] if isinstance(results, Tensor) else list(results)
    gradients = [torch.randn_like(result) for result in results]

    def run() -> None:
        for x in inputs:
            x.grad = None
        made = forward()
        torch.autograd.backward([made] if isinstance(made, Tensor) else list(made), gradients)

    return run


def measure(run: Run, bare: Run, rounds: int, calls: int) -> tuple[float, float, float]:
    """Microseconds a call of both, and the ratio: medians over rounds."""
    times: tuple[list[float], list[float]] = ([], [])
    for each in (run, bare):
        _time(each, 5 * calls)
    for _ in range(rounds):
        for of_one, each in zip(times, (run, bare), strict=True):
            of_one.append(_time(each, calls))
    mine, theirs = (1e6 * statistics.median(of_one) for of_one in times)
    return mine, theirs, statistics.median(a / b for a, b in zip(*times, strict=True))


def _time(run: Run, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def count_python_calls(run: Run) -> int:
    """Calls of Python functions, torch's own among them."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count - 1  # of ``run`` itself


def count_operators(run: Run) -> int:
    """Operators that torch dispatches, those that others call among them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return sum("::" in event.name and not event.is_user_annotation for event in profile.events())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/out/host.json"))
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--calls", type=int, default=50, help="of a round")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for ranks in RANKS:
        with fake_world(ranks, rank=0):
            group = dist.group.WORLD
            assert group is not None
            exchange_of(group).transport._find_route = lambda moves: AllToAll(moves, 0)  # type: ignore[attr-defined]
            x = torch.randn(FRAMES, 1, TOKENS, CHANNELS)
            gc.disable()  # of many calls one would pay for all
            for about, forward, inputs in operations(group):
                xs = [x.detach().requires_grad_() for _ in inputs]

                def bare(xs: list[Tensor] = xs, group: dist.ProcessGroup = group) -> list[Tensor]:
                    return [Bare.apply(x, group) for x in xs]

                for mode, run, beside in (
                    ("fwd", forward, bare),
                    ("fwdbwd", with_backward(forward, inputs), with_backward(bare, xs)),
                ):
                    us, bare_us, ratio = measure(run, beside, arguments.rounds, arguments.calls)
                    counts = {"python_calls": count_python_calls(run), "operators": count_operators(run)}
                    rows.append({**about, "mode": mode, "us": us, "bare_us": bare_us, "ratio": ratio, **counts})
            gc.enable()
    show(rows)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(rows, indent=1))


def show(rows: list[dict[str, Any]]) -> None:
    """A line for each operation and mode, with a column for each number of ranks."""
    table = Table(
        "operation", "shards", "tensors", "mode", title="us on the host / us of the bare function = ratio (operators)"
    )
    cells: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for row in rows:
        key = row["operation"], "even" if row["even"] else "uneven", row["tensors"], row["mode"]
        cells.setdefault(key, {})[row["ranks"]] = row
    for ranks in RANKS:
        table.add_column(f"{ranks} ranks", justify="right")
    for key, by_ranks in cells.items():
        texts = (
            f"{row['us']:.0f} / {row['bare_us']:.0f} = {row['ratio']:.2f} ({row['operators']})" for row in by_ranks.values()
        )
        table.add_row(*map(str, key), *texts)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()

"""Thousands of switches over changing shapes, several graphs in flight: gradients stay right, memory and files do not grow.

Takes the number of switches; prints "kept" with the growth.
"""

import ctypes
import os
import random
import sys
from pathlib import Path

import torch

import megatron_dsp as dsp
from megatron_dsp import launch
from megatron_dsp.reshard.exchange import exchange_of

libc = ctypes.CDLL(None)
SWITCHES_A_GRAPH = 4  # two forward, two backward
# The whole tensor is [T, 2, S, C]: messages of a few bytes, staged ones, and runs that travel in place.
SHAPES = [(T, S, C) for C in (1, 48, 5000) for T in range(1, 12) for S in range(1, 9)] + [(3, 6, 60_000), (4, 5, 60_000)]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def graph(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A leaf, and what two switches make of it: twice its square."""
    T, S, C = random.choice(SHAPES)
    dtype = random.choice([torch.float32, torch.float64, torch.bfloat16])
    x = dsp.split(torch.randn(T, 2, S, C, generator=generator).to(dtype), dim=0).clone().requires_grad_()
    y = dsp.switch(x, gather=0, split=2, size=T)
    return x, dsp.switch(2 * y * y, gather=2, split=0, size=S)


def main() -> None:
    size, graphs = launch.start().world_size, int(sys.argv[1]) // SWITCHES_A_GRAPH
    mesh = dsp.initialize({"sequence_parallel": {"size": size}})
    random.seed(0)
    generator = torch.Generator().manual_seed(0)
    in_flight: list[tuple[torch.Tensor, torch.Tensor]] = []
    held = []  # resident bytes and open files after each third of the run; the first one has seen all that there is
    with dsp.ledger() as moved:
        for step in range(graphs):
            in_flight.append(graph(generator))
            last = step % (graphs // 3) == graphs // 3 - 1
            while len(in_flight) == 4 or (last and in_flight):
                x, z = in_flight.pop(random.randrange(len(in_flight)))
                assert torch.equal(z, 2 * x * x)
                (z * z).sum().backward()
                assert torch.equal(x.grad, (2 * 2 * x * x) * 2 * x * 2), f"graph {step}: wrong gradient"
                del x, z
            if last:
                libc.malloc_trim(0)  # what malloc keeps for itself is not ours to answer for
                held.append((resident_bytes(), open_files()))
    growth = [last - first for first, last in zip(held[0], held[2], strict=True)]
    assert growth[0] < 8 << 20, f"{growth[0]:,} bytes more"
    assert growth[1] == 0, f"{growth[1]} files more"
    name = exchange_of(mesh.group("sequence")).transport.name
    print(f"kept: {moved.calls} switches through {name}, {growth[0]:,} bytes and {growth[1]} files more", flush=True)


launch.run(main)

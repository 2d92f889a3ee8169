"""Switches and chunks over NCCL, one rank a GPU: the bits of slices, and the numbers of one process."""

from __future__ import annotations

import random

import pytest
import torch
import torch.distributed as dist
from one_card import NO_PROFILER, gpu_events
from torch import Tensor
from work import CHAIN, compare_stages, compare_video, missing

import megatron_dsp as dsp
from megatron_dsp.layout import Layout
from megatron_dsp.models.block_runner import DIMS
from megatron_dsp.reshard import FixedOverlap, Region, Stage, set_overlap

MISSING = missing(2)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(MISSING is not None, reason=MISSING or "")]

SIZES = sorted({2, max(2, min(torch.cuda.device_count(), 8))})
OVERLAPS = {  # along what, and how much smaller each chunk is than the one before
    "whole stages": None,
    "sharded": ("sharded", 1.0),
    "shrinking": ("sharded", 0.5),
    "batch": ("batch", 1.0),
    "time": ("time", 1.0),
    "space": ("space", 1.0),
}
DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
]


def _group() -> tuple[dist.ProcessGroup, torch.device]:
    """NCCL for GPUs beside Gloo for the CPU, as a mesh's groups have it: the pool's own world is of Gloo alone."""
    device = torch.device("cuda", dist.get_rank())
    torch.cuda.set_device(device)
    return dist.new_group(backend="cpu:gloo,cuda:nccl"), device


def _overlap(name: str) -> FixedOverlap | None:
    found = OVERLAPS[name]
    return None if found is None else FixedOverlap(3, along=found[0], shrink=found[1])


def _bits(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def _random_bits(shape: list[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """NaN of all kinds, minus zero, ...; of booleans, both."""
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 256, [count], dtype=torch.uint8, generator=generator).view(dtype).view(shape)


def _movements(seeds: range) -> None:
    group, device = _group()
    rank, size = group.rank(), group.size()
    for seed in seeds:
        draw = random.Random(seed)
        shape = [draw.randint(0, 9) for _ in range(draw.randint(2, 5))]
        gather, split = draw.sample(range(len(shape)), 2)
        order = draw.sample(range(len(shape)), len(shape))  # of the dims in memory
        dtype = draw.choice(DTYPES)
        stored = _random_bits([shape[dim] for dim in order], dtype, torch.Generator().manual_seed(seed))
        whole = stored.to(device).permute([order.index(dim) for dim in range(len(shape))])
        x = dsp.split(whole, dim=gather, group=group)
        y = dsp.switch(x, gather=gather, split=split, size=shape[gather], group=group)
        back = dsp.gather(y, dim=split, size=shape[split], group=group)
        about = f"seed {seed}: {shape} {dtype}, {gather} to {split}"
        right = whole.tensor_split(size, split)[rank]
        assert y.shape == right.shape, about
        assert torch.equal(_bits(y), _bits(right)), about
        assert torch.equal(_bits(back), _bits(whole)), about


@pytest.mark.parametrize("size", SIZES)
def test_every_switch_is_bitwise_the_slice(ranks, size):
    ranks(size, _movements, range(200))


def _streams_of_a_switch() -> dict[str, int]:
    """Each kernel and copy of a whole switch that packs and unpacks, and the stream it runs on."""
    group, device = _group()
    size = group.size()
    x = torch.randn(4, 3, 2 * size, 64, device=device)
    events = gpu_events(lambda: dsp.switch(x, gather=1, split=2, size=3 * size, group=group))
    return {event["name"]: event["args"]["stream"] for event in events}


@pytest.mark.parametrize("size", SIZES)
def test_a_whole_switch_runs_on_one_stream(ranks, size):
    for found in ranks(size, _streams_of_a_switch):
        if not found:
            pytest.skip(NO_PROFILER)
        assert any("nccl" in name.lower() for name in found), found
        assert len(set(found.values())) == 1, found


def _chunks_of_bits(name: str) -> None:
    group, device = _group()
    sizes = 4 * group.size() + 1, 3, 4 * group.size() + 2, 5
    whole = _random_bits(list(sizes), torch.float64, torch.Generator().manual_seed(0)).to(device)

    def run() -> Tensor:
        region = Region(Layout(DIMS, sizes, sharded="time"), group)
        x = whole.tensor_split(group.size(), 0)[group.rank()].contiguous()
        return region.run([Stage(torch.clone, sharded) for sharded in CHAIN], x, independent="batch")

    set_overlap(group, None)
    plain = run()
    set_overlap(group, _overlap(name))
    with dsp.ledger() as moved:
        chunked = run()
    assert moved.calls > len(CHAIN) - 1
    assert torch.equal(_bits(chunked), _bits(plain))
    assert torch.equal(_bits(chunked), _bits(whole.tensor_split(group.size(), 2)[group.rank()]))


@pytest.mark.parametrize("name", list(OVERLAPS)[1:])
@pytest.mark.parametrize("size", SIZES)
def test_chunks_move_the_bits_that_whole_stages_move(ranks, size, name):
    ranks(size, _chunks_of_bits, name)


def _stages(name: str, cycles: int) -> None:
    compare_stages(*_group(), _overlap(name), cycles)


@pytest.mark.parametrize("cycles", [0, 20_000_000], ids=["at once", "with late stages"])
@pytest.mark.parametrize("name", OVERLAPS)
@pytest.mark.parametrize("size", SIZES)
def test_outputs_and_gradients_are_those_of_one_process(ranks, size, name, cycles):
    ranks(size, _stages, name, cycles)


def _video(name: str) -> None:
    compare_video(*_group(), _overlap(name))


@pytest.mark.parametrize("name", OVERLAPS)
@pytest.mark.parametrize("size", SIZES)
def test_video_transformer(ranks, size, name):
    ranks(size, _video, name)

"""Stages in chunks against whole stages and one process: random schedules, divergence, inference, memory, and training."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import replace

import pytest
import test_deepspeed_engine
import torch
import torch.distributed as dist
from overlap_cases import (
    HOW,
    Case,
    Interrupted,
    InterruptionError,
    Part,
    compare,
    compare_to_one_process,
    forward,
    give_up_pass,
    overlap_of_case,
    run_case,
    run_chunked,
    same,
    small,
)
from overlap_transports import unraisable
from torch import nn

import megatron_dsp as dsp
from megatron_dsp.layout import Layout
from megatron_dsp.models.video_dit import VideoDiT, VideoDiTConfig
from megatron_dsp.reshard import FixedOverlap, Region, Stage, set_overlap
from megatron_dsp.reshard.agreement import Agreement
from megatron_dsp.reshard.exchange import exchange_of
from megatron_dsp.reshard.transport.buffers import BufferPool


def _random_schedules(seeds: range, ends: bool = False) -> tuple[int, int]:
    """How many cases were cut, and how many chunks were computed, or of ends moved, beyond those of whole stages."""
    group = dist.group.WORLD
    cut = more = 0
    for seed in seeds:
        case = (Case.random_with_ends if ends else Case.random)(seed, group.size())
        torch.manual_seed(seed)
        parts = [Part(case, number) for number in range(len(case.chain))]
        set_overlap(group, None)
        plain = run_case(case, parts, group)
        set_overlap(group, overlap_of_case(case))
        chunked = run_case(case, parts, group)
        compare(case, parts, chunked, plain)
        # A region that is computed again stops where no more is needed, which may be before a switch that is within a stage.
        stops_earlier = ends and case.around and case.checkpointed
        assert chunked.sent == plain.sent or (stops_earlier and chunked.sent < plain.sent), case
        if case.dtype == torch.float64 and case.kind != "identity":
            compare_to_one_process(case, parts, [chunked, plain])
        extra = chunked.calls - plain.calls if ends else len(chunked.seen[0]) - len(plain.seen[0])
        more += extra
        cut += extra > 0
    return cut, more


# 500 schedules, of which `make test` runs a quarter.
@pytest.mark.parametrize("block", [0, *(pytest.param(block, marks=pytest.mark.long) for block in range(1, 4))])
@pytest.mark.parametrize(("size", "cases"), [(2, 50), (3, 45), (4, 30)])
def test_random_schedules(ranks, size, cases, block):
    seeds = range(1000 * size + cases * block, 1000 * size + cases * (block + 1))
    for cut, more in ranks(size, _random_schedules, seeds):
        assert cut > 0.6 * cases
        assert more > 2 * cases


# The same of ends: 500, of which `make test` runs an eighth.
@pytest.mark.parametrize("block", [0, *(pytest.param(block, marks=pytest.mark.long) for block in range(1, 8))])
@pytest.mark.parametrize(("size", "cases"), [(2, 25), (3, 22), (4, 16)])
def test_random_schedules_of_ends(ranks, size, cases, block):
    seeds = range(1000 * size + cases * block, 1000 * size + cases * (block + 1))
    for cut, more in ranks(size, _random_schedules, seeds, True):
        assert cut > 0.3 * cases  # on 4 ranks many a dim is too small
        assert more > 2 * cases


def _checked_collectives(every: int, odd_chunks: int) -> str:
    group = dist.group.WORLD
    exchange = exchange_of(group)
    exchange.agreement = Agreement(group, every)
    for how in HOW:
        case, parts = small(how, sizes=(7, 3, 8))
        compare(case, parts, run_chunked(case, parts), run_case(case, parts, group))
    assert exchange.agreement._count > 6 * len(HOW)
    case, parts = small(sizes=(7, 3, 8))
    try:
        run_chunked(replace(case, chunks=odd_chunks if exchange.rank == 1 else 2), parts)
    except dsp.UsageError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("every", [1, 4])
def test_check_collectives_with_chunks(ranks, every):
    assert ranks(3, _checked_collectives, every, 2) == [""] * 3


def test_a_rank_with_other_chunks_is_named(ranks):
    for message in ranks(3, _checked_collectives, 1, 1):
        assert "rank 1 came to collective" in message


def _inference(mode: str) -> None:
    for how in HOW:
        case, parts = small(how)
        group = dist.group.WORLD
        x = case.shard(case.tensors(2, 1, 1)[0], "time")
        expected = forward(case, parts, Region(case.layout("time"), group), [], x)
        set_overlap(group, overlap_of_case(case))
        seen: list[tuple[object, ...]] = []
        with getattr(torch, mode)(), dsp.ledger() as moved:
            y = forward(case, parts, Region(case.layout("time"), group), seen, x)
        set_overlap(group, None)
        assert moved.calls == 6
        assert not y.requires_grad
        assert y.is_inference() == (mode == "inference_mode")
        same(y, expected.detach(), case, "output")


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_inference(ranks, mode):
    ranks(2, _inference, mode)


def _raise_in(mode: str, size: int) -> list[str]:
    """Errors of destructors, after stages have failed in the middle of their chunks; the group goes on to be used."""
    with unraisable() as errors:
        for how in HOW:
            case, parts = small(how, sizes=(2 * size + 1, 3, 3 * size))
            plain = run_case(case, parts, dist.group.WORLD)
            for give_up in ("forward", "backward", "checkpoint"):
                if mode == "enable_grad":
                    give_up_pass(case, parts, give_up)
                elif give_up == "forward":
                    _give_up_inference(case, parts, mode)
                compare(case, parts, run_chunked(case, parts), plain)
    return errors


def _give_up_inference(case: Case, parts: list[Part], mode: str) -> None:
    interrupted = 2 if case.along == "time" and case.cut == "stages" else 1
    stages = [Interrupted(part, backward=False) if part.number == interrupted else part for part in parts]
    x = case.shard(case.tensors(2, 1, 1)[0], "time")
    set_overlap(dist.group.WORLD, overlap_of_case(case))
    with pytest.raises(InterruptionError), getattr(torch, mode)():
        forward(case, stages, Region(case.layout("time"), dist.group.WORLD), [], x)
    set_overlap(dist.group.WORLD, None)


@pytest.mark.parametrize(("size", "mode"), [(2, "no_grad"), (2, "inference_mode"), (2, "enable_grad"), (3, "enable_grad")])
def test_a_group_is_usable_after_a_stage_has_failed(ranks, size, mode):
    assert ranks(size, _raise_in, mode, size) == [[]] * size


def _sharded_batch() -> None:
    """The dim that no stage mixes is sharded by one of them."""
    for chain in (("batch", "time"), ("time", "batch", "time"), ("batch", "space", "batch")):
        for along in (*dict.fromkeys(chain), "sharded", None):
            for batch in (4, 7):
                case, parts = small(along=along, chain=chain, sizes=(6, batch, 4), channels=(2,) * (len(chain) + 1))
                plain = run_case(case, parts, dist.group.WORLD)
                compare(case, parts, run_chunked(case, parts), plain)


def test_the_independent_dim_may_be_sharded_by_a_stage(ranks):
    ranks(2, _sharded_batch)


# Peak memory beyond that of whole stages, in shards, in 4 equal chunks on 2 ranks. The pool's is what it keeps, too.
EXTRA = {"sharded": (0.25, 0.0), "time": (0.25, 0.0), "space": (0.5, 0.4), "batch": (1.15, 0.0)}


def _peak(overlap: FixedOverlap | None, pooled: bool) -> float:
    """The most memory at a time that forward and backward of two stages take, or what of the pool's was in use; in shards."""
    group = dist.group.WORLD
    exchange = exchange_of(group)
    T, B, S, C = 64, 4, 64, 32
    stages = [Stage(nn.Linear(C, C), sharded) for sharded in ("time", "space")]
    x = torch.randn(T // group.size(), B, S, C, requires_grad=True)
    weight = torch.randn(T, B, S // group.size(), C)
    pool = exchange.transport.buffers = BufferPool()
    if not pooled:
        pool._LEAST = x.nbytes * group.size()  # none is kept, which the profiler would take for memory in use
    set_overlap(group, overlap)
    with torch.profiler.profile(profile_memory=True) as profile:
        region = Region(Layout(("time", "batch", "space", "channels"), (T, B, S, C), "time"), group)
        region.run(stages, x, independent="batch").backward(weight)
    set_overlap(group, None)
    if pooled:
        return pool._most_in_use / x.nbytes
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes)) / x.nbytes


def _extra_memory() -> dict[str, tuple[float, ...]]:
    plain = [_peak(None, pooled) for pooled in (False, True)]
    return {
        along: tuple(_peak(FixedOverlap(4, along=along, shrink=1.0), pooled) - plain[pooled] for pooled in (False, True))
        for along in EXTRA
    }


def test_peak_memory_of_chunks(ranks):
    for measured in ranks(2, _extra_memory):
        for along, extra in measured.items():
            assert all(a <= b + 0.02 for a, b in zip(extra, EXTRA[along], strict=True)), (along, extra)


ENGINE = VideoDiTConfig(layers=2, hidden=32, heads=2, conditioning_size=6, patch=(1, 2, 2))


def _train(zero: int, overlap: FixedOverlap | None) -> tuple[list[float], list[str]]:
    """Losses of 5 steps through DeepSpeed, and the schedules that were run."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # DeepSpeed calls collectives by their old names
    engine_case = test_deepspeed_engine.Case(sequence=2, data=1, zero=zero, T=7, H=8, W=6)
    config = {
        "train_micro_batch_size_per_gpu": engine_case.batch,
        "zero_optimization": {"stage": zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "sequence_parallel": {"size": 2},
    }
    mesh = dsp.initialize(config)
    group = mesh.group("sequence")
    set_overlap(group, overlap)
    torch.manual_seed(0)
    model = VideoDiT(ENGINE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    engine, *_ = dsp.deepspeed_initialize(model=model, optimizer=optimizer, config=config, mesh=mesh)
    frames = range(*dsp.shard_range(engine_case.T, 2, group.rank()))
    losses = []
    for step in range(5):
        loss = test_deepspeed_engine._loss(engine, test_deepspeed_engine._batch(engine_case, step), frames, group)
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item())
    engine.destroy()
    return losses, overlap.decisions if overlap else []


@pytest.mark.parametrize("zero", [2, pytest.param(3, marks=pytest.mark.long)])
def test_training_with_zero_in_chunks_equals_whole_stages(ranks, zero):
    plain, _ = ranks(2, _train, zero, None)[0]
    assert len(set(plain)) == 5
    for overlap, text in (
        (FixedOverlap(3, along="sharded", shrink=1.0), "3 chunks of time, 3 chunks of space"),
        (FixedOverlap(3, along="batch", cut="stages"), "2 chunks of batch"),
        (FixedOverlap(3), "3 chunks of space at both ends of switches"),
    ):
        for losses, decisions in ranks(2, _train, zero, overlap):
            assert decisions == [f"{text}: as asked for"]
            torch.testing.assert_close(losses, plain, rtol=1e-6, atol=0)

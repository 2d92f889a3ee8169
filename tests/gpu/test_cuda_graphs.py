"""Captured passes on GPUs: the same training as without, on one card, and with collectives in the graphs on several."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from work import assert_close, missing

import megatron_dsp as dsp
from megatron_dsp.models.video_dit import VideoDiT, VideoDiTConfig
from megatron_dsp.reshard import FixedOverlap, set_overlap

ONE, TWO = missing(1), missing(2)
pytestmark = pytest.mark.gpu
needs_one = pytest.mark.skipif(ONE is not None, reason=ONE or "")
needs_two = pytest.mark.skipif(TWO is not None, reason=TWO or "")

CONFIG = VideoDiTConfig(layers=2, hidden=64, heads=4, conditioning_size=6, patch=(1, 2, 2))
SHAPES = ((8, 8), (5, 12))  # frames and rows; they take turns


def make_models(device: torch.device, recompute: bool = False) -> tuple[VideoDiT, VideoDiT]:
    """Twice the same; the second one is to be captured."""
    torch.manual_seed(0)
    model = VideoDiT(CONFIG, recompute=recompute)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    model.to(device)
    return model, copy.deepcopy(model)


def find_loss(model: nn.Module, shape: tuple[int, int], seed: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """Of seeded inputs, on this rank's frames."""
    device = next(model.parameters()).device
    (T, rows), generator = shape, torch.Generator().manual_seed(seed)
    video, times = torch.randn(T, 2, 3, rows, 8, generator=generator), torch.rand(T, 2, generator=generator)
    tokens, mask = torch.randn(2, 3, 6, generator=generator), torch.tensor([[True, True, False], [True, False, False]])
    start, stop = (0, T) if group is None else dsp.shard_range(T, group.size(), group.rank())
    inputs = (each.to(device) for each in (video[start:stop], times, tokens, mask))
    velocity = model(*inputs, group=group)
    return velocity.square().mean() if group is None else dsp.mean_loss(velocity.square(), group=group)


def train(models: tuple[VideoDiT, VideoDiT], group: dist.ProcessGroup | None = None) -> None:
    """The same steps on both, of three micro-batches each; fails where they differ."""
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01) for model in models]
    for step in range(6):
        for micro in range(3):
            expected, found = (find_loss(m, SHAPES[(step + micro) % 2], 10 * step + micro, group) for m in models)
            for loss in (expected, found):
                loss.backward()
            assert_close(found.detach(), expected.detach(), 1e-5, f"the loss of step {step}")
        for (name, parameter), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            assert_close(other.grad, parameter.grad, 1e-4, f"the gradient of {name}", 1e-3)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@contextmanager
def pinning() -> Iterator[None]:
    """In the block another thread allocates pinned memory, as one that reads data does."""
    stop = threading.Event()

    def pin() -> None:
        held = []
        while not stop.is_set():
            held = [*held[-8:], torch.empty(1 << 20, pin_memory=True)]

    thread = threading.Thread(target=pin)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@needs_one
@pytest.mark.parametrize("recompute", [False, True])
def test_training_is_as_without_graphs(recompute):
    models = make_models(torch.device("cuda"), recompute)
    dsp.capture(models[1])
    with pinning():
        train(models)
    kept = models[1].forward._graphs
    assert len(kept) == len(SHAPES)


@needs_one
def test_compiled_blocks_are_captured():
    models = make_models(torch.device("cuda"))
    dsp.compile_stages(models[1].blocks())
    dsp.capture(models[1])
    train(models)


@needs_one
def test_nothing_is_collected_during_capture():
    """What is freed in a cycle may wait for a stream that is not captured."""
    models = make_models(torch.device("cuda"))
    seen = []

    def note(phase: str, info: dict) -> None:
        seen.append(torch.cuda.is_current_stream_capturing())

    threshold = gc.get_threshold()
    gc.set_threshold(1)
    gc.callbacks.append(note)
    try:
        dsp.capture(models[1])
        for seed in range(4):
            find_loss(models[1], SHAPES[0], seed).backward()
    finally:
        gc.callbacks.remove(note)
        gc.set_threshold(*threshold)
    assert seen, "it was collected outside"
    assert not any(seen)


@needs_one
def test_a_replay_launches_graphs_alone():
    models = make_models(torch.device("cuda"))
    dsp.capture(models[1])
    for seed in range(3):
        find_loss(models[1], SHAPES[0], seed).backward()
    with torch.profiler.profile() as profile:
        find_loss(models[1], SHAPES[0], 3).backward()
    names = [event.name for event in profile.events()]
    assert names.count("cudaGraphLaunch") == 2
    assert not any("addmm" in name for name in names), "no layer ran on the host"


def _over_nccl(cut: str | None, recompute: bool) -> None:
    device = torch.device("cuda", dist.get_rank())
    torch.cuda.set_device(device)
    group = dist.new_group(backend="cpu:gloo,cuda:nccl")
    set_overlap(group, None if cut is None else FixedOverlap(2, cut=cut))
    models = make_models(device, recompute)
    dsp.capture(models[1])
    with pinning():
        train(models, group)
    counted = []
    for model in models:
        with dsp.ledger() as moved:
            find_loss(model, SHAPES[0], 99, group).backward()
        counted.append(moved.by("stage"))
    assert counted[0] == counted[1]


@needs_two
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("cut", [None, "ends", "leave", "stages"])
def test_collectives_are_captured(ranks, cut, recompute):
    ranks(2, _over_nccl, cut, recompute)

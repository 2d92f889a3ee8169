"""Captured passes of the video transformer, with overlap and recompute: results and counts as without, on ranks of the CPU.

Here a replay computes again; with CUDA graphs `tests/gpu/test_cuda_graphs.py` does it.
"""

from __future__ import annotations

import itertools

import torch
import torch.distributed as dist
from compiled_job import find_gradients
from recorders import Repeats
from test_compile import noisy_models
from torch import Tensor, nn

import megatron_dsp as dsp
from megatron_dsp.reshard import FixedOverlap, overlap_of, set_overlap
from megatron_dsp.reshard.stages.measured_overlap import MeasuredOverlap
from megatron_dsp.training.graph_capture import CapturedForward


def _run(m: nn.Module, T: int, seed: int) -> Tensor:
    group = dist.group.WORLD
    generator = torch.Generator().manual_seed(seed)
    video = torch.randn(T, 1, 3, 4, 6, generator=generator).double()
    side = torch.rand(T, 1, generator=generator).double(), torch.randn(1, 3, 6, generator=generator).double()
    start, stop = dsp.shard_range(T, group.size(), group.rank())
    velocity = m(video[start:stop], *side, torch.ones(1, 3, dtype=torch.bool), group=group)
    return dsp.mean_loss(velocity.square(), group=group)


def _captured_passes() -> None:
    group = dist.group.WORLD
    models = noisy_models(3)
    set_overlap(group, FixedOverlap(2, cut="ends"))
    recorders = [Repeats(), Repeats()]
    for captured, recorder in zip(models[1:], recorders, strict=True):
        captured.forward = CapturedForward(captured, recorder)
    for seed, T in itertools.product(range(4), (3, 4)):
        expected, *others = (find_gradients(m, lambda m, T=T, seed=seed: _run(m, T, seed)) for m in models)
        for loss, gradients, moved in others:
            assert loss == expected[0]
            assert seed != 3 or moved == expected[2], "replays count what they move"
            for a, b in zip(gradients, expected[1], strict=True):
                assert torch.equal(a, b)
    assert [recorder.replayed for recorder in recorders] == [8, 8]
    set_overlap(group, None)


def test_captured_passes_of_a_model_over_ranks(ranks):
    ranks(2, _captured_passes)


def _waits() -> list[int]:
    group = dist.group.WORLD
    overlap = MeasuredOverlap([group])
    model, recorder = noisy_models(1)[0], Repeats()
    find_gradients(model, lambda m: _run(m, 4, 0))
    set_overlap(group, overlap)
    model.forward = CapturedForward(model, recorder)
    undecided = 0
    for seed in range(60):
        find_gradients(model, lambda m, seed=seed: _run(m, 4, seed))
        assert overlap_of(group) is overlap
        undecided += not overlap.decisions
        if recorder.replayed:
            break
    set_overlap(group, None)
    return [undecided, seed, recorder.recorded]


def test_a_shape_is_captured_after_its_overlap_is_decided(ranks):
    for undecided, last, recorded in ranks(2, _waits):
        assert undecided >= 7
        # The pass at which it is decided, which is one of the two as usual, the other one, and the one that is captured.
        assert last == undecided + 2
        assert recorded == 2

"""How many operators a training step dispatches by each kind of schedule: what the host pays for overlap."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dsp.models.video_dit import VideoDiT, VideoDiTConfig
from megatron_dsp.reshard import FixedOverlap, set_overlap
from megatron_dsp.reshard.exchange import exchange_of
from megatron_dsp.reshard.transport.torch_transport import AllToAll
from megatron_dsp.training.fake_world import fake_world

RANKS = 8


class _Count(TorchDispatchMode):
    operators = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        self.operators += 1
        return function(*arguments, **(keywords or {}))


def _operators(overlap: FixedOverlap | None) -> int:
    """Of one rank's step of a model of three layer pairs and one sample, whose switches take the route of CUDA tensors."""
    with fake_world(RANKS, rank=0):
        group = dist.group.WORLD
        exchange_of(group).transport._find_route = lambda moves: AllToAll(moves, 0)
        set_overlap(group, overlap)
        model = VideoDiT(VideoDiTConfig(layers=3, hidden=16, heads=2, conditioning_size=6, patch=(1, 2, 2)))
        frames = 4 * RANKS
        mask = torch.ones(1, 3, dtype=torch.bool)
        with _Count() as count:
            y = model(torch.randn(4, 1, 3, 16, 16), torch.rand(frames, 1), torch.randn(1, 3, 6), mask, group=group)
            y.square().sum().backward()
        return count.operators


@pytest.mark.parametrize(
    ("overlap", "most"),
    [
        (FixedOverlap(2, cut="leave"), 1.25),
        (FixedOverlap(2, cut="ends"), 1.42),
        (FixedOverlap(2, cut="stages", along="sharded"), 2.05),
    ],
    ids=["leave", "ends", "stages"],
)
def test_operators_of_a_step_in_two_chunks(overlap, most):
    assert 1.05 < _operators(overlap) / _operators(None) <= most

"""A video transformer that attends over all tokens in some blocks, on several ranks against one process, in fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch.distributed as dist
from test_sharded_video_dit import compare

import megatron_dsp as dsp
from megatron_dsp.models.block_runner import BlockRunner, plan_blocks
from megatron_dsp.models.video_dit import VideoDiT, VideoDiTConfig
from megatron_dsp.reshard import FixedOverlap, set_overlap
from megatron_dsp.tensor import TensorParallel

# Three heads: uneven over 2 and 4 ranks. The second and the fourth temporal block attend over everything.
CONFIG = VideoDiTConfig(layers=4, hidden=24, heads=3, conditioning_size=6, full_attention_every=2)


def _compare(
    config: VideoDiTConfig, T: int, H: int, W: int, backend: str = "dsp", chunks: int = 1, recompute: bool = False
) -> None:
    group = dist.group.WORLD
    set_overlap(group, FixedOverlap(chunks) if chunks > 1 else None)
    moved, batch = compare(config, T, H, W, backend, recompute=recompute)
    inputs = BlockRunner(config, TensorParallel(), group, backend, recompute).plan_inputs(T, batch, H // 2 * W // 2)
    plan = plan_blocks(inputs, element_size=8)  # of fp64
    collectives, forward, backward = 0, 0, 0
    for operation, (calls, sent) in moved.by("operation").items():
        if operation.endswith("adjoint"):
            backward += sent
        else:
            collectives, forward = collectives + calls, forward + sent
    if backend == "ring":  # which the plan would leave for Ulysses
        return
    if recompute:  # what full attention sends in forward is sent again
        assert collectives > plan.cost.collectives
        return
    assert collectives == plan.cost.collectives
    uneven = any(size % group.size() for size in (T, H // 2 * W // 2, config.heads))
    for sent, planned in ((forward, plan.cost.forward), (backward, plan.cost.backward)):
        # The plan adds up what the busiest rank of each collective sends: with even shards that is any rank.
        assert sent <= planned if uneven else sent == planned


@pytest.mark.parametrize(("size", "T", "H", "W"), [(2, 5, 4, 6), (3, 7, 4, 8), (4, 6, 6, 10), (4, 3, 4, 4)])
@pytest.mark.parametrize("recompute", [False, pytest.param(True, marks=pytest.mark.long)])
def test_equals_one_process_and_moves_what_the_plan_says(ranks, size, T, H, W, recompute):
    assert CONFIG.block_dims == ["space", "time", "space", "all"] * 2
    ranks(size, _compare, CONFIG, T, H, W, recompute=recompute)


def test_recompute_equals_one_process(ranks):
    ranks(2, _compare, CONFIG, 5, 4, 6, recompute=True)


def test_even_shards_move_exactly_what_the_plan_says(ranks):
    ranks(2, _compare, replace(CONFIG, heads=2), 4, 4, 8)


@pytest.mark.parametrize(
    ("size", "T", "H", "W", "backend"), [(2, 4, 4, 4, "ulysses"), (3, 5, 4, 6, "ulysses"), (2, 4, 4, 6, "ring")]
)
def test_other_backends(ranks, size, T, H, W, backend):
    ranks(size, _compare, CONFIG, T, H, W, backend)


def test_whole_stages_run_where_chunks_are_asked_for(ranks):
    ranks(2, _compare, CONFIG, 6, 4, 6, chunks=3)


def _tensor(sequence_dim: int | None) -> None:
    VideoDiT(CONFIG, tensor=TensorParallel(dist.group.WORLD, sequence_dim=sequence_dim))


def test_shards_of_tensor_ranks_are_refused(ranks):
    with pytest.raises(AssertionError, match="full_attention_every with --sequence-parallel"):
        ranks(3, _tensor, 2)
    ranks(3, _tensor, None)
    with pytest.raises(dsp.UsageError, match="full_attention_every=0 must be at least 1"):
        replace(CONFIG, full_attention_every=0)

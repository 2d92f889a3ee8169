"""Ranks that diverge, with "check_collectives": every rank says who, where and what, and none hangs."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

import megatron_dsp as dsp
from megatron_dsp.reshard.agreement import Agreement
from megatron_dsp.reshard.exchange import exchange_of

STAGES = ("spatial 0", "temporal 0", "spatial 1")


def _program(odd: bool, divergence: str, at: int) -> None:
    """Three switches there and back; a rank that is ``odd`` diverges at the stage number ``at``."""
    x = torch.randn(dsp.shard_sizes(4, dist.get_world_size())[dist.get_rank()], 6, 8, requires_grad=True)
    y = x
    stages = list(STAGES)
    if odd and divergence == "swapped":
        stages[at], stages[at - 1] = stages[at - 1], stages[at]
    for number, stage in enumerate(stages):
        here = odd and number == at
        if here and divergence == "skipped":
            continue
        if here and divergence == "wrong dtype":
            y = y.double()
        split = 2 if here and divergence == "wrong dim" else 1
        size = 5 if here and divergence == "wrong size" else 4
        if here and divergence == "wrong size":
            y = torch.cat([y, y])[: dsp.shard_sizes(5, dist.get_world_size())[dist.get_rank()]]
        y = dsp.switch(y, gather=0, split=split, size=size, stage=stage)
        y = dsp.switch(y, gather=split, split=0, size=6 if split == 1 else 8, stage=stage + " back")
    if odd and divergence == "no backward":
        return
    y.sum().backward()


def _diverge(rank: int, divergence: str, at: int) -> tuple[str, float]:
    Agreement.SECONDS = 2.0
    dsp.initialize({"sequence_parallel": {"size": dist.get_world_size(), "check_collectives": True}})
    _program(False, "", 0)  # without one, nothing is said
    start = time.monotonic()
    try:
        _program(dist.get_rank() == rank, divergence, at)
        return "", time.monotonic() - start
    except ValueError as error:
        return str(error), time.monotonic() - start


@pytest.mark.parametrize("at", [1, pytest.param(2, marks=pytest.mark.long)])
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("divergence", ["skipped", "swapped", "wrong dim", "wrong size", "wrong dtype"])
def test_a_divergence_is_named_on_every_rank(ranks, divergence, rank, at):
    for message, seconds in ranks(3, _diverge, rank, divergence, at):
        assert seconds < 10
        assert f"rank {rank} came to collective" in message, message
        assert "Expected" in message
        assert any(stage in message for stage in STAGES)


def test_a_rank_that_does_not_come_is_named_by_the_others(ranks):
    answers = ranks(3, _diverge, 1, "no backward", 0)
    assert answers[1][0] == ""
    for message, seconds in (answers[0], answers[2]):
        assert "ranks [1] did not come" in message
        assert "switch adjoint" in message
        assert seconds < 10


def _swap_in(every: int) -> tuple[str, int]:
    """Many switches, of which rank 1 issues two of equal sizes in the other order; how many were issued until that showed."""
    group = dist.group.WORLD
    exchange_of(group).agreement = Agreement(group, every)
    x = torch.randn(2, 4)
    for number in range(40):
        stage = {12: 13, 13: 12}.get(number, number) if dist.get_rank() == 1 else number
        try:
            dsp.switch(x, gather=0, split=1, size=4, group=group, stage=f"stage {stage}")
        except ValueError as error:
            return str(error), number
    return "", 40


def test_sampled_checks_name_a_divergence_that_did_not_hang(ranks):
    for message, number in ranks(2, _swap_in, 8):
        assert number == 15  # the last of the eight among which it is
        assert "Expected, as most do or the first: collective 13: switch, stage 'stage 12'" in message
        assert "rank 1 came to collective 13: switch, stage 'stage 13'" in message

"""Worlds that no machine here could hold, by fake process groups; what a dry run refuses and prints; the example ds_configs."""

from __future__ import annotations

import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_dsp import UsageError, shard_sizes
from megatron_dsp import config as configs
from megatron_dsp.mesh import AXES, Mesh, RankGrid
from megatron_dsp.models.video_dit import PRESETS, VideoDiTConfig, parameter_count
from megatron_dsp.reshard.labels import Operation
from megatron_dsp.training import dry_run
from megatron_dsp.training.deepspeed_costs import DeepSpeedCosts
from megatron_dsp.training.dry_run import Job, rank_costs
from megatron_dsp.training.fake_world import fake_world

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "pretrain_scripts" / "pretrain_video.py"
EXAMPLES = ROOT / "pretrain_scripts" / "ds_configs"
DEGREES = {"tensor": 8, "sequence": 4, "pipe": 4}  # data 4: 512 ranks
SMALL = VideoDiTConfig(layers=4, hidden=64, heads=8, conditioning_size=6, patch=(1, 2, 2))


def _job(world_size: int, degrees: dict[str, int] = DEGREES, steps: int = 8, **changes: Any) -> Job:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": steps,
        "zero_optimization": {"stage": 1},
        "mesh": {"tensor": degrees["tensor"], "pipe": degrees["pipe"]},
        "sequence_parallel": {"size": degrees["sequence"]},
    }
    # 6 frames and 15 spatial tokens: uneven over 4 ranks.
    return replace(Job(SMALL, world_size, configs.load(config), frames=6, height=6, width=10, partition="uniform"), **changes)


@pytest.mark.parametrize("rank", [0, 7, 100, 255, 300, 511])
def test_mesh_of_512_ranks(rank):
    grid = RankGrid(512, **DEGREES)
    with fake_world(512, rank):
        mesh = Mesh(**DEGREES)
        for axes in [(axis,) for axis in AXES] + [("data", "sequence"), ("pipe", "tensor"), ("data", "sequence", "tensor")]:
            members = dist.get_process_group_ranks(mesh.group(*axes))
            assert members in grid.groups(*axes)
            assert members[mesh.group(*axes).rank()] == rank
        assert [mesh.rank(axis) for axis in AXES] == [grid.coordinate(rank, axis) for axis in AXES]
        assert [mesh.size(axis) for axis in AXES] == [4, 4, 4, 8]
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("axis", "member"), [("sequence", 0), ("sequence", 511), ("tensor", 259)], ids=["first stage", "last stage", "inner stage"]
)
@pytest.mark.parametrize("sharded", [False, True], ids=["", "--sequence-parallel"])
def test_ranks_of_a_group_issue_the_same_collectives_in_the_same_order(axis, member, sharded):
    job = _job(512, sequence_parallel=sharded, width=16)  # 24 spatial tokens: a multiple of tensor 8
    ranks = tuple(job.grid.group_of(member, axis))
    orders = []
    for rank in ranks:
        costs = rank_costs(job, rank)
        assert {call.ranks[job.grid.coordinate(rank, call.axis)] for call in costs.collectives} == {rank}
        orders.append([call for call in costs.collectives if call.ranks == ranks])
    assert len(orders[0]) > 1
    assert all(order == orders[0] for order in orders)


def test_512_ranks_hold_uneven_shards_of_everything():
    job = _job(512)
    ranks = job.grid.group_of(0, "sequence")
    costs = [rank_costs(job, rank) for rank in ranks]
    switches = [call for call in costs[0].collectives if Operation(call.label.operation).is_switch]
    # Each tensor rank switches its channels of all frames and tokens.
    assert {call.shapes for call in switches} == {((6, 1, 15, 8),)}
    assert {call.dims for call in switches} == {(0, 2), (2, 0)}
    activations = [cost.activations for cost in costs]
    assert activations == sorted(activations, reverse=True)
    assert activations[0] > activations[-1]
    assert shard_sizes(6, 4) == [2, 2, 1, 1]


def test_more_ranks_leave_a_rank_less():
    few, many = (rank_costs(_job(size, degrees=dict.fromkeys(DEGREES, 1)), 0) for size in (2, 64))
    assert few.kept.parameters == pytest.approx(many.kept.parameters, rel=0.01)
    assert few.kept.optimizer == pytest.approx(32 * many.kept.optimizer, rel=0.01)
    assert many.sent["data"] > few.sent["data"]
    assert many.activations == few.activations


def test_recomputed_blocks_keep_their_input_alone():
    kept, recomputed = (rank_costs(_job(1, degrees=dict.fromkeys(DEGREES, 1), recompute=value), 0) for value in (False, True))
    assert recomputed.activations < kept.activations / 4
    assert recomputed.working > kept.working


def test_early_stages_hold_more_micro_batches():
    degrees = {"tensor": 1, "sequence": 2, "pipe": 4}
    one, costs = (dry_run.dry_run(_job(64, degrees, steps, width=8)) for steps in (1, 8))
    assert [cost.stage for cost in costs] == [0, 1, 2, 3]
    assert [cost.rank for cost in costs] == [0, 16, 32, 48]
    assert [cost.activations for cost in costs] == [(4 - cost.stage) * cost.activations for cost in one]
    assert [cost.working for cost in costs] == [cost.working for cost in one]
    # 6 frames and 12 tokens: as many of a rank's own whichever is sharded. The last stage sends gradients alone.
    assert costs[1].sent["pipe"] == costs[2].sent["pipe"] == costs[0].sent["pipe"] + costs[3].sent["pipe"]
    assert costs[0].sent["pipe"] > costs[3].sent["pipe"] > 0
    assert sum(cost.parameters for cost in costs) == parameter_count(SMALL)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zero_optimization": {"stage": 2}, "mesh": {"pipe": 2}}, "stage=2 with a pipeline.*use stage 0 or 1"),
        ({"mesh": {"pipe": 2}}, "gradient_clipping=1.0 with a pipeline in ZeRO stage 0.*use stage 1"),
        ({"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}}, "stage=0 with torch.bfloat16.*use stage 1"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, "offload_param.*remove it"),
        ({"optimizer": {"type": "SGD"}}, "optimizer.type='SGD'.*use one of them"),
        ({"communication_data_type": "fp8"}, "communication_data_type='fp8': known are fp32"),
    ],
)
def test_what_a_dry_run_does_not_know_is_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        DeepSpeedCosts.of(configs.load(changes))


@pytest.mark.parametrize(("stage", "before"), [(0, 2), (1, 3), (2, 3), (3, 3)])
def test_an_average_of_the_weights_is_one_more_fp32_copy(stage, before):
    config = configs.load({"zero_optimization": {"stage": stage}})
    without, with_average = (DeepSpeedCosts.of(config, ema=ema).kept([4000, 96], 4, 1) for ema in (False, True))
    assert with_average.optimizer * before == without.optimizer * (before + 1)
    assert with_average._replace(optimizer=0) == without._replace(optimizer=0)


def test_refused_where_a_job_runs():
    with fake_world(4, 0), pytest.raises(UsageError, match="process of its own"), fake_world(4, 0):
        pass
    with pytest.raises(UsageError, match="world size 100 is not a multiple"):
        dry_run.dry_run(_job(100))


def _script(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    runpy.run_path(str(SCRIPT))["main"]()


def test_the_script_prints_it_and_starts_nothing(monkeypatch, capsys):
    degrees = ["--tensor-model-parallel-size", 2, "--dynamic-sequence-parallel-size", 4, "--micro-batch-size", 2]
    _script(monkeypatch, "--dry-run", 128, *degrees)
    output = capsys.readouterr().out
    assert "dry run on 128 ranks = tensor 2 x sequence 4 x data 16 x pipe 1; ZeRO 0, float32" in output
    assert "most memory of a rank" in output
    assert not dist.is_initialized()
    with pytest.raises(UsageError, match="--dry-run 0: must be at least 1"):
        _script(monkeypatch, "--dry-run", 0, *degrees)


# ranks -> what the launch examples of pretrain_scripts/README.md add to the ds_config
VIDEO = {"frames": 16, "height": 256, "width": 256, "recompute": True}
EXAMPLE_JOBS = {8: VIDEO, 64: VIDEO, 1024: VIDEO | {"frames": 64}}


def _example(ranks: int, layers: int) -> Job:
    config = configs.load(EXAMPLES / f"3b_{ranks}_gpus.json")
    return Job(replace(PRESETS["3b"], channels=3, layers=layers), ranks, config, **EXAMPLE_JOBS[ranks])


@pytest.mark.parametrize("ranks", EXAMPLE_JOBS)
def test_example_ds_configs_run(ranks):
    job = _example(ranks, layers=2)
    assert str(DeepSpeedCosts.of(job.config).dtype) == "torch.bfloat16"
    assert all(cost.total > 0 for cost in dry_run.dry_run(job))


@pytest.mark.long
@pytest.mark.parametrize("ranks", EXAMPLE_JOBS)
def test_example_ds_configs_fit_gpus_of_80_gb(ranks):
    assert max(cost.total for cost in dry_run.dry_run(_example(ranks, PRESETS["3b"].layers))) < 70e9  # not all is counted


def test_arithmetic_of_deepspeed():
    whole, first, third = (DeepSpeedCosts.of(configs.load({"zero_optimization": {"stage": stage}})) for stage in (0, 1, 3))
    assert whole.kept([10, 20], 4, 1) == (120, 120, 240, 0)
    assert first.kept([100], 4, 1)[:3] == (416, 400, 3 * 104)  # 104 is a multiple of 2 x 4
    assert first.sent([100], ranks=4, micro_batches=3) == 2 * 3 * 400 // 4 + 3 * 104
    assert first.sent([100], ranks=1, micro_batches=3) == 0
    # The small one is gathered after the step, the other once for forward and backward of each micro-batch.
    assert third.kept([101, 200_000], 4, 2)[:3] == (4 * (50_026 + 200_101), 4 * 50_026, 12 * 50_026)
    assert third.sent([101, 200_000], ranks=4, micro_batches=2) == 3 * 4 * (26 + 2 * 50_000 + 2 * 50_026)

"""What a training job measures of itself and hands to DeepSpeed's monitors."""

from __future__ import annotations

import csv
import json
import sys
import time
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

import megatron_dsp as dsp
from megatron_dsp.models.embeddings import unpatchify
from megatron_dsp.models.flops import forward_flops
from megatron_dsp.models.video_dit import VideoDiT, VideoDiTConfig
from megatron_dsp.reshard.labels import StageName, profile_range
from megatron_dsp.training import arguments as flags
from megatron_dsp.training.checkpointing import Progress
from megatron_dsp.training.log import TrainingLog
from megatron_dsp.training.loop import train
from megatron_dsp.training.monitor import Meter
from megatron_dsp.training.stage_timers import StageTimers

CONFIG = VideoDiTConfig(layers=2, hidden=32, heads=2, conditioning_size=6, patch=(1, 2, 2))
T, H, W, L = 5, 6, 10, 3  # 5 token frames and 15 spatial tokens: uneven over 2 ranks
BATCH, ITERATIONS, PEAK = 4, 5, 1e-3
SIZES = {"frames": T, "height": H, "width": W, "conditioning_tokens": L}


class Workload:
    """Random videos, each a function of its sample's position."""

    def __init__(self, mesh: dsp.Mesh):
        self.group = mesh.group("sequence")
        self.frames = slice(*dsp.shard_range(T, self.group.size(), self.group.rank()))

    def loss(self, model: nn.Module, samples: list[int]) -> Tensor:
        inputs, labels = self.micro_batch(samples, validation=False)
        return self._error(model(*inputs, group=self.group), labels)

    def validation_loss(self, model: nn.Module, samples: list[int]) -> Tensor:
        time.sleep(0.1)  # not a part of training's time
        return self.loss(model, samples)

    def micro_batch(self, samples: list[int], validation: bool) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        with profile_range("data"):
            time.sleep(0.01)
            generator = torch.Generator().manual_seed(samples[0])
            batch = len(samples)
            video, target = (torch.randn(T, batch, 3, H, W, generator=generator)[self.frames] for _ in range(2))
            mask, drop = torch.ones(batch, L, dtype=torch.bool), torch.zeros(batch, dtype=torch.bool)
            return (video, torch.rand(T, batch), torch.randn(batch, L, 6), mask, drop), (target,)

    def forward_flops(self, samples: list[int]) -> int:
        return forward_flops(CONFIG, **SIZES, batch=len(samples))

    def pipeline_loss(self, patches: Tensor, labels: tuple[Tensor, ...]) -> Tensor:
        return self._error(unpatchify(patches, CONFIG.patch, labels[0].shape), labels)

    def _error(self, velocity: Tensor, labels: tuple[Tensor, ...]) -> Tensor:
        return dsp.mean_loss((velocity - labels[0]).square(), group=self.group)


def _job(folder: str, degrees: dict[str, int], line: list[str], sections: dict[str, Any]) -> tuple[Progress, float]:
    """What a training script does, with a small model; how far it came, and the seconds that it took."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    (Path(folder) / f"{dsp.launch.discover().rank}.json").write_text(
        json.dumps(
            {
                "train_batch_size": BATCH,
                "gradient_accumulation_steps": 2,
                "gradient_clipping": 1.0,
                "zero_optimization": {"stage": 1},
                "zero_allow_untested_optimizer": True,
                "mesh": {"pipe": degrees.get("pipe", 1)},
                "sequence_parallel": {"size": degrees.get("sequence", 1), "overlap": {"enabled": False}},
                **sections,
            }
        )
    )
    config_file = ["--deepspeed_config", f"{folder}/{dsp.launch.discover().rank}.json"]
    arguments = flags.parser("").parse_args([*config_file, "--train-iters", str(ITERATIONS), "--log-interval", "2", *line])
    config = flags.settings(arguments)
    mesh = dsp.initialize(config)
    torch.manual_seed(0)
    workload = Workload(mesh)
    model: nn.Module
    if mesh.size("pipe") > 1:
        from megatron_dsp.pipeline import PipelinedVideoDiT

        model = PipelinedVideoDiT(CONFIG, mesh, workload.pipeline_loss)
    else:
        model = VideoDiT(CONFIG)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    engine, *_ = dsp.deepspeed_initialize(model=model, optimizer=optimizer, config=config, mesh=mesh)
    with TrainingLog(rank=torch.distributed.get_rank(), total=ITERATIONS, monitor=engine.monitor) as log:
        start = time.perf_counter()
        progress = train(engine, workload, mesh, arguments, log)
        seconds = time.perf_counter() - start
    engine.destroy()
    return progress, seconds


def _read(folder: Path) -> dict[str, dict[int, float]]:
    """The values of each tag, by step, that DeepSpeed's csv_monitor wrote."""
    tags = {}
    for file in folder.glob("*.csv"):
        with file.open() as lines:
            tags[file.stem] = {int(step): float(value) for step, value in list(csv.reader(lines))[1:]}
    return tags


ALWAYS = {
    *("learning-rate", "loss", "grad-norm", "batch-size", "consumed-samples", "iteration-time", "throughput"),
    *("switch-time", "switch-bytes", "sequence-bytes", "mem-resident-bytes", "mem-max-resident-bytes"),
}


def _csv(folder: Path) -> dict[str, Any]:
    return {"csv_monitor": {"enabled": True, "output_path": str(folder), "job_name": "csv"}}


def test_all_that_a_job_with_switches_measures(ranks, tmp_path):
    line = ["--tensorboard-dir", str(tmp_path / "tensorboard"), "--peak-tflops-per-device", str(PEAK)]
    line += ["--eval-iters", "1", "--eval-interval", "3", "--stage-timers-interval", "3"]
    (progress, total), (same, _) = ranks(2, _job, str(tmp_path), {"sequence": 2}, line, _csv(tmp_path))
    assert progress == same == Progress(ITERATIONS, ITERATIONS * BATCH)
    tags = _read(tmp_path / "csv")
    timed = {tag for tag in tags if tag.endswith("-time")} - ALWAYS
    assert set(tags) == ALWAYS | timed | {"mfu", "validation-loss", "Train_Samples_lr"}
    assert all(list(tags[tag]) == [2, 4, 5] for tag in ALWAYS | {"mfu"})
    assert list(tags["validation-loss"]) == [3, 5]
    assert list(tags["Train_Samples_lr"]) == [BATCH * step for step in range(1, ITERATIONS + 1)], "DeepSpeed's own, in samples"
    assert tags["consumed-samples"] == {2: 8, 4: 16, 5: 20}

    # 8 switches, 2 of them of patches, in each of 2 micro-batches of 2 samples; ranks hold 3 and 2 frames, 8 and 7 places.
    there, back = 3 * 2 * 7 * 4, 2 * 2 * 8 * 4
    switched = (6 * CONFIG.hidden + 2 * CONFIG.patch_channels) * (there + back)
    assert set(tags["switch-bytes"].values()) == {switched}
    # mean_loss counts tokens: one fp32 number in an all-reduce over 2 ranks.
    assert set(tags["sequence-bytes"].values()) == {switched + 2 * 4}
    for step, seconds in tags["iteration-time"].items():
        expected = 3 * forward_flops(CONFIG, **SIZES, batch=BATCH) / 2 / seconds / 1e12
        assert tags["throughput"][step] == pytest.approx(expected, rel=1e-6)
        assert tags["mfu"][step] == pytest.approx(expected / PEAK, rel=1e-6)
        assert 0 < tags["switch-time"][step] < seconds
        assert 2**20 < tags["mem-resident-bytes"][step] <= 1.01 * tags["mem-max-resident-bytes"][step]
    # Without two validations, of which each sleeps in 2 micro-batches.
    assert sum(count * tags["iteration-time"][step] for step, count in {2: 2, 4: 2, 5: 1}.items()) < total - 4 * 0.1

    kinds = {f"{way}-{kind}-time" for way in ("forward", "backward") for kind in ("spatial", "temporal", "head")}
    switches = {f"switch-{way}{kind}-time" for kind, way in [("temporal", ""), ("temporal", "adjoint-"), ("output", "")]}
    assert kinds | switches | {"data-time", "optimizer-step-time", "step-time"} <= timed
    assert all(list(tags[tag]) == [3] and 0 < tags[tag][3] <= tags["step-time"][3] for tag in timed)
    assert tags["data-time"][3] >= 0.02

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {event.step: event.value for event in events.Scalars("loss")} == pytest.approx(tags["loss"])
    assert "Train/Samples/lr" in events.Tags()["scalars"]


def test_data_ranks_share_the_flops_and_weights_and_biases_gets_steps_that_grow(ranks, tmp_path):
    logged, *_ = ranks(2, _job_with_wandb, str(tmp_path), [], _csv(tmp_path))
    tags = _read(tmp_path / "csv")
    assert "mfu" not in tags, "no peak is known of a CPU"
    assert set(tags["switch-bytes"].values()) == set(tags["sequence-bytes"].values()) == {0}
    for step, seconds in tags["iteration-time"].items():
        expected = 3 * forward_flops(CONFIG, **SIZES, batch=BATCH) / 2 / seconds / 1e12
        assert tags["throughput"][step] == pytest.approx(expected, rel=1e-6)
    steps = [step for _, step in logged]
    assert steps == sorted(steps), "W&B drops what goes back"
    assert {step for tag, step in logged if tag == "loss"} == {2 * BATCH, 4 * BATCH, 5 * BATCH}
    assert {step for tag, step in logged if tag == "Train/Samples/lr"} == {BATCH * step for step in range(1, ITERATIONS + 1)}


def _job_with_wandb(folder: str, line: list[str], sections: dict[str, Any]) -> list[tuple[str, int]]:
    """With a stand-in for wandb, which is not installed here, that notes what would be logged."""
    logged: list[tuple[str, int]] = []
    wandb = types.ModuleType("wandb")
    wandb.init = lambda **_: None
    wandb.log = lambda data, step, commit: logged.extend((tag, step) for tag in data)
    sys.modules["wandb"] = wandb
    try:
        _job(folder, {}, line, {**sections, "wandb": {"enabled": True, "project": "a"}})
    finally:
        del sys.modules["wandb"]
    return logged


def test_stages_of_a_pipeline(ranks, tmp_path):
    line = ["--eval-iters", "0", "--stage-timers-interval", "2", "--train-iters", "2"]
    ranks(2, _job, str(tmp_path), {"pipe": 2}, line, _csv(tmp_path))
    tags = _read(tmp_path / "csv")
    for kind in ("spatial", "temporal", "head"):  # the head is on the last rank alone
        assert tags[f"forward-{kind}-time"][2] > 0
        assert tags[f"backward-{kind}-time"][2] > 0
    expected = 3 * forward_flops(CONFIG, **SIZES, batch=BATCH) / 2 / tags["iteration-time"][2] / 1e12
    assert tags["throughput"][2] == pytest.approx(expected, rel=1e-6)
    of_deepspeed = tags["Train_Samples_train_loss"]
    assert list(of_deepspeed) == [BATCH, 2 * BATCH]
    assert sum(of_deepspeed.values()) / 2 == pytest.approx(tags["loss"][2], rel=1e-5)


class _Slow(torch.autograd.Function):
    """Sleeps, so many seconds forward and so many backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.backward_seconds = backward
        time.sleep(forward)
        return x * 1

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.backward_seconds)
        return gradient, None, None


def _slow_stages() -> dict[str, tuple[float, float]]:
    group = dsp.Mesh(sequence=2).group("sequence")
    timers = StageTimers(torch.device("cpu"))
    y = _Slow.apply(torch.ones(4, 2, 4, requires_grad=True), 0.4, 0.4)  # of no stage
    with profile_range("stage", StageName("spatial", 0)):
        y = _Slow.apply(y, 0.02, 0.04 * (1 + group.rank()))
    y = dsp.switch(y, gather=0, split=2, size=8, group=group, stage=StageName("temporal", 0))
    for index in range(2):
        with profile_range("stage", StageName("temporal", index)):
            y = _Slow.apply(y, 0.03, 0.05)
            y.detach()  # makes no node, and sees the number of the next one, which is not of this stage
    y = _Slow.apply(y, 0.4, 0.4)
    y.sum().backward()
    return timers.read()


def test_each_second_is_counted_where_it_was_spent(ranks):
    times, same = ranks(2, _slow_stages)
    assert times == same, "on every rank"
    expected = {"forward spatial": (0.02, 0.02), "backward spatial": (0.04, 0.08)}
    expected |= {"forward temporal": (0.06, 0.06), "backward temporal": (0.1, 0.1)}
    for name, seconds in expected.items():
        for found, least in zip(times[name], seconds, strict=True):
            assert least <= found < least + 0.35, name  # which is less than what sleeps in no stage
    assert times["backward spatial"][1] - times["backward spatial"][0] > 0.02
    assert times["step"][0] > 1.8
    assert {"switch temporal", "switch adjoint temporal"} < set(times)


def _late_rank() -> tuple[float, float, float]:
    mesh = dsp.Mesh(sequence=2)
    group = mesh.group("sequence")
    meter = Meter(mesh, None)
    x = torch.ones(4, 2, 4)
    with meter.step(forward_flops=0):
        if group.rank():
            time.sleep(0.3)
        dsp.switch(x, gather=0, split=2, size=8, group=group)
        dsp.gather(x, dim=0, size=8, group=group)
    own = meter._switches._seconds
    with meter.paused():
        time.sleep(0.6)
        dsp.switch(x, gather=0, split=2, size=8, group=group)  # not in a step
    measured = meter.read()
    assert (measured.switch_bytes, measured.sequence_bytes) == (4 * 2 * 2 * 4, 4 * 2 * 2 * 4 + x.nbytes)
    return own, measured.switch_seconds, measured.seconds


def test_switch_time_is_that_of_the_rank_that_waits(ranks):
    (early, most, seconds), (late, same, _) = ranks(2, _late_rank)
    assert 0.25 < early == most == same < 0.6
    assert late < early / 2
    assert 0.25 < seconds < 0.85

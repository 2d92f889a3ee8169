"""Megatron's flags beside a ds_config, the learning rate that they ask for, and the lines that a run prints."""

from __future__ import annotations

import io
import json
import re

import pytest
import torch

from megatron_dsp import UsageError
from megatron_dsp.training import arguments
from megatron_dsp.training.checkpointing import Progress
from megatron_dsp.training.log import TrainingLog
from megatron_dsp.training.monitor import Measured
from megatron_dsp.training.optimizer import warmup_cosine

# flag, where the same value stands in a ds_config, a value, another
SHARED = [
    ("--tensor-model-parallel-size", "mesh.tensor", 2, 4),
    ("--pipeline-model-parallel-size", "mesh.pipe", 2, 4),
    ("--dynamic-sequence-parallel-size", "sequence_parallel.size", 2, 4),
    ("--micro-batch-size", "train_micro_batch_size_per_gpu", 2, 4),
    ("--global-batch-size", "train_batch_size", 8, 16),
    ("--clip-grad", "gradient_clipping", 1.0, 0.5),
    ("--lr", "optimizer.params.lr", 1e-4, 3e-4),
    ("--weight-decay", "optimizer.params.weight_decay", 0.1, 0.01),
]
each_shared = pytest.mark.parametrize(("flag", "key", "value", "other"), SHARED)


@pytest.fixture
def settings(tmp_path):
    """``settings(ds_config, *command_line)``"""

    def settings(ds_config: dict | None, *line: object):
        file = []
        if ds_config is not None:
            (tmp_path / "ds_config.json").write_text(json.dumps(ds_config))
            file = ["--deepspeed_config", str(tmp_path / "ds_config.json")]
        return arguments.settings(arguments.parser("a script").parse_args([*file, *map(str, line)]))

    return settings


def _config(key: str, value: object) -> dict:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _value(config, key: str) -> object:
    raw = {
        **config.deepspeed,
        "mesh": config.mesh.model_dump(),
        "sequence_parallel": config.sequence_parallel.model_dump(),
    }
    for part in key.split("."):
        raw = raw[part]
    return raw


@each_shared
def test_a_flag_fills_in_what_the_ds_config_leaves_out(settings, flag, key, value, other):
    ds_config = {"optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 1}}
    config = settings(ds_config, flag, value)
    assert _value(config, key) == value
    assert config.deepspeed["optimizer"]["type"] == "AdamW"
    assert config.deepspeed["zero_optimization"] == {"stage": 1}


@each_shared
def test_a_value_given_twice_must_be_the_same(settings, flag, key, value, other):
    assert _value(settings(_config(key, value), flag, value), key) == value
    with pytest.raises(UsageError, match=rf"^{flag} {other} and {re.escape(key)}={value} of the ds_config disagree") as error:
        settings(_config(key, value), flag, other)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("flag", "key"), [("--compile", "compile"), ("--cuda-graphs", "cuda_graphs")])
def test_a_switch_may_be_in_the_ds_config_or_a_flag(settings, flag, key):
    assert _value(settings(None), f"sequence_parallel.{key}") is False
    for found in (settings(None, flag), settings({"sequence_parallel": {key: True}})):
        assert _value(found, f"sequence_parallel.{key}") is True
    with pytest.raises(UsageError, match=rf"^{flag} and sequence_parallel.{key}=False of the ds_config disagree"):
        settings({"sequence_parallel": {key: False}}, flag)


@pytest.mark.parametrize("flag", ["--stage-timers-interval", "--exposed-communication-interval"])
def test_what_measures_inside_of_passes_is_refused_with_graphs(settings, flag):
    settings(None, flag, 10)
    settings(None, "--cuda-graphs", flag, 0)
    for given in (settings, lambda _, *line: settings({"sequence_parallel": {"cuda_graphs": True}}, *line[1:])):
        with pytest.raises(UsageError, match=f"^{flag} 10 with CUDA graphs"):
            given(None, "--cuda-graphs", flag, 10)


def test_flags_do_without_a_ds_config(settings):
    config = settings(None, "--dynamic-sequence-parallel-size", 2, "--global-batch-size", 8, "--lr", 1e-3)
    assert config.degrees == {"tensor": 1, "pipe": 1, "sequence": 2}
    # Without an optimizer section the script makes the optimizer: DeepSpeed must not read half a section.
    assert config.deepspeed == {"train_batch_size": 8}
    assert settings(None) == settings({})


def test_no_flag_leaves_the_ds_config_as_it_is(settings):
    ds_config = {"train_batch_size": 8, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}, "fp16": {"enabled": False}}
    assert settings(ds_config).deepspeed == ds_config


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--trian-iters", 5], "--trian-iters"),
        (["--train", 5], "--train"),  # an abbreviation would change its meaning with the next flag
        (["--lr", "fast"], "--lr: invalid float value: 'fast'"),
        (["--train-iters"], "--train-iters: expected one argument"),
        (["--train-iters", 0], "--train-iters 0: must be at least 1"),
        (["--log-interval", -1], "--log-interval -1: must be at least 1"),
        (["--seed", -1], "--seed -1: must be at least 0"),
        (["--stage-timers-interval", -1], "--stage-timers-interval -1: must be at least 0"),
        (["--peak-tflops-per-device", 0], "--peak-tflops-per-device 0.0: must be at least 0.001"),
        (["--deepspeed_config", "no.json"], "no.json does not exist"),
        (["--dynamic-sequence-parallel-size", 0], "sequence_parallel.size=0"),
        (["stray\ntext"], "stray"),
    ],
)
def test_a_wrong_command_line_is_refused_in_one_line(settings, line, message):
    with pytest.raises(UsageError) as error:
        settings(None, *line)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_section_that_is_none_is_refused_beside_a_flag(settings):
    with pytest.raises(UsageError, match=r"mesh=3 must be a section"):
        settings({"mesh": 3}, "--tensor-model-parallel-size", 2)


@pytest.mark.parametrize("line", [["--local_rank=1"], ["--local-rank", "1"], ["--deepspeed"]])
def test_what_deepspeed_users_and_its_launcher_pass_is_accepted(settings, line):
    assert settings(None, *line) == settings(None)


def test_help_names_the_defaults_and_no_local_rank(capsys):
    with pytest.raises(SystemExit) as end:
        arguments.parser("Trains a model.").parse_args(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert "Trains a model." in text
    assert "(default: 100)" in text
    assert "local" not in text


def test_show_lists_all_arguments():
    file = io.StringIO()
    arguments.show(arguments.parser("").parse_args(["--local_rank=1", "--lr", "0.5"]), file=file)
    lines = file.getvalue().splitlines()
    assert any(re.fullmatch(r"  lr \.+ 0\.5", line) for line in lines)
    assert any(re.fullmatch(r"  train_iters \.+ 100", line) for line in lines)
    assert not any("local_rank" in line for line in lines)


def _learning_rates(iterations: int, *, lr: float, min_lr: float, warmup: int, total: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = warmup_cosine(optimizer, lr=lr, min_lr=min_lr, warmup=warmup, total=total)
    rates = []
    for _ in range(iterations):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_learning_rate_warms_up_and_follows_a_half_cosine():
    rates = _learning_rates(15, lr=1e-3, min_lr=1e-4, warmup=4, total=12)
    assert rates[:5] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3])
    assert rates[8] == pytest.approx(5.5e-4), "half of the way, half of the difference"
    assert rates[6] + rates[10] == pytest.approx(1.1e-3)
    assert rates[12:] == pytest.approx([1e-4] * 3)
    assert rates[3:13] == sorted(rates[3:13], reverse=True)


def test_learning_rate_at_the_limits():
    assert _learning_rates(3, lr=1.0, min_lr=0.0, warmup=0, total=2) == pytest.approx([1.0, 0.5, 0.0])
    assert _learning_rates(2, lr=1.0, min_lr=0.5, warmup=2, total=2) == pytest.approx([0.5, 1.0])
    assert _learning_rates(3, lr=0.0, min_lr=0.0, warmup=1, total=2) == [0.0] * 3


class _Monitor:
    """Keeps what DeepSpeed's would write."""

    enabled, wandb_monitor = True, None

    def __init__(self):
        self.events = {}

    def write_events(self, events):
        self.events |= {tag: (step, value) for tag, value, step in events}


def test_log_line_has_the_fields_of_megatron(capsys):
    values = {"learning rate": 1e-4, "loss": 0.51234567, "loss scale": 1.0, "grad norm": 2.0}
    measured = Measured(
        seconds=0.01234,
        tflops=45.67,
        utilisation=0.1234,
        switch_seconds=0.0025,
        switch_bytes=10.0,
        sequence_bytes=12.0,
        memory={"mem-max-resident-bytes": 3 * 2**19},
    )
    for rank in (0, 1):
        monitor = _Monitor()
        with TrainingLog(rank=rank, total=100, monitor=monitor) as log:
            log.message("a line [with brackets]")
            log.iteration(Progress(20, 160), batch=8, values=values, measured=measured)
            log.advance(20)
            log.times(Progress(20, 160), {"forward spatial": (0.001, 0.002)})
        out = capsys.readouterr().out
        if rank:
            assert out == "", "rank 0 alone shows"
            assert not monitor.events
            continue
        assert re.fullmatch(
            r"a line \[with brackets\]\n"
            r" \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] iteration +20/ +100 \| consumed samples: +160"
            r" \| elapsed time per iteration \(ms\): 12\.3 \| throughput per GPU \(TFLOP/s/GPU\): 45\.7 \| MFU: 12\.3%"
            r" \| global batch size: +8 \| learning rate: 1\.000000E-04 \| loss: 5\.123457E-01 \| loss scale: 1\.000000E\+00"
            r" \| grad norm: 2\.000000E\+00 \| switch time \(ms\): 2\.5 \| peak memory \(MiB\): 1\.5 \|\n"
            r" \(min, max\) time across ranks \(ms\) at iteration 20:\n    forward spatial \.+: \(1\.00, 2\.00\)\n",
            out,
        )
        written = {"loss": 0.51234567, "learning-rate": 1e-4, "batch-size": 8, "iteration-time": 0.01234, "throughput": 45.67}
        written |= {"mfu": 0.1234, "switch-bytes": 10.0, "forward-spatial-time": 0.002, "mem-max-resident-bytes": 3 * 2**19}
        assert monitor.events.items() >= {tag: (20, value) for tag, value in written.items()}.items()


def test_tensorboard_dir_is_the_tensorboard_section_of_the_ds_config(settings):
    section = {"enabled": True, "output_path": "runs/a", "job_name": ""}
    assert settings(None, "--tensorboard-dir", "runs/a").deepspeed == {"tensorboard": section}
    assert settings({"tensorboard": section}, "--tensorboard-dir", "runs/a").deepspeed == {"tensorboard": section}
    named = {"tensorboard": {"job_name": "mine"}}
    assert settings(named, "--tensorboard-dir", "runs/a").deepspeed["tensorboard"] == {**section, "job_name": "mine"}
    for key, value in (("output_path", "runs/b"), ("enabled", False)):
        with pytest.raises(UsageError, match=rf"^--tensorboard-dir runs/a and tensorboard\.{key}={value!r} of the ds_config"):
            settings({"tensorboard": {key: value}}, "--tensorboard-dir", "runs/a")


def test_one_profiler_at_a_time(settings):
    with pytest.raises(UsageError, match="--profile and --stage-timers-interval"):
        settings(None, "--profile", "--stage-timers-interval", 5)


@pytest.mark.parametrize("flag", ["--min-lr", "--lr-warmup-iters", "--lr-decay-iters", "--adam-beta2"])
def test_flags_without_effect_are_refused(settings, flag):
    settings({}, flag, 1)
    with pytest.raises(UsageError, match=f'{flag} has no effect beside the "optimizer" section'):
        settings({"optimizer": {"type": "AdamW", "params": {"lr": 1e-4}}}, flag, 1)


def test_a_scheduler_without_an_optimizer_is_refused(settings):
    with pytest.raises(UsageError, match='"scheduler" but no "optimizer"'):
        settings({"scheduler": {"type": "WarmupLR"}})

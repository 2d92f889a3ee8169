"""The names that users may rely on: what is renamed or loses an argument here breaks their programs."""

from __future__ import annotations

import importlib.metadata
import inspect
import re
from pathlib import Path

import pytest

import megatron_dsp as dsp
from megatron_dsp import cli

ROOT = Path(__file__).parents[2]
NAMES = [
    "Boundary",
    "Carried",
    "Computed",
    "Layout",
    "Ledger",
    "LocalSize",
    "Mesh",
    "Needs",
    "Plan",
    "Reduced",
    "Region",
    "Slice",
    "Stage",
    "UsageError",
    "capture",
    "compile_stages",
    "deepspeed_initialize",
    "gather",
    "initialize",
    "ledger",
    "mean",
    "mean_loss",
    "parallelize",
    "random_along",
    "repeat_random",
    "sampler",
    "seed",
    "shard_range",
    "shard_sizes",
    "split",
    "switch",
    "unparallelize",
    "verify",
]
# A call as users write it: so many values by position, and keywords.
CALLS = {
    "Mesh": (0, ["tensor", "pipe", "sequence", "data"]),
    "capture": (1, []),
    "compile_stages": (1, ["backend"]),
    "deepspeed_initialize": (0, ["model", "config", "mesh", "optimizer", "model_parameters", "training_data", "lr_scheduler"]),
    "gather": (1, ["dim", "size", "group"]),
    "initialize": (1, []),
    "ledger": (0, []),
    "mean": (1, ["dim", "size", "group"]),
    "mean_loss": (1, ["group", "mask"]),
    "parallelize": (2, ["mesh"]),
    "sampler": (2, []),
    "seed": (2, []),
    "shard_range": (3, []),
    "shard_sizes": (2, []),
    "split": (1, ["dim", "group"]),
    "switch": (1, ["gather", "split", "size", "group"]),
    "unparallelize": (1, []),
    "verify": (2, ["plan", "mesh"]),
}
TARGETS = [
    "setup",
    "pretrain",
    "test",
    "test-long",
    "test-checkpoints",
    "test-mpich",
    "test-models",
    "test-oldest",
    "test-matrix",
    "lint",
    "gpu-check",
]


def test_the_package_has_these_names_and_no_others():
    assert sorted(dsp.__all__) == NAMES
    for name in NAMES:
        assert getattr(dsp, name).__doc__, name


@pytest.mark.parametrize("name", CALLS)
def test_calls_are_accepted_as_they_are_documented(name):
    positional, keywords = CALLS[name]
    signature = inspect.signature(getattr(dsp, name))
    signature.bind(*range(positional), **dict.fromkeys(keywords))
    if "group" in keywords:
        assert signature.parameters["group"].default is None, "the current mesh's sequence group"


@pytest.mark.parametrize("name", ["size", "rank", "group", "mpu", "device_mesh", "device", "from_megatron"])
def test_a_mesh_has(name):
    assert getattr(dsp.Mesh, name).__doc__


@pytest.mark.parametrize("missing", ["gather", "split", "size"])
def test_a_switch_names_its_dims_and_size(missing):
    keywords = {"gather": 0, "split": 1, "size": 2}
    del keywords[missing]
    with pytest.raises(TypeError, match=missing):
        inspect.signature(dsp.switch).bind("x", **keywords)


def test_usage_errors_are_value_errors():
    assert issubclass(dsp.UsageError, ValueError)


def test_the_console_command_has_its_subcommands(capsys):
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="megatron-dsp")
    assert command.load() is cli.main
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert {"env", "mesh"} <= set(re.findall(r"^    (\w+)", capsys.readouterr().out, re.MULTILINE))


@pytest.mark.parametrize("target", TARGETS)
def test_make_has_a_target(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert re.search(rf"^# .*make {target}\b", (ROOT / "Makefile").read_text(), re.MULTILINE), "described at the top"

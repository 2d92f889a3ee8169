"""docs/porting.md: a DeepSpeed script before and after DSP computes the same, and few of its lines differ."""

from __future__ import annotations

import copy
import difflib
import json
import re
from pathlib import Path

import jobs
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import megatron_dsp as dsp

FOLDER = jobs.ROOT / "examples" / "port_deepspeed"
PAIRS = [("before.py", "after.py"), ("ds_config.json", "ds_config_dsp.json")]
STEPS = 20

# What before.py runs through here: on the CPU DeepSpeed would compile its shared-memory collectives, for up to two minutes.
COMPILING_NOTHING = f"""
import runpy
from deepspeed.ops import __compatible_ops__
__compatible_ops__["deepspeed_shm_comm"] = False
runpy.run_path({str(FOLDER / "before.py")!r}, run_name="__main__")
"""


def _losses(launcher: str, size: int, script: Path, folder: Path, zero: int, sequence: int | None = None) -> list[float]:
    """The loss of each step of a job; ``sequence`` None: the script knows of no such axis."""
    config = json.loads((FOLDER / ("ds_config.json" if sequence is None else "ds_config_dsp.json")).read_text())
    config["zero_optimization"]["stage"] = zero
    if sequence is not None:
        config["sequence_parallel"]["size"] = sequence
    (folder / "ds_config.json").write_text(json.dumps(config))
    status, output = jobs.run(launcher, size, script, "--deepspeed_config", folder / "ds_config.json", "--dropout", 0)
    assert status == 0, output
    steps = re.findall(r"^step (\d+) loss (\S+)$", output, flags=re.MULTILINE)
    assert [int(step) for step, _ in steps] == list(range(1, STEPS + 1)), output
    return [float(loss) for _, loss in steps]


def _before(launcher: str, size: int, folder: Path, zero: int) -> list[float]:
    (folder / "before.py").write_text(COMPILING_NOTHING)
    return _losses(launcher, size, folder / "before.py", folder, zero)


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> list[float]:
    """The losses of the script as it was, on one rank."""
    losses = _before("torchrun", 1, tmp_path_factory.mktemp("before"), zero=1)
    assert losses[-1] < 0.5 * losses[0]
    return losses


# launcher, ranks, degree of the sequence axis, ZeRO stage; data fills the ranks
RUNS = [
    ("alone", 1, 1, 1),
    ("torchrun", 2, 2, 1),
    pytest.param("deepspeed", 2, 2, 0, marks=pytest.mark.long),
    pytest.param("torchrun", 4, 2, 2, marks=pytest.mark.long),
    pytest.param("deepspeed", 4, 2, 3, marks=pytest.mark.long),
    pytest.param("mpirun", 3, 3, 2, marks=pytest.mark.long),
]


@pytest.mark.parametrize(("launcher", "size", "sequence", "zero"), RUNS)
def test_the_ported_script_has_the_losses_of_the_old_one(expected, tmp_path, launcher, size, sequence, zero):
    losses = _losses(launcher, size, FOLDER / "after.py", tmp_path, zero, sequence)
    assert losses == pytest.approx(expected, rel=1e-5, abs=0)


@pytest.mark.long
@pytest.mark.parametrize(("launcher", "zero"), [("deepspeed", 1), ("torchrun", 3)])
def test_the_old_script_on_data_ranks(expected, tmp_path, launcher, zero):
    assert _before(launcher, 2, tmp_path, zero) == pytest.approx(expected, rel=1e-5, abs=0)


def test_few_lines_differ():
    added = removed = 0
    for before, after in PAIRS:
        lines = [(FOLDER / name).read_text().splitlines() for name in (before, after)]
        changes = [line[0] for line in difflib.unified_diff(*lines, n=0, lineterm="")][2:]
        added, removed = added + changes.count("+"), removed + changes.count("-")
    assert max(added, removed) <= 15
    assert f"{added} lines added, {removed} removed" in " ".join((jobs.ROOT / "docs" / "porting.md").read_text().split())


def test_what_the_scripts_know_of_us():
    before, after = ((FOLDER / name).read_text() for name in PAIRS[0])
    assert "dsp" not in before
    assert set(re.findall(r"dsp\.(\w+)", after)) == {
        "initialize", "deepspeed_initialize", "split", "switch", "mean_loss", "seed",
    }  # fmt: skip


class _OverTime(nn.Module):
    """x [B, T, S, C]; a stage that mixes T, between two that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mix, self.last = (nn.Linear(size, size) for size in (4, 7, 4))

    def forward(self, x: Tensor, sharded: bool = True) -> Tensor:
        x = self.first(dsp.split(x, dim=1) if sharded else x)
        if sharded:
            x = dsp.switch(x, gather=1, split=2, size=7)
        x = torch.tanh(self.mix(x.transpose(1, 3)).transpose(1, 3))
        return self.last(dsp.switch(x, gather=2, split=1, size=5) if sharded else x)


def _own_loop(code: str) -> None:
    config = {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "sequence_parallel": {"size": 2},
    }
    data, model = TensorDataset(*torch.randn(2, 8, 7, 5, 4)), _OverTime()
    expected = copy.deepcopy(model)
    names = {
        "dsp": dsp,
        "DataLoader": DataLoader,
        "data": data,
        "model": model,
        "config": config,
        "mesh": dsp.initialize(config),
    }
    exec(code, names)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    sampler = DistributedSampler(data, num_replicas=1, rank=0)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        for x, target in DataLoader(data, 4, sampler=sampler):
            ((expected(x, sharded=False) - target) ** 2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for weight, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=0, atol=1e-6 * other.abs().max().item())


@pytest.mark.parametrize("size", [4, pytest.param(2, marks=pytest.mark.long)])
def test_the_loop_of_ones_own(ranks, size):
    (code,) = re.findall(r"```python\n(.*?)```", (jobs.ROOT / "docs" / "porting.md").read_text(), flags=re.DOTALL)
    ranks(size, _own_loop, code)

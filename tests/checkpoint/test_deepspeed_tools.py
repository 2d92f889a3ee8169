"""DeepSpeed's own tools on what is saved: where they take it by their own rules, they find the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jobs
import pytest
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from test_other_degrees import SAVED, Cell, _save, _state

pytestmark = pytest.mark.long


@pytest.mark.parametrize("cell", [Cell(data=2, zero=1), Cell(sequence=3, zero=2), Cell(data=2, zero=3)], ids=str)
def test_zero_to_fp32(ranks, tmp_path, cell):
    ranks(cell.ranks, _save, cell, tmp_path)
    state, found = _state(tmp_path), get_fp32_state_dict_from_zero_checkpoint(str(tmp_path))
    assert found.keys() == state.parameters.keys()
    assert all(torch.equal(found[name], state.read("weight", name)) for name in found)


UNIVERSAL = [Cell(data=2, zero=1), Cell(tensor=2, data=2, zero=2), Cell(pipe=2, zero=1), Cell(tensor=2, pipe=2, zero=1)]


@pytest.mark.parametrize("cell", UNIVERSAL, ids=str)
def test_ds_to_universal(ranks, tmp_path, cell):
    """ZeRO 3 is left out: at tensor 1 its universal files are of another form, at tensor 2 they cannot be loaded again."""
    ranks(cell.ranks, _save, cell, tmp_path / "saved")
    state, path = _state(tmp_path / "saved"), tmp_path / "universal"
    tool = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--num_extract_workers=1", "--num_merge_workers=1"]
    folders = ["--input_folder", tmp_path / "saved" / f"global_step{SAVED}", "--output_folder", path]
    done = subprocess.run([*tool, *folders], cwd=jobs.ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    names = {state.model.locate(name)[1]: name for name in state.parameters}
    assert {folder.name for folder in (path / "zero").iterdir() if folder.is_dir()} == names.keys()
    for local, name in names.items():
        for kind, file in (("weight", "fp32"), ("exp_avg", "exp_avg"), ("exp_avg_sq", "exp_avg_sq")):
            assert torch.equal(_param(path / "zero" / local / f"{file}.pt"), state.read(kind, name)), (kind, name)


def _param(path: Path) -> torch.Tensor:
    return torch.load(path, weights_only=True)["param"]

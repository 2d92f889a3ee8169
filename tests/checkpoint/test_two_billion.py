"""Two billion parameters from safetensors to DeepSpeed's files at tensor 4 x pipe 2, and back: memory, disk, and every bit."""

from __future__ import annotations

import math
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jobs
import pytest
import synthetic
import torch
from safetensors import safe_open

from megatron_dsp.checkpoint.state import WEIGHT

PARAMETERS = 2.02e9  # its widths are rounded
MEMORY, DISK = 3 * 2**30, 24 * 2**30  # bytes


def _run(script: str, *arguments: object) -> None:
    command = [sys.executable, jobs.ROOT / script, *map(str, arguments)]
    done = subprocess.run(command, cwd=jobs.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(f"{script} {' '.join(map(str, arguments))}: peak of memory up to now {peak / 2**20:.0f} MiB")
    assert peak < MEMORY


def _on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def folder(tmp_path) -> Iterator[Path]:
    if shutil.disk_usage(tmp_path).free < DISK:
        pytest.skip(f"needs {DISK:,} bytes of free disk in {tmp_path}")
    yield tmp_path
    shutil.rmtree(tmp_path)  # pytest would keep it


@pytest.mark.long
def test_there_and_back(folder):
    source, there, back = (folder / name for name in ("source", "there", "back"))
    convert = "tools/convert_checkpoint.py"
    _run("tests/checkpoint/synthetic.py", source, "--parameters", PARAMETERS)
    degrees = ["--target-tensor-parallel-size", 4, "--target-pipeline-parallel-size", 2, "--target-zero-stage", 0]
    _run(convert, "--load-dir", source, "--save-dir", there, "--saver", "deepspeed", *degrees)
    assert _on_disk(folder) < DISK
    shutil.rmtree(source)
    _run(convert, "--load-dir", there, "--save-dir", back, "--saver", "safetensors")
    assert _on_disk(folder) < DISK

    made = synthetic.source(PARAMETERS, (WEIGHT,))
    assert sum(math.prod(parameter.shape) for parameter in made.parameters.values()) >= 2e9
    found = set()
    for path in back.glob("model*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                assert torch.equal(file.get_tensor(name), made.read(WEIGHT, name)), name
                found.add(name)
    assert found == made.parameters.keys()

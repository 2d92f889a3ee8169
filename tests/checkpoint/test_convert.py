"""``megatron-dsp convert``: what it says, what it refuses, what a kill leaves, and how much memory it takes."""

from __future__ import annotations

import json
import os
import pickle
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import in_memory
import jobs
import pytest
import synthetic
import torch

from megatron_dsp import cli
from megatron_dsp.checkpoint import convert as converting
from megatron_dsp.checkpoint import manifest
from megatron_dsp.checkpoint.convert import convert
from megatron_dsp.checkpoint.formats import FORMATS
from megatron_dsp.checkpoint.formats.source import Target
from megatron_dsp.errors import UsageError

tool = runpy.run_path(str(jobs.ROOT / "tools" / "convert_checkpoint.py"))["main"]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A checkpoint of safetensors."""
    path = tmp_path / "source"
    path.mkdir()
    FORMATS["safetensors"].save(in_memory.source(), path, Target())
    return path


@pytest.fixture
def command(folder, capsys):
    """``command("--saver", ...)``: exit status, stdout, stderr; from ``folder`` into a new one beside it."""

    def command(*arguments: object, save_dir: Path = folder.parent / "new", load_dir: Path = folder) -> tuple[int, str, str]:
        folders = ["--load-dir", load_dir, "--save-dir", save_dir]
        status = tool(["convert", *map(str, [*folders, *arguments])])
        return status, *capsys.readouterr()

    return command


def test_through_all_formats_and_back(command, folder):
    """Every step is found out by its files, and nothing is lost on the way."""
    degrees = ["--target-tensor-parallel-size", 2, "--target-pipeline-parallel-size", 3, "--target-data-parallel-size", 2]
    steps = [["deepspeed", *degrees], ["torch_dcp"], ["deepspeed_universal"], ["safetensors"]]
    before, names = folder, []
    for number, (saver, *flags) in enumerate(steps):
        new = folder.parent / str(number)
        status, output, error = command("--saver", saver, *flags, save_dir=new, load_dir=before)
        assert status == 0, error
        line = output.splitlines()[-1]  # DeepSpeed's own notes stand before it
        assert line.startswith("108 tensors, ")
        names.append(line.partition(" from ")[2].partition(" in ")[0])
        before = new
    assert names == [
        "safetensors to deepspeed",
        "deepspeed to torch_dcp",
        "torch_dcp to deepspeed_universal",
        "deepspeed_universal to safetensors",
    ]
    found = FORMATS["safetensors"].load(before)
    in_memory.same(found, in_memory.source())
    assert found.layers == in_memory.LAYERS
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--saver", "safetensor"], "--saver safetensor: no such format; did you mean safetensors?"),
        (["--saver", "torch_dcp", "--loader", "dcp"], "--loader dcp: no such format; did you mean torch_dcp?"),
        (["--saver", "torch_dcp", "--loader", "deepspeed"], "has no files with names of that format; give another, or auto"),
        (["--saver", "torch_dcp", "--target-tensor-parallel-size", 2], "torch_dcp has no use for it; leave it out"),
        (["--saver", "torch_dcp", "--dtype", "fp8"], "--dtype fp8: must be one of fp32, bf16, fp16"),
        (["--saver", "deepspeed_universal", "--dtype", "bf16"], "universal checkpoints have weights in fp32"),
        (["--saver", "deepspeed", "--dtype", "fp16"], "for models in fp32 and bf16"),
        (["--saver", "deepspeed", "--target-zero-stage", 4], "--target-zero-stage 4: must be 0, 1, 2 or 3"),
        (["--saver", "deepspeed", "--target-data-parallel-size", 0], "--target-data-parallel-size 0: must be at least 1"),
        (
            ["--saver", "deepspeed", "--target-tensor-parallel-size", 6],
            "'blocks.0.kernel' has 5 elements along the dim that is divided; lower it",
        ),
        (["--saver", "deepspeed", "--target-pipeline-parallel-size", 7], "more than the model's 6 layers; lower it"),
        (
            ["--saver", "deepspeed", "--target-pipeline-parallel-size", 2, "--target-zero-stage", 2],
            "--target-zero-stage 2 with a pipeline: DeepSpeed has no gradient shards there; use stage 0 or 1",
        ),
        (
            ["--saver", "deepspeed", "--target-pipeline-parallel-size", 2, "--target-zero-stage", 0, "--dtype", "bf16"],
            "DeepSpeed does not load its own checkpoints of these",
        ),
        (["--saver", "safetensors", "--max-shard-size", "5XB"], "--max-shard-size '5XB': must be a size such as 5GB"),
        (["--saver", "safetensors", "--load-iteration", 3], "--load-iteration 3: there is no"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_refusals(command, folder, arguments, message):
    status, output, error = command(*arguments)
    assert (status, output) == (1, "")
    line = error.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert message in line
    assert [path.name for path in folder.parent.iterdir()] == ["source"]


def test_folders_are_never_mixed(command, folder):
    (folder.parent / "full").mkdir()
    (folder.parent / "full" / "notes").write_text("mine")
    inside = "one of it and --load-dir"
    cases = [(folder, inside), (folder / "new", inside), (folder.parent, inside), (folder.parent / "full", "is not empty")]
    for save_dir, message in cases:
        status, _, error = command("--saver", "torch_dcp", save_dir=save_dir)
        assert status == 1
        assert message in error
    status, _, error = command("--saver", "torch_dcp", load_dir=folder.parent / "none")
    assert "no such folder" in error
    status, _, error = command("--saver", "torch_dcp", load_dir=folder.parent / "full")
    assert "no checkpoint in one of the formats" in error
    (folder.parent / "empty").mkdir()
    assert command("--saver", "torch_dcp", save_dir=folder.parent / "empty")[0] == 0


def test_a_table_describes_a_model_of_others(command, folder, tmp_path):
    (folder / manifest.NAME).unlink()
    (folder / "training.json").unlink()
    for path in folder.glob("*.safetensors"):
        if not path.name.startswith("model"):
            path.unlink()
    degrees = ["--saver", "deepspeed", "--target-tensor-parallel-size", 2, "--target-pipeline-parallel-size", 2]
    table = tmp_path / "table.json"
    for content, message in (
        (None, "does not say how the tensor axis divides parameters; give a --sharding-table"),
        ({"parameters": {"*.query.weight": 0}}, 'does not say what the layers of a pipeline are; name them under "layers"'),
        ({"parameters": {"*.query.weight": 0}, "layers": in_memory.LAYERS[:-1]}, "parameter 'head."),
        ({"parameters": {"*.key.weight": 0}}, "'*.key.weight' matches no parameter"),
        ({"parameters": ["*.query.weight"]}, "is no sharding table; it is"),
        ({"dims": {}}, "is no sharding table; it is"),
    ):
        flags = []
        if content is not None:
            table.write_text(json.dumps(content))
            flags = ["--sharding-table", table]
        status, _, error = command(*degrees, *flags)
        assert status == 1
        assert message in error
    dims = {"*.query.*": 0, "*.out.weight": 1, "*.kernel": 2, "embedding.table": 0}
    table.write_text(json.dumps({"parameters": dims, "layers": in_memory.LAYERS}))
    status, _, error = command(*degrees, "--sharding-table", table)
    assert status == 0, error
    found, expected = FORMATS["deepspeed"].load(folder.parent / "new"), in_memory.source(in_memory.KINDS[:1])
    assert found.parameters.keys() == expected.parameters.keys() | {"head.table"}  # a buffer, which nothing says now
    for name, parameter in expected.parameters.items():
        assert found.parameters[name] == parameter
        assert torch.equal(found.read("weight", name), expected.read("weight", name))


def test_the_newest_good_one_of_several(command, folder, tmp_path, caplog):
    several = tmp_path / "several"
    for number in (5, 9):
        source = in_memory.source()
        training = replace(source.training, iteration=number)
        FORMATS["deepspeed"].save(replace(source, training=training), several, Target())
    (several / "global_step9" / "mp_rank_00_model_states.pt").unlink()
    assert command("--saver", "torch_dcp", load_dir=several)[0] == 0
    assert FORMATS["torch_dcp"].load(folder.parent / "new").training.iteration == 5
    assert "global_step9 is damaged (mp_rank_00_model_states.pt is missing); taking global_step5" in caplog.text
    status, _, error = command(
        "--saver", "torch_dcp", "--load-iteration", 9, "--loader", "deepspeed", load_dir=several, save_dir=tmp_path / "other"
    )
    assert status == 1
    assert "global_step9 is damaged: mp_rank_00_model_states.pt is missing" in error


class _Makes:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path):
        self._path = str(path)

    def __reduce__(self):
        return os.mkdir, (self._path,)


def test_metadata_that_runs_code_is_refused_unrun(tmp_path):
    for protocol in range(6):
        (tmp_path / ".metadata").write_bytes(pickle.dumps(_Makes(tmp_path / "made"), protocol=protocol))
        with pytest.raises(
            UsageError, match=r"\.metadata is not opened: .*(posix\.mkdir, which may run anything|not of its protocol)"
        ):
            FORMATS["torch_dcp"].load(tmp_path)
    # A name that comes from the memo, and is put there behind another text.
    hidden = b"\x80\x04\x8c\x05posix\x94\x8c\x05torch\x94\x8c\x05mkdir\x94\x8c\x04Sizeh\x00h\x02\x93\x8c\x01x\x85R."
    (tmp_path / ".metadata").write_bytes(hidden)
    with pytest.raises(UsageError, match=r"it wants posix\.mkdir, which may run anything"):
        FORMATS["torch_dcp"].load(tmp_path)
    # The module's name is below what is taken away before.
    popped = b"\x80\x04\x8c\x05posix\x8c\x05mkdir\x8c\x01x0\x93\x8c\x01x\x85R."
    (tmp_path / ".metadata").write_bytes(popped)
    with pytest.raises(UsageError, match="a global in it has no plain name"):
        FORMATS["torch_dcp"].load(tmp_path)
    assert not (tmp_path / "made").exists()


def test_what_fails_on_the_way_leaves_nothing(folder, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(FORMATS, "torch_dcp", replace(FORMATS["torch_dcp"], save=fail))
    (tmp_path / ".new.converting").mkdir()  # of a kill
    (tmp_path / ".new.converting" / "half").write_text("")
    with pytest.raises(UsageError, match="No space left on device"):
        convert(folder, tmp_path / "new", saver="torch_dcp", target=Target())
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def _kilobytes(key: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1])


def peak_of(load_dir: Path, save_dir: Path, *flags: str) -> int:
    """The bytes by which a conversion in this process raises its memory at most, files that are mapped into it included."""
    import deepspeed  # noqa: F401

    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now on
    before = _kilobytes("VmRSS")
    status = cli.main(["convert", "--load-dir", str(load_dir), "--save-dir", str(save_dir), *flags])
    assert status == 0
    return 1024 * (_kilobytes("VmHWM") - before)


def _peak_elsewhere(*arguments: object) -> int:
    call = f"import test_convert; print(test_convert.peak_of(*{[str(argument) for argument in arguments]!r}))"
    path = os.pathsep.join([str(Path(__file__).parent), str(jobs.ROOT / "tests"), str(jobs.ROOT)])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", call], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


@pytest.mark.long
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of memory cannot be set back here")
def test_memory_does_not_grow_with_the_model(tmp_path):
    """Of checkpoints of 300 and 600 MB: at most 3 times the largest tensor and a constant, which is the same for both."""
    kinds = "weight", "exp_avg", "exp_avg_sq"
    degrees = ["--target-tensor-parallel-size", "4", "--target-pipeline-parallel-size", "2"]
    for parameters in (25e6, 50e6):
        made = synthetic.source(parameters, kinds)
        largest = max(4 * torch.Size(parameter.shape).numel() for parameter in made.parameters.values())
        (tmp_path / "0").mkdir()
        FORMATS["safetensors"].save(made, tmp_path / "0", Target())
        savers = [["deepspeed", *degrees], ["torch_dcp"], ["deepspeed_universal"], ["safetensors"]]
        for number, (saver, *flags) in enumerate(savers):
            peak = _peak_elsewhere(tmp_path / str(number), tmp_path / str(number + 1), "--saver", saver, *flags)
            mapped = (256 + 16) * 2**20 if number == 1 else 0  # of DeepSpeed's files
            print(f"{saver} {parameters:g}: {peak / 2**20:.0f} MiB, largest {largest / 2**20:.0f}")
            assert peak < 3 * largest + 48 * 2**20 + mapped
        for path in (tmp_path / "0").glob("*.safetensors"):
            assert manifest.sha256(path) == manifest.sha256(tmp_path / "4" / path.name)
        for number in range(5):
            shutil.rmtree(tmp_path / str(number))


def test_sizes():
    for text, size in (("5GB", 5 * 10**9), ("2GiB", 2**31), ("1.5 kb", 1500), ("12", 12), ("300MB", 3 * 10**8)):
        assert converting.size_of(text) == size

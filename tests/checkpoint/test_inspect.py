"""``megatron-dsp inspect``: what it says of checkpoints of all formats, good and damaged, and of two of them."""

from __future__ import annotations

import json
import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import in_memory
import plain
import planted
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import checkpoint as dcp

from megatron_dsp import cli
from megatron_dsp.checkpoint import manifest
from megatron_dsp.checkpoint.formats import FORMATS
from megatron_dsp.checkpoint.formats.source import Source, Target
from megatron_dsp.checkpoint.inspect import compare, describe

TARGETS = {
    "deepspeed": Target(tensor=2, pipe=2, data=3, zero_stage=1),
    "deepspeed_universal": Target(),
    "torch_dcp": Target(),
    "safetensors": Target(max_shard_size=200),
}


@pytest.fixture
def command(monkeypatch, capsys):
    """``command(PATH, ...)``: exit status, stdout, stderr."""
    monkeypatch.setenv("COLUMNS", "200")

    def command(*arguments: object) -> tuple[int, str, str]:
        status = cli.main(["inspect", *map(str, arguments)])
        return status, *capsys.readouterr()

    return command


def save(folder: Path, name: str, source: Source | None = None, target: Target | None = None) -> Path:
    """A folder with a checkpoint of a format."""
    folder.mkdir()
    FORMATS[name].save(source or in_memory.source(), folder, target or TARGETS[name])
    return folder


def changed(kind: str, name: str, change: Callable[[Tensor], Tensor]) -> Source:
    """The checkpoint of `in_memory` with one other tensor."""
    source = in_memory.source()
    other = change(source.read(kind, name).clone())
    return replace(source, read=lambda *of: other if of == (kind, name) else source.read(*of))


def cells(output: str, first: str) -> list[str]:
    """The cells of the first table row that begins with ``first``."""
    rows = [[cell.strip() for cell in line.strip("│┃ ").split("│")] for line in output.splitlines()]
    return next(row for row in rows if row[0] == first)


@pytest.mark.parametrize("name", FORMATS)
def test_what_each_format_holds(tmp_path, command, name):
    folder = save(tmp_path / "saved", name)
    status, output, _ = command(folder)
    assert status == 0
    assert cells(output, "format")[1] == name
    assert cells(output, "state")[1] == "good"
    assert cells(output, "iteration")[1] == "7"
    assert cells(output, "consumed samples")[1] == "56"
    assert cells(output, "step")[1] == "6"
    assert cells(output, "lr")[1] == "0.125"
    assert set(cells(output, "tensors of each parameter")[1].split(", ")) == set(in_memory.KINDS)
    elements = sum(math.prod(parameter.shape) for parameter in in_memory.PARAMETERS.values())
    assert cells(output, "parameters")[1] == f"{len(in_memory.PARAMETERS)} of {elements:,} elements"
    assert cells(output, "precision")[1] == "fp32"
    assert "torch 2" in cells(output, "written by")[1]
    assert "... and" in output
    status, output, _ = command(folder, "--tensors", "--full")
    assert status == 0
    assert cells(output, "mixers.1.out.weight")[1:3] == ["[5, 7]", "1"]
    assert "... and" not in output
    assert ("--load" in output) == (name == "deepspeed")
    if name == "deepspeed":
        assert cells(output, "saved by ranks")[1] == "pipe 2 x data 3 x sequence 1 x tensor 2"
        assert cells(output, "ZeRO stage")[1] == "1"
        assert cells(output, "global_step7")[4:6] == ["good", "latest, --load takes it"]


def test_json(tmp_path, command):
    folder = save(tmp_path / "saved", "deepspeed")
    status, output, _ = command(folder, "--json")
    found = json.loads(output)
    assert status == 0
    (described,) = found["described"]
    assert described["training"]["lr"] == 0.125
    assert {each["name"]: (each["shape"], each["dim"]) for each in described["parameters"]} == {
        name: (list(parameter.shape), parameter.dim) for name, parameter in in_memory.PARAMETERS.items()
    }
    assert found["checkpoints"][0]["taken"]
    _, output, _ = command(folder, folder, "--json")
    assert json.loads(output)["equal"]


def test_json_stands_alone_on_stdout(tmp_path):
    """DeepSpeed logs there when it is imported, as it is for the classes that its files name."""
    folder = save(tmp_path / "saved", "deepspeed", target=Target(zero_stage=1))
    main = "import sys; from megatron_dsp.cli import main; sys.exit(main(sys.argv[1:]))"
    output = subprocess.check_output([sys.executable, "-c", main, "inspect", folder, "--json"], timeout=120)
    assert json.loads(output)["damaged"] == []


def test_published_files_without_a_manifest(tmp_path, command):
    folder = tmp_path / "published"
    folder.mkdir()
    save_file({"a.weight": torch.ones(3, 2, dtype=torch.bfloat16), "count": torch.tensor(3)}, folder / "model.safetensors")
    status, output, _ = command(folder, "--full")
    assert status == 0
    assert cells(output, "checked")[1] == "all tensors were read, as there is no manifest.json"
    assert cells(output, "precision")[1] == "bf16"
    assert cells(output, "parameters")[1] == "1 of 6 elements"
    assert "iteration" not in output
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-1])
    status, output, _ = command(folder)
    assert status == 1
    assert "damaged: published/" in output
    assert "model.safetensors" in output.splitlines()[-1]


def test_a_part_of_torch_files_that_is_cut_off_is_found_by_reading(tmp_path, command):
    folder = tmp_path / "published"
    dcp.save({"model": {"a": torch.ones(100)}}, checkpoint_id=folder, no_dist=True)
    (file,) = folder.glob("*.distcp")
    file.write_bytes(file.read_bytes()[:-200])
    assert command(folder)[0] == 0
    status, output, _ = command(folder, "--full")
    assert status == 1
    assert file.name in output.splitlines()[-1]


def test_a_folder_of_several(tmp_path, command):
    for step in (2, 9, 10):
        plain.save(tmp_path, step)
    (tmp_path / "global_step10" / plain.OURS[0]).unlink()
    (tmp_path / "global_step10" / plain.FILES[0]).write_text("cut")
    status, output, _ = command(tmp_path)
    assert status == 1
    assert cells(output, "global_step10")[4:6] == ["damaged", "latest"]
    assert cells(output, "global_step9")[4:6] == ["good by sizes", "--load takes it"]
    assert cells(output, "global_step2")[4:] == ["good by sizes"]
    lines = [line for line in output.splitlines() if line.startswith("damaged: global_step10/")]
    assert sorted(lines) == [
        f"damaged: global_step10/{plain.FILES[0]} is cut off: 3 bytes instead of {len(plain.content(plain.FILES[0], 10))}",
        f"damaged: global_step10/{plain.OURS[0]} is missing",
    ]
    assert cells(output, "iteration")  # of the one that --load takes


def test_a_flipped_byte_is_found_by_its_hash(tmp_path, command):
    folder = save(tmp_path / "saved", "torch_dcp")
    (file,) = folder.glob("*.distcp")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert command(folder)[0] == 0
    status, output, _ = command(folder, "--full")
    assert status == 1
    assert f"damaged: saved/{file.name} was changed: it holds other bytes than were saved" in output


@pytest.mark.parametrize("name", FORMATS)
def test_no_byte_of_a_manifest_may_be_missing(tmp_path, command, name):
    folder = save(tmp_path / "saved", name)
    (path,) = folder.rglob(manifest.NAME)
    path.write_bytes(path.read_bytes()[:-1])
    status, output, _ = command(folder)
    assert status == 1
    assert "manifest.json was changed" in output


def test_nothing_is_run(tmp_path, command):
    """A pickle that makes a folder, in all places where one is read."""
    harm = tmp_path / "harm"
    folder = tmp_path / "torch"
    dcp.save({"model": {"a": torch.ones(2)}}, checkpoint_id=folder, no_dist=True)
    (folder / ".metadata").write_bytes(pickle.dumps(planted.Makes(harm), 4))
    status, output, _ = command(folder)
    assert status == 1
    assert "is not opened" in output
    folder = save(tmp_path / "deepspeed", "deepspeed")
    path = folder / "global_step7"
    record = manifest.read(path)
    for file in path.glob("*.pt"):
        planted.archive(file, pickle.dumps(planted.Makes(harm), 2))
        record.files[file.name] = manifest.StoredFile(file.stat().st_size, manifest.sha256(file))
    manifest.write(path, record)  # an attacker can do so too
    status, output, _ = command(folder, "--full")
    assert status == 1
    assert "is not opened" in output
    assert not harm.exists()


@pytest.mark.parametrize("path", ["nothing", "."])
def test_where_there_is_no_checkpoint(tmp_path, command, path):
    status, output, error = command(tmp_path / path)
    assert (status, output) == (1, "")
    assert error.startswith(f"error: {tmp_path / path}: no ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "deepspeed"])
def test_formats_and_degrees_make_no_difference(tmp_path, command, name):
    status, output, _ = command(save(tmp_path / "a", "deepspeed"), save(tmp_path / "b", name))
    assert status == 0, output
    tensors = len(in_memory.KINDS) * len(in_memory.PARAMETERS)
    assert output.startswith(f"equal, bit by bit: {tensors} tensors in fp32")


def test_values_that_differ(tmp_path, command):
    name = "blocks.1.query.weight"

    def change(x: Tensor) -> Tensor:
        x[0, 0], x[1, 1] = x[0, 0] * 2, x[1, 1] + 0.25
        return x

    source = changed("exp_avg", name, change)
    a, b = save(tmp_path / "a", "safetensors"), save(tmp_path / "b", "safetensors", source)
    x, y = in_memory.source().read("exp_avg", name).double(), source.read("exp_avg", name).double()
    difference = compare(a, b)
    (value,) = difference.values
    assert value[:4] == ("exp_avg", name, 2, 35)
    assert value.absolute == (x - y).abs().max()
    assert value.relative == ((x - y).abs() / torch.maximum(x.abs(), y.abs())).max()
    status, output, _ = command(a, b)
    assert status == 2
    assert cells(output, "exp_avg") == ["exp_avg", f"{value.absolute:.3g}", f"{value.relative:.3g}", "1"]
    assert cells(output.rpartition("elements that differ")[2], "exp_avg")[1] == name


def test_the_most_different_tensor_stands_first(tmp_path):
    source = in_memory.source()
    more = {"head.weight": 1e-3, "embedding.table": 1.0, "embedding.scale": 0.1}

    def read(kind: str, name: str) -> Tensor:
        return source.read(kind, name) + (more.get(name, 0.0) if kind == "weight" else 0.0)

    a = save(tmp_path / "a", "safetensors")
    b = save(tmp_path / "b", "safetensors", replace(source, read=read))
    assert [each.name for each in compare(a, b).values] == ["embedding.table", "embedding.scale", "head.weight"]


@pytest.mark.parametrize(("number", "absolute"), [(-0.0, 0.0), (math.nan, math.inf), (math.inf, math.inf)])
def test_bits_that_differ_without_a_finite_difference(tmp_path, command, number, absolute):
    zero = changed("weight", "embedding.scale", lambda x: torch.zeros_like(x))
    other = changed("weight", "embedding.scale", lambda x: torch.full_like(x, number))
    a, b = (save(tmp_path / name, "safetensors", source) for name, source in (("a", zero), ("b", other)))
    (value,) = compare(a, b).values
    assert (value.differing, value.absolute) == (1, absolute)
    assert compare(b, b).equal
    status, output, _ = command(a, b, "--json")
    assert status == 2
    assert json.loads(output)["values"][0]["absolute"] == (absolute if absolute == 0 else None)


def test_large_tensors_are_compared_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_dsp.checkpoint.inspect._PIECE", 8)
    name = "embedding.table"
    a = save(tmp_path / "a", "safetensors")
    b = save(tmp_path / "b", "safetensors", changed("weight", name, lambda x: x + 1))
    (value,) = compare(a, b).values
    assert value.differing == 33
    assert value.absolute == pytest.approx(1, rel=1e-6)


def test_other_parameters_kinds_shapes_buffers_and_training(tmp_path, command):
    source = in_memory.source(kinds=("weight",))
    parameters: dict[str, Any] = dict(in_memory.PARAMETERS)
    parameters["mixers.0.bias"] = parameters.pop("mixers.0.out.bias")
    shaped = parameters["head.weight"]
    parameters["head.weight"] = replace(shaped, shape=(4, 3, 2))
    other = replace(
        in_memory.source(kinds=("weight",), parameters=parameters),
        training=replace(source.training, iteration=8, schedule=None),
        buffers={**source.buffers, "embedding.count": torch.tensor(4)},
    )
    a, b = save(tmp_path / "a", "safetensors"), save(tmp_path / "b", "torch_dcp", other)
    found = compare(a, b)
    assert found.only == (
        ["mixers.0.out.bias", *(f"all of the kind {kind}" for kind in in_memory.KINDS if kind != "weight")],
        ["mixers.0.bias"],
    )
    assert found.shapes == {"head.weight": ((2, 3, 4), (4, 3, 2))}
    assert found.training == {"iteration": (7, 8)}
    assert found.buffers == ["embedding.count"]
    status, output, _ = command(a, b)
    assert status == 2
    assert cells(output, "head.weight")[1:3] == ["(2, 3, 4)", "(4, 3, 2)"]
    assert cells(output, "iteration")[1:3] == ["7", "8"]


def test_files_of_others_are_compared_by_what_they_have(tmp_path):
    ours = save(tmp_path / "ours", "safetensors", in_memory.source(kinds=("weight",)))
    source = in_memory.source()
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    weights = {name: source.read("weight", name).contiguous() for name in source.parameters}
    save_file({**weights, **source.buffers}, theirs / "model.safetensors")
    assert compare(ours, theirs).equal
    save_file({**weights, **source.buffers, "head.table": torch.ones(2, 3)}, theirs / "model.safetensors")
    assert compare(ours, theirs).buffers == ["head.table"]


def test_damaged_ones_are_not_compared(tmp_path, command):
    a, b = save(tmp_path / "a", "safetensors"), save(tmp_path / "b", "safetensors")
    next(b.glob("exp_avg-*.safetensors")).unlink()
    status, _, error = command(a, b)
    assert status == 1
    assert "exp_avg-" in error
    assert "is missing" in error


def test_names_cannot_steer_a_terminal(tmp_path, command):
    folder = tmp_path / "published"
    folder.mkdir()
    save_file({"\x1b[2Jgone[bold]": torch.ones(1)}, folder / "model.safetensors")
    _, output, _ = command(folder)
    assert "\x1b" not in output
    assert "?[2Jgone[bold]" in output


def test_a_description_reads_no_tensors(tmp_path, monkeypatch):
    """Where there is a manifest: a checkpoint of any size is described at once."""
    folder = save(tmp_path / "saved", "safetensors")

    def refuse(*arguments: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(manifest, "sha256", refuse)
    monkeypatch.setattr("megatron_dsp.checkpoint.formats.safetensors.load", refuse)
    assert describe(folder).problems == []

"""Files of tensors: what the safetensors package reads of them, parts of tensors, and files that are not whole."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dsp.checkpoint.disk import durable_file
from megatron_dsp.checkpoint.tensor_file import TensorFile, create
from megatron_dsp.errors import UsageError

TENSORS = {
    "float64": torch.tensor(-0.0, dtype=torch.float64),
    "whole": torch.arange(3),
    "float32": torch.randn(5, 3, 2),
    "nothing": torch.empty(0, 4),
    "turned": torch.randn(3, 4).T,
    "half": torch.randn(3).half(),
    "bfloat16": torch.randn(2, 2).bfloat16(),
    "bytes": torch.arange(3, dtype=torch.uint8),
    "bits": torch.tensor([True, False]),
}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "some.safetensors"
    with create(path, {name: (t.dtype, t.shape) for name, t in TENSORS.items()}, {"a": "b"}) as append:
        for tensor in TENSORS.values():
            append(tensor)
    return path


def test_the_package_reads_what_is_written(path):
    found = load_file(path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert found[name].flatten().view(torch.uint8).tolist() == tensor.flatten().view(torch.uint8).tolist(), name
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_parts_of_flattened_tensors(path):
    file = TensorFile(path)
    assert file.metadata == {"a": "b"}
    assert file.shapes == {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    for name, tensor in TENSORS.items():
        flat = tensor.flatten()
        for start in range(len(flat) + 1):
            for stop in range(start, len(flat) + 1):
                assert torch.equal(file.read_flat(name, start, stop - start), flat[start:stop])
        assert torch.equal(file.read(name), tensor)


def test_a_file_that_is_not_finished_leaves_the_old_one(path):
    before = path.read_bytes()
    for tensor, message in ((torch.zeros(1), "bytes were announced"), (torch.zeros(2), "announced as torch.float32")):
        entries = {"first": (torch.float32, (1,)), "bytes": (torch.uint8, (1,))}
        with pytest.raises(ValueError, match=message), create(path, entries, {}) as append:
            append(tensor)
    with pytest.raises(TypeError), durable_file(path) as file:
        file.writelines([b"half", None])
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_damaged_files_are_refused(path, tmp_path):
    content = path.read_bytes()
    for damaged in (b"", content[:20], content[:-1], content + b"x", b"\xff" * 8 + content[8:]):
        path.write_bytes(damaged)
        with pytest.raises(UsageError, match="cannot be read as a safetensors file"):
            TensorFile(path)
    with pytest.raises(UsageError, match="cannot be read"):
        TensorFile(tmp_path / "none.safetensors")
    save_file({"x": torch.ones(2)}, path)
    assert TensorFile(path).read("x").tolist() == [1, 1]

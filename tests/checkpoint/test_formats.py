"""A checkpoint that is written in a format and read again is the same, bit by bit; and it is what others read."""

from __future__ import annotations

import itertools
import json
import logging
import zipfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import in_memory
import pytest
import torch
import torch.distributed.checkpoint as dcp
from deepspeed.checkpoint import ds_to_universal
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from megatron_dsp.checkpoint import manifest
from megatron_dsp.checkpoint.formats import FORMATS
from megatron_dsp.checkpoint.formats.source import Source, Target, depth_first, pipeline_model
from megatron_dsp.checkpoint.parameters import Parameter
from megatron_dsp.checkpoint.state import AVERAGE, WEIGHT, Training
from megatron_dsp.checkpoint.torch_file import Placeholder, TorchFile
from megatron_dsp.dtypes import PRECISIONS
from megatron_dsp.errors import UsageError

WHOLE = {  # formats that have parameters whole
    "safetensors": Target(),
    "safetensors in many files": Target(max_shard_size=100),
    "torch_dcp": Target(),
    "deepspeed_universal": Target(),
    "deepspeed_universal of a pipeline": Target(pipe=2),
}
DEGREES = itertools.product((1, 2), (1, 2), (1, 2, 3, 4, 6), (0, 1, 2, 3), ("fp32", "bf16"))
DEEPSPEED = [
    Target(tensor, pipe, data, stage, dtype)
    for tensor, pipe, data, stage, dtype in DEGREES
    if (stage or data == 1) and not (pipe > 1 and (stage > 1 or (stage == 0 and dtype == "bf16")))
]
IN_MAKE_TEST = [
    Target(1, 1, 1, 0),
    Target(2, 2, 3, 1),
    Target(2, 1, 4, 3, "bf16"),
    Target(1, 1, 1, 0, "bf16"),
    Target(2, 1, 6, 2),
]


def _copy(source: Source, folder: Path, name: str, target: Target) -> Source:
    FORMATS[name].save(source, folder, target)
    return FORMATS[name].load(folder)


@pytest.mark.parametrize("name", WHOLE)
def test_whole_parameters_come_back(tmp_path, name):
    source = in_memory.source()
    found = _copy(source, tmp_path, name.partition(" ")[0], WHOLE[name])
    in_memory.same(found, source)
    assert (found.training, found.layers) == (source.training, source.layers)


@pytest.mark.parametrize("kinds", [(WEIGHT,), (WEIGHT, AVERAGE), (WEIGHT, "momentum_buffer")], ids=str)
@pytest.mark.parametrize("name", [*WHOLE, "deepspeed"])
def test_whatever_kinds_of_tensors_there_are(tmp_path, name, kinds):
    source = in_memory.source(kinds)
    in_memory.same(_copy(source, tmp_path, name.partition(" ")[0], WHOLE.get(name, Target(data=2))), source)


def _of_deepspeed(source: Source, folder: Path, target: Target) -> None:
    found = _copy(source, folder, "deepspeed", target)
    in_memory.same(found, source)
    assert found.layers == (in_memory.LAYERS if target.pipe > 1 else None)
    assert replace(found.training, options=source.training.options) == source.training
    (path,) = folder.glob("global_step*")
    record = manifest.read(path)
    manifest.write(path, replace(record, contents=["ema"]))  # DeepSpeed's own weights are read now, and no longer our copy
    in_memory.same(FORMATS["deepspeed"].load(folder), source)


@pytest.mark.parametrize(
    "target", [pytest.param(each, marks=() if each in IN_MAKE_TEST else pytest.mark.long) for each in DEEPSPEED], ids=str
)
def test_deepspeeds_parts_come_back(tmp_path, target):
    _of_deepspeed(in_memory.source(), tmp_path, target)


def test_parameters_are_in_the_order_of_what_has_them():
    """A pipeline's in that of its layers, which run in another order than a module has them in its lists."""
    source = in_memory.source()
    ((names,),) = pipeline_model(source, [range(6)]).order
    numbers = [int(name.partition(".")[0]) for name in names]
    assert numbers == sorted(numbers)
    assert [name for name in names if name.startswith("2.")][:2] == ["2.query.weight", "2.query.bias"]
    wholes = list(pipeline_model(source, [range(6)]).parameters)
    assert wholes != list(source.parameters)
    assert depth_first(wholes) == list(source.parameters)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(40))
def test_random_models_come_back(tmp_path, seed):
    source = in_memory.random_source(seed)
    for name, target in WHOLE.items():
        (tmp_path / name).mkdir()
        in_memory.same(_copy(source, tmp_path / name, name.partition(" ")[0], target), source)
    target = DEEPSPEED[seed * 7 % len(DEEPSPEED)]
    if any(parameter.dim is not None for parameter in source.parameters.values()) or target.tensor == 1:
        _of_deepspeed(source, tmp_path / "deepspeed", target)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_weights_are_rounded_to_nearest(tmp_path, dtype):
    source = in_memory.source()
    for name in ("safetensors", "torch_dcp"):
        (tmp_path / name).mkdir()
        found = _copy(source, tmp_path / name, name, Target(dtype=dtype))
        for parameter in source.parameters:
            for kind in in_memory.KINDS:
                whole = source.read(kind, parameter)
                rounded = whole.to(PRECISIONS[dtype]).float() if kind in (WEIGHT, AVERAGE) else whole
                assert torch.equal(found.read(kind, parameter), rounded)


def test_safetensors_alone_reads_the_weights(tmp_path):
    source = in_memory.source()
    FORMATS["safetensors"].save(source, tmp_path, Target(max_shard_size=300))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert files == [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    size = 0
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / file, framework="pt") as opened:
            value = opened.get_tensor(name)
            assert opened.metadata() == {"format": "pt"}
        expected = source.buffers[name] if name in source.buffers else source.read(WEIGHT, name)
        assert value.dtype == expected.dtype
        assert torch.equal(value, expected)
        size += value.nbytes
    assert index["weight_map"].keys() == source.parameters.keys() | source.buffers.keys()
    assert index["metadata"]["total_size"] == size
    assert all(sum(_sizes(tmp_path / file)) <= 300 or len(_sizes(tmp_path / file)) == 1 for file in files)


def _sizes(path: Path) -> list[int]:
    with safe_open(path, framework="pt") as file:
        return [file.get_tensor(name).nbytes for name in file.keys()]  # noqa: SIM118


def test_published_weights_load_alone(tmp_path):
    values = {"b.weight": torch.randn(3, 2).bfloat16(), "a.weight": torch.randn(4).double(), "a.count": torch.tensor([2])}
    save_file(values, tmp_path / "diffusion_pytorch_model.safetensors")
    found = FORMATS["safetensors"].load(tmp_path)
    assert found.kinds == (WEIGHT,)
    assert found.training == Training()
    assert dict(found.parameters) == {"a.weight": Parameter((4,)), "b.weight": Parameter((3, 2))}
    assert torch.equal(found.read(WEIGHT, "b.weight"), values["b.weight"].float())
    assert torch.equal(found.buffers["a.count"], values["a.count"])
    save_file(values, tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match=r"several sets of weights .*diffusion_pytorch_model, other"):
        FORMATS["safetensors"].load(tmp_path)


def test_torch_reads_its_own(tmp_path):
    source = in_memory.source()
    FORMATS["torch_dcp"].save(source, tmp_path / "dcp", Target())
    wanted = {name: torch.empty(parameter.shape) for name, parameter in source.parameters.items()}
    optimizer = {name: {"exp_avg": torch.empty(parameter.shape), "step": torch.empty(())} for name, parameter in wanted.items()}
    content = {"model": wanted, "optimizer": {"state": optimizer}}
    dcp.load(content, checkpoint_id=tmp_path / "dcp", no_dist=True)
    for name in source.parameters:
        assert torch.equal(content["model"][name], source.read(WEIGHT, name))
        assert torch.equal(content["optimizer"]["state"][name]["exp_avg"], source.read("exp_avg", name))
        assert content["optimizer"]["state"][name]["step"] == source.training.step
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "all.pt")
    whole = torch.load(tmp_path / "all.pt", weights_only=True)
    assert torch.equal(whole["ema"]["head.weight"], source.read(AVERAGE, "head.weight"))


def _save_sharded(folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    weight = distribute_tensor(torch.arange(35.0).view(7, 5), mesh, [Shard(0)])
    moment = distribute_tensor(-torch.arange(35.0).view(7, 5), mesh, [Shard(1)])
    content = {"model": {"a.weight": weight, "a.count": torch.tensor(3)}}
    dcp.save({"app": content | {"optim": {"state": {"a.weight": {"exp_avg": moment}}}}}, checkpoint_id=folder)


def test_what_several_ranks_have_written_is_put_together(ranks, tmp_path):
    ranks(2, _save_sharded, tmp_path)
    found = FORMATS["torch_dcp"].load(tmp_path)
    assert dict(found.parameters) == {"a.weight": Parameter((7, 5))}
    assert found.kinds == (WEIGHT, "exp_avg")
    assert torch.equal(found.read(WEIGHT, "a.weight"), torch.arange(35.0).view(7, 5))
    assert torch.equal(found.read("exp_avg", "a.weight"), -torch.arange(35.0).view(7, 5))
    assert found.buffers == {"a.count": torch.tensor(3)}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_to_fp32(tmp_path, stage):
    source = in_memory.source()
    FORMATS["deepspeed"].save(source, tmp_path, Target(data=3, zero_stage=stage))
    found = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path))
    assert found.keys() == source.parameters.keys() | source.buffers.keys()
    assert all(torch.equal(found[name], source.read(WEIGHT, name)) for name in source.parameters)


@pytest.mark.parametrize("target", [Target(2, 2, 2, 1), pytest.param(Target(2, 1, 3, 2), marks=pytest.mark.long)], ids=str)
def test_ds_to_universal(tmp_path, capfd, target):
    """Even shards along dims 0 and 1, as that tool has no others; no scalars, which ZeRO's memory cannot have."""
    shapes = {"column": ((4, 3), 0), "row": ((3, 6), 1), "bias": ((5,), None)}
    names = [f"{layer}.{name}" for layer in in_memory.LAYERS for name in shapes]
    parameters = {name: Parameter(*shapes[name.rpartition(".")[2]]) for name in depth_first(names)}
    source = replace(in_memory.source(in_memory.KINDS[:3], parameters), buffers={})
    FORMATS["deepspeed"].save(source, tmp_path / "saved", target)
    (path,) = (tmp_path / "saved").glob("global_step*")
    flags = ["--input_folder", path, "--output_folder", tmp_path / "universal" / path.name]
    monkey = ["ds_to_universal", *map(str, flags), "--num_extract_workers", "1", "--num_merge_workers", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", monkey)
        ds_to_universal.main(ds_to_universal.parse_arguments())
    found = replace(FORMATS["deepspeed_universal"].load(tmp_path / "universal" / path.name), layers=source.layers)
    local = {name: name for name in parameters}
    if target.pipe > 1:
        numbers = {layer: number for number, layer in enumerate(in_memory.LAYERS)}
        local = {name: f"{numbers[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}" for name in parameters}
    for name, parameter in parameters.items():
        assert found.parameters[local[name]] == parameter
        for kind in source.kinds:
            assert torch.equal(found.read(kind, local[name]), source.read(kind, name))
    assert found.training == source.training


@pytest.mark.parametrize("name", WHOLE)
def test_a_changed_byte_is_found(tmp_path, name):
    kind = name.partition(" ")[0]
    FORMATS[kind].save(in_memory.source(), tmp_path, WHOLE[name])
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name not in ("latest", "latest_universal")]
    for path in files[:: max(1, len(files) // 12)]:
        content = path.read_bytes()
        path.write_bytes(
            content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :]
        )
        with pytest.raises(UsageError) as error:
            FORMATS[kind].load(tmp_path)
        assert path.name in str(error.value)
        path.write_bytes(content)
    FORMATS[kind].load(tmp_path)


def test_options_that_are_not_known_are_said(tmp_path, caplog):
    source = in_memory.source()
    with caplog.at_level(logging.WARNING):
        FORMATS["deepspeed"].save(source, tmp_path / "known", Target())
        assert not caplog.records
        unknown = replace(source, training=replace(source.training, options=None))
        FORMATS["deepspeed"].save(unknown, tmp_path / "unknown", Target())
    assert "weight decay 0.01 are written" in caplog.text


def test_a_file_is_what_torch_would_write(tmp_path):
    """Its archive is whole as others see it too, and pieces may come in any turn."""
    first, second = Placeholder(torch.float32, (2, 3)), Placeholder(torch.bfloat16, ())
    empty = Placeholder(torch.float32, (0, 2))
    file = TorchFile(tmp_path / "file.pt", {"list": [first, second], "dict": OrderedDict(empty=empty), "size": torch.Size([2])})
    file.append(first, torch.tensor([0.0, 1.0]))
    file.append(second, torch.tensor(2.0))
    file.append(first, torch.tensor([[2.0, 3.0], [4.0, 5.0]]))
    file.close()
    assert zipfile.ZipFile(tmp_path / "file.pt").testzip() is None
    for mmap in (False, True):
        content = torch.load(tmp_path / "file.pt", weights_only=True, mmap=mmap)
        assert torch.equal(content["list"][0], torch.arange(6.0).view(2, 3))
        assert torch.equal(content["list"][1], torch.tensor(2.0, dtype=torch.bfloat16))
        assert content["dict"]["empty"].shape == (0, 2)
        assert content["size"] == torch.Size([2])
    for size in (5, 7):
        file = TorchFile(tmp_path / "file.pt", first)
        file.append(first, torch.zeros(size))
        with pytest.raises(ValueError, match=f"{4 * size} bytes of a record were written instead of 24"):
            file.close()

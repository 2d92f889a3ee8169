"""DeepSpeed's universal checkpoints, which its engines load in ZeRO 1 and 2 (and BF16_Optimizer) at any degrees.

| in ``FOLDER/global_stepN/`` | what it has |
|---|---|
| ``zero/NAME/fp32.pt``, ``exp_avg.pt``, ... | ``{"param": the whole tensor, "cat_dim": how the tensor axis divides it}`` |
| ``zero/NAME/step.pt`` | the optimizer's count |
| ``zero/optimizer_state.pt`` | the options of its param group |
| ``mp_rank_00_model_states.pt`` | counts, the schedule, and buffers |

``FOLDER/latest_universal`` names it. With a pipeline NAME begins with the number of a layer. What ``ds_to_universal`` makes of
ZeRO 3 is another form, which is not read.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from megatron_dsp.checkpoint import unpickling
from megatron_dsp.checkpoint.disk import durable_file, sync
from megatron_dsp.checkpoint.file_names import ModelFile, UniversalFile, model_files, step_folder
from megatron_dsp.checkpoint.formats import safetensors
from megatron_dsp.checkpoint.formats.source import (
    DEEPSPEED,
    Source,
    Target,
    param_group,
    pipeline_model,
    read_companion,
    require_layers,
    write_companion,
)
from megatron_dsp.checkpoint.parameters import Parameter, whole_name
from megatron_dsp.checkpoint.state import AVERAGE, WEIGHT, Training
from megatron_dsp.checkpoint.torch_file import Placeholder, TorchFile
from megatron_dsp.errors import UsageError

POINTER = "latest_universal"
_MODEL = ModelFile(0).name
_OPTIMIZER = UniversalFile("optimizer_state").name
_WEIGHT = UniversalFile("fp32").name
_STEP = UniversalFile("step").name


def recognises(folder: Path) -> bool:
    return (folder / POINTER).exists() or (folder / "zero" / _OPTIMIZER).exists()


def load(folder: Path) -> Source:
    """The checkpoint that ``latest_universal`` names, or one itself. Errors: UsageError where it is damaged or of ZeRO 3."""
    path = folder
    if (folder / POINTER).exists():
        path = folder / (folder / POINTER).read_text().strip()
    if not (path / "zero" / _OPTIMIZER).exists():
        raise UsageError(f"{path} has no zero/{_OPTIMIZER}; give the folder of a universal checkpoint")
    companion = read_companion(path)
    model = unpickling.load(next(iter(model_files(path)), path / _MODEL))
    layers = None if companion.model is None else companion.model.layers
    numbered = model["module"] is None  # a pipeline's
    names = _parameter_names(path)
    places = {whole_name(name, layers) if numbered else name: path / "zero" / name for name in names}
    buffer_names = set(model.get("buffer_names") or ())
    buffers = {name: value.clone() for name, value in (model["module"] or {}).items() if name in buffer_names}
    if numbered and "buffers" in model:
        buffers = dict(model["buffers"])
    shards = model.get("checkpoint_parallel_dimensions", {}).get("tp_degree", 1) > 1
    found = {}
    for name, place in places.items():
        if name not in buffers:
            entry = _load_weight(place / _WEIGHT)
            found[name] = Parameter(tuple(entry["param"].shape), entry.get("cat_dim") if shards else None)
    first = places[next(iter(found))] if found else path
    there = [entry.stem for entry in first.glob("*.pt") if entry.name not in (_WEIGHT, _STEP)]
    kinds = companion.kinds or (WEIGHT, *sorted(there))
    average = safetensors.reader(path, AVERAGE) if AVERAGE in kinds else None

    def read(kind: str, name: str) -> torch.Tensor:
        if kind == AVERAGE and average is not None:
            return average(name)
        file = places[name] / _file_name(kind)
        if kind != WEIGHT and not file.exists():  # it is not trained
            return torch.zeros(found[name].shape)
        return unpickling.load(file)["param"].float()

    return Source(
        found if companion.model is None else companion.parameters({name: each.shape for name, each in found.items()}),
        kinds,
        companion.training if companion.model is not None else _training(path, model, first),
        layers,
        buffers,
        read,
    )


def save(source: Source, folder: Path, target: Target) -> None:
    """Write one, for a pipeline where ``target.pipe`` is above 1. Weights are in fp32, as DeepSpeed's format has them alone.

    Errors: UsageError for another dtype, and for a pipeline of a model whose layers are not known.
    """
    if target.dtype != "fp32":
        raise UsageError(f"--dtype {target.dtype}: universal checkpoints have weights in fp32; leave it out")
    names = {name: name for name in source.parameters}
    if target.pipe > 1:
        model = pipeline_model(source, [range(len(require_layers(source, target.pipe)))])
        names = {name: model.locate(name)[1] for name in model.parameters}
    training = source.training
    path = folder / step_folder(training.iteration)
    for kind in (kind for kind in source.kinds if kind != AVERAGE):
        for name, parameter in source.parameters.items():
            place = path / "zero" / names[name]
            place.mkdir(parents=True, exist_ok=True)
            tensor = Placeholder(torch.float32, parameter.shape)
            divided = {} if parameter.dim is None else {"cat_dim": parameter.dim}
            file = TorchFile(place / _file_name(kind), {"param": tensor, **divided})
            file.append(tensor, source.read(kind, name))
            file.close()
    if source.optimizer_kinds:
        for name in names.values():
            torch.save(torch.tensor(float(training.step or 0)), path / "zero" / name / _STEP)
    buffers = OrderedDict(source.buffers)
    counts = {
        "skipped_steps": training.skipped_steps,
        "global_steps": training.iteration,
        "global_samples": training.consumed_samples,
        "lr_scheduler": training.schedule,
        "dp_world_size": 1,
        "mp_world_size": 1,  # as many as there are model files
    }
    rest = {"module": None, "buffers": buffers} if target.pipe > 1 else {"module": buffers}
    torch.save({**counts, **rest, "buffer_names": list(buffers), "ds_version": DEEPSPEED}, path / _MODEL)
    torch.save({"param_groups": [{**param_group(source), "params": []}], "ds_version": DEEPSPEED}, path / "zero" / _OPTIMIZER)
    if AVERAGE in source.kinds:
        safetensors.write(source, AVERAGE, dict.fromkeys(source.parameters, torch.float32), path, target.max_shard_size)
    for file_path in path.rglob("*.pt"):
        sync(file_path)
    write_companion(source, path, target.dtype)
    with durable_file(folder / POINTER) as pointer:
        pointer.write(path.name.encode())


def _parameter_names(path: Path) -> list[str]:
    """The names in the tree: as the model's files order them, where they do."""
    names = sorted(entry.parent.relative_to(path / "zero").as_posix() for entry in path.glob(f"zero/**/{_WEIGHT}"))
    order: dict[str, None] = {}
    for file in model_files(path):
        for group in unpickling.load(file, mmap=True).get("param_shapes") or ():
            order |= dict.fromkeys(name for name in group if name in names)
    return list(order | dict.fromkeys(names))


def _file_name(kind: str) -> str:
    return _WEIGHT if kind == WEIGHT else UniversalFile(kind).name


def _load_weight(path: Path) -> Any:
    entry = unpickling.load(path, mmap=True)
    if not isinstance(entry, dict):
        raise UsageError(
            f"{path} is of ds_to_universal for ZeRO 3, which keeps no shapes; convert the ZeRO 3 checkpoint itself"
        )
    return entry


def _training(path: Path, model: Any, first: Path) -> Training:
    """What DeepSpeed's files say of the training."""
    (group, *_) = unpickling.load(path / "zero" / _OPTIMIZER)["param_groups"]
    step = first / _STEP
    return Training(
        iteration=model["global_steps"],
        consumed_samples=model["global_samples"],
        skipped_steps=model["skipped_steps"],
        step=int(unpickling.load(step)) if step.exists() else None,
        lr=group.get("lr"),
        schedule=model["lr_scheduler"],
        options={key: value for key, value in group.items() if key not in ("params", "lr")},
    )

"""Checkpoints through DeepSpeed's engine, with what DeepSpeed does not record beside them (docs/checkpoints.md).

DeepSpeed writes ``<folder>/global_stepN/`` and, last, the pointer ``<folder>/latest``. Beside its files stand whole weights and
their average in safetensors files, the states of random numbers, and ``megatron_dsp.json``: the degrees, how far the data was
consumed, and what else is there. It is read before anything is unpickled.
"""

from __future__ import annotations

import itertools
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron_dsp.errors import UsageError
from megatron_dsp.mesh import AXES, Mesh
from megatron_dsp.training import master_weights, rng
from megatron_dsp.training.ema import EMA
from megatron_dsp.training.master_weights import MasterWeights
from megatron_dsp.training.tensor_file import TensorFile, durable

_RECORD = "megatron_dsp.json"


@dataclass
class Progress:
    """How far a run has come."""

    iteration: int = 0
    consumed_samples: int = 0


def save(engine: Any, folder: Path, progress: Progress, mesh: Mesh, ema: EMA | None = None) -> None:
    """Save engine, optimizer, schedule, progress, random numbers, whole weights and their average; every rank calls it.

    Where DeepSpeed has the weights in files of its own, the whole ones are left out.
    """
    tag = f"global_step{progress.iteration}"
    path = folder / tag
    if dist.get_rank() == 0:
        path.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    metadata = {"iteration": str(progress.iteration), **{axis: str(mesh.size(axis)) for axis in AXES}}
    contents, place = ["random numbers"], _place(mesh)
    rng.save(path / _random_file(dist.get_rank()), mesh)
    if ema is not None:
        ema.save(path / _weights_file("ema_model", *place), metadata)
        contents.append("ema")
    if master_weights.reason_against(engine) is None:
        weights = MasterWeights(engine, mesh)
        weights.save(path / _weights_file("weights", *place), weights.tensors(), metadata)
        contents.append("weights")
    if dist.get_rank() == 0:
        record = {"progress": asdict(progress), "layout": _layout(engine, mesh), "contents": contents}
        with durable(path / _RECORD) as file:
            file.write(json.dumps(record, indent=2).encode())
    dist.barrier()  # all of it is there before DeepSpeed points to it
    engine.save_checkpoint(str(folder), tag=tag)


def load(engine: Any, folder: Path, mesh: Mesh, ema: EMA | None = None) -> Progress:
    """Resume from the latest checkpoint in ``folder``; every rank calls it.

    ``ema`` takes the average from there. Without it an average that is there is left alone.

    Errors: UsageError where there is none, where it was saved at other degrees or another ZeRO stage, where it has no average
    for ``ema``, or where a file of it is missing; never a silent start from scratch.
    """
    path, record = _latest(folder)
    tag = path.name
    here = _layout(engine, mesh)
    differing = [
        f"{key} {record['layout'].get(key)} -> {value}" for key, value in here.items() if record["layout"].get(key) != value
    ]
    if differing:
        raise UsageError(
            f"--load {folder}: the checkpoint was saved with another layout ({', '.join(differing)}); resume with the same "
            "degrees and ZeRO stage"
        )
    contents = record.get("contents", [])
    if ema is not None and "ema" not in contents:
        raise UsageError(
            f"--load {folder}: its checkpoint {tag!r} has no EMA; resume without one, or load(..., ema=None) first and make "
            "EMA(engine, mesh, decay) then, to start it from the loaded weights"
        )
    needed = [_random_file(rank) for rank in range(dist.get_world_size())] if "random numbers" in contents else []
    if ema is not None:
        places = itertools.product(range(mesh.size("tensor")), range(mesh.size("pipe")))
        needed += [_weights_file("ema_model", *place) for place in places]
    missing = sorted(set(needed) - set(os.listdir(path)))
    if missing:
        raise UsageError(f"--load {folder}: its checkpoint {tag!r} lacks {', '.join(missing[:8])}; use another one")
    loaded, _ = engine.load_checkpoint(str(folder), tag=tag)
    if loaded is None:
        raise UsageError(f"--load {folder}: DeepSpeed could not load {tag!r}; its own message says what is missing")
    if ema is not None:
        ema.load(path / _weights_file("ema_model", *_place(mesh)))
    if "random numbers" in contents:
        rng.load(path / _random_file(dist.get_rank()), mesh)
    return Progress(**record["progress"])


@torch.no_grad()
def load_weights(module: nn.Module, folder: Path, mesh: Mesh, *, ema: bool) -> Progress:
    """Fill a plain module with the weights of the latest checkpoint in ``folder``, or with their average; no DeepSpeed.

    The checkpoint may be of any ZeRO stage, data and sequence degree. Every rank reads for itself; values are cast to the
    module's dtypes. Returns how far the training had come.

    Errors: UsageError where there is no such checkpoint or no average in it, where its tensor degree is not the mesh's, with a
    pipe axis, and for names or shapes that are not the module's.
    """
    path, record = _latest(folder)
    name, what = ("ema", "EMA") if ema else ("weights", "weights")
    if name not in record.get("contents", []):
        raise UsageError(f"--load {folder}: its checkpoint {path.name!r} has no file of {what}; give ema={not ema} or another")
    pipe, tensor = record["layout"]["pipe"], record["layout"]["tensor"]
    if pipe > 1 or mesh.size("pipe") > 1:
        raise UsageError(
            f"--load {folder}: saved at pipe {pipe}, to be loaded at pipe {mesh.size('pipe')}, but a pipeline names weights by "
            "the numbers of its layers; both must be 1"
        )
    if tensor != mesh.size("tensor"):
        raise UsageError(
            f"--load {folder}: its weights are in shards of tensor degree {tensor}, and this mesh has {mesh.size('tensor')}; "
            f"use a mesh of tensor={tensor}"
        )
    file = TensorFile(path / _weights_file("ema_model" if ema else "weights", *_place(mesh)))
    values = dict(module.named_parameters()) | master_weights.persistent_buffers(module)
    file.check({name: tuple(value.shape) for name, value in values.items()})
    for name, value in values.items():
        value.copy_(file.read(name))
    return Progress(**record["progress"])


def _latest(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint in ``folder``, and its record."""
    latest = folder / "latest"
    if not latest.is_file():
        raise UsageError(f"--load {folder}: no checkpoint there (no file {latest}); give the folder of an earlier --save")
    tag = latest.read_text().strip()
    record_file = folder / tag / _RECORD
    if not record_file.is_file():
        raise UsageError(f"--load {folder}: its latest checkpoint {tag!r} has no {_RECORD}; it was not saved by this package")
    return folder / tag, json.loads(record_file.read_text())


def _random_file(rank: int) -> str:
    return f"rng_rank_{rank:05d}.safetensors"


def _weights_file(kind: str, tensor: int, pipe: int) -> str:
    """As Megatron names what the ranks of a model have: by their places on the tensor and pipe axes."""
    return f"{kind}_tp_{tensor:02d}_pp_{pipe:02d}.safetensors"


def _place(mesh: Mesh) -> tuple[int, int]:
    return mesh.rank("tensor"), mesh.rank("pipe")


def _layout(engine: Any, mesh: Mesh) -> dict[str, int]:
    return {**{axis: mesh.size(axis) for axis in AXES}, "zero_stage": engine.zero_optimization_stage()}

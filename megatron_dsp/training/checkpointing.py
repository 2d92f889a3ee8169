"""Checkpoints through DeepSpeed's engine, with what DeepSpeed does not record beside them.

DeepSpeed writes ``<folder>/global_stepN/`` and, last, the pointer ``<folder>/latest``. Beside its files stands
``megatron_dsp.json``: the degrees, and how far the data was consumed. It is read before anything is unpickled.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_dsp.errors import UsageError
from megatron_dsp.mesh import AXES, Mesh

_RECORD = "megatron_dsp.json"


@dataclass
class Progress:
    """How far a run has come."""

    iteration: int = 0
    consumed_samples: int = 0


def save(engine: Any, folder: Path, progress: Progress, mesh: Mesh) -> None:
    """Save engine, optimizer, schedule and progress; every rank calls it."""
    tag = f"global_step{progress.iteration}"
    if dist.get_rank() == 0:
        (folder / tag).mkdir(parents=True, exist_ok=True)
        record = {"progress": asdict(progress), "layout": _layout(engine, mesh)}
        (folder / tag / _RECORD).write_text(json.dumps(record, indent=2))
    dist.barrier()
    engine.save_checkpoint(str(folder), tag=tag)


def load(engine: Any, folder: Path, mesh: Mesh) -> Progress:
    """Resume from the latest checkpoint in ``folder``; every rank calls it.

    Errors: UsageError where there is none, where it was saved at other degrees or another ZeRO stage, or where a file of
    it is missing; never a silent start from scratch.
    """
    latest = folder / "latest"
    if not latest.is_file():
        raise UsageError(f"--load {folder}: no checkpoint there (no file {latest}); give the folder of an earlier --save")
    tag = latest.read_text().strip()
    record_file = folder / tag / _RECORD
    if not record_file.is_file():
        raise UsageError(f"--load {folder}: its latest checkpoint {tag!r} has no {_RECORD}; it was not saved by this package")
    record = json.loads(record_file.read_text())
    here = _layout(engine, mesh)
    differing = [
        f"{key} {record['layout'].get(key)} -> {value}" for key, value in here.items() if record["layout"].get(key) != value
    ]
    if differing:
        raise UsageError(
            f"--load {folder}: the checkpoint was saved with another layout ({', '.join(differing)}); resume with the same "
            "degrees and ZeRO stage"
        )
    path, _ = engine.load_checkpoint(str(folder), tag=tag)
    if path is None:
        raise UsageError(f"--load {folder}: DeepSpeed could not load {tag!r}; its own message says what is missing")
    return Progress(**record["progress"])


def _layout(engine: Any, mesh: Mesh) -> dict[str, int]:
    return {**{axis: mesh.size(axis) for axis in AXES}, "zero_stage": engine.zero_optimization_stage()}

"""Checkpoints of plain files: what a save is to the disk, without an engine."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_dsp.checkpoint import manifest, store
from megatron_dsp.checkpoint.disk import durable_file
from megatron_dsp.checkpoint.manifest import Manifest, StoredFile
from megatron_dsp.checkpoint.parameters import Model

FILES = [
    *(f"layer_{layer:02d}-model_00-model_states.pt" for layer in range(6)),
    "mp_rank_00_model_states.pt",
    "swapped/rank0/a",
]
OURS = ["weights_tp_00_pp_00.safetensors", "rng_rank_00000.safetensors"]


def content(name: str, step: int) -> bytes:
    """What a file holds, different for each name and step."""
    return f"{name} of step {step}\n".encode() * 20


def save(folder: Path, step: int, keep: int | None = None) -> None:
    """Save a checkpoint as one rank alone would."""
    store.publish(folder, f"global_step{step}", record(write(folder, step), step), keep)


def write(folder: Path, step: int) -> dict[str, StoredFile]:
    """All of a save but its end; the files."""
    path = store.begin(folder, f"global_step{step}")
    for name in FILES:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        with (path / name).open("wb", buffering=0) as file:
            half = len(content(name, step)) // 2
            file.write(content(name, step)[:half])
            file.write(content(name, step)[half:])
            os.fsync(file.fileno())
    for name in OURS:
        with durable_file(path / name) as file:
            file.write(content(name, step))
    return {name: StoredFile((path / name).stat().st_size, manifest.sha256(path / name)) for name in [*FILES, *OURS]}


def record(files: dict[str, StoredFile], step: int) -> Manifest:
    """A manifest of ``files``; later steps were saved later."""
    return Manifest(
        model=Model({}, None, [[]], [[]]),
        saved=f"2026-01-01T00:00:{step:02d}",
        progress={"iteration": step, "consumed_samples": 4 * step},
        layout={"pipe": 1, "data": 1, "sequence": 1, "tensor": 1, "zero_stage": 1},
        precision="fp32",
        contents=["weights"],
        versions={"torch": "2.13.0"},
        files=files,
    )


def names(folder: Path) -> set[str]:
    """What is in a folder, hidden or not."""
    return {path.name for path in folder.iterdir()}

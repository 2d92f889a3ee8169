"""Checkpoints that were converted, loaded by DeepSpeed itself: losses go on as those of the run that was not interrupted."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import jobs
import pytest
import torch

sys.path.append(str(jobs.ROOT / "tests" / "distributed"))  # the ranks of the pool get it too

from parallelism import BATCH, CONFIG, LR, STEPS, Cell, make, train

import megatron_dsp as dsp
from megatron_dsp.checkpoint.convert import ShardingTable, convert
from megatron_dsp.checkpoint.formats.source import Target
from megatron_dsp.models.video_dit import part_names
from megatron_dsp.training import checkpointing
from megatron_dsp.training.checkpointing import Progress
from megatron_dsp.training.optimizer import warmup_cosine

SAVED = 2
LIMIT = 1e-6
TABLE = ShardingTable({}, part_names(CONFIG))


def _engine(cell: Cell, universal: bool = False) -> tuple[Any, dsp.Mesh]:
    """AdamW with a schedule, in one group."""
    made: list[torch.optim.Optimizer] = []

    def optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
        made.append(torch.optim.AdamW(model.parameters(), lr=LR["AdamW"]))
        return made[0]

    schedule = {"lr": LR["AdamW"], "min_lr": 1e-5, "warmup": 2, "total": 10}
    more = {"optimizer": optimizer, "lr_scheduler": lambda model: warmup_cosine(made[0], **schedule)}
    return make(cell, "AdamW", settings={"checkpoint": {"load_universal": universal}}, **more)


def _save(cell: Cell, folder: Path) -> list[float]:
    """Train, save, go on; the losses after the save."""
    engine, mesh = _engine(cell)
    train(engine, mesh, range(SAVED))
    checkpointing.save(engine, folder, Progress(SAVED, SAVED * BATCH), mesh)
    losses, _ = train(engine, mesh, range(SAVED, STEPS))
    engine.destroy()
    del engine
    gc.collect()
    return losses


def _load(cell: Cell, folder: Path, by: str = "deepspeed") -> list[float]:
    """The losses after a load by DeepSpeed, of a universal checkpoint or not, or by this package."""
    engine, mesh = _engine(cell, universal=by == "universal")
    if by == "megatron_dsp":
        checkpointing.load(engine, folder, mesh)
    else:
        path, _ = engine.load_checkpoint(str(folder))
        assert path is not None
    assert (engine.global_steps, engine.global_samples) == (SAVED, SAVED * BATCH)
    losses, _ = train(engine, mesh, range(SAVED, STEPS))
    engine.destroy()
    del engine
    gc.collect()
    return losses


def _fresh(cell: Cell) -> list[float]:
    engine, mesh = _engine(cell)
    losses, _ = train(engine, mesh, range(SAVED, STEPS))
    return losses


def _target(cell: Cell) -> Target:
    return Target(cell.tensor, cell.pipe, cell.data * cell.sequence, cell.zero, cell.precision)


CELLS = [
    (Cell(pipe=2, zero=1), Cell(data=2, zero=1)),
    (Cell(data=2, zero=1), Cell(sequence=3, zero=3)),
    (Cell(data=2, zero=1), Cell()),
    (Cell(data=2, zero=1), Cell(sequence=3, zero=2)),
    (Cell(data=2, zero=1), Cell(tensor=2, zero=1)),
    (Cell(data=2, zero=1), Cell(tensor=2, pipe=2, zero=1)),
    (Cell(tensor=2, data=2, zero=3), Cell(pipe=2, data=2, zero=1)),
    (Cell(tensor=2, pipe=2, zero=1), Cell(tensor=2, data=2, zero=3)),
]


@pytest.mark.long
@pytest.mark.parametrize(("source", "target"), CELLS, ids=str)
def test_deepspeed_loads_what_was_converted(ranks, tmp_path, source, target):
    expected = ranks(source.ranks, _save, source, tmp_path / "saved")[0]
    convert(tmp_path / "saved", tmp_path / "between", saver="safetensors", target=Target(), table=TABLE)
    convert(tmp_path / "between", tmp_path / "converted", saver="deepspeed", target=_target(target), table=TABLE)
    losses = ranks(target.ranks, _load, target, tmp_path / "converted")[0]
    assert losses == pytest.approx(expected, rel=LIMIT)
    assert ranks(1, _fresh, Cell())[0] != pytest.approx(expected, rel=1e-3)


UNIVERSAL = [
    (Cell(zero=1), Cell(tensor=2, zero=1)),
    (Cell(zero=3, data=2), Cell(sequence=3, zero=2)),
    (Cell(), Cell(tensor=2, pipe=2, zero=1)),
    (Cell(pipe=2, zero=1), Cell(data=2, zero=1)),
]


@pytest.mark.long
@pytest.mark.parametrize(("source", "target"), UNIVERSAL, ids=str)
def test_deepspeed_loads_universal_checkpoints(ranks, tmp_path, source, target):
    expected = ranks(source.ranks, _save, source, tmp_path / "saved")[0]
    new = tmp_path / "universal"
    convert(tmp_path / "saved", new, saver="deepspeed_universal", target=Target(pipe=target.pipe), table=TABLE)
    losses = ranks(target.ranks, _load, target, new, by="universal")[0]
    assert losses == pytest.approx(expected, rel=LIMIT)


@pytest.mark.long
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_models_in_bf16(ranks, tmp_path, stage):
    """Losses are of bf16, which rounds otherwise in another optimizer class."""
    source = Cell(data=2, zero=1, precision="bf16")
    target = source._replace(zero=stage, data=2 if stage else 1)
    expected = ranks(source.ranks, _save, source, tmp_path / "saved")[0]
    convert(tmp_path / "saved", tmp_path / "converted", saver="deepspeed", target=_target(target))
    losses = ranks(target.ranks, _load, target, tmp_path / "converted")[0]
    assert losses == pytest.approx(expected, rel=LIMIT if stage == 1 else 2e-3)
    assert ranks(1, _fresh, Cell(precision="bf16"))[0] != pytest.approx(expected, rel=1e-2)


@pytest.mark.long
def test_a_resume_takes_what_was_converted(ranks, tmp_path):
    source, target = Cell(data=2, zero=1), Cell(tensor=2, zero=1)
    expected = ranks(source.ranks, _save, source, tmp_path / "saved")[0]
    convert(tmp_path / "saved", tmp_path / "converted", saver="deepspeed", target=_target(Cell(data=2, zero=3)))
    for cell in (target, Cell(data=2, zero=3)):
        losses = ranks(cell.ranks, _load, cell, tmp_path / "converted", by="megatron_dsp")[0]
        assert losses == pytest.approx(expected, rel=LIMIT)

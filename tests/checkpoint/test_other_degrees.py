"""Resume at other degrees and ZeRO stages: losses go on as those of the run that was not interrupted."""

from __future__ import annotations

import gc
import itertools
import random
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jobs
import pytest
import torch

import megatron_dsp as dsp

sys.path.append(str(jobs.ROOT / "tests" / "distributed"))  # the ranks of the pool get it too

from parallelism import BATCH, LR, STEPS, Cell, all_degrees, make, train

from megatron_dsp.checkpoint import manifest
from megatron_dsp.checkpoint.deepspeed_files import DeepSpeedState
from megatron_dsp.checkpoint.formats import deepspeed
from megatron_dsp.checkpoint.formats.source import Target
from megatron_dsp.training import checkpointing
from megatron_dsp.training.checkpointing import Progress
from megatron_dsp.training.ema import EMA
from megatron_dsp.training.optimizer import warmup_cosine

SAVED = 2  # after so many of the steps
LIMIT = 1e-6


def _engine(cell: Cell, turned: bool = False) -> tuple[Any, dsp.Mesh]:
    """AdamW with two groups and a schedule, so that order and learning rate matter; ``turned``: in the other order."""

    def optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
        parameters = list(model.parameters())[:: -1 if turned else 1]
        groups = [[p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() <= 1]]
        made.append(torch.optim.AdamW([{"params": groups[0]}, {"params": groups[1], "weight_decay": 0.0}], lr=LR["AdamW"]))
        return made[0]

    made: list[torch.optim.Optimizer] = []
    schedule = {"lr": LR["AdamW"], "min_lr": 1e-5, "warmup": 2, "total": 10}
    return make(cell, "AdamW", optimizer=optimizer, lr_scheduler=lambda model: warmup_cosine(made[0], **schedule))


def _end(engine: Any) -> None:
    engine.destroy()
    del engine
    gc.collect()


def _save(cell: Cell, folder: Path, ema: bool = False) -> list[float]:
    """Train, save, go on; all losses after the save."""
    engine, mesh = _engine(cell)
    average = EMA(engine, mesh, 0.5) if ema else None
    for step in range(SAVED):
        train(engine, mesh, [step])
        if average is not None:
            average.update()
    checkpointing.save(engine, folder, Progress(SAVED, SAVED * BATCH), mesh, average)
    losses, _ = train(engine, mesh, range(SAVED, STEPS))
    _end(engine)
    return losses


def _resume(cell: Cell, folder: Path, copy: Path, stepped: bool = False, turned: bool = False, **kept: bool) -> list[float]:
    """The losses of a run that goes on from a checkpoint, which it saves again first.

    ``stepped``: its optimizer has state already. ``turned``: and its parameters in another order.
    """
    engine, mesh = _engine(cell, turned)
    average = EMA(engine, mesh, 0.5) if kept.pop("ema", False) else None
    if stepped:
        train(engine, mesh, [7])
    progress = checkpointing.load(engine, folder, mesh, average, **{"random_numbers": False, **kept})
    assert progress == Progress(SAVED, SAVED * BATCH)
    checkpointing.save(engine, copy, progress, mesh, average)
    losses, _ = train(engine, mesh, range(SAVED, STEPS))
    _end(engine)
    return losses


def _state(folder: Path) -> DeepSpeedState:
    path = folder / f"global_step{SAVED}"
    return DeepSpeedState(path, manifest.read(path))


def _assert_equal(copy: DeepSpeedState, state: DeepSpeedState) -> None:
    """Bit by bit."""
    assert set(copy.kinds) == set(state.kinds)
    assert copy.training == state.training
    assert {name: p.shape for name, p in copy.parameters.items()} == {name: p.shape for name, p in state.parameters.items()}
    for name in state.parameters:
        for kind in state.kinds:
            assert torch.equal(copy.read(kind, name), state.read(kind, name)), (kind, name)


CELLS = {
    "zero 0": Cell(),
    "data 2, zero 1": Cell(data=2, zero=1),
    "sequence 2, zero 2": Cell(sequence=2, zero=2),
    "sequence 3, zero 3": Cell(sequence=3, zero=3),
    "tensor 2, zero 1": Cell(tensor=2, zero=1),
    "pipe 2, zero 1": Cell(pipe=2, zero=1),
    "tensor 2, pipe 2, zero 1": Cell(tensor=2, pipe=2, zero=1),
    "tensor 2, data 2, zero 3": Cell(tensor=2, data=2, zero=3),
    # A pipeline in stage 0 does not clip gradients.
    "pipe 2, zero 0": Cell(pipe=2),
    "pipe 2, sequence 2, zero 0": Cell(pipe=2, sequence=2),
}
ROUND = [*list(CELLS)[:8], "zero 0"]
PAIRS = [*itertools.pairwise(ROUND), ("pipe 2, zero 0", "pipe 2, sequence 2, zero 0")]
IN_MAKE_TEST = {"sequence 3, zero 3"}  # as sources


def _marked(source: str, target: str) -> Any:
    return pytest.param(source, target, marks=() if source in IN_MAKE_TEST else pytest.mark.long)


@pytest.mark.parametrize(("source", "target"), [_marked(*pair) for pair in PAIRS])
def test_losses_go_on_and_what_is_saved_again_is_the_same(ranks, tmp_path, source, target):
    cell, other, copy = CELLS[source], CELLS[target], tmp_path / "copy"
    expected = ranks(cell.ranks, _save, cell, tmp_path)[0]
    losses = ranks(other.ranks, _resume, other, tmp_path, copy, stepped=other.zero % 2 == 0)[0]
    _assert_equal(_state(copy), _state(tmp_path))
    assert losses == pytest.approx(expected, rel=LIMIT)


@pytest.mark.parametrize("cell", [Cell(data=2, zero=1), pytest.param(Cell(), marks=pytest.mark.long)], ids=str)
def test_another_order_of_parameters_at_the_same_degrees(ranks, tmp_path, cell):
    expected = ranks(cell.ranks, _save, cell, tmp_path)[0]
    losses = ranks(cell.ranks, _resume, cell, tmp_path, tmp_path / "copy", turned=True)[0]
    _assert_equal(_state(tmp_path / "copy"), _state(tmp_path))
    assert losses == pytest.approx(expected, rel=LIMIT)


def _fresh(cell: Cell) -> list[float]:
    engine, mesh = _engine(cell)
    losses, _ = train(engine, mesh, range(SAVED, STEPS))
    _end(engine)
    return losses


@pytest.mark.long
def test_forty_random_pairs(ranks, tmp_path):
    draw = random.Random(0)
    cells = [cell for cell in all_degrees() if cell.ranks <= 4 and (cell.pipe == 1 or cell.zero == 1)]
    fresh = ranks(1, _fresh, Cell())[0]
    for number in range(40):
        source, target = draw.choice(cells), draw.choice(cells)
        folder = tmp_path / str(number)
        expected = ranks(source.ranks, _save, source, folder)[0]
        losses = ranks(target.ranks, _resume, target, folder, folder / "copy")[0]
        _assert_equal(_state(folder / "copy"), _state(folder))
        assert losses == pytest.approx(expected, rel=LIMIT), (source, target)
        assert fresh != pytest.approx(expected, rel=1e-3)  # so that the check means something
        shutil.rmtree(folder)


BF16 = [
    Cell(zero=stage, data=data, pipe=pipe, precision="bf16")
    for stage, data, pipe in ((0, 1, 1), (1, 2, 1), (3, 2, 1), (0, 1, 2))
]


@pytest.mark.long
@pytest.mark.parametrize(("source", "target"), [(0, 1), (1, 2), (2, 3), (3, 3), (3, 0)])
def test_fp32_weights_behind_bf16_are_kept(ranks, tmp_path, source, target):
    """Losses are of bf16, which rounds otherwise in another layout; what is saved again is the same, bit by bit."""
    copy = tmp_path / "copy"
    ranks(BF16[source].ranks, _save, BF16[source], tmp_path)
    ranks(BF16[target].ranks, _resume, BF16[target], tmp_path, copy)
    _assert_equal(_state(copy), _state(tmp_path))


@pytest.mark.long
def test_the_average_goes_along(ranks, tmp_path):
    source, target = Cell(data=2, zero=1), Cell(tensor=2, pipe=2, zero=1)
    ranks(source.ranks, _save, source, tmp_path, ema=True)
    ranks(target.ranks, _resume, target, tmp_path, tmp_path / "copy", ema=True)
    state = _state(tmp_path)
    assert "ema" in state.kinds
    assert any(not torch.equal(state.read("ema", name), state.read("weight", name)) for name in state.parameters)
    _assert_equal(_state(tmp_path / "copy"), state)


def _draws(cell: Cell, folder: Path, saves: bool) -> list[float]:
    """On each rank, after a save or a load."""
    engine, mesh = _engine(cell)
    dsp.seed(mesh, 3)
    if saves:
        torch.rand(7)
        checkpointing.save(engine, folder, Progress(1, BATCH), mesh)
    else:
        checkpointing.load(engine, folder, mesh)
    _end(engine)
    return torch.rand(4).tolist()


def _refused(cell: Cell, folder: Path) -> tuple[str, bool]:
    engine, mesh = _engine(cell)
    dsp.seed(mesh, 3)
    first = torch.rand(4).tolist()
    dsp.seed(mesh, 3)
    with pytest.raises(dsp.UsageError) as error:
        checkpointing.load(engine, folder, mesh)
    checkpointing.load(engine, folder, mesh, random_numbers=False)
    again = torch.rand(4).tolist()
    _end(engine)
    return str(error.value), first == again


@pytest.mark.long
def test_random_numbers_are_kept_or_refused(ranks, tmp_path):
    folder = tmp_path / "saved"
    drawn = ranks(2, _draws, Cell(sequence=2, zero=1), folder, saves=True)
    assert drawn[0] != drawn[1]
    kept = ranks(4, _draws, Cell(sequence=2, tensor=2, zero=3), folder, saves=False)
    assert kept == [drawn[0], drawn[0], drawn[1], drawn[1]]
    for message, repeats in ranks(2, _refused, Cell(data=2, zero=1), folder):
        assert "random numbers are of other ranks (data 1 -> 2, sequence 2 -> 1)" in message
        assert "--no-load-rng" in message
        assert not repeats


def _weights_alone(cell: Cell, folder: Path) -> None:
    engine, mesh = _engine(cell)
    train(engine, mesh, [7])
    moments = [value.clone() for state in engine.basic_optimizer.state.values() for value in state.values()]
    checkpointing.load(engine, folder, mesh, optimizer=False, random_numbers=False)
    left = [value for state in engine.basic_optimizer.state.values() for value in state.values()]
    assert all(map(torch.equal, moments, left))
    whole = _state(folder)
    for name, parameter in engine.module.named_parameters():
        assert torch.equal(parameter, whole.read("weight", name))
    _end(engine)


def _other_optimizer(cell: Cell, folder: Path) -> str:
    engine, mesh = make(cell, "SGD", optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    train(engine, mesh, [0])
    with pytest.raises(dsp.UsageError) as error:
        checkpointing.load(engine, folder, mesh, random_numbers=False)
    _end(engine)
    return str(error.value)


@pytest.mark.long
def test_weights_without_the_optimizer(ranks, tmp_path):
    ranks(2, _save, Cell(data=2, zero=1), tmp_path)
    ranks(1, _weights_alone, Cell(), tmp_path)
    (message,) = ranks(1, _other_optimizer, Cell(), tmp_path)
    assert "the checkpoint's optimizer has exp_avg, exp_avg_sq, and this one momentum_buffer" in message


def _no_optimizer_there(cell: Cell, folder: Path) -> str:
    engine, mesh = _engine(cell)
    with pytest.raises(dsp.UsageError) as error:
        checkpointing.load(engine, folder, mesh)
    checkpointing.load(engine, folder, mesh, optimizer=False)
    _end(engine)
    return str(error.value)


@pytest.mark.long
def test_an_optimizer_that_was_not_saved_is_missed(ranks, tmp_path):
    ranks(1, _save, Cell(), tmp_path / "whole")
    whole = deepspeed.load(tmp_path / "whole")
    weights = replace(whole, kinds=("weight",), training=replace(whole.training, step=None, lr=None))  # as published ones
    deepspeed.save(weights, tmp_path / "weights", Target(zero_stage=0))
    (message,) = ranks(1, _no_optimizer_there, Cell(), tmp_path / "weights")
    assert "has weights and no optimizer; start that anew with --no-load-optim" in message

"""Random numbers: where they are equal, that recompute repeats them, and that a resumed run goes on with them."""

from __future__ import annotations

import gc
import itertools
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import megatron_dsp as dsp
from megatron_dsp.mesh import AXES
from megatron_dsp.training import checkpointing, rng
from megatron_dsp.training.checkpointing import Progress

SETS = [axes for count in range(len(AXES) + 1) for axes in itertools.combinations(AXES, count)]


def _draws_by_axes(given: dict[str, int]) -> tuple[dict[str, int], dict[tuple[str, ...], list[float]]]:
    mesh = dsp.Mesh(**given)
    dsp.seed(mesh, 5)
    plain = torch.rand(4), torch.rand(4)
    dsp.seed(mesh, 5)
    draws, outside = {}, []
    for _ in range(2):
        for axes in SETS:
            with dsp.random_along(mesh, *axes):
                draws.setdefault(axes, []).append(torch.cat([torch.rand(3), nn.Dropout(0.5)(torch.ones(32))]))
        outside.append(torch.rand(4))
    assert torch.equal(torch.cat(outside), torch.cat(plain)), "blocks moved the default generator"
    assert all(not torch.equal(*twice) for twice in draws.values()), "a stream began anew"

    dsp.seed(mesh, 5)
    for axes, twice in draws.items():
        with dsp.random_along(mesh, *reversed(axes)):
            assert torch.equal(torch.rand(3), twice[0][:3]), "the same seed gave other numbers, or the order of axes counts"
    dsp.seed(mesh, 6)
    with dsp.random_along(mesh, "data"):
        assert not torch.equal(torch.rand(3), draws["data",][0][:3])
    return {axis: mesh.rank(axis) for axis in AXES}, {axes: torch.cat(twice).tolist() for axes, twice in draws.items()}


@pytest.mark.parametrize("given", [{"tensor": 2, "sequence": 2}, {"pipe": 2}])
def test_draws_differ_along_the_named_axes_alone(ranks, given):
    results = ranks(4, _draws_by_axes, given)
    for (one, draws), (other, others) in itertools.product(results, results):
        for axes in SETS:
            assert (draws[axes] == others[axes]) == all(one[axis] == other[axis] for axis in axes), axes
    first = [tuple(draws) for draws in results[0][1].values()]
    assert len(set(first)) == len(SETS), "streams of different axes are the same"


def _nested() -> None:
    mesh = dsp.Mesh()
    dsp.seed(mesh, 1)
    with dsp.random_along(mesh, "data"):
        expected = torch.rand(6)
    dsp.seed(mesh, 1)
    found = []
    with dsp.random_along(mesh, "data"):
        found.append(torch.rand(2))
        with dsp.random_along(mesh, "pipe"):
            torch.rand(1)
            with dsp.random_along(mesh, "data"):
                found.append(torch.rand(2))
            with pytest.raises(ZeroDivisionError), dsp.random_along(mesh):
                _ = 1 / 0
        found.append(torch.rand(2))
    assert torch.equal(torch.cat(found), expected)

    other = dsp.Mesh()
    with pytest.raises(dsp.UsageError, match=r"call dsp.seed\(mesh, seed\) first"), dsp.random_along(other, "data"):
        pass
    with pytest.raises(dsp.UsageError, match="no axis 'time'; a mesh has pipe"), dsp.random_along(mesh, "data", "time"):
        pass


def test_blocks_may_be_nested_and_wrong_ones_are_refused(ranks):
    ranks(1, _nested)


class _Noisy(nn.Module):
    """Dropout of the default generator, of copies, and of parts."""

    def __init__(self, mesh: dsp.Mesh) -> None:
        super().__init__()
        self.mesh = mesh
        self.layers = nn.ModuleList(nn.Linear(16, 16, dtype=torch.float64) for _ in range(3))
        self.masks: list[Tensor] = []  # of copies, then of parts, in turn

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(self.layers[0](x).tanh(), 0.5)
        with dsp.random_along(self.mesh, "pipe", "data"):
            mask = nn.functional.dropout(torch.ones_like(x), 0.5)
            x = self.layers[1](x * mask).tanh()
            with dsp.random_along(self.mesh, "pipe", "data", "sequence"):
                part = nn.functional.dropout(torch.ones_like(x), 0.5)
        self.masks += [mask.detach(), part.detach()]
        return self.layers[2](x * part).tanh()


def _gradients(way: str) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """Of two blocks one after another; also the masks of forward, and draws that come later."""
    mesh = dsp.Mesh(sequence=2)
    torch.manual_seed(0)
    blocks = [_Noisy(mesh), _Noisy(mesh)]
    x = torch.randn(4, 16, dtype=torch.float64, requires_grad=True)
    dsp.seed(mesh, 3)
    y = x
    keywords = {"context_fn": dsp.repeat_random(mesh)} if way == "recompute" else {}
    for block in blocks:
        with dsp.random_along(mesh, "data"):  # a checkpoint inside a block
            y = block(y) if way == "plain" else checkpoint(block, y, use_reentrant=False, **keywords)
    masks = [mask for block in blocks for mask in block.masks]
    with dsp.random_along(mesh, "pipe", "data"):  # draws between forward and backward, and backward inside a block
        torch.rand(3)
        y.square().sum().backward(retain_graph=True)
        torch.rand(3)
        y.square().sum().backward()
    later = [torch.rand(1).item()]
    for axes in (("data",), ("pipe", "data"), ("pipe", "data", "sequence")):
        with dsp.random_along(mesh, *axes):
            later.append(torch.rand(1).item())
    gradients = [x.grad, *(parameter.grad for block in blocks for parameter in block.parameters())]
    return gradients, masks, later


def test_recompute_repeats_the_masks(ranks):
    plain, again, recomputed, careless = (
        ranks(2, _gradients, way) for way in ("plain", "plain", "recompute", "without context_fn")
    )
    for one, two in zip(plain, again, strict=True):
        assert all(torch.equal(*pair) for pair in zip(one[0], two[0], strict=True)), "the same seed gave other numbers"
    for one, two in zip(plain, recomputed, strict=True):
        assert all(torch.equal(*pair) for pair in zip(one[0], two[0], strict=True))
        assert all(torch.equal(*pair) for pair in zip(one[1], two[1], strict=True))
        assert one[2] == two[2], "recompute moved the streams"
    assert not torch.equal(plain[0][0][0], careless[0][0][0])
    for index, (one, two) in enumerate(zip(plain[0][1], plain[1][1], strict=True)):
        assert torch.equal(one, two) == (index % 2 == 0), "masks of copies are equal, those of parts differ"


class _Dropped(nn.Module):
    def __init__(self, mesh: dsp.Mesh) -> None:
        super().__init__()
        self.mesh, self.layer = mesh, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        with dsp.random_along(self.mesh, "data"):
            x = nn.functional.dropout(x, 0.3)
        scale = 1 + 0.1 * random.random() + 0.1 * np.random.rand()
        return scale * nn.functional.dropout(self.layer(x), 0.3)


def _engine(config: dict[str, Any], mesh: dsp.Mesh) -> Any:
    torch.manual_seed(0)
    model = _Dropped(mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return dsp.deepspeed_initialize(model=model, optimizer=optimizer, config=config, mesh=mesh)[0]


def _steps(engine: Any, first: int) -> list[Tensor]:
    for step in range(first, first + 2):
        x = torch.randn(2, 8, generator=torch.Generator().manual_seed(step))
        engine.backward(engine(x).square().mean())
        engine.step()
    return [parameter.detach().clone() for parameter in engine.module.parameters()]


def _resumes(folder: Path) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "sequence_parallel": {"size": 2},
    }
    mesh = dsp.initialize(config)
    engine = _engine(config, mesh)
    dsp.seed(mesh, 7)
    random.seed(dist.get_rank())
    np.random.seed(dist.get_rank())
    np.random.randn()  # leaves one number over, which is state too
    _steps(engine, 0)
    checkpointing.save(engine, folder, Progress(2, 4), mesh)
    expected = _steps(engine, 2)
    numbers = random.random(), np.random.randn(), torch.rand(3).tolist()
    with pytest.raises(dsp.UsageError, match="save and load outside"), dsp.random_along(mesh, "data"):
        checkpointing.save(engine, folder, Progress(2, 4), mesh)

    other = _engine(config, mesh)
    dsp.seed(mesh, 8)
    assert checkpointing.load(other, folder, mesh) == Progress(2, 4)
    found = _steps(other, 2)
    assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))
    assert (random.random(), np.random.randn(), torch.rand(3).tolist()) == numbers

    dist.barrier()
    missing = folder / "global_step2" / "rng_rank_00001.safetensors"
    if dist.get_rank() == 0:
        missing.unlink()
    dist.barrier()
    with pytest.raises(dsp.UsageError, match=f"{missing.name} is missing"):
        checkpointing.load(other, folder, mesh)
    for each in (engine, other):
        each.destroy()
    gc.collect()


def test_a_resumed_run_draws_what_the_uninterrupted_one_does(ranks, tmp_path):
    ranks(2, _resumes, tmp_path)


def _streams_that_come_later(path: Path) -> None:
    """A stream that was never used before the checkpoint begins with the seed of the saved run."""
    mesh = dsp.Mesh()
    dsp.seed(mesh, 1)
    with dsp.random_along(mesh, "pipe"):
        torch.rand(2)
    rng.save(path, mesh)
    expected = []
    for axes in (("pipe",), ("data",)):
        with dsp.random_along(mesh, *axes):
            expected.append(torch.rand(2))
    dsp.seed(mesh, 2)
    rng.load(path, mesh)
    for axes, numbers in zip((("pipe",), ("data",)), expected, strict=True):
        with dsp.random_along(mesh, *axes):
            assert torch.equal(torch.rand(2), numbers)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(dsp.UsageError, match="cannot be read as a safetensors file"):
        rng.load(path, mesh)


def test_streams_that_come_later(ranks, tmp_path):
    ranks(1, _streams_that_come_later, tmp_path / "rng.safetensors")

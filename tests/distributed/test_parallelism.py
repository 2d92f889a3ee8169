"""A part of the parallelism matrix (`make test-matrix` runs it all), what is refused, and that wrong gradients show."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import parallelism
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from parallelism import LIMIT, Cell

import megatron_dsp as dsp
from megatron_dsp.pipeline import PipelinedVideoDiT
from megatron_dsp.reshard import primitives
from megatron_dsp.tensor import TensorParallel, mappings

CELLS = [
    Cell(tensor=2, pipe=2, sequence=2, data=1, zero=1, checkpointing=True, overlap=True),
    Cell(pipe=2, sequence=2, zero=0, overlap=True),
]
MORE = [  # most of them beyond the matrix: it has no --sequence-parallel
    Cell(tensor=2, sequence=2, zero=3, overlap=True),
    Cell(tensor=2, sequence=3, zero=1, sharded=True, overlap=True),
    Cell(tensor=2, sequence=2, zero=2, sharded=True, checkpointing=True),
    Cell(tensor=2, pipe=2, sequence=2, zero=0, sharded=True),
    Cell(tensor=2, sequence=2, data=2, zero=3, sharded=True, checkpointing=True),
]
LONG = pytest.mark.long


@pytest.fixture(scope="module")
def references() -> dict[tuple[str, float], Any]:
    return parallelism.references()


@pytest.mark.parametrize("cell", [*CELLS, *(pytest.param(cell, marks=LONG) for cell in MORE)], ids=str)
def test_equals_one_process(ranks, references, cell):
    for error in ranks(cell.ranks, parallelism.run, cell, references):
        assert error < LIMIT


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(Cell(tensor=2, sequence=2, zero=1, precision="bf16", overlap=True), marks=LONG),
        pytest.param(Cell(tensor=2, sequence=2, zero=3, precision="bf16"), marks=LONG),
        pytest.param(Cell(pipe=2, sequence=2, zero=1, precision="bf16"), marks=LONG),
        Cell(tensor=2, sequence=2, zero=2, precision="fp16"),
    ],
    ids=str,
)
def test_half_precision_follows_fp32(ranks, references, cell):
    if cell.precision == "fp16" and not get_accelerator().is_fp16_supported():
        pytest.skip("DeepSpeed trains in fp16 only on devices that compute in it, and this CPU does not")
    for error in ranks(cell.ranks, parallelism.run, cell, references):
        assert 1e-5 < error < 0.02


def _refusal(cell: Cell) -> str:
    with pytest.raises(dsp.UsageError) as error:
        parallelism.run(cell, parallelism.references())
    return str(error.value)


@pytest.mark.parametrize("zero", [2, 3])
def test_a_pipeline_refuses_zero_2_and_3(ranks, zero):
    for message in ranks(2, _refusal, Cell(pipe=2, zero=zero)):
        assert f"zero_optimization.stage={zero} with a pipeline" in message
        assert "use stage 0 or 1" in message


def _refuse_clipping() -> str:
    mesh = dsp.Mesh(pipe=2)
    model = PipelinedVideoDiT(parallelism.CONFIG, mesh, lambda patches, labels: patches.mean())
    # It is not given: DeepSpeed's default is to clip.
    config = {"train_micro_batch_size_per_gpu": 1, "mesh": {"pipe": 2}}
    with pytest.raises(dsp.UsageError) as error:
        dsp.deepspeed_initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), config=config, mesh=mesh)
    return str(error.value)


def test_a_pipeline_refuses_clipping_in_stage_0(ranks):
    for message in ranks(2, _refuse_clipping):
        assert "gradient_clipping=1.0 with a pipeline in ZeRO stage 0" in message


def _identity(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
    return gradient


def _own_slice(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
    dim, group, _ = ctx.reverse
    exchange = mappings.collectives.find_exchange(group)
    return gradient.narrow(dim, *_start_and_length(gradient.shape[dim], exchange.size, exchange.rank)).contiguous()


def _start_and_length(size: int, ranks: int, rank: int) -> tuple[int, int]:
    start, stop = dsp.shard_range(size, ranks, rank)
    return start, stop - start


def _summed(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
    return mappings._ReduceFrom.apply(gradient, *ctx.where, "tensor all-reduce")


def _slice_summed(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
    dim, group, ranks, rank, stage = ctx.reverse
    return mappings._ScatterTo.apply(
        mappings._ReduceFrom.apply(gradient, group, stage, "tensor all-reduce"), dim, group, ranks, rank, stage
    )


def _others_zero(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
    dim, size, group, *_ = ctx.reverse
    exchange = mappings.collectives.find_exchange(group)
    ranks, rank = exchange.size, exchange.rank
    whole = gradient.new_zeros([size if index == dim else own for index, own in enumerate(gradient.shape)])
    whole.narrow(dim, *_start_and_length(size, ranks, rank)).copy_(gradient)
    return whole


def _padded(function: Callable[..., torch.Tensor], inputs: int) -> staticmethod:
    return staticmethod(lambda ctx, gradient: (function(ctx, gradient), *[None] * (inputs - 1)))


def _unscaled_mean_loss(per_token: torch.Tensor, *, group: Any = None, mask: Any = None) -> torch.Tensor:
    return primitives.mean_loss(per_token, group=group, mask=mask) / group.size()


# name: (what is replaced, by what, a cell that must notice). Each of the tensor axis's pairs, each of DSP's, each reduction.
MUTATIONS: dict[str, tuple[Any, str, Any, Cell]] = {
    "copy: identity backward": (mappings._CopyTo, "backward", _padded(_identity, 3), Cell(tensor=2)),
    "reduce: summed backward": (mappings._ReduceFrom, "backward", _padded(_summed, 4), Cell(tensor=2)),
    "scatter: zeros beside the slice": (mappings._ScatterTo, "backward", _padded(_others_zero, 6), Cell(tensor=2, sequence=2)),
    "gather: summed before the slice": (
        mappings._GatherFrom,
        "backward",
        _padded(_slice_summed, 8),
        Cell(tensor=2, sequence=2),
    ),
    "sequence gather: own slice": (mappings._GatherSequence, "backward", _padded(_own_slice, 6), Cell(tensor=2, sharded=True)),
    "sequence reduce-scatter: zeros beside": (
        mappings._ReduceScatterTo,
        "backward",
        _padded(_others_zero, 5),
        Cell(tensor=2, sharded=True),
    ),
    "weights of all heads: not summed": (TensorParallel, "part", lambda parallel, x: x, Cell(tensor=2)),
    "weights beside shards: not summed": (TensorParallel, "beside", lambda parallel, x: x, Cell(tensor=2, sharded=True)),
    "mean_loss: without N": (dsp, "mean_loss", _unscaled_mean_loss, Cell(sequence=2)),
    "gradients: mean over data alone": (
        dsp.mesh.DeepSpeedView,
        "get_data_parallel_group",
        lambda view: view._mesh.group("data"),
        Cell(sequence=2, data=2),
    ),
}


@contextmanager
def _broken(name: str) -> Iterator[None]:
    where, attribute, replacement, _ = MUTATIONS[name]
    before = where.__dict__[attribute]
    setattr(where, attribute, replacement)
    try:
        yield
    finally:
        setattr(where, attribute, before)


def _run_broken(name: str, references: dict[tuple[str, float], Any]) -> float:
    with _broken(name):
        return parallelism.run_with("SGD", MUTATIONS[name][3], references)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_gradient_is_noticed(ranks, references, name):
    errors = ranks(MUTATIONS[name][3].ranks, _run_broken, name, references)
    assert max(errors) > 10 * LIMIT

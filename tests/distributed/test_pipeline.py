"""The pipelined video transformer beyond the matrix: where it is cut, what crosses a boundary, shapes that change."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import megatron_dsp as dsp
from megatron_dsp.models.embeddings import unpatchify
from megatron_dsp.models.video_dit import VideoDiT, VideoDiTConfig
from megatron_dsp.pipeline import PipelinedVideoDiT
from megatron_dsp.tensor import TensorParallel
from megatron_dsp.training.dry_run import _deepspeed_world
from megatron_dsp.training.fake_world import fake_world

PATCH = (1, 2, 2)
SHAPES = [(5, 6, 4), (1, 4, 4), (7, 2, 10), (5, 6, 4)]  # of the steps: frames, height, width
MICRO_BATCHES = 3
LR = 0.05


def _sample(step: int, micro: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    T, H, W = SHAPES[step]
    generator = torch.Generator().manual_seed(10 * step + micro)
    video, target = (torch.randn(T, 2, 3, H, W, generator=generator) for _ in range(2))
    mask = torch.tensor([[True, True, False], [True, False, False]])
    sides = torch.rand(T, 2, generator=generator), torch.randn(2, 3, 6, generator=generator), mask, torch.tensor([False, True])
    return (video, *sides), (target,)


def _loss(velocity: Tensor, labels: tuple[Tensor, ...], group: Any = None) -> Tensor:
    error = (velocity - labels[0]).square()
    return error.mean() if group is None else dsp.mean_loss(error, group=group)


def _noisy(parameters: Any) -> None:
    with torch.no_grad():
        for name, parameter in parameters:
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def _by_part(parts: Any, first: int) -> list[tuple[str, torch.nn.Parameter]]:
    return [(f"{index}.{name}", p) for index, part in enumerate(parts, first) for name, p in part.named_parameters()]


def _config(layers: int) -> VideoDiTConfig:
    return VideoDiTConfig(layers=layers, hidden=24, heads=2, conditioning_size=6, patch=PATCH)


def _one_process(layers: int) -> tuple[list[float], dict[str, Tensor]]:
    torch.manual_seed(0)
    model = VideoDiT(_config(layers))
    _noisy(_by_part(model.parts(), 0))
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    losses = []
    for step in range(len(SHAPES)):
        optimizer.zero_grad()
        total = 0.0
        for micro in range(MICRO_BATCHES):
            inputs, labels = _sample(step, micro)
            loss = _loss(model(*inputs), labels) / MICRO_BATCHES
            loss.backward()
            total += loss.item()
        optimizer.step()
        losses.append(total)
    return losses, {name: p.detach() for name, p in _by_part(model.parts(), 0)}


def _train(layers: int, pipe: int, sequence: int, partition: str) -> tuple[list[int], int, tuple[int, int]]:
    """The layers of each stage; switches and bytes that this rank's first step took."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "mesh": {"pipe": pipe},
        "sequence_parallel": {"size": sequence},
    }
    mesh = dsp.initialize(config)
    group = mesh.group("sequence")
    torch.manual_seed(0)
    model = PipelinedVideoDiT(
        _config(layers),
        mesh,
        lambda patches, labels: _loss(unpatchify(patches, PATCH, labels[0].shape), labels, group),
        partition=partition,
    )
    _noisy(_by_part(model.forward_funcs, model._local_start))
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    engine, *_ = dsp.deepspeed_initialize(model=model, optimizer=optimizer, config=config, mesh=mesh)
    losses, first = [], None
    for step, (T, _, _) in enumerate(SHAPES):
        frames = slice(*dsp.shard_range(T, sequence, group.rank()))
        micro_batches = []
        for micro in range(MICRO_BATCHES):
            (video, *sides), (target,) = _sample(step, micro)
            micro_batches.append(((video[frames], *sides), (target[frames],)))
        evaluated = engine.eval_batch(iter(micro_batches)).item()
        with dsp.ledger() as moved:
            losses.append(engine.train_batch(iter(micro_batches)).item())
        assert evaluated == pytest.approx(losses[-1], rel=1e-6)
        if first is None:
            first = moved.by("operation").get("switch", (0, 0))
    expected_losses, expected = _one_process(layers)
    assert losses == pytest.approx(expected_losses, rel=2e-6)
    for name, parameter in _by_part(model.forward_funcs, model._local_start):
        error = (parameter.detach() - expected[name]).abs().max() / expected[name].abs().max()
        assert error < 2e-6, name
    engine.destroy()
    parts = list(model.parts)
    del engine, model
    gc.collect()
    return parts, mesh.rank("pipe"), first


@pytest.mark.parametrize(
    ("layers", "pipe", "sequence", "partition", "boundaries"),
    [
        (3, 2, 2, "uniform", [0, 4, 8]),  # between a spatial and a temporal block, where the shard moves
        pytest.param(3, 2, 3, "parameters", [0, 3, 8], marks=pytest.mark.long),
        pytest.param(3, 3, 2, "type:Block", [0, 3, 5, 8], marks=pytest.mark.long),
        (1, 4, 1, "uniform", [0, 1, 2, 3, 4]),  # a part a stage: the head's has no use for what blocks take
    ],
)
def test_shapes_change_and_no_switch_is_spent_on_boundaries(ranks, layers, pipe, sequence, partition, boundaries):
    seen = ranks(pipe * sequence, _train, layers, pipe, sequence, partition)
    assert seen[0][0] == boundaries
    # Ranks of one stage make its switches together.
    switches = sum({stage: calls for _, stage, (calls, _) in seen}.values())
    assert switches == (0 if sequence == 1 else 2 * layers * MICRO_BATCHES)


def test_what_is_sent_is_contiguous():
    # The first stage has the embedding alone, and shards its tokens over the tensor ranks: a view, which NCCL refuses.
    with fake_world(8, rank=0), _deepspeed_world():
        mesh = dsp.Mesh(pipe=4, tensor=2)
        tensor = TensorParallel(mesh.group("tensor"), sequence_dim=2)
        model = PipelinedVideoDiT(_config(1), mesh, _loss, partition="uniform", tensor=tensor)
        assert list(model.parts) == [0, 1, 2, 3, 4]
        inputs, _ = _sample(0, 0)
        assert all(each.is_contiguous() for each in model(inputs))

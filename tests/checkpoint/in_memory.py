"""Checkpoints in memory, of models that are names and shapes."""

from __future__ import annotations

import random
from dataclasses import replace

import torch
from torch import Tensor

from megatron_dsp.checkpoint.formats.source import Source, depth_first
from megatron_dsp.checkpoint.parameters import Parameter
from megatron_dsp.checkpoint.state import AVERAGE, WEIGHT, Training

KINDS = WEIGHT, "exp_avg", "exp_avg_sq", AVERAGE
LAYERS = ["embedding", "blocks.0", "mixers.0", "blocks.1", "mixers.1", "head"]  # two lists of layers that alternate
TRAINING = Training(
    iteration=7,
    consumed_samples=56,
    skipped_steps=1,
    step=6,
    lr=0.125,
    schedule={"last_epoch": 7, "base_lrs": [0.5]},
    options={"betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.01},
)

_SHAPES = {
    "embedding.table": ((11, 3), 0),
    "embedding.scale": ((), None),
    **{
        f"{layers}.{number}.{name}": shape
        for layers in ("blocks", "mixers")
        for number in range(2)
        for name, shape in {
            "query.weight": ((7, 5), 0),  # uneven shards
            "query.bias": ((7,), 0),
            "out.weight": ((5, 7), 1),
            "out.bias": ((5,), None),
            "kernel": ((3, 2, 5), 2),
            "empty": ((0, 4), None),
        }.items()
    },
    "head.weight": ((2, 3, 4), None),
}
PARAMETERS = {name: Parameter(shape, dim) for name, (shape, dim) in _SHAPES.items()}


def source(kinds: tuple[str, ...] = KINDS, parameters: dict[str, Parameter] = PARAMETERS) -> Source:
    """A checkpoint of these parameters, of values that no two tensors share. Every second tensor is not contiguous."""
    tensors: dict[tuple[str, str], Tensor] = {}
    for number, (kind, name) in enumerate((kind, name) for kind in kinds for name in parameters):
        generator = torch.Generator().manual_seed(number)
        shape = parameters[name].shape
        transposed = torch.randn(tuple(reversed(shape)), generator=generator)
        whole = transposed.permute(tuple(reversed(range(len(shape))))) if number % 2 else transposed.reshape(shape)
        tensors[kind, name] = whole
    buffers = {
        "embedding.count": torch.tensor(3),
        "blocks.1.mask": torch.tensor([True, False, True]),
        "head.table": torch.arange(6.0).view(2, 3),
    }
    return Source(parameters, kinds, TRAINING, LAYERS, buffers, lambda kind, name: tensors[kind, name])


def random_source(seed: int) -> Source:
    """A checkpoint of a model of random shapes: up to 4 dims of up to 9 elements, some of them empty."""
    draw = random.Random(seed)
    parameters = {}
    for layer in LAYERS:
        for number in range(draw.randrange(1, 4)):
            shape = tuple(draw.choice((0, 1, 1, 2, 3, 5, 9)) for _ in range(draw.randrange(5)))
            dims = [dim for dim, size in enumerate(shape) if size > 1]
            parameters[f"{layer}.weight{number}"] = Parameter(shape, draw.choice(dims) if dims else None)
    by_module = {name: parameters[name] for name in depth_first(list(parameters))}
    return replace(source(parameters=by_module), buffers={})


def same(found: Source, expected: Source) -> None:
    """Assert that two checkpoints have the same tensors, bit by bit. A pipeline's order of them is that of its layers."""
    assert dict(found.parameters) == dict(expected.parameters)
    assert depth_first(list(found.parameters)) == list(expected.parameters)
    assert set(found.kinds) == set(expected.kinds)
    assert found.kinds[0] == WEIGHT
    for kind in expected.kinds:
        for name, parameter in expected.parameters.items():
            value = found.read(kind, name)
            assert value.dtype == torch.float32
            assert tuple(value.shape) == parameter.shape
            assert torch.equal(value, expected.read(kind, name)), f"{kind} of {name}"
    assert found.buffers.keys() == expected.buffers.keys()
    for name, buffer in expected.buffers.items():
        assert found.buffers[name].dtype == buffer.dtype
        assert torch.equal(found.buffers[name], buffer), name

"""Collectives of the tensor axis and their adjoints (Megatron-LM, arXiv 1909.08053, section 3; Megatron-SP, arXiv 2205.05198,
section 4.2.2).

| mapping                    | forward        | backward       |
|----------------------------|----------------|----------------|
| copy_to_tensor             | none           | all-reduce     |
| reduce_from_tensor         | all-reduce     | none           |
| scatter_to_tensor          | own slice      | all-gather     |
| gather_from_tensor         | all-gather     | own slice      |
| gather_from_sequence       | all-gather     | reduce-scatter |
| reduce_scatter_to_sequence | reduce-scatter | all-gather     |

On this axis an activation that all ranks hold has a gradient that all ranks hold, and gradients of weights are not averaged
afterwards. So these are not the primitives of the sequence axis (`megatron_dsp.reshard`), whose gradients are partial sums.
Shards follow ``torch.tensor_split``. With one rank everything is the identity.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dsp.layout import shard_range, shard_sizes
from megatron_dsp.reshard import collectives
from megatron_dsp.reshard.exchange import exchange_of
from megatron_dsp.reshard.labels import Operation


def copy_to_tensor(x: Tensor, *, group: dist.ProcessGroup, stage: str = "") -> Tensor:
    """``x``, which all ranks hold, for a computation of which each does a part: gradients are summed over the group."""
    return x if group.size() == 1 else _CopyTo.apply(x, _name(group), stage)


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str, stage: str) -> Tensor:
        ctx.where = (group, stage)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (_ReduceFrom.apply(gradient, *ctx.where, Operation.TENSOR_ALL_REDUCE_ADJOINT.value), None, None)


def reduce_from_tensor(x: Tensor, *, group: dist.ProcessGroup, stage: str = "") -> Tensor:
    """The sum of all ranks' ``x``, on all of them."""
    return x if group.size() == 1 else _ReduceFrom.apply(x, _name(group), stage, Operation.TENSOR_ALL_REDUCE.value)


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str, stage: str, operation: str) -> Tensor:
        ctx.where = (group, stage)
        return collectives.all_reduce(x, group, operation, stage, None)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (_CopyTo.apply(gradient, *ctx.where), None, None, None)


def scatter_to_tensor(x: Tensor, *, dim: int, group: dist.ProcessGroup, stage: str = "") -> Tensor:
    """This rank's shard of dim ``dim`` of ``x``, which all ranks hold: a view."""
    return x if group.size() == 1 else _ScatterTo.apply(x, dim % x.dim(), _name(group), group.size(), group.rank(), stage)


class _ScatterTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: str, ranks: int, rank: int, stage: str) -> Tensor:
        ctx.reverse = (dim, x.shape[dim], group, ranks, rank, stage, Operation.TENSOR_ALL_GATHER_ADJOINT.value)
        start, stop = shard_range(x.shape[dim], ranks, rank)
        return x.narrow(dim, start, stop - start)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (_GatherFrom.apply(gradient, *ctx.reverse), *[None] * 5)


def gather_from_tensor(x: Tensor, *, dim: int, size: int, group: dist.ProcessGroup, stage: str = "") -> Tensor:
    """The whole of dim ``dim``, of global size ``size``, from each rank's shard; for what all ranks then do alike."""
    if group.size() == 1:
        return x
    dim = _check(x, dim, size, group, "gather_from_tensor")
    return _GatherFrom.apply(x, dim, size, _name(group), group.size(), group.rank(), stage, Operation.TENSOR_ALL_GATHER.value)


class _GatherFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, size: int, group: str, ranks: int, rank: int, stage: str, name: str) -> Tensor:
        ctx.reverse = (dim, group, ranks, rank, stage)
        return collectives.gather(x, dim, size, group, name, stage, None)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (_ScatterTo.apply(gradient, *ctx.reverse), *[None] * 7)


def gather_from_sequence(x: Tensor, *, dim: int, size: int, group: dist.ProcessGroup, stage: str = "") -> Tensor:
    """The whole of dim ``dim``, of global size ``size``, for a computation of which each rank does a part."""
    if group.size() == 1:
        return x
    dim = _check(x, dim, size, group, "gather_from_sequence")
    return _GatherSequence.apply(x, dim, size, _name(group), stage, Operation.TENSOR_ALL_GATHER.value)


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, size: int, group: str, stage: str, operation: str) -> Tensor:
        ctx.reverse = (dim, group, stage)
        return collectives.gather(x, dim, size, group, operation, stage, None)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (_ReduceScatterTo.apply(gradient, *ctx.reverse, Operation.TENSOR_REDUCE_SCATTER_ADJOINT.value), *[None] * 5)


def reduce_scatter_to_sequence(x: Tensor, *, dim: int, group: dist.ProcessGroup, stage: str = "") -> Tensor:
    """This rank's shard of dim ``dim`` of the sum of all ranks' ``x``."""
    return (
        x
        if group.size() == 1
        else _ReduceScatterTo.apply(x, dim % x.dim(), _name(group), stage, Operation.TENSOR_REDUCE_SCATTER.value)
    )


class _ReduceScatterTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: str, stage: str, operation: str) -> Tensor:
        ctx.reverse = (dim, x.shape[dim], group, stage)
        return collectives.reduce_scatter(x, dim, group, operation, stage, None)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (_GatherSequence.apply(gradient, *ctx.reverse, Operation.TENSOR_ALL_GATHER_ADJOINT.value), *[None] * 4)


@torch.compiler.assume_constant_result
def _name(group: dist.ProcessGroup) -> str:
    return exchange_of(group).members.name


def _check(x: Tensor, dim: int, size: int, group: dist.ProcessGroup, mapping: str) -> int:
    own = shard_sizes(size, group.size())[group.rank()]
    if x.shape[dim] != own:
        raise ValueError(
            f"{mapping}: rank {group.rank()} of {group.size()} holds {x.shape[dim]} of dim {dim} (shape {tuple(x.shape)}), but "
            f"its shard of size={size} is {own}; shards follow dsp.shard_sizes"
        )
    return dim % x.dim()

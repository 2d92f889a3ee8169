"""The primitives of DSP and their adjoints (Zhao et al., ICML 2025, arXiv 2403.10266, section 3).

| primitive | from -> to | communication        | adjoint                       |
|-----------|------------|----------------------|-------------------------------|
| switch    | s_i -> s_j | one all-to-all       | switch s_j -> s_i             |
| split     | whole -> s | none                 | none (zeros outside the shard)|
| gather    | s -> whole | one all-gather       | reduce-scatter (sum)          |
| mean      | s -> whole | one all-reduce       | all-reduce (sum)              |

The ranks of a group compute one program, so every gradient of a replicated parameter is a partial sum, and its *average*
over the group equals the single-process gradient (docs/contracts.md). Dims may be negative. Shards follow
``torch.tensor_split`` and may be empty. With one rank everything is the identity.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dsp import mesh
from megatron_dsp.errors import UsageError
from megatron_dsp.layout import shard_range, shard_sizes
from megatron_dsp.reshard.exchange import Exchange, exchange_of
from megatron_dsp.reshard.packing import counts, pack, shard_shapes, unpack


def switch(x: Tensor, *, gather: int, split: int, size: int, group: dist.ProcessGroup | None = None, stage: str = "") -> Tensor:
    """Move the shard from dim ``gather``, which becomes whole, to dim ``split``, which is whole in ``x``.

    ``size`` is the global size of dim ``gather``. One all-to-all; a copy to pack unless ``split`` is the outermost dim of
    a contiguous ``x``, and a copy to unpack unless ``gather`` is the outermost. The result is contiguous and holds the
    same bits as the slice of the whole tensor, for any dtype. ``stage`` labels the ledger's row.

    Errors: UsageError for dims and groups that cannot be meant, on every rank; ValueError where this rank's shard is not
    the one that ``size`` gives it.
    """
    exchange = _exchange(group)
    gather, split = _dim(x, gather, "gather"), _dim(x, split, "split")
    if gather == split:
        raise UsageError(f"switch: gather and split are both dim {gather}; a switch moves the shard to another dim")
    _check_shard(x, gather, size, exchange, "switch")
    if exchange.size == 1:
        return x
    exchange.transport.check(x)
    return _Switch.apply(x, gather, split, size, exchange, stage, "switch")


class _Switch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gather: int, split: int, size: int, exchange: Exchange, stage: str, operation: str
    ) -> Tensor:
        ctx.reverse = (split, gather, x.shape[split], exchange, stage, _adjoint_of(operation))
        return exchange.switch(x, gather, split, size, stage, operation)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (_Switch.apply(gradient, *ctx.reverse), *[None] * 6)


def split(x: Tensor, *, dim: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """This rank's shard of dim ``dim`` of a tensor that every rank holds whole: a view, as ``narrow`` gives.

    Backward communicates nothing: the gradient is zero outside the shard, and exact after the mean over the group.
    """
    exchange = _exchange(group)
    dim = _dim(x, dim, "dim")
    start, stop = shard_range(x.shape[dim], exchange.size, exchange.rank)
    return x if exchange.size == 1 else x.narrow(dim, start, stop - start)


def gather(x: Tensor, *, dim: int, size: int, group: dist.ProcessGroup | None = None, stage: str = "") -> Tensor:
    """The whole tensor, on every rank, from shards of dim ``dim`` whose global size is ``size``. Errors as `switch`."""
    exchange = _exchange(group)
    dim = _dim(x, dim, "dim")
    _check_shard(x, dim, size, exchange, "gather")
    return x if exchange.size == 1 else _Gather.apply(x, dim, size, exchange, stage, "gather")


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, size: int, exchange: Exchange, stage: str, operation: str) -> Tensor:
        ctx.arguments = (dim, size, exchange, stage, _adjoint_of(operation))
        shapes = shard_shapes(x.shape, dim, shard_sizes(size, exchange.size))
        flat = exchange.all_gather(x.contiguous().view(-1), counts(shapes), stage, operation)
        return unpack(flat, dim, shapes)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (_ReduceScatter.apply(gradient, *ctx.arguments), *[None] * 5)


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, size: int, exchange: Exchange, stage: str, operation: str) -> Tensor:
        ctx.arguments = (dim, size, exchange, stage, _adjoint_of(operation))
        shapes = shard_shapes(x.shape, dim, shard_sizes(size, exchange.size))
        flat = exchange.reduce_scatter(pack(x, dim, shapes), counts(shapes), stage, operation)
        return flat.view(shapes[exchange.rank])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (_Gather.apply(gradient, *ctx.arguments), *[None] * 5)


def mean(x: Tensor, *, dim: int, size: int, group: dist.ProcessGroup | None = None, stage: str = "") -> Tensor:
    """The mean over dim ``dim`` of global size ``size``, of which ``x`` holds this rank's shard; the same on every rank.

    bf16 and fp16 are summed in fp32, as ``torch.mean`` does. Errors as `switch`; UsageError for other than floats.
    """
    exchange = _exchange(group)
    dim = _dim(x, dim, "dim")
    if not (x.is_floating_point() or x.is_complex()):
        raise UsageError(f"mean: dtype {x.dtype} has no mean; convert the tensor to a floating dtype first")
    _check_shard(x, dim, size, exchange, "mean")
    accumulate = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
    local = x.sum(dim, dtype=accumulate) / size
    if exchange.size > 1:
        local = _AllReduce.apply(local, exchange, stage, "mean")
    return local.to(x.dtype)


class _AllReduce(torch.autograd.Function):
    """Its adjoint is itself: each rank's output depends on all inputs, and the ranks' gradients are partial sums."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange, stage: str, operation: str) -> Tensor:
        ctx.arguments = (exchange, stage, _adjoint_of(operation))
        return exchange.all_reduce(x.clone(memory_format=torch.contiguous_format), stage, operation)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (_AllReduce.apply(gradient, *ctx.arguments), None, None, None)


def mean_loss(per_token: Tensor, *, group: dist.ProcessGroup | None = None, mask: Tensor | None = None) -> Tensor:
    """A loss on local shards whose average over the group is the mean over all of the group's tokens.

    ``N * (sum of this rank's tokens) / (the group's count of tokens)``, so that gradients averaged over the group (DeepSpeed
    with ``mesh.mpu``, DDP, FSDP2) are those of the single-process mean; the value itself differs between ranks. ``mask``
    (bool, or weights; broadcast to ``per_token``) says which tokens count. One all-reduce of one number, no host sync.
    A count of zero gives 0, with zero gradients, even where masked tokens hold NaN.
    """
    exchange = _exchange(group)
    accumulate = torch.float64 if per_token.dtype == torch.float64 else torch.float32
    tokens = per_token.to(accumulate)
    if mask is None:
        count = tokens.new_full((), tokens.numel())
    else:
        weights = mask.to(accumulate).expand_as(tokens)
        tokens = torch.where(weights != 0, tokens, 0.0) * weights
        count = weights.sum()
    if exchange.size > 1:
        count = exchange.all_reduce(count.detach().clone(), "loss", "token count")
    return tokens.sum() * exchange.size / torch.where(count == 0, 1.0, count)


def _exchange(group: dist.ProcessGroup | None) -> Exchange:
    group = mesh.sequence_group(group)
    if group.group_desc == "tensor":
        raise UsageError(
            "this is a mesh's tensor group, where activations and gradients are replicated and these adjoints would be "
            "wrong; pass the sequence group"
        )
    return exchange_of(group)


def _dim(x: Tensor, dim: int, name: str) -> int:
    if not -x.dim() <= dim < x.dim():
        raise UsageError(f"{name}={dim} is no dim of a tensor of shape {tuple(x.shape)}; use {-x.dim()}..{x.dim() - 1}")
    return dim % x.dim()


def _check_shard(x: Tensor, dim: int, size: int, exchange: Exchange, operation: str) -> None:
    start, stop = shard_range(size, exchange.size, exchange.rank)
    if x.shape[dim] != stop - start:
        raise ValueError(
            f"{operation}: rank {exchange.rank} of {exchange.size} in group {exchange.name!r} holds {x.shape[dim]} of dim "
            f"{dim} (shape {tuple(x.shape)}), but its shard of size={size} is {stop - start}; size is the global size of "
            "the sharded dim, and shards follow dsp.shard_sizes"
        )


def _adjoint_of(operation: str) -> str:
    return operation.removesuffix(" adjoint") if operation.endswith(" adjoint") else operation + " adjoint"

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

from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dsp import mesh
from megatron_dsp.errors import UsageError
from megatron_dsp.layout import shard_range
from megatron_dsp.reshard import operators
from megatron_dsp.reshard.exchange import exchange_of


@overload
def switch(
    x: Tensor, *, gather: int, split: int, size: int, group: dist.ProcessGroup | None = None, stage: str = ""
) -> Tensor: ...


@overload
def switch(
    x: Sequence[Tensor], *, gather: int, split: int, size: int, group: dist.ProcessGroup | None = None, stage: str = ""
) -> tuple[Tensor, ...]: ...


def switch(
    x: Tensor | Sequence[Tensor],
    *,
    gather: int,
    split: int,
    size: int,
    group: dist.ProcessGroup | None = None,
    stage: str = "",
) -> Tensor | tuple[Tensor, ...]:
    """Move the shard from dim ``gather``, which becomes whole, to dim ``split``, which is whole in ``x``.

    ``size`` is the global size of dim ``gather``. ``x`` may be several tensors, of any shapes and dtypes that have both dims
    (tokens with their mask; queries, keys and values): they move in one collective, and a tuple is returned.

    One all-to-all. Where ``gather`` or ``split`` is the outermost dim of a contiguous ``x``, each element is copied at most
    once, else at most twice. The result is contiguous and holds the same bits as the slice of the whole tensor, for any
    dtype. ``stage`` labels the ledger's row.

    Errors: UsageError for dims and groups that cannot be meant and for tensors that the transport cannot move, on every rank;
    ValueError where this rank's shard is not the one that ``size`` gives it.
    """
    members = _members(group)
    xs = (x,) if isinstance(x, Tensor) else tuple(x)
    gathers, splits = tuple(_dim(x, gather, "gather") for x in xs), tuple(_dim(x, split, "split") for x in xs)
    for x_, gather_dim, split_dim in zip(xs, gathers, splits, strict=True):
        if gather_dim == split_dim:
            raise UsageError(f"switch: gather and split are both dim {gather_dim}; a switch moves the shard to another dim")
        _check_shard(x_, gather_dim, size, members, "switch")
    if members.size > 1 and xs:
        xs = _Switch.apply(gathers, splits, (size,) * len(xs), members.name, stage, "switch", *xs)
    return xs[0] if isinstance(x, Tensor) else xs


class _Switch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gathers: tuple[int, ...],
        splits: tuple[int, ...],
        sizes: tuple[int, ...],
        group: str,
        stage: str,
        operation: str,
        *xs: Tensor,
    ) -> tuple[Tensor, ...]:
        reverse_sizes = tuple(x.shape[split] for x, split in zip(xs, splits, strict=True))
        ctx.reverse = (splits, gathers, reverse_sizes, group, stage, _adjoint_of(operation))
        moved = tuple(operators.switch(xs, gathers, splits, sizes, group, stage, operation))
        # torch would take all of them to need a gradient where one of them does, masks aside.
        ctx.mark_non_differentiable(*(y for y, needed in zip(moved, ctx.needs_input_grad[6:], strict=True) if not needed))
        return moved

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        splits, gathers, sizes, *where = ctx.reverse
        moved = [index for index, needed in enumerate(ctx.needs_input_grad[6:]) if needed]
        dims_and_sizes = (tuple(values[index] for index in moved) for values in (splits, gathers, sizes))
        results = iter(_Switch.apply(*dims_and_sizes, *where, *(gradients[index] for index in moved)))
        return (*[None] * 6, *(next(results) if index in moved else None for index in range(len(gradients))))


def split(x: Tensor, *, dim: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """This rank's shard of dim ``dim`` of a tensor that every rank holds whole: a view, as ``narrow`` gives.

    Backward communicates nothing: the gradient is zero outside the shard, and exact after the mean over the group.
    """
    members = _members(group)
    dim = _dim(x, dim, "dim")
    start, stop = shard_range(x.shape[dim], members.size, members.rank)
    return x if members.size == 1 else x.narrow(dim, start, stop - start)


def gather(x: Tensor, *, dim: int, size: int, group: dist.ProcessGroup | None = None, stage: str = "") -> Tensor:
    """The whole tensor, on every rank, from shards of dim ``dim`` whose global size is ``size``. Errors as `switch`."""
    members = _members(group)
    dim = _dim(x, dim, "dim")
    _check_shard(x, dim, size, members, "gather")
    return x if members.size == 1 else _Gather.apply(x, dim, size, members.name, stage, "gather")


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, size: int, group: str, stage: str, operation: str) -> Tensor:
        ctx.reverse = (dim, size, group, stage, _adjoint_of(operation))
        return operators.gather(x, dim, size, group, stage, operation)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (_ReduceScatter.apply(gradient, *ctx.reverse), *[None] * 5)


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, size: int, group: str, stage: str, operation: str) -> Tensor:
        ctx.reverse = (dim, size, group, stage, _adjoint_of(operation))
        return operators.reduce_scatter(x, dim, group, stage, operation)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (_Gather.apply(gradient, *ctx.reverse), *[None] * 5)


def mean(x: Tensor, *, dim: int, size: int, group: dist.ProcessGroup | None = None, stage: str = "") -> Tensor:
    """The mean over dim ``dim`` of global size ``size``, of which ``x`` holds this rank's shard; the same on every rank.

    bf16 and fp16 are summed in fp32, as ``torch.mean`` does. Errors as `switch`; UsageError for other than floats.
    """
    members = _members(group)
    dim = _dim(x, dim, "dim")
    if not (x.is_floating_point() or x.is_complex()):
        raise UsageError(f"mean: dtype {x.dtype} has no mean; convert the tensor to a floating dtype first")
    _check_shard(x, dim, size, members, "mean")
    accumulate = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
    local = x.sum(dim, dtype=accumulate) / size
    if members.size > 1:
        local = _AllReduce.apply(local, members.name, stage, "mean")
    return local.to(x.dtype)


def all_reduce(x: Tensor, *, group: dist.ProcessGroup | None = None, stage: str = "") -> Tensor:
    """The sum over the ranks of their ``x``, the same on every rank. Its adjoint sums the ranks' gradients."""
    members = _members(group)
    return x if members.size == 1 else _AllReduce.apply(x, members.name, stage, "all-reduce")


class _AllReduce(torch.autograd.Function):
    """Its adjoint is itself: each rank's output depends on all inputs, and the ranks' gradients are partial sums."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str, stage: str, operation: str) -> Tensor:
        ctx.reverse = (group, stage, _adjoint_of(operation))
        return operators.all_reduce(x, group, stage, operation)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (_AllReduce.apply(gradient, *ctx.reverse), None, None, None)


def mean_loss(per_token: Tensor, *, group: dist.ProcessGroup | None = None, mask: Tensor | None = None) -> Tensor:
    """A loss on local shards whose average over the group is the mean over all of the group's tokens.

    ``N * (sum of this rank's tokens) / (the group's count of tokens)``, so that gradients averaged over the group (DeepSpeed
    with ``mesh.mpu``, DDP, FSDP2) are those of the single-process mean; the value itself differs between ranks. ``mask``
    (bool, or weights; broadcast to ``per_token``) says which tokens count. One all-reduce of one number, no host sync.
    A count of zero gives 0, with zero gradients, even where masked tokens hold NaN.
    """
    members = _members(group)
    accumulate = torch.float64 if per_token.dtype == torch.float64 else torch.float32
    tokens = per_token.to(accumulate)
    if mask is None:
        count = tokens.new_full((), tokens.numel())
    else:
        weights = mask.to(accumulate).expand_as(tokens)
        tokens = torch.where(weights != 0, tokens, 0.0) * weights
        count = weights.sum()
    if members.size > 1:
        count = operators.all_reduce(count.detach(), members.name, "loss", "token count")
    return tokens.sum() * members.size / torch.where(count == 0, 1.0, count)


class _Members(NamedTuple):
    """What a primitive needs of a group; constants to torch.compile."""

    name: str  # the group_name, by which operators find the group
    description: str
    size: int
    rank: int


@torch.compiler.assume_constant_result
def _members(group: dist.ProcessGroup | None) -> _Members:
    group = mesh.sequence_group(group)
    exchange = exchange_of(group)
    return _Members(group.group_name, exchange.name, exchange.size, exchange.rank)


def _dim(x: Tensor, dim: int, name: str) -> int:
    if not -x.dim() <= dim < x.dim():
        raise UsageError(f"{name}={dim} is no dim of a tensor of shape {tuple(x.shape)}; use {-x.dim()}..{x.dim() - 1}")
    return dim % x.dim()


def _check_shard(x: Tensor, dim: int, size: int, members: _Members, operation: str) -> None:
    start, stop = shard_range(size, members.size, members.rank)
    if x.shape[dim] != stop - start:
        raise ValueError(
            f"{operation}: rank {members.rank} of {members.size} in group {members.description!r} holds {x.shape[dim]} of dim "
            f"{dim} (shape {tuple(x.shape)}), but its shard of size={size} is {stop - start}; size is the global size of "
            "the sharded dim, and shards follow dsp.shard_sizes"
        )


def _adjoint_of(operation: str) -> str:
    return operation.removesuffix(" adjoint") if operation.endswith(" adjoint") else operation + " adjoint"

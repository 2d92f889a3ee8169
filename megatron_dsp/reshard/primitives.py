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
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dsp import mesh
from megatron_dsp.errors import UsageError
from megatron_dsp.layout import shard_range
from megatron_dsp.reshard import collectives
from megatron_dsp.reshard.collectives import check_dim, check_shard, check_switch
from megatron_dsp.reshard.exchange import Members, exchange_of
from megatron_dsp.reshard.labels import Operation, StageName

# The group by its name, the operation, and the kind and number of the stage: the last arguments of each collective.
_Where = tuple[str, str, str, int | None]

# Operators of torch take strings: an enumeration's members are not, to a compiler, and their values take time to look up.
_SWITCH, _GATHER, _MEAN = Operation.SWITCH.value, Operation.GATHER.value, Operation.MEAN.value
_ALL_REDUCE, _TOKEN_COUNT = Operation.ALL_REDUCE.value, Operation.TOKEN_COUNT.value


@overload
def switch(
    x: Tensor, *, gather: int, split: int, size: int, group: dist.ProcessGroup | None = None, stage: str | StageName = ""
) -> Tensor: ...


@overload
def switch(
    x: Sequence[Tensor],
    *,
    gather: int,
    split: int,
    size: int,
    group: dist.ProcessGroup | None = None,
    stage: str | StageName = "",
) -> tuple[Tensor, ...]: ...


def switch(
    x: Tensor | Sequence[Tensor],
    *,
    gather: int,
    split: int,
    size: int,
    group: dist.ProcessGroup | None = None,
    stage: str | StageName = "",
) -> Tensor | tuple[Tensor, ...]:
    """Move the shard from dim ``gather``, which becomes whole, to dim ``split``, which is whole in ``x``.

    ``size`` is the global size of dim ``gather``. ``x`` may be several tensors, of any shapes and dtypes that have both dims
    (tokens with their mask; queries, keys and values): they move in one collective, and a tuple is returned.

    One all-to-all. Each element is copied at most twice; of one contiguous tensor at most once, where ``gather`` or ``split``
    is the outermost dim. The result is contiguous and holds the same bits as the slice of the whole tensor, for any
    dtype. ``stage`` labels the ledger's row.

    Errors: UsageError for dims and groups that cannot be meant and for tensors that the transport cannot move, on every rank;
    ValueError where this rank's shard is not the one that ``size`` gives it.
    """
    members = _members(group)
    xs = (x,) if isinstance(x, Tensor) else tuple(x)
    if members.size > 1 and xs:  # whose collective checks its arguments, once for a shape
        xs = _Switch.apply((gather, split, (size,) * len(xs), _where(members, _SWITCH, stage)), *xs)
    else:
        for each in xs:
            check_switch(members, each, gather, split, size)
    return xs[0] if isinstance(x, Tensor) else xs


class _Switch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, arguments: tuple[int, int, tuple[int, ...], _Where], *xs: Tensor) -> tuple[Tensor, ...]:
        gather, split, sizes, where = arguments
        moved = tuple(collectives.switch(xs, gather, split, sizes, *where))
        ctx.back = split, gather, tuple([x.shape[split] for x in xs]), where
        if len(xs) > 1:
            # torch would take all of them to need a gradient where one of them does, masks aside.
            needed = ctx.needs_input_grad[1:]
            ctx.mark_non_differentiable(*(y for y, needs in zip(moved, needed, strict=True) if not needs))
        return moved

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gather, split, sizes, where = ctx.back
        moved = [index for index, needed in enumerate(ctx.needs_input_grad[1:]) if needed]
        arguments = gather, split, tuple([sizes[index] for index in moved]), _adjoint(where)
        results = iter(_Switch.apply(arguments, *[gradients[index] for index in moved]))
        return (None, *(next(results) if index in moved else None for index in range(len(gradients))))


def split(x: Tensor, *, dim: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """This rank's shard of dim ``dim`` of a tensor that every rank holds whole: a view, as ``narrow`` gives.

    Backward communicates nothing: the gradient is zero outside the shard, and exact after the mean over the group.
    """
    members = _members(group)
    dim = check_dim(x, dim, "dim")
    start, stop = shard_range(x.shape[dim], members.size, members.rank)
    return x if members.size == 1 else x.narrow(dim, start, stop - start)


def gather(x: Tensor, *, dim: int, size: int, group: dist.ProcessGroup | None = None, stage: str | StageName = "") -> Tensor:
    """The whole tensor, on every rank, from shards of dim ``dim`` whose global size is ``size``. Errors as `switch`."""
    members = _members(group)
    dim = check_dim(x, dim, "dim")
    check_shard(members, x, dim, size, "gather")
    return x if members.size == 1 else _Gather.apply(x, dim, size, _where(members, _GATHER, stage))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, size: int, where: _Where) -> Tensor:
        ctx.reverse = (dim, size, _adjoint(where))
        return collectives.gather(x, dim, size, *where)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (_ReduceScatter.apply(gradient, *ctx.reverse), *[None] * 3)


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, size: int, where: _Where) -> Tensor:
        ctx.reverse = (dim, size, _adjoint(where))
        return collectives.reduce_scatter(x, dim, *where)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (_Gather.apply(gradient, *ctx.reverse), *[None] * 3)


def mean(x: Tensor, *, dim: int, size: int, group: dist.ProcessGroup | None = None, stage: str | StageName = "") -> Tensor:
    """The mean over dim ``dim`` of global size ``size``, of which ``x`` holds this rank's shard; the same on every rank.

    bf16 and fp16 are summed in fp32, as ``torch.mean`` does. Errors as `switch`; UsageError for other than floats.
    """
    members = _members(group)
    dim = check_dim(x, dim, "dim")
    if not (x.is_floating_point() or x.is_complex()):
        raise UsageError(f"mean: dtype {x.dtype} has no mean; convert the tensor to a floating dtype first")
    check_shard(members, x, dim, size, "mean")
    accumulate = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
    local = x.sum(dim, dtype=accumulate) / size
    if members.size > 1:
        local = _AllReduce.apply(local, _where(members, _MEAN, stage))
    return local.to(x.dtype)


def all_reduce(x: Tensor, *, group: dist.ProcessGroup | None = None, stage: str | StageName = "") -> Tensor:
    """The sum over the ranks of their ``x``, the same on every rank. Its adjoint sums the ranks' gradients."""
    members = _members(group)
    return x if members.size == 1 else _AllReduce.apply(x, _where(members, _ALL_REDUCE, stage))


class _AllReduce(torch.autograd.Function):
    """Its adjoint is itself: each rank's output depends on all inputs, and the ranks' gradients are partial sums."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, where: _Where) -> Tensor:
        ctx.reverse = _adjoint(where)
        return collectives.all_reduce(x, *where)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _AllReduce.apply(gradient, ctx.reverse), None


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
        count = collectives.all_reduce(count.detach(), *_where(members, _TOKEN_COUNT, "loss"))
    return tokens.sum() * members.size / torch.where(count == 0, 1.0, count)


@torch.compiler.assume_constant_result
def _members(group: dist.ProcessGroup | None) -> Members:
    return exchange_of(mesh.sequence_group(group)).members


def _where(members: Members, operation: str, stage: str | StageName) -> _Where:
    kind, number = (stage, None) if isinstance(stage, str) else stage
    return members.name, operation, kind, number


_ADJOINTS = {
    operation.value: adjoint.value
    for pair in (
        (Operation.SWITCH, Operation.SWITCH_ADJOINT),
        (Operation.GATHER, Operation.GATHER_ADJOINT),
        (Operation.MEAN, Operation.MEAN_ADJOINT),
        (Operation.ALL_REDUCE, Operation.ALL_REDUCE_ADJOINT),
    )
    for operation, adjoint in (pair, pair[::-1])
}


def _adjoint(where: _Where) -> _Where:
    group, operation, kind, number = where
    return group, _ADJOINTS[operation], kind, number

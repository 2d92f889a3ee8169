"""Ring attention (Liu et al., arXiv 2310.01889): attention over a sharded dim whose keys and values go round the ranks.

Each rank attends from its own queries to one block of keys after another, while the next block travels, and merges the results
by their log-sum-exp. In backward the blocks go round again, with the gradients of their keys and values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_dsp import mesh
from megatron_dsp.errors import UsageError
from megatron_dsp.reshard.collectives import rotate
from megatron_dsp.reshard.labels import Label, Operation, StageName


def ring(
    query: Tensor, key: Tensor, value: Tensor, *, size: int, group: dist.ProcessGroup | None = None, stage: str | StageName = ""
) -> Tensor:
    """Softmax attention of [batch, H, length, D], of whose length, globally ``size``, each rank holds an equal shard.

    N - 1 exchanges of keys and values forward; in backward as many, and N of their gradients. The result is exact to rounding.

    Errors: UsageError where ``size`` is not a multiple of the group's size, on other devices than the CPU, and for tensors
    whose shapes are not those.
    """
    group = mesh.sequence_group(group)
    ranks = group.size()
    if size % ranks:
        raise UsageError(f"ring: length {size} over {ranks} ranks is uneven, which ring attention does not take; use ulysses")
    if query.device.type != "cpu":
        raise UsageError(f"ring: a tensor on {query.device}; ring attention is built for the CPU alone, use ulysses")
    if not query.shape == key.shape == value.shape or query.dim() != 4 or query.shape[2] != size // ranks:
        raise UsageError(
            f"ring: query, key and value have shapes {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}; they "
            f"must be equal: [batch, heads, {size // ranks} of length {size}, head size]"
        )
    return _Ring.apply(query, key, value, group, StageName(stage) if isinstance(stage, str) else stage)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, group: dist.ProcessGroup, stage: StageName) -> Tensor:
        block, merged = [key.contiguous(), value.contiguous()], None
        ranks, label = group.size(), Label(Operation.RING.value, *stage)
        for step in range(ranks):
            travels = step + 1 < ranks
            if travels:
                end = rotate(block, group=group, label=label)
            part = _attend(query, *block)
            merged = part if merged is None else _merge(*merged, *part)
            if travels:
                block = end()
        assert merged is not None  # a group has a rank
        out, log_sum = merged[0].to(query.dtype), merged[1]
        ctx.group, ctx.label = group, Label(Operation.RING_ADJOINT.value, *stage)
        ctx.save_for_backward(query, key, value, out, log_sum)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        group, label, ranks = ctx.group, ctx.label, ctx.group.size()
        query, key, value, out, log_sum = ctx.saved_tensors
        block = [key.contiguous(), value.contiguous()]
        query_gradient = torch.zeros_like(query)
        arriving: Callable[[], list[Tensor]] | None = None  # the gradients of this rank's next block, as far as they are found
        for step in range(ranks):
            travels = step + 1 < ranks
            if travels:
                end = rotate(block, group=group, label=label)
            # With the log-sum-exp of whole rows, the backward of a block gives its part of the whole one's.
            part, *found = _attend_backward(gradient, query, block[0], block[1], out, log_sum)
            query_gradient += part
            if arriving is not None:
                found = [mine + theirs for mine, theirs in zip(found, arriving(), strict=True)]
            if ranks > 1:  # the last time home, to the rank whose block it is
                arriving = rotate([part.contiguous() for part in found], group=group, label=label)
            if travels:
                block = end()
        key_gradient, value_gradient = found if arriving is None else arriving()
        return query_gradient, key_gradient, value_gradient, None, None


def _attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to one block, and the log-sum-exp of each query's scores [batch, H, length]."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)


def _attend_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        gradient, query, key, value, out, log_sum, 0.0, False
    )


def _merge(out: Tensor, log_sum: Tensor, part: Tensor, part_log_sum: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to all keys of two results, in the precision of the log-sum-exp (fp32 for bf16)."""
    total = torch.logaddexp(log_sum, part_log_sum)
    shares = (torch.exp(each - total).unsqueeze(-1) for each in (log_sum, part_log_sum))
    return next(shares) * out + next(shares) * part, total

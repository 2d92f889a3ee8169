"""Ring attention (Liu et al., arXiv 2310.01889): attention over a sharded dim whose keys and values go round the ranks.

Each rank attends from its own queries to one block of keys after another, while the next block travels, and merges the results
by their log-sum-exp. In backward the blocks go round again, with the gradients of their keys and values. On CUDA they travel on
NCCL's stream, and compute waits for a block where it needs it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.backends.cuda import SDPAParams, can_use_efficient_attention, can_use_flash_attention

from megatron_dsp import mesh
from megatron_dsp.errors import UsageError
from megatron_dsp.reshard.collectives import rotate
from megatron_dsp.reshard.labels import Label, Operation, StageName


def ring(
    query: Tensor, key: Tensor, value: Tensor, *, size: int, group: dist.ProcessGroup | None = None, stage: str | StageName = ""
) -> Tensor:
    """Softmax attention of [batch, H, length, D], of whose length, globally ``size``, each rank holds an equal shard.

    N - 1 exchanges of keys and values forward; in backward as many, and N of their gradients. The result is exact to rounding.
    In memory its dims lie in the order batch, length, H, D.

    Errors: UsageError where ``size`` is not a multiple of the group's size, for tensors whose shapes are not those, and for
    those that no kernel takes that tells the log-sum-exp: on CUDA fp64, and head sizes that are no multiple of 8, or in fp32
    of 4.
    """
    group = mesh.sequence_group(group)
    ranks = group.size()
    if size % ranks:
        raise UsageError(f"ring: length {size} over {ranks} ranks is uneven, which ring attention does not take; use ulysses")
    if not query.shape == key.shape == value.shape or query.dim() != 4 or query.shape[2] != size // ranks:
        raise UsageError(
            f"ring: query, key and value have shapes {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}; they "
            f"must be equal: [batch, heads, {size // ranks} of length {size}, head size]"
        )
    kernel = _find_kernel(query, key, value)
    return _Ring.apply(query, key, value, kernel, group, StageName(stage) if isinstance(stage, str) else stage)


class _Kernel(NamedTuple):
    """Attention to one block.

    Attributes:
        attend: query, key and value -> the result, and the log-sum-exp of each query's scores, [batch, H, length or more].
        attend_backward: the result's gradient, query, key, value, result, log-sum-exp -> the gradients of the three.
    """

    attend: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    attend_backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, kernel: _Kernel, group: dist.ProcessGroup, stage: StageName
    ) -> Tensor:
        block, merged = [key.contiguous(), value.contiguous()], None
        ranks, label = group.size(), Label(Operation.RING.value, *stage)
        for step in range(ranks):
            travels = step + 1 < ranks
            if travels:
                end = rotate(block, group=group, label=label)
            part = kernel.attend(query, *block)
            merged = part if merged is None else _merge(*merged, *part)
            if travels:
                block = end()
        assert merged is not None  # a group has a rank
        # The backward of CUDA's memory-efficient kernel takes it for granted that the heads of a token lie side by side.
        out, log_sum = merged[0].to(query.dtype).transpose(1, 2).contiguous().transpose(1, 2), merged[1]
        ctx.kernel, ctx.group, ctx.label = kernel, group, Label(Operation.RING_ADJOINT.value, *stage)
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
            part, *found = ctx.kernel.attend_backward(gradient, query, block[0], block[1], out, log_sum)
            query_gradient += part
            if arriving is not None:
                found = [mine + theirs for mine, theirs in zip(found, arriving(), strict=True)]
            if ranks > 1:  # the last time home, to the rank whose block it is
                arriving = rotate([part.contiguous() for part in found], group=group, label=label)
            if travels:
                block = end()
        key_gradient, value_gradient = found if arriving is None else arriving()
        return query_gradient, key_gradient, value_gradient, None, None, None


def _merge(out: Tensor, log_sum: Tensor, part: Tensor, part_log_sum: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to all keys of two results, in the precision of the log-sum-exp (fp32 for bf16)."""
    total, length = torch.logaddexp(log_sum, part_log_sum), out.shape[2]
    shares = (torch.exp(each - total)[:, :, :length].unsqueeze(-1) for each in (log_sum, part_log_sum))
    return next(shares) * out + next(shares) * part, total


# --- Kernels: of torch's fused ones, those that tell the log-sum-exp. torch's own context parallelism calls the same operators.

_aten = torch.ops.aten


def _find_kernel(query: Tensor, key: Tensor, value: Tensor) -> _Kernel:
    """The one for these tensors; on CUDA the first one that torch would take too. Errors: UsageError."""
    if query.device.type == "cpu":
        return _FLASH_ON_CPU
    if query.device.type == "cuda":
        parameters = SDPAParams(query, key, value, None, 0.0, False, False)
        if query.shape[-1] % 8 == 0 and can_use_flash_attention(parameters):  # which pads other heads before its kernel
            return _FLASH
        if can_use_efficient_attention(parameters):
            return _MEMORY_EFFICIENT
    raise UsageError(
        f"ring: no fused attention of torch takes {query.dtype} of shape {tuple(query.shape)} and strides {query.stride()} on "
        f"{query.device}; on CUDA it takes bf16, fp16 and fp32, heads whose size is a multiple of 8, and a last dim that is "
        "contiguous; use ulysses"
    )


def _flash_on_cpu_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _aten._scaled_dot_product_flash_attention_for_cpu_backward(gradient, query, key, value, out, log_sum, 0.0, False)


def _flash(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    out, log_sum, *_ = _aten._scaled_dot_product_flash_attention(query, key, value)
    return out, log_sum


def _flash_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    lengths = None, None, query.shape[2], key.shape[2]  # dense ones
    return _aten._scaled_dot_product_flash_attention_backward(
        gradient, query, key, value, out, log_sum, *lengths, 0.0, False, philox_seed=None, philox_offset=None
    )


def _memory_efficient(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Its log-sum-exp is padded, as its backward wants it."""
    out, log_sum, *_ = _aten._scaled_dot_product_efficient_attention(query, key, value, None, compute_log_sumexp=True)
    return out, log_sum


def _memory_efficient_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    wanted = [True, True, True, False]  # the last one is of a bias
    found = _aten._scaled_dot_product_efficient_attention_backward(
        gradient, query, key, value, None, out, log_sum, None, None, 0.0, wanted
    )
    return found[0], found[1], found[2]


_FLASH_ON_CPU = _Kernel(_aten._scaled_dot_product_flash_attention_for_cpu, _flash_on_cpu_backward)
_FLASH = _Kernel(_flash, _flash_backward)
_MEMORY_EFFICIENT = _Kernel(_memory_efficient, _memory_efficient_backward)

"""Softmax attention, and whose kernel computes it: flash-attn's on GPUs where it is installed, else the one that torch chooses.

flash-attn (https://github.com/Dao-AILab/flash-attention) skips keys that a mask hides, where torch's fused kernels take a mask
for a bias. In a compiled graph it is always torch's.
"""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

# Its CUDA extension tells: without it the package does not load.
HAS_FLASH = importlib.util.find_spec("flash_attn_2_cuda") is not None
if HAS_FLASH:
    from flash_attn import flash_attn_func, flash_attn_varlen_func


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention of strided tensors.

    Args:
        query: [batch, H, length, D].
        key: [batch, H, key length, D].
        value: like ``key``.
        mask: bool, [batch, key length]; True = attend. At least one a sample.

    Returns:
        Shaped like ``query``; CPU's flash kernel and flash-attn give it a memory order in which D, then H is innermost.
    """
    if _flash(query):
        return _attention_of_flash(query, key, value, mask)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=None if mask is None else mask[:, None, None, :])


def kernel_name(device: torch.device) -> str:
    """For the log: whose attention runs on ``device``, and why not flash-attn's."""
    if device.type != "cuda":
        return "attention of torch: flash-attn's is for GPUs"
    return "attention of flash-attn in bf16 and fp16" if HAS_FLASH else "attention of torch: flash-attn is not installed"


def _flash(query: Tensor) -> bool:
    half = query.dtype in (torch.bfloat16, torch.float16)
    # Its kernels cannot be launched for an empty tensor, which a rank with an empty shard has, nor for larger heads.
    return (
        HAS_FLASH
        and query.is_cuda
        and half
        and query.numel() > 0
        and query.shape[-1] <= 256
        and not torch.compiler.is_compiling()
    )


def _attention_of_flash(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if mask is None:
        return flash_attn_func(query, key, value).transpose(1, 2)
    batch, length = query.shape[:2]
    order, there, key_ends = pack(mask)
    # What no sample attends to gets whatever gradient was in memory: `where` stops it.
    key, value = (torch.where(there[:, None, None], x.flatten(0, 1)[order], 0) for x in (key, value))
    query_ends = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=query.device)
    attended = flash_attn_varlen_func(query.flatten(0, 1), key, value, query_ends, key_ends, length, mask.shape[1])
    return attended.unflatten(0, (batch, length)).transpose(1, 2)


def pack(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How to bring the keys that are attended to, of all samples, one after another; the others follow. Without a host sync.

    ``mask`` [batch, key length] -> the order of the flattened keys, [batch x key length]; which of those in that order are
    attended to, bool; and where each sample's begin and the last one's end, int32 [batch + 1].
    """
    flat = mask.flatten()
    order = torch.argsort(flat.byte(), descending=True, stable=True)
    ends = F.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    return order, flat[order], ends

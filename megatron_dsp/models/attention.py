"""Attention over one dim of an activation in storage order [T, B, S, C], and over conditioning tokens.

T are token frames, B the batch, S spatial tokens, C the hidden size; H are heads, D a head's size, L conditioning
tokens. Self-attention works on views: neither the attended dim nor its batch is ever moved in memory. Any of T and S
may be 0, as on a rank with an empty shard.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from megatron_dsp.models.attention_kernels import attention
from megatron_dsp.models.norms import EPSILON, rms_norm
from megatron_dsp.tensor import TensorParallel

Over = Literal["space", "time", "all"]  # what an attention's tokens are: those of a frame, of a place, or of the whole clip

# From x [T, B, S, C] and rotations to [T, B, S, C] by a module's weights, where the dim that it attends over is sharded.
OverRanks = Callable[["SelfAttention", Tensor, Tensor | None], Tensor]


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Turn each pair of neighbouring channels by its angle (rotary positions, RoFormer, arXiv 2104.09864).

    Args:
        x: [..., D], its last dim contiguous.
        rotations: cosine and sine of each angle, broadcastable to [..., D / 2, 2].

    Returns:
        A tensor like ``x``, computed in the precision of ``rotations``.
    """
    pairs = x.to(rotations.dtype).unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        # Inductor makes this one kernel with what stands around it; it makes none of complex numbers.
        (first, second), (cosine, sine) = pairs.unbind(-1), rotations.unbind(-1)
        turned = torch.stack((first * cosine - second * sine, first * sine + second * cosine), dim=-1)
    else:
        # As complex numbers, the rotation is one multiplication: one pass over memory and nothing to stack.
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotations))
    return turned.flatten(-2).to(x.dtype)


class SelfAttention(nn.Module):
    """Multi-head attention over the dim ``over`` of [T, B, S, C], or over both; the other dims are its batch.

    Args:
        hidden: C.
        heads: H, a divisor of C.
        over: "space" attends over S, "time" over T, "all" over T x S.
        qk_norm: normalise every head's queries and keys (RMS, as in ViT-22B, arXiv 2302.05442, and STDiT3).
        tensor: each rank of its group attends with its own heads.
    """

    def __init__(self, hidden: int, heads: int, over: Over, qk_norm: bool, tensor: TensorParallel) -> None:
        super().__init__()
        self.over = over
        self.tensor = tensor
        self.head_shape = (tensor.own(heads, "heads"), hidden // heads)
        # Three layers, not a fused one: its q, k and v would be strided slices, which the norms' GPU kernel copies,
        # and whose gradients have to be stacked.
        self.query = tensor.column(hidden, hidden)
        self.key = tensor.column(hidden, hidden)
        self.value = tensor.column(hidden, hidden)
        self.query_norm: nn.Module = HeadNorm(hidden // heads, tensor) if qk_norm else nn.Identity()
        self.key_norm: nn.Module = HeadNorm(hidden // heads, tensor) if qk_norm else nn.Identity()
        self.out = tensor.row(hidden, hidden)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, rotations: Tensor | None = None) -> Tensor:
        """From what `to_heads` gives of all of the dim, [T, B, S, H, D], to [T, B, S, C].

        ``rotations`` ([T, 1, 1, 1, D / 2, 2], as of `rotate`) turn queries and keys.
        """
        return self.finish(self.attend(*self.place(query, key, value, rotations)))

    def to_heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [T, B, S, H, D] of x [T, B, S, C], each token's alone."""
        x = self.tensor.enter(x)
        query, key, value = (layer(x).unflatten(-1, self.head_shape) for layer in (self.query, self.key, self.value))
        return query, key, value

    def place(self, query: Tensor, key: Tensor, value: Tensor, rotations: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys as they meet: normalised and turned."""
        query, key = self.query_norm(query), self.key_norm(key)
        if rotations is not None:
            query, key = rotate(query, rotations), rotate(key, rotations)
        return query, key, value

    def project(self, x: Tensor, rotations: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What `attend` takes, [T, B, S, H, D], of x [T, B, S, C]."""
        return self.place(*self.to_heads(x), rotations)

    def finish(self, attended: Tensor) -> Tensor:
        """From attended values [T, B, S, H, D] to [T, B, S, C]."""
        return self.out(attended.flatten(-2))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention over the whole dim, of and to [T, B, S, H, D] with any number of heads."""
        return self.to_storage_order(attention(self.to_batch(query), self.to_batch(key), self.to_batch(value)), query)

    def to_batch(self, x: Tensor) -> Tensor:
        """[T, B, S, H, D] as [batch, H, length, D]; a view, but over both dims of several samples."""
        if self.over == "space":
            return x.flatten(0, 1).transpose(1, 2)
        if self.over == "time":
            return x.flatten(1, 2).permute(1, 2, 0, 3)
        return x.transpose(0, 1).flatten(1, 2).transpose(1, 2)

    def to_storage_order(self, attended: Tensor, like: Tensor) -> Tensor:
        """Bring [batch, H, length, D] back to the shape of ``like`` [T, B, S, H, D]: a view where the kernel kept the order."""
        if self.over == "all":
            return attended.transpose(1, 2).unflatten(1, like.shape[0:3:2]).transpose(0, 1)
        rows = attended.transpose(1, 2) if self.over == "space" else attended.permute(2, 0, 1, 3)
        return rows.reshape(like.shape)


class CrossAttention(nn.Module):
    """Multi-head attention from every token of [T, B, S, C] to its sample's conditioning tokens [B, L, C]."""

    def __init__(self, hidden: int, heads: int, tensor: TensorParallel) -> None:
        super().__init__()
        self.tensor = tensor
        self.head_shape = (tensor.own(heads, "heads"), hidden // heads)
        self.query = tensor.column(hidden, hidden)
        self.key = tensor.column(hidden, hidden)
        self.value = tensor.column(hidden, hidden)
        self.out = tensor.row(hidden, hidden)

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Attend from x [T, B, S, C] to ``tokens`` [B, L, C] where ``mask`` [B, L] is True.

        ``tokens`` are a `TensorParallel.part`: of their gradient, each rank gives what its heads do.
        """
        x = self.tensor.enter(x)
        frames = x.shape[0]
        query = self.query(x).unflatten(-1, self.head_shape)
        key = self.key(tokens).unflatten(-1, self.head_shape)
        value = self.value(tokens).unflatten(-1, self.head_shape)
        attended = attention(
            query.flatten(0, 1).transpose(1, 2),
            _repeat(key, frames).transpose(1, 2),
            _repeat(value, frames).transpose(1, 2),
            _repeat(mask, frames),
        )
        return self.out(attended.transpose(1, 2).reshape(*query.shape).flatten(-2))


class HeadNorm(nn.RMSNorm):
    """RMS norm over the channels D of each head (arXiv 1910.07467), with weights that all heads share."""

    def __init__(self, head_size: int, tensor: TensorParallel) -> None:
        super().__init__(head_size, eps=EPSILON)
        self.tensor = tensor

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., D]."""
        return rms_norm(x, self.tensor.part(self.weight))


def _repeat(x: Tensor, frames: int) -> Tensor:
    """[B, ...] for every frame, as [frames * B, ...]: a view for B = 1, else a copy of the short tokens, never of x."""
    return x.expand(frames, *x.shape).flatten(0, 1)

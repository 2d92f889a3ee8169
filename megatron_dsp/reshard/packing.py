"""Shards of a dim one after another in a flat tensor, which is what collectives take."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Shape = tuple[int, ...]
Empty = Callable[[Sequence[int], Tensor], Tensor]  # (shape, like) -> an uninitialised contiguous tensor


def fresh(shape: Sequence[int], like: Tensor) -> Tensor:
    """Torch's own memory, where none is to be reused."""
    return like.new_empty(shape)


def shard_shapes(shape: Sequence[int], dim: int, sizes: list[int]) -> list[Shape]:
    """The shapes of the shards of ``dim`` of a tensor."""
    return [(*shape[:dim], size, *shape[dim + 1 :]) for size in sizes]


def counts(shapes: list[Shape]) -> list[int]:
    """How many elements each shard has."""
    return [torch.Size(shape).numel() for shape in shapes]


def pack(x: Tensor, dim: int, shapes: list[Shape], empty: Empty = fresh) -> Tensor:
    """The shards of dim ``dim`` one after another in a flat tensor: a view where they lie so already, else one copy."""
    if x.is_contiguous() and _is_outermost(dim, x.shape):
        return x.view(-1)
    flat = empty([x.numel()], x)
    pieces = flat.split(counts(shapes))
    for source, piece, shape in zip(x.split([shape[dim] for shape in shapes], dim), pieces, shapes, strict=True):
        piece.view(shape).copy_(source)
    return flat


def unpack(flat: Tensor, dim: int, shapes: list[Shape], empty: Empty = fresh) -> Tensor:
    """The tensor whose shards of dim ``dim`` lie one after another in ``flat``: a view, or one copy."""
    whole = list(shapes[0])
    whole[dim] = sum(shape[dim] for shape in shapes)
    if _is_outermost(dim, whole):
        return flat.view(whole)
    x = empty(whole, flat)
    pieces = flat.split(counts(shapes))
    for target, piece, shape in zip(x.split([shape[dim] for shape in shapes], dim), pieces, shapes, strict=True):
        target.copy_(piece.view(shape))
    return x


def as_bytes(flat: Tensor) -> Tensor:
    """The bytes of a flat tensor, in place."""
    # A tensor of one element is contiguous with any stride, but only stride 1 can be viewed as bytes.
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8)


def _is_outermost(dim: int, shape: Sequence[int]) -> bool:
    """Whether shards of ``dim`` lie one after another in a contiguous tensor of this shape."""
    return all(size == 1 for size in shape[:dim])

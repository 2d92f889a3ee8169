"""Shards of a dim one after another in a flat tensor, which is what an all-gather and a reduce-scatter take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Shape = tuple[int, ...]


def shard_shapes(shape: Sequence[int], dim: int, sizes: list[int]) -> list[Shape]:
    """The shapes of the shards of ``dim`` of a tensor."""
    return [(*shape[:dim], size, *shape[dim + 1 :]) for size in sizes]


def counts(shapes: list[Shape]) -> list[int]:
    """How many elements each shard has."""
    return [torch.Size(shape).numel() for shape in shapes]


def pack(x: Tensor, dim: int, shapes: list[Shape]) -> Tensor:
    """The shards of dim ``dim`` one after another in a flat tensor: a view where they lie so already, else one copy."""
    if x.is_contiguous() and _is_outermost(dim, x.shape):
        return x.view(-1)
    flat = x.new_empty(x.numel())
    pieces = flat.split(counts(shapes))
    for source, piece, shape in zip(x.split([shape[dim] for shape in shapes], dim), pieces, shapes, strict=True):
        piece.view(shape).copy_(source)
    return flat


def unpack(flat: Tensor, dim: int, shapes: list[Shape]) -> Tensor:
    """The tensor whose shards of dim ``dim`` lie one after another in ``flat``: a view, or one copy."""
    whole = list(shapes[0])
    whole[dim] = sum(shape[dim] for shape in shapes)
    if _is_outermost(dim, whole):
        return flat.view(whole)
    return torch.cat([piece.view(shape) for piece, shape in zip(flat.split(counts(shapes)), shapes, strict=True)], dim)


def _is_outermost(dim: int, shape: Sequence[int]) -> bool:
    """Whether shards of ``dim`` lie one after another in a contiguous tensor of this shape."""
    return all(size == 1 for size in shape[:dim])

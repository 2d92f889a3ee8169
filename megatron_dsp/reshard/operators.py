"""The collectives as torch operators, which torch.compile keeps in its graphs. They name their group by its ``group_name``.

They have no gradients of their own: primitives.py, which alone calls them, holds each with its adjoint.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_dsp.layout import shard_sizes
from megatron_dsp.reshard.exchange import exchange_named

_library = torch.library.Library("megatron_dsp", "DEF")
_WHERE = "str group, str stage, str operation"


def _define(schema: str, run: Callable, infer: Callable) -> torch._ops.OpOverload:
    """An operator that ``run`` computes; ``infer`` gives torch.compile its outputs' shapes without any communication."""
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"megatron_dsp::{name}", infer, lib=_library)
    return getattr(torch.ops.megatron_dsp, name).default


def _switch(
    xs: list[Tensor], gather: list[int], split: list[int], sizes: list[int], group: str, stage: str, operation: str
) -> list[Tensor]:
    return exchange_named(group).switch(xs, gather, split, sizes, stage, operation)


def _infer_switch(
    xs: list[Tensor], gather: list[int], split: list[int], sizes: list[int], group: str, stage: str, operation: str
) -> list[Tensor]:
    return [
        _infer_reduce_scatter(_infer_gather(x, gather_dim, size, group, stage, operation), split_dim, group, stage, operation)
        for x, gather_dim, split_dim, size in zip(xs, gather, split, sizes, strict=True)
    ]


def _gather(x: Tensor, dim: int, size: int, group: str, stage: str, operation: str) -> Tensor:
    return exchange_named(group).gather(x, dim, size, stage, operation)


def _infer_gather(x: Tensor, dim: int, size: int, group: str, stage: str, operation: str) -> Tensor:
    return x.new_empty((*x.shape[:dim], size, *x.shape[dim + 1 :]))


def _reduce_scatter(x: Tensor, dim: int, group: str, stage: str, operation: str) -> Tensor:
    return exchange_named(group).reduce_scatter(x, dim, stage, operation)


def _infer_reduce_scatter(x: Tensor, dim: int, group: str, stage: str, operation: str) -> Tensor:
    exchange = exchange_named(group)
    own = shard_sizes(x.shape[dim], exchange.size)[exchange.rank]
    return x.new_empty((*x.shape[:dim], own, *x.shape[dim + 1 :]))


def _all_reduce(x: Tensor, group: str, stage: str, operation: str) -> Tensor:
    return exchange_named(group).all_reduce(x, stage, operation)


def _infer_all_reduce(x: Tensor, group: str, stage: str, operation: str) -> Tensor:
    return x.new_empty(x.shape)


switch = _define(
    f"switch(Tensor[] xs, int[] gather, int[] split, SymInt[] sizes, {_WHERE}) -> Tensor[]", _switch, _infer_switch
)
gather = _define(f"gather(Tensor x, int dim, SymInt size, {_WHERE}) -> Tensor", _gather, _infer_gather)
reduce_scatter = _define(f"reduce_scatter(Tensor x, int dim, {_WHERE}) -> Tensor", _reduce_scatter, _infer_reduce_scatter)
all_reduce = _define(f"all_reduce(Tensor x, {_WHERE}) -> Tensor", _all_reduce, _infer_all_reduce)

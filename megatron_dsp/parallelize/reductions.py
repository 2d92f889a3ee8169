"""Outputs that are reduced over a dim of which each rank has a part, made those of the whole."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_dsp.parallelize.module_needs import Reduced
from megatron_dsp.parallelize.pattern import Pattern, parse
from megatron_dsp.parallelize.routes import Route
from megatron_dsp.parallelize.sharded_forward import ShardedForward
from megatron_dsp.reshard import all_reduce, mean


def reduce_output(x: Tensor, output: Reduced, route: Route, forward: ShardedForward, stage: str) -> Tensor:
    """``x``, which a module returned, as `Reduced` says; collective where ``output.over`` is sharded."""
    pattern, over = parse(output.pattern), output.over
    if over in pattern.names:
        if route.after != over:
            return x
        return _replace_by_mean(x, pattern, over, forward.local_sizes(over), forward)
    if route.inside != over:
        return x
    if output.by == "mean":
        x = x * (forward.local_sizes(over)[over] / forward.sizes[over])
    return all_reduce(x, group=forward.group, stage=stage)


def reduce_output_alone(x: Tensor, output: Reduced, route: Route, forward: ShardedForward) -> Tensor:
    """What `reduce_output` makes of the whole ``x``."""
    pattern = parse(output.pattern)
    if output.over not in pattern.names or route.after != output.over:
        return x
    return _replace_by_mean(x, pattern, output.over, forward.sizes, None)


def _replace_by_mean(
    x: Tensor, pattern: Pattern, over: str, known: Mapping[str, int], forward: ShardedForward | None
) -> Tensor:
    """Each element of the tokens beside others, or of all where there are none beside, replaced by the mean over ``over``."""
    sizes = pattern.sizes(x.shape, known)
    sums = [dim for dim in pattern.sums if pattern.dim_of(over) != dim]
    if not sums:
        return _spread_mean(x, pattern, over, sizes, forward)
    (dim,) = sums
    lengths, patterns = zip(*pattern.parts(dim, sizes), strict=True)
    parts = [
        # Tokens beside are those of a term without a dim whose size is known to the plan.
        _spread_mean(part, kept, over, sizes, forward) if isinstance(term, int) or not known.keys() & set(term) else part
        for part, kept, term in zip(x.split(lengths, dim), patterns, pattern.dims[dim], strict=True)
    ]
    return torch.cat(parts, dim)


def _spread_mean(x: Tensor, pattern: Pattern, over: str, sizes: Mapping[str, int], forward: ShardedForward | None) -> Tensor:
    index, x = pattern.index(over), pattern.unflatten(x, sizes)
    whole = x.mean(index) if forward is None else mean(x, dim=index, size=forward.sizes[over], group=forward.group)
    return pattern.flatten(whole.unsqueeze(index).expand_as(x))

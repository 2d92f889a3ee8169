"""Tensors whose dims are named by patterns, on their way from one layout to another."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dsp.layout import shard_range
from megatron_dsp.parallelize.pattern import Pattern
from megatron_dsp.reshard import gather, split, switch

_ChangeKey = TypeVar("_ChangeKey", bound=Hashable)


@dataclass(frozen=True)
class LayoutChange:
    """A tensor and its way. A layout is the name of the sharded dim, None is whole.

    Attributes:
        x: the tensor.
        pattern: of ``x``; it names ``source`` and ``target``.
        sizes: of each of its named dims, before the move.
        source: the layout of ``x``.
        target: the layout that it is to have.
        size: the global size of dim ``source``; 0 where that is None.
    """

    x: Tensor
    pattern: Pattern
    sizes: Mapping[str, int]
    source: str | None
    target: str | None
    size: int

    def parts(self) -> tuple[list[LayoutChange], int]:
        """What moves for itself, and along which dim it is joined: the terms of a dim of which one is sharded, before or after.

        Tokens that stand beside the sharded ones are the same on all ranks, unless a dim of another place is sharded.
        """
        for dim in self.pattern.sums:
            names = {name for term in self.pattern.dims[dim] if not isinstance(term, int) for name in term}
            if self.source != self.target and {self.source, self.target} & names:
                sizes, patterns = zip(*self.pattern.parts(dim, self.sizes), strict=True)
                xs = self.x.split(sizes, dim)
                return [self._part(x, pattern) for x, pattern in zip(xs, patterns, strict=True)], dim
        return [self], 0

    @property
    def is_switch(self) -> bool:
        """Whether the shard moves from one dim to another."""
        return self.source != self.target and self.source is not None and self.target is not None

    def sizes_after(self, group: dist.ProcessGroup) -> dict[str, int]:
        """Of each of its named dims, after the move."""
        sizes = dict(self.sizes)
        if self.source != self.target and self.source is not None:
            sizes[self.source] = self.size
        if self.source != self.target and self.target is not None:
            start, stop = shard_range(sizes[self.target], group.size(), group.rank())
            sizes[self.target] = stop - start
        return sizes

    def _part(self, x: Tensor, pattern: Pattern) -> LayoutChange:
        source, target = (dim if dim in pattern.names else None for dim in (self.source, self.target))
        return LayoutChange(x, pattern, self.sizes, source, target, 0 if source is None else self.size)


def change_layouts(
    changes: Mapping[_ChangeKey, LayoutChange], group: dist.ProcessGroup, stage: str
) -> dict[_ChangeKey, Tensor]:
    """Each tensor in its new layout, by keep, switch, split or gather; collective.

    Those whose shards move between dims of the same places are switched in one collective.
    """
    parts = {(key, index): part for key, change in changes.items() for index, part in enumerate(change.parts()[0])}
    done: dict[tuple[_ChangeKey, int], Tensor] = {}
    switches: dict[tuple[int, int, int], list[tuple[_ChangeKey, int]]] = {}
    for key, part in parts.items():
        x, pattern, source, target = part.x, part.pattern, part.source, part.target
        if source == target:
            done[key] = x
        elif source is None:
            done[key] = pattern.flatten(split(pattern.unflatten(x, part.sizes), dim=pattern.index(str(target)), group=group))
        elif target is None:
            whole = gather(
                pattern.unflatten(x, part.sizes), dim=pattern.index(source), size=part.size, group=group, stage=stage
            )
            done[key] = pattern.flatten(whole)
        else:
            switches.setdefault((pattern.index(source), pattern.index(target), part.size), []).append(key)
    for (gathered, divided, size), keys in switches.items():
        xs = [parts[key].pattern.unflatten(parts[key].x, parts[key].sizes) for key in keys]
        switched = switch(xs, gather=gathered, split=divided, size=size, group=group, stage=stage)
        done.update({key: parts[key].pattern.flatten(x) for key, x in zip(keys, switched, strict=True)})
    return {key: join(change, [done[key, index] for index in range(len(change.parts()[0]))]) for key, change in changes.items()}


def join(change: LayoutChange, parts: list[Tensor]) -> Tensor:
    """A tensor from its `LayoutChange.parts`, after the move."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, change.parts()[1])

"""The way of one activation through the stages of a model, and where its shard is on the way."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from megatron_dsp.layout import Layout, shard_range
from megatron_dsp.reshard import primitives


class Region:
    """Keeps one activation sharded on a dim that the running stage does not mix.

    One region serves one forward pass: it starts in ``layout`` and moves with the activation. ``group`` None means a
    single process, which holds everything: nothing is moved then, and a model needs no second code path for it.
    """

    def __init__(self, layout: Layout, group: dist.ProcessGroup | None):
        self.layout = layout
        self.group = group

    def shard(self, x: Tensor, dim: str | None, *, stage: str = "") -> Tensor:
        """Bring the shard of ``x`` to the dim named ``dim`` (None: gather it), by keep, switch, split or gather."""
        now, self.layout = self.layout, self.layout.with_sharded(dim)
        if self.group is None or dim == now.sharded:
            return x
        if now.sharded is None:
            return primitives.split(x, dim=now.index(dim or ""), group=self.group)
        whole, size = now.index(now.sharded), now.size(now.sharded)
        if dim is None:
            return primitives.gather(x, dim=whole, size=size, group=self.group, stage=stage)
        return primitives.switch(x, gather=whole, split=now.index(dim), size=size, group=self.group, stage=stage)

    def range(self, name: str) -> tuple[int, int]:
        """The half-open range of global indices of the dim named ``name`` that this rank holds now."""
        size = self.layout.size(name)
        if self.group is None or name != self.layout.sharded:
            return 0, size
        return shard_range(size, self.group.size(), self.group.rank())

    def local(self, tensor: Tensor, *, dim: int, name: str) -> Tensor:
        """The part of a side input that belongs to this rank now: ``dim`` of it is the dim named ``name``.

        The whole ``tensor`` where that dim is not the one sharded now.
        """
        start, stop = self.range(name)
        return tensor.narrow(dim, start, stop - start)

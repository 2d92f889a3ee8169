"""The way of one activation through the stages of a model, and where its shard is on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dsp.layout import Layout, shard_range
from megatron_dsp.reshard import chunked, primitives
from megatron_dsp.reshard.exchange import exchange_of
from megatron_dsp.reshard.trace import named


class Stage(NamedTuple):
    """A part of a model that runs with one dim sharded, which it does not mix.

    ``compute`` gets the activation, or a chunk of it along a dim that it does not mix, and returns it in the same sizes, those
    of the last dim aside. Side inputs it takes from `Region.local`, which knows of the chunk.

    A stage that ``mixes_sharded`` attends over the dim that is sharded, with collectives of its own (`embedded`): it and the
    stages around it run whole.
    """

    compute: Callable[[Tensor], Tensor]
    sharded: str
    name: str = ""
    mixes_sharded: bool = False


class Sharing(Protocol):
    """Divides the work of switches among ranks that hold the same activation, along a dim that no stage shards."""

    def part(self, x: Tensor) -> Tensor:
        """What this rank switches of ``x``; a view."""

    def complete(self, moved: Tensor) -> Tensor:
        """All of it, from this rank's part."""


class Region:
    """Keeps one activation sharded on a dim that the running stage does not mix.

    One region serves one forward pass: it starts in ``layout`` and moves with the activation. ``group`` None means a
    single process, which holds everything: nothing is moved then, and a model needs no second code path for it.

    ``sharing`` is for ranks of several sequence groups that hold the same activation: each switches a part of it.
    """

    def __init__(self, layout: Layout, group: dist.ProcessGroup | None, *, sharing: Sharing | None = None):
        self.layout = layout
        self.group = group
        self._sharing = sharing if group is not None and group.size() > 1 else None  # else there is no work to divide
        self._chunk: dict[str, tuple[int, int]] = {}  # of a dim, the global indices on which a stage runs now

    def run(self, stages: Sequence[Stage], x: Tensor, *, independent: str | None = None) -> Tensor:
        """Run ``stages`` on ``x`` in turn, each with its dim sharded; the result has the last one's sharded.

        With an overlap on the group's exchange, stages run in chunks, whose switches travel while the next chunks compute.
        ``independent`` names a dim that no stage mixes, as the batch's.
        """
        if stages:
            x = self.shard(x, stages[0].sharded, stage=stages[0].name)
        # A compiled graph would order the ends of switches as it likes; blocks within stages may be compiled.
        overlap = None
        if self.group is not None and self.group.size() > 1 and not torch.compiler.is_compiling():
            overlap = exchange_of(self.group).overlap
        sharded = {stage.sharded for stage in stages}
        if overlap is not None and len(sharded) > 1 and not any(stage.mixes_sharded for stage in stages):
            # A dim that a stage has sharded cannot be sliced for all of them.
            schedule, x = overlap.enter(self, stages, x, None if independent in sharded else independent)
            if not schedule.plain:
                return chunked.run(self, stages, x, schedule)
        for stage in stages:
            x = self.shard(x, stage.sharded, stage=stage.name)
            with named(f"stage {stage.name}"):
                x = stage.compute(x)
        return x

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
        moved = primitives.switch(self.part(x), gather=whole, split=now.index(dim), size=size, group=self.group, stage=stage)
        return self.complete(moved)

    def part(self, x: Tensor) -> Tensor:
        """What this rank switches of ``x``."""
        return x if self._sharing is None else self._sharing.part(x)

    def complete(self, moved: Tensor) -> Tensor:
        """The activation, from the part of it that this rank switched."""
        return moved if self._sharing is None else self._sharing.complete(moved)

    def range(self, name: str) -> tuple[int, int]:
        """The half-open range of global indices of the dim named ``name`` on which this rank runs now."""
        if name in self._chunk:
            return self._chunk[name]
        size = self.layout.size(name)
        if self.group is None or name != self.layout.sharded:
            return 0, size
        return shard_range(size, self.group.size(), self.group.rank())

    def local(self, tensor: Tensor, *, dim: int, name: str) -> Tensor:
        """The part of a side input that belongs to this rank and chunk now: ``dim`` of it is the dim named ``name``."""
        start, stop = self.range(name)
        return tensor if stop - start == tensor.shape[dim] else tensor.narrow(dim, start, stop - start)

    @contextmanager
    def on_chunk(self, dim: str | None, part: tuple[int, int]) -> Iterator[None]:
        """In the block, the region is at the part ``part`` of the dim named ``dim``, in global indices; None is all of it."""
        self._chunk = {} if dim is None else {dim: part}
        try:
            yield
        finally:
            self._chunk = {}

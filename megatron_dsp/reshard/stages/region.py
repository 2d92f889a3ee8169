"""The way of one activation through the stages of a model, and where its shard is on the way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dsp.layout import Layout, shard_range
from megatron_dsp.reshard import primitives
from megatron_dsp.reshard.exchange import exchange_of
from megatron_dsp.reshard.labels import StageName, profile_range
from megatron_dsp.reshard.stages import chunks, legs
from megatron_dsp.reshard.stages.ends import WHOLE_ENDS, Activation, ChunkedEnds, Way, find_way
from megatron_dsp.reshard.stages.overlap import overlap_of
from megatron_dsp.reshard.stages.schedule import Schedule
from megatron_dsp.reshard.stages.stage import Stage


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

        With an overlap for the group, stages or their ends run in chunks, whose switches travel while other chunks compute.
        ``independent`` names a dim that no stage mixes, as the batch's.
        """
        if stages:
            x = self.shard(x, stages[0].sharded, stage=stages[0].label)
        # A compiled graph would order the ends of switches as it likes; blocks within stages may be compiled.
        if self.group is not None and self.group.size() > 1 and not torch.compiler.is_compiling():
            overlap, dims = overlap_of(self.group), [stage.sharded for stage in stages]
            if overlap is not None and len(set(dims)) > 1 and not any(stage.mixes_sharded for stage in stages):
                # A dim that a stage has sharded cannot be sliced for all of them.
                free = None if independent in dims else independent
                schedule = overlap.choose(self.layout, self.group, dims, x, free, any(stage.has_ends for stage in stages))
                if not schedule.plain:
                    run = self._run_in_chunks if schedule.cut == "stages" else self._run_with_ends
                    return run(self.group, stages, x, schedule)
                stages = overlap.watch(stages)
        for stage in stages:
            x = self.shard(x, stage.sharded, stage=stage.label)
            x = _compute(stage, x)
        return x

    def _run_with_ends(self, group: dist.ProcessGroup, stages: Sequence[Stage], x: Tensor, schedule: Schedule) -> Tensor:
        """By a schedule that cuts the ends of stages; the first stage has its dim sharded already."""
        exchange = exchange_of(group)
        way: Way | None = None
        at: Activation = x
        for stage, following in zip(stages, [*stages[1:], None], strict=True):
            self.layout = self.layout.with_sharded(stage.sharded)
            arrival, way = way, None
            if following is not None and following.sharded != stage.sharded:
                way = find_way(stage, following, exchange, self.layout, schedule)
            ends = ChunkedEnds(schedule.along, arrival, way, self.part, self.complete)
            with profile_range("stage", stage.label):
                if stage.has_ends:
                    at = stage.compute(at, ends)
                else:
                    (whole,) = ends.enter(lambda x: (x,), at)
                    at = ends.leave(lambda x: x, stage.compute(whole))
        assert isinstance(at, Tensor)  # nothing leaves the last stage
        return at

    def _run_in_chunks(self, group: dist.ProcessGroup, stages: Sequence[Stage], x: Tensor, schedule: Schedule) -> Tensor:
        """By a schedule that is not plain; the first stage has its dim sharded already."""
        exchange = exchange_of(group)
        runs = [list(same) for _, same in groupby(stages, lambda stage: stage.sharded)]  # no switch inside one
        cuts = [chunks.cut_stage(schedule, same[0].sharded, self.layout, exchange.size) for same in runs]
        arriving: Iterator[Tensor] = iter(chunks.take_chunks(x, cuts[0], self.layout, exchange.rank))
        for index, same in enumerate(runs):
            self.layout = self.layout.with_sharded(same[0].sharded)
            cut, last = cuts[index], index == len(runs) - 1
            ways = [] if last else chunks.legs_to(runs[index + 1][0], exchange, self.layout, cut, cuts[index + 1], schedule)
            done: list[Tensor] = []
            for number, chunk in enumerate(arriving):
                with self._on_chunk(cut.dim, cut.ranges[number].parts[exchange.rank]):
                    for stage in same:
                        chunk = _compute(stage, chunk)
                if last:
                    done.append(chunk)
                else:
                    # A stage that runs whole sends its result off in all the chunks of the next one.
                    done += legs.begin([ways[number]] if cut.dim else ways, self.part(chunk))
            if last:
                break
            if ways[0].target is ways[-1].target:
                # Nothing else names the whole, which would live on after its chunks.
                arriving = iter(
                    chunks.take_chunks(self.complete(legs.end(ways, done)), cuts[index + 1], self.layout, exchange.rank)
                )
            else:
                # Each is waited for just before it is computed on.
                arriving = (self.complete(legs.end([way], [token])) for way, token in zip(ways, done, strict=True))
        return done[0] if cuts[-1].dim is None else torch.cat(done, self.layout.index(cuts[-1].dim))

    def shard(self, x: Tensor, dim: str | None, *, stage: str | StageName = "") -> Tensor:
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
    def _on_chunk(self, dim: str | None, part: tuple[int, int]) -> Iterator[None]:
        """In the block, the region is at the part ``part`` of the dim named ``dim``, in global indices; None is all of it."""
        self._chunk = {} if dim is None else {dim: part}
        try:
            yield
        finally:
            self._chunk = {}


def _compute(stage: Stage, x: Tensor) -> Tensor:
    with profile_range("stage", stage.label):
        return stage.compute(x, WHOLE_ENDS) if stage.has_ends else stage.compute(x)

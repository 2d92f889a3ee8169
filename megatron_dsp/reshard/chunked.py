"""Stages in chunks: the order in which chunks compute, leave and arrive."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from megatron_dsp.layout import Layout, shard_ranges
from megatron_dsp.reshard import legs
from megatron_dsp.reshard.exchange import Exchange, exchange_of
from megatron_dsp.reshard.legs import Landing, Leg
from megatron_dsp.reshard.moves import Ranges
from megatron_dsp.reshard.schedule import SHARDED, Schedule, chunk_ranges
from megatron_dsp.reshard.trace import named

if TYPE_CHECKING:
    from megatron_dsp.reshard.region import Region, Stage


def run(region: Region, stages: Sequence[Stage], x: Tensor, schedule: Schedule) -> Tensor:
    """Run ``stages`` by a schedule that is not plain; the first has its dim sharded already."""
    assert region.group is not None
    exchange = exchange_of(region.group)
    runs = [list(of_dim) for _, of_dim in groupby(stages, lambda stage: stage.sharded)]  # no switch inside one
    cuts = [_cut(schedule, same[0].sharded, region.layout, exchange.size) for same in runs]
    arriving: Iterator[Tensor] = iter(_pieces(x, cuts[0], region.layout, exchange.rank))
    for index, same in enumerate(runs):
        region.layout = region.layout.with_sharded(same[0].sharded)
        cut, last = cuts[index], index == len(runs) - 1
        ways = [] if last else _ways(exchange, region.layout, cut, cuts[index + 1], runs[index + 1][0], schedule)
        done: list[Tensor] = []
        for number, chunk in enumerate(arriving):
            with region.on_chunk(cut.dim, cut.chunks[number][exchange.rank]):
                for stage in same:
                    with named(f"stage {stage.name}"):
                        chunk = stage.compute(chunk)
            if last:
                done.append(chunk)
            else:
                # A stage that runs whole sends its result off in all the chunks of the next one.
                done += legs.begin([ways[number]] if cut.dim else ways, region.part(chunk))
        if last:
            break
        if ways[0].target is ways[-1].target:
            # Nothing else names the whole, which would live on after its chunks.
            arriving = iter(_pieces(region.complete(legs.end(ways, done)), cuts[index + 1], region.layout, exchange.rank))
        else:
            # Each is waited for just before it is computed on.
            arriving = (region.complete(legs.end([way], [token])) for way, token in zip(ways, done, strict=True))
    return done[0] if cuts[-1].dim is None else torch.cat(done, region.layout.index(cuts[-1].dim))


class _Cut(NamedTuple):
    """A stage's chunks: of the dim named ``dim``, each rank's global indices in each chunk. None: one chunk, the whole."""

    dim: str | None
    chunks: list[Ranges]


def _cut(schedule: Schedule, sharded: str, layout: Layout, ranks: int) -> _Cut:
    dim = schedule.cut_dim(sharded)
    if dim is None:
        return _Cut(None, [((0, 0),) * ranks])
    size = layout.size(dim)
    whole = shard_ranges(size, ranks) if dim == sharded else ((0, size),) * ranks
    return _Cut(dim, chunk_ranges(whole, schedule.chunks[dim], schedule.shrink))


def _pieces(x: Tensor, cut: _Cut, layout: Layout, rank: int) -> Sequence[Tensor]:
    if cut.dim is None:
        return [x]
    # One split, whose gradient is one concatenation.
    return x.split([stop - start for start, stop in (ranges[rank] for ranges in cut.chunks)], layout.index(cut.dim))


def _ways(exchange: Exchange, layout: Layout, cut: _Cut, following: _Cut, stage: Stage, schedule: Schedule) -> list[Leg]:
    """The legs of the switch from the layout to that of ``stage``, which is cut as ``following`` says."""
    gather, split = layout.sharded or "", stage.sharded
    whole = {dim: shard_ranges(layout.size(dim), exchange.size) for dim in (gather, split)}
    leaves_in_chunks = cut.dim is not None
    arrives_in_chunks = following.dim is not None and schedule.along != SHARDED
    driving = cut if leaves_in_chunks or not arrives_in_chunks else following
    source, target = Landing(), Landing()
    return [
        Leg(
            exchange,
            layout.index(gather),
            layout.index(split),
            layout.size(gather),
            ranges if driving.dim == gather else whole[gather],
            ranges if driving.dim == split else whole[split],
            Landing() if leaves_in_chunks else source,
            Landing() if arrives_in_chunks else target,
            stage.name,
        )
        for ranges in driving.chunks
    ]

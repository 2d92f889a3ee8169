"""How a stage is cut into chunks, and the legs on which they travel to the next one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from megatron_dsp.layout import Layout, RankRanges, all_ranges, shard_ranges
from megatron_dsp.reshard.exchange import Exchange
from megatron_dsp.reshard.stages.legs import Landing, Leg
from megatron_dsp.reshard.stages.schedule import SHARDED, Schedule, chunk_ranges
from megatron_dsp.reshard.stages.stage import Stage


class StageChunks(NamedTuple):
    """A stage's chunks: of the dim named ``dim``, each rank's global indices in each chunk. None: one chunk, the whole."""

    dim: str | None
    ranges: Sequence[RankRanges]


def cut_stage(schedule: Schedule, sharded: str, layout: Layout, ranks: int) -> StageChunks:
    """How ``schedule`` cuts a stage that runs with ``sharded`` sharded."""
    dim = schedule.cut_dim(sharded)
    if dim is None:
        return StageChunks(None, [all_ranges(0, ranks)])
    size = layout.size(dim)
    whole = shard_ranges(size, ranks) if dim == sharded else all_ranges(size, ranks)
    return StageChunks(dim, chunk_ranges(whole, schedule.chunks[dim], schedule.shrink))


def take_chunks(x: Tensor, cut: StageChunks, layout: Layout, rank: int) -> Sequence[Tensor]:
    """The chunks of a rank's activation."""
    if cut.dim is None:
        return [x]
    # One split, whose gradient is one concatenation.
    parts = (ranges.parts[rank] for ranges in cut.ranges)
    return x.split([stop - start for start, stop in parts], layout.index(cut.dim))


def legs_to(
    stage: Stage, exchange: Exchange, layout: Layout, cut: StageChunks, following: StageChunks, schedule: Schedule
) -> list[Leg]:
    """The legs of the switch from ``layout``, cut as ``cut`` says, to that of ``stage``, cut as ``following`` says."""
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
            stage.label,
        )
        for ranges in driving.ranges
    ]

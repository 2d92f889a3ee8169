"""Which schedule the stages of a region run by, for each group; and the streams beside compute that chunks pack on."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dsp.errors import UsageError
from megatron_dsp.layout import Layout
from megatron_dsp.reshard.stages.schedule import SHARDED, Schedule
from megatron_dsp.reshard.transport.side_stream import SideStream


class Overlap(Protocol):
    """Chooses how stages are cut; the same on all ranks."""

    @property
    def decisions(self) -> list[str]:
        """The schedules that were decided for, and why, in the order of deciding."""

    def choose(
        self, layout: Layout, group: dist.ProcessGroup, sharded: Sequence[str], x: Tensor, independent: str | None
    ) -> Schedule:
        """The schedule of a pass of ``x``, which lies as ``layout`` says, through stages with these dims sharded.

        ``independent`` is a dim that none of them mixes or has sharded.
        """


@dataclass
class _GroupOverlap:
    overlap: Overlap | None = None
    stream_priority: int = -1
    side_streams: dict[torch.device, SideStream] = field(default_factory=dict)


_overlaps: weakref.WeakKeyDictionary[dist.ProcessGroup, _GroupOverlap] = weakref.WeakKeyDictionary()


def set_overlap(group: dist.ProcessGroup, overlap: Overlap | None, *, stream_priority: int | None = None) -> None:
    """Let regions over ``group`` run by ``overlap`` from now on; None: in whole stages. The same on all ranks.

    ``stream_priority`` is that of the CUDA stream on which chunks are packed and unpacked, -1 at first, which goes before
    compute; None: as it is.
    """
    known = _overlaps.setdefault(group, _GroupOverlap())
    known.overlap = overlap
    if stream_priority not in (None, known.stream_priority):
        known.stream_priority, known.side_streams = stream_priority, {}


def overlap_of(group: dist.ProcessGroup) -> Overlap | None:
    """By what regions over ``group`` run; None: in whole stages."""
    known = _overlaps.get(group)
    return None if known is None else known.overlap


@contextmanager
def whole_stages(group: dist.ProcessGroup) -> Iterator[None]:
    """In the block, regions over ``group`` run in whole stages. The same on all ranks."""
    known = _overlaps.setdefault(group, _GroupOverlap())
    usual, known.overlap = known.overlap, None
    try:
        yield
    finally:
        known.overlap = usual


def side_stream(group: dist.ProcessGroup, device: torch.device) -> SideStream | None:
    """The stream on which chunks that travel over ``group`` are packed and unpacked; None where the device has no streams."""
    if device.type != "cuda":
        return None
    known = _overlaps.setdefault(group, _GroupOverlap())
    stream = known.side_streams.get(device)
    if stream is None:
        stream = known.side_streams[device] = SideStream(device, known.stream_priority)
    return stream


class FixedOverlap:
    """``chunks`` chunks, or as many as the smallest shard has elements. Attributes as those of `Schedule`.

    ``along`` None: the dim that no stage mixes where it is as large as ``chunks``, since both ends of its switches are hidden;
    else each stage's own. ``shrink`` None: equal slices of the former, chunks of half of the one before of the latter.
    """

    def __init__(self, chunks: int, *, along: str | None = None, shrink: float | None = None):
        self.chunks, self.along, self.shrink = chunks, along, shrink
        self._schedules: dict[str, None] = {}

    @property
    def decisions(self) -> list[str]:
        """The different schedules that passes ran by."""
        return list(self._schedules)

    def choose(
        self, layout: Layout, group: dist.ProcessGroup, sharded: Sequence[str], x: Tensor, independent: str | None
    ) -> Schedule:
        """The same for every pass. Errors: UsageError for a dim along which no stage can be cut."""
        sharded = list(dict.fromkeys(sharded))
        along = self.along
        if along is None:
            along = independent if independent and layout.size(independent) >= self.chunks else SHARDED
        if along not in (SHARDED, independent, *sharded):
            raise UsageError(
                f"overlap along {along!r}: the stages have {', '.join(sharded)} sharded, and the dim that none mixes is "
                f"{independent}; choose one of these, or {SHARDED!r}"
            )
        shrink = self.shrink if self.shrink is not None else (1.0 if along == independent else 0.5)
        schedule = schedule_of(layout, sharded, group.size(), along, independent, self.chunks, shrink)
        schedule = replace(schedule, reason="as asked for")
        self._schedules[str(schedule)] = None
        return schedule


def schedule_of(
    layout: Layout, sharded: Sequence[str], ranks: int, along: str, independent: str | None, chunks: int, shrink: float
) -> Schedule:
    """The schedule of ``chunks`` chunks, or as many as there are elements in the smallest shard of a dim to cut."""
    dims = list(dict.fromkeys(sharded)) if along == SHARDED else [along]
    least = {dim: layout.size(dim) // (1 if dim == independent else ranks) for dim in dims}
    return Schedule(along, along == independent, {dim: max(1, min(chunks, size)) for dim, size in least.items()}, shrink)

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
from megatron_dsp.reshard.stages.schedule import SHARDED, Schedule, What
from megatron_dsp.reshard.stages.stage import Stage
from megatron_dsp.reshard.transport.side_streams import SideStreams


class Overlap(Protocol):
    """Chooses how stages are cut; the same on all ranks."""

    @property
    def decisions(self) -> list[str]:
        """The schedules that were decided for, and why, in the order of deciding."""

    def choose(
        self, layout: Layout, group: dist.ProcessGroup, sharded: Sequence[str], x: Tensor, independent: str | None, ends: bool
    ) -> Schedule:
        """The schedule of a pass of ``x``, which lies as ``layout`` says, through stages with these dims sharded.

        ``independent`` is a dim that none of them mixes or has sharded. ``ends``: some of them have ends, which can be cut.
        """

    def watch(self, stages: Sequence[Stage]) -> Sequence[Stage]:
        """What is run for ``stages`` in a pass for which `choose` has left them whole: they themselves, timed perhaps."""


@dataclass
class _GroupOverlap:
    overlap: Overlap | None = None
    stream_priority: int = -1
    side_streams: dict[torch.device, SideStreams] = field(default_factory=dict)


_overlaps: weakref.WeakKeyDictionary[dist.ProcessGroup, _GroupOverlap] = weakref.WeakKeyDictionary()


def set_overlap(group: dist.ProcessGroup, overlap: Overlap | None, *, stream_priority: int | None = None) -> None:
    """Let regions over ``group`` run by ``overlap`` from now on; None: in whole stages. The same on all ranks.

    ``stream_priority`` is that of the CUDA streams on which chunks are packed and unpacked, -1 at first, which goes before
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


def side_streams(group: dist.ProcessGroup, device: torch.device) -> SideStreams | None:
    """Those on which chunks that travel over ``group`` are packed and unpacked; None where the device has no streams."""
    if device.type != "cuda":
        return None
    known = _overlaps.setdefault(group, _GroupOverlap())
    streams = known.side_streams.get(device)
    if streams is None:
        streams = known.side_streams[device] = SideStreams(device, known.stream_priority)
    return streams


class FixedOverlap:
    """``chunks`` chunks, or as many as the smallest shard has elements. Attributes as those of `Schedule`.

    ``cut`` None: whole stages where the dim that no stage mixes is as large as ``chunks``, since its slices meet nowhere; else
    the ends of stages, where some have ends. ``along`` None: of ends, the largest dim that some stage has sharded. Of whole
    stages, the dim that none mixes where it is large enough, else each stage's own. ``shrink`` None: chunks of half of the one
    before where the last one travels alone, equal ones else.
    """

    def __init__(self, chunks: int, *, along: str | None = None, shrink: float | None = None, cut: What | None = None):
        self.chunks, self.along, self.shrink, self.cut = chunks, along, shrink, cut
        self._schedules: dict[str, None] = {}

    @property
    def decisions(self) -> list[str]:
        """The different schedules that passes ran by."""
        return list(self._schedules)

    def choose(
        self, layout: Layout, group: dist.ProcessGroup, sharded: Sequence[str], x: Tensor, independent: str | None, ends: bool
    ) -> Schedule:
        """The same for every pass. Errors: UsageError for a dim along which no stage can be cut."""
        sharded = list(dict.fromkeys(sharded))
        slices = independent if independent and layout.size(independent) >= self.chunks else None
        cut: What = self.cut or ("ends" if ends and self.along is None and slices is None else "stages")
        if cut == "stages":
            along = self.along or slices or SHARDED
            possible = (SHARDED, *([independent] if independent else []), *sharded)
        else:
            along = self.along or max(sharded, key=layout.size)
            possible = layout.dims[:-1]
        if along not in possible:
            raise UsageError(
                f"overlap along {along!r}: the stages have {', '.join(sharded)} sharded, and the dim that none mixes is "
                f"{independent}; choose one of {', '.join(possible)}"
            )
        alone = cut == "leave" or (cut == "stages" and along != independent)
        shrink = self.shrink if self.shrink is not None else (0.5 if alone else 1.0)
        schedule = schedule_of(layout, sharded, group.size(), along, independent, self.chunks, shrink, cut)
        schedule = replace(schedule, reason="as asked for")
        self._schedules[str(schedule)] = None
        return schedule

    def watch(self, stages: Sequence[Stage]) -> Sequence[Stage]:
        """They themselves."""
        return stages


def schedule_of(
    layout: Layout,
    sharded: Sequence[str],
    ranks: int,
    along: str,
    independent: str | None,
    chunks: int,
    shrink: float,
    cut: What = "stages",
) -> Schedule:
    """The schedule of ``chunks`` chunks, or as many as there are elements in the smallest shard of a dim to cut."""
    dims = list(dict.fromkeys(sharded)) if along == SHARDED else [along]
    least = {dim: layout.size(dim) // (ranks if dim in sharded else 1) for dim in dims}
    counts = {dim: max(1, min(chunks, size)) for dim, size in least.items()}
    return Schedule(along, along == independent, counts, shrink, cut)

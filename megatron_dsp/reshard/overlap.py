"""Which schedule the stages of a region run by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from megatron_dsp.errors import UsageError
from megatron_dsp.layout import Layout
from megatron_dsp.reshard.schedule import SHARDED, Schedule

if TYPE_CHECKING:
    from megatron_dsp.reshard.region import Region, Stage


class Overlap(Protocol):
    """Chooses how stages are cut; the same on all ranks."""

    @property
    def decisions(self) -> list[str]:
        """The schedules that were decided for, and why, in the order of deciding."""

    def enter(self, region: Region, stages: Sequence[Stage], x: Tensor, independent: str | None) -> tuple[Schedule, Tensor]:
        """The schedule of this pass, and ``x`` to run it on."""


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

    def enter(self, region: Region, stages: Sequence[Stage], x: Tensor, independent: str | None) -> tuple[Schedule, Tensor]:
        """The same for every pass. Errors: UsageError for a dim along which no stage can be cut."""
        sharded = list(dict.fromkeys(stage.sharded for stage in stages))
        along = self.along
        if along is None:
            along = independent if independent and region.layout.size(independent) >= self.chunks else SHARDED
        if along not in (SHARDED, independent, *sharded):
            raise UsageError(
                f"overlap along {along!r}: the stages have {', '.join(sharded)} sharded, and the dim that none mixes is "
                f"{independent}; choose one of these, or {SHARDED!r}"
            )
        assert region.group is not None
        ranks = region.group.size()
        shrink = self.shrink if self.shrink is not None else (1.0 if along == independent else 0.5)
        schedule = cut(region.layout, sharded, ranks, along, independent, self.chunks, shrink)
        schedule = replace(schedule, reason="as asked for")
        self._schedules[str(schedule)] = None
        return schedule, x


def cut(
    layout: Layout, sharded: Sequence[str], ranks: int, along: str, independent: str | None, chunks: int, shrink: float
) -> Schedule:
    """The schedule of ``chunks`` chunks, or as many as there are elements in the smallest shard of a dim to cut."""
    dims = list(dict.fromkeys(sharded)) if along == SHARDED else [along]
    least = {dim: layout.size(dim) // (1 if dim == independent else ranks) for dim in dims}
    return Schedule(along, along == independent, {dim: max(1, min(chunks, size)) for dim, size in least.items()}, shrink)

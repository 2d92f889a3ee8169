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
    """``chunks`` chunks, or as many as the smallest shard has elements. Attributes as those of `Schedule`."""

    def __init__(self, chunks: int, *, along: str = SHARDED, shrink: float = 0.5):
        self.chunks, self.along, self.shrink = chunks, along, shrink
        self._schedules: dict[str, None] = {}

    @property
    def decisions(self) -> list[str]:
        """The different schedules that passes ran by."""
        return list(self._schedules)

    def enter(self, region: Region, stages: Sequence[Stage], x: Tensor, independent: str | None) -> tuple[Schedule, Tensor]:
        """The same for every pass. Errors: UsageError for a dim along which no stage can be cut."""
        sharded = list(dict.fromkeys(stage.sharded for stage in stages))
        if self.along not in (SHARDED, independent, *sharded):
            raise UsageError(
                f"overlap along {self.along!r}: the stages have {', '.join(sharded)} sharded, and the dim that none mixes is "
                f"{independent}; choose one of these, or {SHARDED!r}"
            )
        assert region.group is not None
        ranks = region.group.size()
        schedule = cut(region.layout, sharded, ranks, self.along, independent, self.chunks, self.shrink)
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

"""Which schedule the stages of a region run by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from megatron_dsp.reshard.schedule import Schedule

if TYPE_CHECKING:
    from megatron_dsp.reshard.region import Region, Stage


class Overlap(Protocol):
    """Chooses how stages are cut; the same on all ranks."""

    def enter(self, region: Region, stages: Sequence[Stage], x: Tensor, independent: str | None) -> tuple[Schedule, Tensor]:
        """The schedule of this pass, and ``x`` to run it on."""


class FixedOverlap:
    """So many chunks, as far as the smallest shard allows it."""

    def __init__(self, chunks: int, *, along: str = "sharded", shrink: float = 0.5):
        self.chunks, self.along, self.shrink = chunks, along, shrink

    def enter(self, region: Region, stages: Sequence[Stage], x: Tensor, independent: str | None) -> tuple[Schedule, Tensor]:
        """The same for every pass."""
        schedule = Schedule(
            self.along, self.along == independent, self._chunks(region, stages), self.shrink, "the config asks for it"
        )
        return schedule, x

    def _chunks(self, region: Region, stages: Sequence[Stage]) -> dict[str, int]:
        assert region.group is not None
        ranks, sharded = region.group.size(), {stage.sharded for stage in stages}
        dims = sharded if self.along == "sharded" else {self.along}
        least = {dim: region.layout.size(dim) // (ranks if dim in sharded else 1) for dim in dims}
        return {dim: max(1, min(self.chunks, size)) for dim, size in sorted(least.items())}

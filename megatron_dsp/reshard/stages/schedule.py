"""How stages are cut into chunks, so that one chunk's switch travels while the next one computes. Pure Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from megatron_dsp.layout import RankRanges

SHARDED = "sharded"

What = Literal["stages", "leave", "ends"]


@dataclass(frozen=True)
class Schedule:
    """How the stages between two layouts run.

    Attributes:
        along: where whole stages are cut, "sharded": each along the dim that is sharded while it runs, and its chunks leave as
            they are done (the last one travels alone). The name of a dim that some stage has sharded: those stages are cut
            along it, and their chunks arrive and leave one by one. The name of another dim, which no stage mixes (batch): all
            stages run in slices of it, and both ends of each switch are hidden. Where the ends of stages are cut, the name of
            any dim but the last.
        independent: whether ``along`` is such a dim.
        chunks: how many, for each dim that is cut. None or 1 is plain: whole stages, and switches between them.
        shrink: the size of a chunk over that of the one before it. Below 1, the one that travels alone is small.
        cut: what runs in chunks. "stages": whole stages. "leave": what treats tokens alone at the end of a stage, whose chunks
            leave as they are done. "ends": that, and what treats tokens alone at the beginning of the next stage, where they
            arrive one by one; both ends of each switch are hidden, and what mixes tokens stays whole.
        reason: why this schedule was chosen.
    """

    along: str = SHARDED
    independent: bool = False
    chunks: Mapping[str, int] = field(default_factory=dict)
    shrink: float = 1.0
    cut: What = "stages"
    reason: str = field(default="", compare=False)

    @property
    def plain(self) -> bool:
        """Whether nothing is cut."""
        return all(count == 1 for count in self.chunks.values())

    def cut_dim(self, sharded: str) -> str | None:
        """The dim along which a whole stage is cut that runs with ``sharded`` sharded; None where it runs whole."""
        if self.cut != "stages":
            return None
        dim = sharded if self.along == SHARDED else self.along
        return dim if (dim == sharded or self.independent) and self.chunks.get(dim, 1) > 1 else None

    def __str__(self) -> str:
        if self.plain:
            text = "whole stages"
        else:
            cuts = ", ".join(f"{count} chunks of {dim}" for dim, count in self.chunks.items() if count > 1)
            where = {"stages": "", "leave": " where tokens leave", "ends": " at both ends of switches"}[self.cut]
            text = (cuts if self.shrink == 1.0 else f"{cuts}, each {self.shrink:g} of the one before") + where
        return f"{text}: {self.reason}" if self.reason else text


def chunk_sizes(size: int, chunks: int, shrink: float = 1.0) -> list[int]:
    """``size`` in ``chunks`` parts of at least 1, each about ``shrink`` times the one before; they sum to ``size``."""
    if not 1 <= chunks <= max(size, 1):
        raise ValueError(f"cannot cut size={size} into chunks={chunks}: there must be 1 to {max(size, 1)}")
    weights = [shrink**index for index in range(chunks)]
    stops: list[int] = []
    for index in range(chunks):
        wanted = round(size * sum(weights[: index + 1]) / sum(weights))
        least = stops[-1] + 1 if stops else min(1, size)
        stops.append(min(max(wanted, least), size - (chunks - 1 - index)))
    return [stop - start for start, stop in zip([0, *stops], stops, strict=False)]


@lru_cache(maxsize=1024)
def chunk_ranges(ranges: RankRanges, chunks: int, shrink: float = 1.0) -> tuple[RankRanges, ...]:
    """Of each chunk, the (start, stop) of every rank, where ``ranges`` are the ranks' shards."""
    by_rank = []
    for start, stop in ranges.parts:
        parts = []
        for size in chunk_sizes(stop - start, chunks, shrink):
            parts.append((start, start + size))
            start += size
        by_rank.append(parts)
    return tuple(RankRanges(parts) for parts in zip(*by_rank, strict=True))

"""The ends of a stage, where tokens are alone, in chunks: one travels while the next one is computed before it leaves, and
while the one before is computed after it has arrived. What mixes tokens stays whole.

A chunk of the dim along which a switch is cut has a part of every rank's shard of it. So at an end at which that dim is sharded
a chunk lies in one place, and at one at which it is whole it has a place for each rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate, groupby, pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_dsp.layout import Layout, RankRanges, all_ranges, shard_ranges
from megatron_dsp.reshard.exchange import Exchange
from megatron_dsp.reshard.stages import legs
from megatron_dsp.reshard.stages.legs import Landing, Leg
from megatron_dsp.reshard.stages.schedule import Schedule, chunk_ranges
from megatron_dsp.reshard.stages.stage import Stage

# An activation; or, while it travels, a token for each of its chunks, which stand for it in autograd.
Activation = Tensor | tuple[Tensor, ...]


class Ends(Protocol):
    """What a stage does at its ends, where it treats tokens alone: it mixes no dim but the last."""

    def enter(self, run: Callable[[Tensor], tuple[Tensor, ...]], x: Activation) -> tuple[Tensor, ...]:
        """``run`` on the activation ``x`` that came in: what it gives, of all tokens.

        ``run`` gets the activation, or a chunk of it, and returns tensors that have its sizes, the last dim aside (it may be
        several dims).
        """

    def leave(self, run: Callable[..., Tensor], *xs: Tensor) -> Activation:
        """``run`` on all tokens of ``xs``, or on the same chunk of each: what the stage returns."""

    def local(self, side: Tensor, *, dim: int, name: str) -> Tensor:
        """The part of a side input of ``run`` that belongs to what it runs on: ``dim`` of it is the dim named ``name``."""


class WholeEnds:
    """All tokens at once."""

    def enter(self, run: Callable[[Tensor], tuple[Tensor, ...]], x: Activation) -> tuple[Tensor, ...]:
        assert isinstance(x, Tensor)  # tokens come with the ends that know them
        return run(x)

    def leave(self, run: Callable[..., Tensor], *xs: Tensor) -> Activation:
        return run(*xs)

    def local(self, side: Tensor, *, dim: int, name: str) -> Tensor:
        return side


WHOLE_ENDS = WholeEnds()


class Places(NamedTuple):
    """Where chunks lie along a dim: in each shard of ``ranks`` ranks in a row, one after another with these ``sizes``."""

    ranks: int
    sizes: tuple[int, ...]


class Way(NamedTuple):
    """A switch in chunks, from the end of one stage to the beginning of the next.

    ``dim`` is the one that is cut, ``source`` and ``target`` say where its chunks lie at either end; each has its leg.
    ``enters``: the next stage computes on each as it arrives.
    """

    dim: int
    source: Sequence[Places]
    target: Sequence[Places]
    legs: list[Leg]
    enters: bool


def find_way(before: Stage, after: Stage, exchange: Exchange, layout: Layout, schedule: Schedule) -> Way:
    """The way from one stage to another, which has another dim sharded."""
    along, gather, split = schedule.along, before.sharded, after.sharded
    ranges = {dim: shard_ranges(layout.size(dim), exchange.size) for dim in (gather, split)}
    own = ranges.get(along) or all_ranges(layout.size(along), exchange.size)
    chunks = chunk_ranges(own, schedule.chunks[along], schedule.shrink)
    here, everywhere = _places_at(chunks, exchange.rank), _places(chunks)
    legs_of_chunks = []
    for chunk in chunks:
        # A chunk is a tensor of its own, whose shards lie without gaps.
        of_chunk = ranges | {along: _without_gaps(chunk)}
        size = of_chunk[gather].total
        dims = layout.index(gather), layout.index(split)
        leg = Leg(
            exchange,
            *dims,
            size,
            of_chunk[gather],
            of_chunk[split],
            Landing(),
            Landing(),
            after.label,
            begins_again=before.recomputes,
            ends_again=after.recomputes,
        )
        legs_of_chunks.append(leg)
    return Way(
        layout.index(along),
        everywhere if along == split else here,
        everywhere if along == gather else here,
        legs_of_chunks,
        schedule.cut == "ends",
    )


@lru_cache(maxsize=1024)
def _places(chunks: tuple[RankRanges, ...]) -> tuple[Places, ...]:
    """Of all ranks' shards."""
    of_ranks = zip(*([stop - start for start, stop in ranges.parts] for ranges in chunks), strict=True)
    return tuple(Places(len(list(same)), sizes) for sizes, same in groupby(of_ranks))


@lru_cache(maxsize=1024)
def _places_at(chunks: tuple[RankRanges, ...], rank: int) -> tuple[Places, ...]:
    """Of the shard of ``rank``."""
    parts = [ranges.parts[rank] for ranges in chunks]
    return (Places(1, tuple(stop - start for start, stop in parts)),)


@lru_cache(maxsize=1024)
def _without_gaps(ranges: RankRanges) -> RankRanges:
    """Ranges of the same sizes, one after another from 0 on."""
    stops = accumulate((stop - start for start, stop in ranges.parts), initial=0)
    return RankRanges(tuple(pairwise(stops)))


def split_end(x: Tensor, dim: int, places: Sequence[Places]) -> list[Tensor]:
    """The chunks of ``x``: views where all of it lies in one place, copies else. Adjoint: `join_end`."""
    blocks = [x] if len(places) == 1 else x.split([ranks * sum(sizes) for ranks, sizes in places], dim)
    of_blocks = []
    for block, (ranks, sizes) in zip(blocks, places, strict=True):
        if ranks == 1:
            of_blocks.append(list(block.split(sizes, dim)))
        else:
            parts = block.unflatten(dim, (ranks, sum(sizes))).split(sizes, dim + 1)
            of_blocks.append([part.flatten(dim, dim + 1) for part in parts])
    return [parts[0] if len(parts) == 1 else torch.cat(parts, dim) for parts in zip(*of_blocks, strict=True)]


def join_end(chunks: Sequence[Tensor], dim: int, places: Sequence[Places]) -> Tensor:
    """The tensor whose chunks these are; a copy. Adjoint: `split_end`."""
    of_chunks: list[Sequence[Tensor]] = [
        [chunk] if len(places) == 1 else chunk.split([ranks * sizes[number] for ranks, sizes in places], dim)
        for number, chunk in enumerate(chunks)
    ]
    blocks = []
    for parts, (ranks, _) in zip(zip(*of_chunks, strict=True), places, strict=True):
        if ranks == 1:
            blocks.append(torch.cat(parts, dim))
        else:
            blocks.append(torch.cat([part.unflatten(dim, (ranks, -1)) for part in parts], dim + 1).flatten(dim, dim + 1))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim)


class ChunkedEnds:
    """The ends of one stage, where the switches before and after it travel in chunks; None: there is no switch."""

    def __init__(
        self,
        along: str,
        arrival: Way | None,
        departure: Way | None,
        part: Callable[[Tensor], Tensor],
        complete: Callable[[Tensor], Tensor],
    ):
        """``along`` is the name of the dim that is cut; ``part`` and ``complete`` are those of `Sharing`."""
        self._along = along
        self._arrival, self._departure = arrival, departure
        self._part, self._complete = part, complete
        self._chunk: tuple[Sequence[Places], int] | None = None  # on which an end runs now

    def enter(self, run: Callable[[Tensor], tuple[Tensor, ...]], x: Activation) -> tuple[Tensor, ...]:
        way = self._arrival
        if way is None:
            assert isinstance(x, Tensor)  # nothing was under way
            return run(x)
        done = []
        for number, (leg, token) in enumerate(zip(way.legs, x, strict=True)):
            # Made just before it is computed on: so in backward its gradient leaves as soon as it is computed.
            chunk = self._complete(legs.end([leg], [token]))
            with self._on_chunk(way.target, number):
                done.append(run(chunk) if way.enters else (chunk,))
        wholes = tuple(join_end(chunks, way.dim, way.target) for chunks in zip(*done, strict=True))
        return wholes if way.enters else run(*wholes)

    def leave(self, run: Callable[..., Tensor], *xs: Tensor) -> Activation:
        way = self._departure
        if way is None:
            return run(*xs)
        tokens: list[Tensor] = []
        chunks = zip(*(split_end(x, way.dim, way.source) for x in xs), strict=True)
        for number, (leg, chunk) in enumerate(zip(way.legs, chunks, strict=True)):
            with self._on_chunk(way.source, number):
                y = run(*chunk)
            tokens += legs.begin([leg], self._part(y))
        return tuple(tokens)

    def local(self, side: Tensor, *, dim: int, name: str) -> Tensor:
        if self._chunk is None or name != self._along:
            return side
        places, number = self._chunk
        return split_end(side, dim, places)[number]

    @contextmanager
    def _on_chunk(self, places: Sequence[Places], number: int) -> Iterator[None]:
        self._chunk = places, number
        try:
            yield
        finally:
            self._chunk = None

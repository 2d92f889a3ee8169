"""Where the parts of an activation lie: shard arithmetic and layouts. Pure Python, no processes.

A *shard* is a rank's part of a dim, by the rule of ``torch.tensor_split``: of N ranks, the first ``size % N`` hold
one element more. A *layout* says which dim the sequence axis shards, and the global sizes of all dims.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache


def shard_sizes(size: int, parts: int) -> list[int]:
    """The sizes of all shards of a dim of ``size`` elements over ``parts`` ranks; they sum to ``size``, some may be 0."""
    if size < 0 or parts < 1:
        raise ValueError(f"cannot shard size={size} over parts={parts}: size must be >= 0 and parts >= 1")
    small, larger = size // parts, size % parts  # not divmod, which a compiler's symbols do not have
    return [small + (rank < larger) for rank in range(parts)]


def shard_range(size: int, parts: int, rank: int) -> tuple[int, int]:
    """The half-open range ``(start, stop)`` of global indices that ``rank`` of ``parts`` holds."""
    if size < 0 or not 0 <= rank < parts:
        raise ValueError(f"no shard of size={size} for rank={rank} of parts={parts}: needs size >= 0, 0 <= rank < parts")
    small, larger = size // parts, size % parts
    start = rank * small + min(rank, larger)
    return start, start + small + (rank < larger)


@dataclass(frozen=True, eq=False)
class RankRanges:
    """The half-open range of global indices that each rank has of a dim.

    Compared by identity, so that what depends on it is found by a key whose cost does not grow with the ranks: get it from
    functions that give the same one for the same arguments.
    """

    parts: tuple[tuple[int, int], ...]

    @cached_property
    def even(self) -> bool:
        """Whether all ranks have as many."""
        return len({stop - start for start, stop in self.parts}) == 1

    @cached_property
    def consecutive(self) -> bool:
        """Whether the first rank begins at 0 and each goes on where the one before stops."""
        stops = (0, *(stop for _, stop in self.parts))
        return all(start == before for (start, _), before in zip(self.parts, stops, strict=False))

    @cached_property
    def total(self) -> int:
        """How many indices all ranks have together."""
        return sum(stop - start for start, stop in self.parts)


@lru_cache(maxsize=4096)
def shard_ranges(size: int, parts: int) -> RankRanges:
    """`shard_range` of every rank."""
    return RankRanges(tuple(shard_range(size, parts, rank) for rank in range(parts)))


@lru_cache(maxsize=1024)
def all_ranges(size: int, parts: int) -> RankRanges:
    """Every rank has all of a dim."""
    return RankRanges(((0, size),) * parts)


@dataclass(frozen=True)
class Layout:
    """How an activation lies on the ranks of a sequence group.

    ``dims`` are the names of its dims in storage order, ``sizes`` their global sizes, and ``sharded`` the one dim of
    which each rank holds its shard (None: every rank holds the whole activation).
    """

    dims: tuple[str, ...]
    sizes: tuple[int, ...]
    sharded: str | None = None

    def __post_init__(self) -> None:
        if len(self.dims) != len(self.sizes) or len(set(self.dims)) != len(self.dims):
            raise ValueError(f"a layout needs one size for each of its differently named dims: {self.dims}, {self.sizes}")
        if self.sharded is not None:
            self.index(self.sharded)

    def index(self, dim: str) -> int:
        """The position of the dim named ``dim`` in storage order."""
        if dim not in self.dims:
            raise ValueError(f"no dim {dim!r} in this layout; its dims are {', '.join(self.dims)}")
        return self.dims.index(dim)

    def size(self, dim: str) -> int:
        """The global size of the dim named ``dim``."""
        return self.sizes[self.index(dim)]

    def with_sharded(self, dim: str | None) -> Layout:
        """The same activation with its shard on another dim."""
        return replace(self, sharded=dim)

    def local_sizes(self, parts: int, rank: int) -> tuple[int, ...]:
        """The sizes of the part that ``rank`` of ``parts`` holds."""
        if self.sharded is None:
            return self.sizes
        start, stop = shard_range(self.size(self.sharded), parts, rank)
        return tuple(stop - start if dim == self.sharded else size for dim, size in zip(self.dims, self.sizes, strict=True))

"""What it costs to move a shard, and to attend over a sharded dim. Exact integers, the same on every rank.

A collective takes as long as its busiest rank, so its cost is the most bytes that one rank sends to others. Costs of
collectives add up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod

from megatron_dsp.layout import shard_sizes
from megatron_dsp.planner.stage_needs import Attention, StageNeeds


@dataclass(frozen=True)
class Cost:
    """What one forward and its backward cost.

    Attributes:
        forward: bytes that the busiest rank of each collective sends.
        backward: the same for the adjoints.
        collectives: how many collectives forward issues.
        copies: how often forward copies a shard of the activation in local memory.
    """

    forward: int = 0
    backward: int = 0
    collectives: int = 0
    copies: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.forward + other.forward,
            self.backward + other.backward,
            self.collectives + other.collectives,
            self.copies + other.copies,
        )


class Costs:
    """Costs on ``ranks`` ranks for activations with dims ``sizes``: global sizes in storage order, channels left out.

    Without ``training`` there is no backward. A layout is the name of the sharded dim; None: every rank holds all.
    """

    def __init__(self, sizes: Mapping[str, int], ranks: int, *, training: bool):
        self.sizes, self.ranks, self.training = dict(sizes), ranks, training

    def reshard(self, source: str | None, target: str | None, bytes_per_position: int) -> Cost:
        """Of the activation, from layout ``source`` to ``target``, by keep, split, gather or switch."""
        if source is None or source == target or self.ranks == 1:
            return Cost()  # the backward of a split communicates nothing either
        held, rest = self._shards(source), bytes_per_position * self._positions_without(source)
        if target is None:
            # All-gather: each shard goes to all others. Reduce-scatter: all but the own part of the gradient leaves the rank.
            forward, backward = (self.ranks - 1) * max(held), sum(held) - min(held)
            return self._cost(rest * forward, rest * backward, 1, self._copies_of_pieces(source, sharded=None))
        wanted, rest = self._shards(target), bytes_per_position * self._positions_without(source, target)
        # One copy packs pieces that are not contiguous in the source, one unpacks those that are not in the result.
        copies = self._copies_of_pieces(target, sharded=source) + self._copies_of_pieces(source, sharded=target)
        return self._cost(rest * _most_sent(held, wanted), rest * _most_sent(wanted, held), 1, copies)

    def ulysses(self, over: str, attention: Attention) -> Cost:
        """Of attention over the sharded dim ``over``: queries, keys and values go to the heads together, the result back."""
        held, heads = self._shards(over), shard_sizes(attention.groups, self.ranks)
        there, back = _most_sent(held, heads), _most_sent(heads, held)
        head = attention.head_bytes * self._positions_without(over)
        queries, everything = head * attention.heads // attention.groups, head * (attention.heads // attention.groups + 2)
        copies = 4 * (self._copies_of_pieces(None, sharded=over) + self._copies_of_pieces(over, sharded=None))
        return self._cost(everything * there + queries * back, queries * there + everything * back, 2, copies)

    def ring(self, over: str, attention: Attention) -> Cost:
        """Of attention over the sharded dim ``over``, whose keys and values go round; in backward their gradients too."""
        positions = max(self._shards(over)) * self._positions_without(over)
        block = 2 * attention.heads * attention.head_bytes * positions
        steps = self.ranks - 1
        return self._cost(steps * block, (steps + self.ranks) * block, steps, 2)

    def stage_copies(self, stage: StageNeeds, sharded: str | None) -> Cost:
        """One copy where the dims that ``stage`` mixes, or those that are its batch, do not flatten to one as a view."""
        mixed = [dim in stage.mixes for dim, size in self._local_sizes(sharded) if size > 1]
        borders = sum(before != after for before, after in pairwise(mixed))
        return Cost(copies=int(borders > 1))

    def _cost(self, forward: int, backward: int, collectives: int, copies: int) -> Cost:
        return Cost(forward, backward if self.training else 0, collectives, copies)

    def _shards(self, dim: str) -> list[int]:
        return shard_sizes(self.sizes[dim], self.ranks)

    def _positions_without(self, *dims: str) -> int:
        return prod(size for dim, size in self.sizes.items() if dim not in dims)

    def _local_sizes(self, sharded: str | None) -> list[tuple[str, int]]:
        """The dims of the largest part, in storage order."""
        return [(dim, max(self._shards(dim)) if dim == sharded else size) for dim, size in self.sizes.items()]

    def _copies_of_pieces(self, dim: str | None, *, sharded: str | None) -> int:
        """1 (a copy) where pieces along ``dim`` (None: heads, innermost) lie apart in memory in layout ``sharded``, else 0."""
        local = self._local_sizes(sharded)
        outside = local if dim is None else local[: list(self.sizes).index(dim)]
        return int(any(size > 1 for _, size in outside))


def _most_sent(held: list[int], wanted: list[int]) -> int:
    """The most that one rank sends in a switch from shards ``held`` of one dim to shards ``wanted`` of another, both summed."""
    whole = sum(wanted)
    return max(mine * (whole - keeps) for mine, keeps in zip(held, wanted, strict=True))

"""Which rank is on which host, and which groups cross hosts though they need not.

Links within a host are faster than those between hosts, so the ranks of a tensor group belong on one host, then those of a
sequence group (docs/clusters.md). Everything here but ``placement`` is arithmetic on a rank grid and the hosts of its ranks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from megatron_dsp.errors import UsageError
from megatron_dsp.mesh import AXES, Mesh, RankGrid

_MOST_ROWS = 32  # of a table with one row a rank; larger worlds get one row a host
_MOST_RANGES = 3  # that a cell shows


def placement(mesh: Mesh) -> Placement:
    """Where each rank of ``mesh`` runs, by host name; the same on all ranks, all of which call it."""
    return Placement(mesh.grid, mesh.hosts())


@dataclass(frozen=True)
class Placement:
    """The hosts of all ranks of a grid, ``hosts[rank]``. Errors: UsageError where their number is not the world size."""

    grid: RankGrid
    hosts: Sequence[str]

    def __post_init__(self) -> None:
        if len(self.hosts) != self.grid.world_size:
            raise UsageError(f"{len(self.hosts)} hosts given for {self.grid.world_size} ranks; give the host of each rank")

    def table(self) -> str:
        """Aligned text: rank, host, local rank and coordinates, one row a rank; beyond 32 ranks one row a host, in ranges."""
        ranks_of: dict[str, list[int]] = {}
        for rank, host in enumerate(self.hosts):
            ranks_of.setdefault(host, []).append(rank)
        if self.grid.world_size > _MOST_ROWS:
            rows = [
                [host, _ranges(ranks), *(_ranges(self.grid.coordinate(rank, axis) for rank in ranks) for axis in AXES)]
                for host, ranks in ranks_of.items()
            ]
            return _aligned([["host", "ranks", *AXES], *rows])
        rows = [
            [str(rank), host, str(ranks_of[host].index(rank)), *(str(self.grid.coordinate(rank, axis)) for axis in AXES)]
            for rank, host in enumerate(self.hosts)
        ]
        return _aligned([["rank", "host", "local rank", *AXES], *rows])

    def warnings(self) -> list[str]:
        """One line for each thing that makes links between hosts carry what they need not; empty where all is well."""
        counts = Counter(self.hosts)
        found = []
        if len(set(counts.values())) > 1:
            most, fewest = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
            found.append(
                f"hosts have unequal numbers of ranks: {most} has {counts[most]}, {fewest} has {counts[fewest]}; give every "
                "host as many slots (hostfile) or tasks (--ntasks-per-node)"
            )
        return found + [warning for axis in ("tensor", "sequence") for warning in self._needless_crossing(axis)]

    def _needless_crossing(self, axis: str) -> list[str]:
        ranks_per_host = max(Counter(self.hosts).values())
        # Tensor groups stay whole, so that a sequence group takes the room of all tensor ranks beside its own.
        room = self.grid.degrees["tensor"] * (self.grid.degrees["sequence"] if axis == "sequence" else 1)
        needed = math.ceil(room / ranks_per_host)
        widest = max(self.grid.groups(axis), key=lambda ranks: _spanned(ranks, self.hosts))
        spanned = _spanned(widest, self.hosts)
        if spanned <= needed:
            return []
        by_host = [host for host, count in Counter(self.hosts).items() for _ in range(count)]
        if max(_spanned(ranks, by_host) for ranks in self.grid.groups(axis)) <= needed:
            fix = (
                f"number the ranks host by host: mpirun --map-by ppr:{ranks_per_host}:node (MPICH: -ppn {ranks_per_host}), "
                "srun --distribution=block"
            )
        else:
            product = "the degree" if axis == "tensor" else "tensor x sequence"
            fix = f"choose degrees for which {product} divides the {ranks_per_host} ranks of a host, or is a multiple of them"
        degrees = f"{axis} {self.grid.degrees[axis]}"
        if axis == "sequence" and self.grid.degrees["tensor"] > 1:
            degrees += f" x tensor {self.grid.degrees['tensor']}"
        return [
            f"{axis} groups cross hosts needlessly: {degrees} needs {needed} of the hosts with {ranks_per_host} ranks each, "
            f"but the group of ranks {_ranges(widest)} lies on {spanned}; {fix}"
        ]


def _spanned(ranks: Iterable[int], hosts: Sequence[str]) -> int:
    """The number of hosts that a group lies on."""
    return len({hosts[rank] for rank in ranks})


def _ranges(numbers: Iterable[int]) -> str:
    """``0-3 8`` for 0, 1, 2, 3, 8; of many ranges the first ones and the last."""
    ordered = sorted(set(numbers))
    starts = [ordered[0], *(after for before, after in pairwise(ordered) if after != before + 1)]
    ends = [*(before for before, after in pairwise(ordered) if after != before + 1), ordered[-1]]
    shown = [f"{start}-{end}" if end > start else str(start) for start, end in zip(starts, ends, strict=True)]
    if len(shown) > _MOST_RANGES:
        shown = [*shown[: _MOST_RANGES - 1], "...", shown[-1]]
    return " ".join(shown)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)

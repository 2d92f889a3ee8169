"""What was moved: calls and bytes by group, stage, operation and kind of stage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from megatron_dsp.reshard.exchange import Exchange, open_exchanges
from megatron_dsp.reshard.labels import Label, Operation


class Row(NamedTuple):
    """One line of a ledger. ``bytes`` are those that this rank sent to other ranks, ``kind`` is that of the stage."""

    group: str
    stage: str
    operation: Operation
    calls: int
    bytes: int
    kind: str


@dataclass
class Ledger:
    """Collectives issued by this rank while a ``ledger()`` block runs, or ran."""

    _start: dict[Exchange, dict[Label, tuple[int, int]]] = field(default_factory=dict)
    _end: list[Row] | None = None

    @property
    def rows(self) -> list[Row]:
        """One row for each group, stage and operation that moved something; names sorted."""
        if self._end is not None:
            return self._end
        rows = []
        for exchange in open_exchanges():
            before = self._start.get(exchange, {})
            for label, (calls, sent) in exchange.counts.items():
                calls_before, sent_before = before.get(label, (0, 0))
                if calls > calls_before:
                    new = calls - calls_before, sent - sent_before
                    rows.append(Row(exchange.description, str(label.stage), Operation(label.operation), *new, label.kind))
        return sorted(rows)

    @property
    def calls(self) -> int:
        """How many collectives were issued."""
        return sum(row.calls for row in self.rows)

    @property
    def bytes(self) -> int:
        """How many bytes this rank sent to other ranks."""
        return sum(row.bytes for row in self.rows)

    def by(self, key: str) -> dict[str, tuple[int, int]]:
        """(calls, bytes) summed by "group", "stage", "operation" or "kind", that of stages without their numbers."""
        sums: dict[str, tuple[int, int]] = {}
        for row in self.rows:
            name = getattr(row, key)
            calls, sent = sums.get(name, (0, 0))
            sums[name] = (calls + row.calls, sent + row.bytes)
        return sums


@contextmanager
def ledger() -> Iterator[Ledger]:
    """Count what this rank's reshards move inside the block, backward included.

    A switch, a gather and their adjoints count the exact bytes that leave this rank. An all-reduce counts those of a ring,
    ``2 (N - 1) / N`` of its tensor. Counting is always on (two integers a collective): the block only takes differences.
    """
    moved = Ledger({exchange: exchange.counts.copy() for exchange in open_exchanges()})
    try:
        yield moved
    finally:
        moved._end = moved.rows
        moved._start = {}

"""`make test-matrix`: every cell of the parallelism matrix. Writes docs/parallelism_matrix.json, and its table in
docs/parallelism.md.

A run that was interrupted goes on where it stopped; cells that failed are run again.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import parallelism
from parallelism import LIMIT, Cell
from ranks import RankPool

from megatron_dsp.errors import UsageError

ROOT = Path(__file__).parent.parent
MATRIX = ROOT / "docs/parallelism_matrix.json"
DONE = ROOT / "parallelism_matrix.partial.json"  # the cells of a run that is not through
PAGE = ROOT / "docs/parallelism.md"
BEGIN, END = "<!-- matrix: made by make test-matrix -->\n", "<!-- end of matrix -->\n"
KEYS = Cell._fields[:7]


def outcome(cell: Cell, references: dict[tuple[str, float], Any]) -> dict[str, Any]:
    """What a rank saw of a cell."""
    try:
        return {"outcome": "equal", "max_rel_error": parallelism.run(cell, references), "reason": ""}
    except UsageError as error:
        return {"outcome": "refused", "max_rel_error": None, "reason": str(error)}


def run(cell: Cell, pool: RankPool, references: dict[tuple[str, float], Any]) -> dict[str, Any]:
    """The entry of a cell: of its ranks the worst. "failed" is an error that is no refusal, or too large a difference."""
    entry: dict[str, Any] = dict(zip(KEYS, cell, strict=False))
    try:
        seen = pool(cell.ranks, outcome, cell, references)
    except AssertionError as error:
        return {**entry, "outcome": "failed", "max_rel_error": None, "reason": str(error)}
    if len({each["outcome"] for each in seen}) > 1:
        return {**entry, "outcome": "failed", "max_rel_error": None, "reason": "some ranks refused, others did not"}
    if seen[0]["outcome"] == "refused":
        return {**entry, **seen[0]}
    error = max(each["max_rel_error"] for each in seen)
    failed = {"outcome": "failed", "reason": f"differs by more than {LIMIT:g}"} if not error < LIMIT else {}
    return {**entry, "outcome": "equal", "max_rel_error": error, "reason": "", **failed}


def table(entries: list[dict[str, Any]]) -> str:
    """Markdown: a row for each degrees, a column for each ZeRO stage, checkpointing and overlap off."""
    plain = [entry for entry in entries if not entry["checkpointing"] and not entry["overlap"]]
    lines = ["| tensor | pipe | sequence | data | ZeRO 0 | ZeRO 1 | ZeRO 2 | ZeRO 3 |", "|---|---|---|---|---|---|---|---|"]
    for degrees, row in itertools.groupby(plain, lambda entry: tuple(entry[key] for key in KEYS[:4])):
        cells = [f"{each['max_rel_error']:.1e}" if each["outcome"] == "equal" else each["outcome"] for each in row]
        lines.append("| " + " | ".join([*map(str, degrees), *cells]) + " |")
    switched = [entry for entry in entries if entry not in plain]
    equal = [entry for entry in switched if entry["outcome"] == "equal"]
    worst = max((entry["max_rel_error"] for entry in equal), default=0.0)
    lines += [
        "",
        f"With checkpointing, overlap or both, {len(equal)} of {len(switched)} cells are equal, at most {worst:.1e} apart.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    cells = parallelism.all_degrees() + parallelism.switch_cover()
    done: dict[str, dict[str, Any]] = json.loads(DONE.read_text()) if DONE.exists() else {}
    references, pool, started = parallelism.references(), RankPool(), time.monotonic()
    try:
        for number, cell in enumerate(cells, start=1):
            if done.get(str(cell), {}).get("outcome", "failed") != "failed":
                continue
            entry = done[str(cell)] = run(cell, pool, references)
            print(f"{number}/{len(cells)} {cell}: {entry['outcome']} {entry['max_rel_error'] or entry['reason']}", flush=True)
            DONE.write_text(json.dumps(done))
    finally:
        pool.close()
    entries = [done[str(cell)] for cell in cells]
    MATRIX.write_text(json.dumps({"limit": LIMIT, "cells": entries}, indent=1) + "\n")
    text = PAGE.read_text()
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    PAGE.write_text(before + BEGIN + table(entries) + END + after)
    counts = {name: sum(entry["outcome"] == name for entry in entries) for name in ("equal", "refused", "failed")}
    print(f"{counts} in {time.monotonic() - started:.0f} s")
    if not counts["failed"]:
        DONE.unlink()
    return bool(counts["failed"])


if __name__ == "__main__":
    sys.exit(main())

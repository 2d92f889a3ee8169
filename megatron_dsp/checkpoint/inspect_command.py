"""``megatron-dsp inspect``: what `inspect` finds, as tables or as JSON."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from megatron_dsp.checkpoint.inspect import (
    CheckpointEntry,
    Description,
    Difference,
    TensorDifference,
    compare,
    describe,
    list_checkpoints,
)
from megatron_dsp.mesh import AXES

T = TypeVar("T")
_FIRST = 16  # tensors that are shown without --tensors
GOOD, DAMAGED, DIFFERENT = 0, 1, 2  # exit statuses


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of the command."""
    add = parser.add_argument
    add("path", type=Path, help="folder of a checkpoint, or of several")
    add("other", type=Path, nargs="?", help="another one: how it differs, tensor by tensor")
    add("--full", action="store_true", help="check hashes too; without a manifest, read all tensors")
    add("--json", action="store_true", help="print JSON instead of tables")
    add("--tensors", action="store_true", help=f"list all tensors, not the first {_FIRST}")


def run(given: argparse.Namespace) -> int:
    """Print what the arguments ask for; the exit status: 0 good or equal, 1 damaged, 2 different.

    Errors: UsageError where there is no checkpoint, and in a comparison where one is damaged.
    """
    console = Console(highlight=False)
    if given.other is not None:
        return _compare(given, console)
    with redirect_stdout(sys.stderr):  # where DeepSpeed, which is imported for what its files name, may log
        listed, strange = list_checkpoints(given.path, full=given.full)
        taken = [given.path / each.name for each in listed if each.taken]
        described = [describe(path, full=given.full) for path in (taken if listed else [given.path])]
    problems = [f"{each.name}/{problem}" for each in listed for problem in each.problems]
    problems += [f"{each.path.name}/{problem}" for each in described for problem in each.problems]
    if given.json:
        content = {"checkpoints": [asdict(each) for each in listed], "strange": strange}
        content |= {"described": [each.to_json() for each in described], "damaged": problems}
        print(json.dumps(content, indent=1))
        return DAMAGED if problems else GOOD
    if listed:
        console.print(_checkpoints_table(listed, given.path, given.full))
    for line in strange:
        console.print(Text(f"note: {line}", "yellow"))
    for each in described:
        console.print(_description_table(each))
        if each.parameters:
            console.print(_parameters_table(each, given.tensors))
    for problem in problems:  # plain, so that a line stays one
        print(f"damaged: {problem}")
    return DAMAGED if problems else GOOD


def _compare(given: argparse.Namespace, console: Console) -> int:
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with redirect_stdout(sys.stderr), Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("comparing", total=None)
        difference = compare(
            given.path, given.other, progress=lambda done, total: bar.update(task, completed=done, total=total)
        )
    if given.json:
        print(json.dumps(difference.to_json(), indent=1))
    elif difference.equal:
        print(f"equal, bit by bit: {difference.compared:,} tensors in fp32, and how far the training had come where both tell")
    else:
        for table in _difference_tables(difference, given.tensors):
            console.print(table)
    return GOOD if difference.equal else DIFFERENT


def _checkpoints_table(listed: Sequence[CheckpointEntry], folder: Path, full: bool) -> Table:
    table = _table(f"checkpoints in {folder}", "name", "iteration", "saved", "bytes", "state", "")
    for each in listed:
        state = Text("damaged", "red") if each.problems else Text("good" if full else "good by sizes", "green")
        marks = [mark for mark, is_so in (("latest", each.latest), ("--load takes it", each.taken)) if is_so]
        _add_row(table, each.name, each.iteration, each.saved and each.saved[:19], f"{each.bytes:,}", state, ", ".join(marks))
    return table


def _description_table(of: Description) -> Table:
    table = _table(str(of.path), "", "")
    layout, training = of.layout, of.training
    rows: list[tuple[str, object]] = [
        ("format", of.format),
        ("state", Text("damaged", "red") if of.problems else Text("good", "green")),
        ("checked", of.checked),
        ("saved", of.saved),
        ("saved by ranks", " x ".join(f"{axis} {layout[axis]}" for axis in AXES) if layout else None),
        ("ZeRO stage", layout.get("zero_stage")),
        ("precision", of.precision),
    ]
    if training is not None:
        rows += [(name.replace("_", " "), getattr(training, name)) for name in ("iteration", "consumed_samples", "step", "lr")]
        rows += [("skipped steps", training.skipped_steps or None)]
    rows += [
        ("tensors of each parameter", ", ".join(of.kinds) or None),
        ("parameters", f"{len(of.parameters):,} of {of.elements:,} elements" if of.parameters else None),
        ("on disk", f"{of.bytes:,} bytes in {of.files:,} files"),
        ("written by", ", ".join(f"{name} {version}" for name, version in of.versions.items()) or None),
    ]
    for name, value in rows:
        if value is not None:
            _add_row(table, name, value)
    return table


def _parameters_table(of: Description, all_of_them: bool) -> Table:
    table = _table("parameters of the whole model", "name", "shape", "divided by tensor along dim")
    for name, parameter in _first(of.parameters.items(), all_of_them):
        _add_row(table, name, list(parameter.shape), parameter.dim)
    _add_rest(table, len(of.parameters), all_of_them)
    return table


def _difference_tables(difference: Difference, all_of_them: bool) -> Iterable[Table]:
    for which, names in zip(("first", "second"), difference.only, strict=True):
        if names:
            table = _table(f"only in the {which}: {len(names):,}", "")
            for name in _first(names, all_of_them):
                _add_row(table, name)
            _add_rest(table, len(names), all_of_them)
            yield table
    pairs = (("of other shapes", difference.shapes), ("training", difference.training))
    for title, entries in pairs:
        if entries:
            table = _table(title, "", "first", "second")
            for name, (first, second) in _first(entries.items(), all_of_them or title == "training"):
                _add_row(table, name, first, second)
            _add_rest(table, len(entries), all_of_them or title == "training")
            yield table
    if difference.buffers:
        yield _lines_table("buffers that differ", difference.buffers)
    if not difference.values:
        yield _lines_table("values", [f"equal, bit by bit, in all {difference.compared:,} tensors that were compared"])
        return
    kinds = dict.fromkeys(each.kind for each in difference.values)
    table = _table(
        f"largest differences, of {difference.compared:,} tensors", "kind", "absolute", "relative", "tensors that differ"
    )
    for kind in kinds:
        of_kind = [each for each in difference.values if each.kind == kind]
        _add_row(table, kind, *_largest(of_kind), f"{len(of_kind):,}")
    yield table
    table = _table("tensors that differ", "kind", "name", "absolute", "relative", "elements that differ")
    for each in _first(difference.values, all_of_them):
        _add_row(table, each.kind, each.name, *_largest([each]), f"{each.differing:,} of {each.elements:,}")
    _add_rest(table, len(difference.values), all_of_them)
    yield table


def _largest(values: Sequence[TensorDifference]) -> list[str]:
    """The largest absolute and relative difference."""
    sizes = max(each.absolute for each in values), max(each.relative for each in values)
    return ["not finite" if size == math.inf else f"{size:.3g}" for size in sizes]


def _lines_table(title: str, lines: Sequence[str]) -> Table:
    table = _table(title, "")
    for line in lines:
        _add_row(table, line)
    return table


def _first(items: Iterable[T], all_of_them: bool) -> list[T]:
    found = list(items)
    return found if all_of_them else found[:_FIRST]


def _add_rest(table: Table, count: int, all_of_them: bool) -> None:
    if count > _FIRST and not all_of_them:
        _add_row(table, f"... and {count - _FIRST:,} more (--tensors)")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=Text(title), title_justify="left", show_header=any(columns))
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column == "name")
    return table


def _add_row(table: Table, *cells: object) -> None:
    """A row of texts as they are, without markup, and without what would steer a terminal."""
    texts = [cell if isinstance(cell, Text) else Text("" if cell is None else str(cell)) for cell in cells]
    for text in texts:
        text.plain = "".join(sign if sign.isprintable() else "?" for sign in text.plain)
    table.add_row(*texts)

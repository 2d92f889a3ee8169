"""Weights published for another model, under the names and in the order of ours: by a map that is data.

A map is a JSON file, of which ``name_maps/`` has those that are shipped (docs/converting.md says what is in one). Tensors are
changed as they are read, one at a time.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_dsp.checkpoint.formats.source import Source, depth_first
from megatron_dsp.checkpoint.parameters import parameters_by_table
from megatron_dsp.checkpoint.state import WEIGHT, Training
from megatron_dsp.errors import UsageError

SHIPPED = {path.stem: path for path in sorted((Path(__file__).parent / "name_maps").glob("*.json"))}
_KEYS = {"about": str, "notes": list, "sizes": dict, "parameters": list, "left_out": list, "divided": dict}
_NUMBER = "{n}"  # in a name stands for a number that is the same in ours and theirs


class Entry(NamedTuple):
    """Where a parameter of ours comes from; in names ``{n}`` is any number.

    Attributes:
        ours: its name.
        theirs: the name of what it is made from; None: the source has nothing for it.
        operations: names of `_OPERATIONS` with their arguments, one after another; sizes may be given by their names.
        optional: whether the source may lack it, for all numbers.
        values: what it begins with, a name of `_VALUES`, where the source has nothing.
        shape: its shape then.
        note: what a user should know of it.
    """

    ours: str
    theirs: str | None = None
    operations: Sequence[Sequence[Any]] = ()
    optional: bool = False
    values: str | None = None
    shape: Sequence[int | str] = ()
    note: str | None = None


class Omission(NamedTuple):
    """What of the source has no place in ours (a pattern of names), and why."""

    theirs: str
    why: str


@dataclass(frozen=True)
class NameMap:
    """A name map.

    Attributes:
        name: under which it was given.
        about: what it is a map of.
        notes: what a user should know.
        sizes: by name, a parameter of the source and the dim that has the size.
        parameters: in the order of our model.
        left_out: what the source has and ours does not.
        divided: the dims that the tensor axis divides, for patterns of our names.
        layers: the layers of a pipeline in ours, with ``{n}`` in each of a run of them for every number; None: not known.
    """

    name: str
    about: str
    notes: Sequence[str]
    sizes: Mapping[str, tuple[str, int]]
    parameters: Sequence[Entry]
    left_out: Sequence[Omission]
    divided: Mapping[str, int]
    layers: Sequence[str] | None


def read_name_map(given: str) -> NameMap:
    """A shipped map by its name, or that in a file. Errors: UsageError where there is none, and for a file that is no map."""
    path = SHIPPED.get(given, Path(given))
    rule = f"give one of {', '.join(SHIPPED)}, or a JSON file as docs/converting.md has it"
    try:
        record = json.loads(path.read_text())
        wrong = [key for key, kind in _KEYS.items() if not isinstance(record.get(key), kind)]
        if wrong or record.keys() - _KEYS.keys() - {"layers"}:
            raise ValueError(f"wrong or missing: {', '.join([*wrong, *sorted(record.keys() - _KEYS.keys() - {'layers'})])}")
        found = NameMap(
            given,
            record["about"],
            record["notes"],
            {name: (theirs, int(dim)) for name, (theirs, dim) in record["sizes"].items()},
            [Entry(**entry) for entry in record["parameters"]],
            [Omission(**entry) for entry in record["left_out"]],
            record["divided"],
            record.get("layers"),
        )
        unknown = {name for entry in found.parameters for name, *_ in entry.operations} - _OPERATIONS.keys()
        unknown |= {str(entry.values) for entry in found.parameters if entry.theirs is None} - _VALUES.keys()
        unknown |= {
            size for entry in found.parameters for size in _texts([entry.shape, *(o[1:] for o in entry.operations)])
        } - (found.sizes.keys())
        if unknown:
            raise ValueError(f"no such operations, values or sizes: {', '.join(sorted(unknown))}")
    except OSError as error:
        raise UsageError(f"--name-map {given} cannot be read ({error.strerror}); {rule}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"--name-map {given} is no name map ({error}); {rule}") from error
    return found


def apply_name_map(source: Source, name_map: NameMap) -> tuple[Source, list[str]]:
    """The weights of ``source`` as those of our model, and what a user should know of them, one line each.

    Errors: UsageError where the source is of another model: it lacks something, or has more than the map names, or other
    shapes.
    """
    shapes = {name: parameter.shape for name, parameter in source.parameters.items()}
    flag = f"--name-map {name_map.name}"
    numbers = _numbers(name_map, shapes)
    pairs = [
        (entry, *names)
        for entry in name_map.parameters
        for names in _expand(entry, numbers)
        if not entry.optional or any(theirs in shapes for _, theirs in _expand(entry, numbers))
    ]
    missing = [theirs for entry, _, theirs in pairs if theirs is not None and theirs not in shapes]
    if missing:
        raise UsageError(
            f"{flag}: the source lacks {len(missing)} of its parameters ({', '.join(missing[:4])}); it is not {name_map.about}"
        )
    sizes = {name: _size(theirs, dim, shapes, flag) for name, (theirs, dim) in name_map.sizes.items()}
    made = {ours: partial(_make, entry, ours, theirs, sizes, flag) for entry, ours, theirs in pairs}
    notes = [*name_map.notes, *_notes(name_map.parameters)]
    used = {theirs for _, _, theirs in pairs}
    left = [name for name in (*shapes, *source.buffers) if name not in used]
    for pattern, why in name_map.left_out:
        if any(fnmatchcase(name, pattern) for name in left):
            notes.append(f"{pattern} is left out: {why}")
            left = [name for name in left if not fnmatchcase(name, pattern)]
    if left:
        raise UsageError(
            f"{flag}: the source has {len(left)} tensors that the map does not name ({', '.join(left[:4])}); it is not "
            f'{name_map.about}; what is not wanted of them is named under "left_out" in a map of yours'
        )
    new_shapes = {
        name: tuple(made[name](lambda theirs: torch.empty(shapes[theirs], device="meta")).shape)
        for name in depth_first(list(made))
    }
    ours_whole = Source(
        parameters_by_table(new_shapes, name_map.divided),
        (WEIGHT,),
        Training(),
        _layers(name_map, numbers),
        {},
        lambda kind, name: made[name](partial(source.read, kind)),
    )
    return ours_whole, notes


def _texts(value: Any) -> set[str]:
    """The texts in lists of lists."""
    if isinstance(value, str):
        return {value}
    return {text for each in value for text in _texts(each)} if isinstance(value, (list, tuple)) else set()


def _numbers(name_map: NameMap, shapes: Mapping[str, Any]) -> list[int]:
    """Those that stand for ``{n}`` in names of the source."""
    found = set()
    for entry in name_map.parameters:
        if entry.theirs is not None and _NUMBER in entry.theirs:
            pattern = re.compile(re.escape(entry.theirs).replace(re.escape(_NUMBER), r"(\d+)", 1))
            found |= {int(match[1]) for name in shapes if (match := pattern.fullmatch(name))}
    return sorted(found)


def _fill_in(name: str, number: int) -> str:
    return name.replace(_NUMBER, str(number))


def _expand(entry: Entry, numbers: Sequence[int]) -> list[tuple[str, str | None]]:
    """Our name and theirs, for each number where ``{n}`` is in them."""
    if _NUMBER not in entry.ours:
        return [(entry.ours, entry.theirs)]
    return [(_fill_in(entry.ours, each), None if entry.theirs is None else _fill_in(entry.theirs, each)) for each in numbers]


def _notes(entries: Sequence[Entry]) -> list[str]:
    """What the entries of a map say, those that say the same in one line."""
    names: dict[str, list[str]] = {}
    for entry in entries:
        begins = "" if entry.values is None else f" (not in the source, begins with {entry.values.replace('_', ' ')})"
        if begins or entry.note:
            names.setdefault(entry.note or "it has to be trained", []).append(entry.ours + begins)
    return [f"{', '.join(ours)}: {note}" for note, ours in names.items()]


def _layers(name_map: NameMap, numbers: Sequence[int]) -> list[str] | None:
    """The layers of our pipeline: those with ``{n}``, which stand together, for one number after another."""
    if name_map.layers is None:
        return None
    repeated = [layer for layer in name_map.layers if _NUMBER in layer]
    layers: list[str] = []
    for layer in name_map.layers:
        if layer not in repeated:
            layers.append(layer)
        elif layer == repeated[0]:
            layers += [_fill_in(each, number) for number in numbers for each in repeated]
    return layers


def _size(theirs: str, dim: int, shapes: Mapping[str, Sequence[int]], flag: str) -> int:
    shape = shapes.get(theirs, ())
    if not 0 <= dim < len(shape):
        raise UsageError(f"{flag}: {theirs!r} has shape {list(shape)} in the source, and the map needs its dim {dim}")
    return shape[dim]


def _make(
    entry: Entry, ours: str, theirs: str | None, sizes: Mapping[str, int], flag: str, read: Callable[[str], Tensor]
) -> Tensor:
    """A parameter of ours, given what reads theirs. Errors: UsageError where the operations do not fit it."""

    def resolve(value: Any) -> Any:
        return [resolve(each) for each in value] if isinstance(value, list) else sizes.get(value, value)

    if theirs is None:  # its values follow from its name
        generator = torch.Generator().manual_seed(zlib.crc32(ours.encode()))
        return _VALUES[str(entry.values)](torch.empty(resolve(list(entry.shape))), generator)
    x = read(theirs)
    shape = list(x.shape)
    for name, *arguments in entry.operations:
        try:
            x = _OPERATIONS[name](x, *map(resolve, arguments))
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UsageError(
                f"{flag}: {ours} cannot be made: {name} of {theirs!r}, which has shape {shape} in the source: {reason}; it is "
                "another model, or the map is wrong"
            ) from error
    return x


def _swap_halves(x: Tensor, dim: int) -> Tensor:
    if x.shape[dim] % 2:
        raise ValueError(f"{x.shape[dim]} along dim {dim} is odd")
    return x.roll(x.shape[dim] // 2, dim)


_OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "part": lambda x, dim, number, parts: x.unflatten(dim, (parts, -1)).select(dim, number),
    "first": lambda x, dim, size: x.narrow(dim, 0, size),
    "reshape": lambda x, shape: x.reshape(shape),
    "permute": lambda x, dims: x.permute(dims),
    "swap_halves": _swap_halves,
    "negate": lambda x: -x,
}


_VALUES: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "zeros": lambda x, generator: torch.nn.init.zeros_(x),
    "ones": lambda x, generator: torch.nn.init.ones_(x),
    "xavier_uniform": lambda x, generator: torch.nn.init.xavier_uniform_(x, generator=generator),
}

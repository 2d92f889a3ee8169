"""Converting checkpoints between formats and degrees, one tensor at a time (docs/converting.md).

What is written has another name until all of it is on the disk, and nothing of the source is changed.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_dsp.checkpoint.disk import sync
from megatron_dsp.checkpoint.file_names import step_folder
from megatron_dsp.checkpoint.formats import FORMATS
from megatron_dsp.checkpoint.formats.source import Source, Target
from megatron_dsp.checkpoint.name_map import NameMap, apply_name_map
from megatron_dsp.checkpoint.parameters import parameters_by_table
from megatron_dsp.dtypes import PRECISIONS
from megatron_dsp.errors import UsageError

IMPORTED = "imported.json"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_FLAGS = {  # of what a `Target` has
    "tensor": "--target-tensor-parallel-size",
    "pipe": "--target-pipeline-parallel-size",
    "data": "--target-data-parallel-size",
    "zero_stage": "--target-zero-stage",
    "max_shard_size": "--max-shard-size",
    "dtype": "--dtype",
}


@dataclass(frozen=True)
class ShardingTable:
    """What a checkpoint of others does not say of its model.

    Attributes:
        parameters: the dim that the tensor axis divides, for patterns of names; names that match none are whole on every rank.
        layers: the names of the modules that are a pipeline's layers, in order.
    """

    parameters: Mapping[str, int]
    layers: Sequence[str] | None


@dataclass(frozen=True)
class Summary:
    """What was converted: the format that it was in, tensors of parameters, their bytes in fp32, and what to know of them."""

    loader: str
    tensors: int
    bytes: int
    notes: Sequence[str]


def convert(
    load_dir: Path,
    save_dir: Path,
    *,
    saver: str,
    target: Target,
    loader: str = "auto",
    iteration: int | None = None,
    table: ShardingTable | None = None,
    name_map: NameMap | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Summary:
    """Write the checkpoint in ``load_dir`` into ``save_dir``, which is new or empty, in the format ``saver``.

    ``iteration``: which one in a folder of several; None: the newest good one. ``name_map``: the source has the weights of
    another model, which become ours; the notes on that are in the file ``imported.json`` too. ``progress`` is told the bytes
    that were read and those that there are, after each tensor.

    Errors: UsageError for unknown formats, folders in one another, a damaged source, a target that cannot be, and where the
    disk is full.
    """
    _check_format("--saver", saver)
    _check_folders(load_dir, save_dir)
    _check_target(target, saver)
    folder = load_dir if iteration is None else load_dir / step_folder(iteration)
    if not folder.is_dir():
        raise UsageError(f"--load-iteration {iteration}: there is no {folder}; give one that is there, or leave it out")
    if loader == "auto":
        loader = _find_format(folder)
    _check_format("--loader", loader)
    if not FORMATS[loader].recognises(folder):
        raise UsageError(f"--loader {loader}: {folder} has no files with names of that format; give another, or auto")
    source = FORMATS[loader].load(folder)
    notes: list[str] = []
    if name_map is not None:
        source, notes = apply_name_map(source, name_map)
    if table is not None:
        source = _apply_table(source, table)
    sizes = {name: 4 * math.prod(parameter.shape) for name, parameter in source.parameters.items()}
    total, done = sum(sizes.values()) * len(source.kinds), 0

    def read(kind: str, name: str) -> Tensor:
        nonlocal done
        tensor = source.read(kind, name)
        done += sizes[name]
        progress(done, total)
        return tensor

    save_dir = save_dir.absolute()
    save_dir.parent.mkdir(parents=True, exist_ok=True)
    hidden = save_dir.with_name(f".{save_dir.name}.converting")
    if hidden.exists():  # of a conversion that was ended
        shutil.rmtree(hidden)
    hidden.mkdir()
    try:
        if name_map is not None:
            imported = {"name_map": name_map.name, "about": name_map.about, "notes": notes}
            (hidden / IMPORTED).write_text(json.dumps(imported, indent=1))
        FORMATS[saver].save(replace(source, read=read), hidden, target)
        for below in [hidden, *(path for path in hidden.rglob("*") if path.is_dir())]:
            sync(below)
        hidden.replace(save_dir)
    except BaseException as error:
        shutil.rmtree(hidden)
        if isinstance(error, OSError):
            raise UsageError(f"--save-dir {save_dir}: nothing is written there ({error}); see that it can be") from error
        raise
    sync(save_dir.parent)
    return Summary(loader, len(sizes) * len(source.kinds), total, notes)


def read_table(path: Path) -> ShardingTable:
    """A sharding table: ``{"parameters": {"*.query.weight": 0}, "layers": ["embedding", "blocks.0"]}``, each key optional.

    Errors: UsageError where the file is not that.
    """
    example = 'it is {"parameters": {"*.query.weight": 0}, "layers": ["embedding", "blocks.0"]}, or one of the two'
    try:
        table: Any = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"--sharding-table {path} cannot be read as JSON ({error}); {example}") from error
    if not isinstance(table, dict) or not table or table.keys() - {"parameters", "layers"}:
        raise UsageError(f"--sharding-table {path} is no sharding table; {example}")
    parameters, layers = table.get("parameters", {}), table.get("layers")
    dims = isinstance(parameters, dict) and all(type(dim) is int for dim in parameters.values())
    names = layers is None or (isinstance(layers, list) and all(isinstance(name, str) for name in layers))
    if not dims or not names:
        raise UsageError(f"--sharding-table {path} is no sharding table; {example}")
    return ShardingTable(parameters, layers)


def size_of(text: str) -> int:
    """Bytes, from ``5GB``, ``500MiB`` or a number. Errors: UsageError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(\w*)", text.strip())
    if match is None or match[2].upper() not in _UNITS or float(match[1]) * _UNITS[match[2].upper()] < 1:
        raise UsageError(f"--max-shard-size {text!r}: must be a size such as 5GB, 500MB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _check_format(flag: str, name: str) -> None:
    if name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else "choose one of them"
        raise UsageError(f"{flag} {name}: no such format; {hint} (known: {', '.join(FORMATS)})")


def _check_folders(load_dir: Path, save_dir: Path) -> None:
    if not load_dir.is_dir():
        raise UsageError(f"--load-dir {load_dir}: no such folder; give the folder of a checkpoint")
    source, destination = load_dir.resolve(), save_dir.resolve()
    if source == destination or source in destination.parents or destination in source.parents:
        raise UsageError(f"--save-dir {save_dir}: one of it and --load-dir {load_dir} is in the other; give a folder elsewhere")
    if save_dir.exists() and (not save_dir.is_dir() or any(save_dir.iterdir())):
        raise UsageError(f"--save-dir {save_dir} is not empty, and nothing is overwritten; give a new folder")


def _check_target(target: Target, saver: str) -> None:
    usual = Target()
    for option in fields(target):
        value, flag = getattr(target, option.name), _FLAGS[option.name]
        if option.name == "dtype":
            if value not in PRECISIONS:
                raise UsageError(f"{flag} {value}: must be one of {', '.join(PRECISIONS)}")
            continue
        if value != getattr(usual, option.name) and option.name not in FORMATS[saver].takes:
            raise UsageError(f"{flag} {value}: {saver} has no use for it; leave it out")
        if option.name == "zero_stage" and value not in (0, 1, 2, 3):
            raise UsageError(f"{flag} {value}: must be 0, 1, 2 or 3")
        if option.name != "zero_stage" and value < 1:
            raise UsageError(f"{flag} {value}: must be at least 1")


def _find_format(folder: Path) -> str:
    for name, each in FORMATS.items():
        if each.recognises(folder):
            return name
    raise UsageError(f"--load-dir {folder}: no checkpoint in one of the formats {', '.join(FORMATS)} is there")


def _apply_table(source: Source, table: ShardingTable) -> Source:
    """The source, with what the table says of it."""
    if table.parameters:
        shapes = {name: parameter.shape for name, parameter in source.parameters.items()}
        source = replace(source, parameters=parameters_by_table(shapes, table.parameters))
    return source if table.layers is None else replace(source, layers=table.layers)

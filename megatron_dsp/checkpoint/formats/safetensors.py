"""Safetensors in Hugging Face's layout: ``model.safetensors``, or ``model-00001-of-0000N.safetensors`` with an index.

The weights are what any reader of the layout takes. Their average and the optimizer's tensors are files of the same kind
beside them (``ema-...``, ``exp_avg-...``).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_dsp.checkpoint import tensor_file
from megatron_dsp.checkpoint.disk import durable_file
from megatron_dsp.checkpoint.formats.source import Source, Target, read_companion, write_companion
from megatron_dsp.checkpoint.state import AVERAGE, WEIGHT
from megatron_dsp.checkpoint.tensor_file import TensorFile
from megatron_dsp.dtypes import DTYPES, PRECISIONS
from megatron_dsp.errors import UsageError

_STEM = re.compile(r"(.+?)(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_FLOATS = {names.safetensors for names in DTYPES if names.dtype.is_floating_point}
_WEIGHTS = "model"  # how names of files of the weights begin


def recognises(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


def load(folder: Path) -> Source:
    """A folder of any number of files; of others it has weights alone.

    Floating point tensors are parameters, in fp32 whatever they are stored as; others are buffers. Errors: UsageError for
    files that are missing or damaged, and for several sets of weights.
    """
    companion = read_companion(folder)
    stems = {match[1] for path in folder.iterdir() if (match := _STEM.fullmatch(path.name))}
    kinds = companion.kinds or (WEIGHT,)
    if not companion.kinds and len(stems) > 1 and _WEIGHTS not in stems:
        raise UsageError(f"{folder} has several sets of weights ({', '.join(sorted(stems))}); give a folder with one of them")
    main = _WEIGHTS if _WEIGHTS in stems else min(stems)
    files = {kind: _files(folder, main if kind == WEIGHT else kind) for kind in kinds}
    shapes, buffers = {}, {}
    known = companion.model.parameters if companion.model is not None else None
    shapes_of = {path: TensorFile(path).shapes for path in dict.fromkeys(files[WEIGHT].values())}
    for name, path in files[WEIGHT].items():
        if name not in shapes_of[path]:
            raise UsageError(f"{path} does not have {name!r}, which its index says it has; use another checkpoint")
        if name in known if known is not None else _is_floating(path, name):
            shapes[name] = shapes_of[path][name]
        else:
            buffers[name] = _read(path, name).clone()

    def read(kind: str, name: str) -> Tensor:
        return _read(files[kind][name], name).float()

    return Source(
        companion.parameters(shapes),
        kinds,
        companion.training,
        None if companion.model is None else companion.model.layers,
        buffers,
        read,
    )


def save(source: Source, folder: Path, target: Target) -> None:
    """Write weights and buffers in ``target.dtype``, the average too, and the optimizer's tensors in fp32."""
    dtype = PRECISIONS[target.dtype]
    for kind in source.kinds:
        entries = dict.fromkeys(source.parameters, dtype if kind in (WEIGHT, AVERAGE) else torch.float32)
        if kind == WEIGHT:
            entries |= {name: buffer.dtype for name, buffer in source.buffers.items()}
        write(source, kind, entries, folder, target.max_shard_size)
    write_companion(source, folder, target.dtype)


def write(source: Source, kind: str, dtypes: Mapping[str, torch.dtype], folder: Path, max_size: int) -> None:
    """Write the tensors of a kind, and buffers where they are named, one at a time into files of ``max_size`` bytes at most.

    A larger tensor has a file of its own. Those of wider dtypes stand first, as `tensor_file.create` wants them.
    """
    stem = _WEIGHTS if kind == WEIGHT else kind
    shapes = {name: parameter.shape for name, parameter in source.parameters.items()}
    shapes |= {name: tuple(buffer.shape) for name, buffer in source.buffers.items()}
    sizes = {name: math.prod(shapes[name]) * dtype.itemsize for name, dtype in dtypes.items()}
    files: list[list[str]] = [[]]
    left = max_size
    for name in sorted(dtypes, key=lambda name: -dtypes[name].itemsize):
        if files[-1] and sizes[name] > left:
            files.append([])
            left = max_size
        files[-1].append(name)
        left -= sizes[name]
    names_of = {f"{stem}.safetensors": files[0]}
    if len(files) > 1:
        names_of = {
            f"{stem}-{number:05d}-of-{len(files):05d}.safetensors": names for number, names in enumerate(files, start=1)
        }
    for file, names in names_of.items():
        with tensor_file.create(folder / file, {n: (dtypes[n], shapes[n]) for n in names}, {"format": "pt"}) as append:
            for name in names:
                whole = source.read(kind, name) if name in source.parameters else source.buffers[name]
                append(whole.to(dtypes[name]))
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": {name: file for file, names in names_of.items() for name in names},
        }
        with durable_file(folder / f"{stem}.safetensors.index.json") as output:
            output.write(json.dumps(index, indent=2).encode())


def reader(folder: Path, stem: str) -> Callable[[str], Tensor]:
    """Reads tensors by name from the files whose names begin with ``stem``, in fp32."""
    files = _files(folder, stem)
    return lambda name: _read(files[name], name).float()


def _files(folder: Path, stem: str) -> dict[str, Path]:
    """The file of each tensor of a set of files."""
    index = folder / f"{stem}.safetensors.index.json"
    if not index.exists():
        path = folder / f"{stem}.safetensors"
        return dict.fromkeys(TensorFile(path).shapes, path)
    try:
        names = json.loads(index.read_bytes())["weight_map"]
        files = {name: folder / file for name, file in names.items()}
        outside = next((path for path in files.values() if path.parent != folder), None)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{index} is no index of safetensors files ({error}); use another checkpoint") from error
    if outside is not None:
        raise UsageError(f"{index} names {outside}, which is not beside it; use another checkpoint")
    missing = sorted({path.name for path in files.values() if not path.exists()})
    if missing:
        raise UsageError(f"{folder} lacks {', '.join(missing[:4])}, which {index.name} names; use another checkpoint")
    return files


def _is_floating(path: Path, name: str) -> bool:
    with safe_open(path, framework="pt") as file:
        return file.get_slice(name).get_dtype() in _FLOATS


def _read(path: Path, name: str) -> Tensor:
    """A tensor. The file is mapped into memory for it alone, so that what was read before is not in memory any more."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} cannot be read as a safetensors file ({error}); use another checkpoint") from error

"""What a checkpoint of any format holds, whether it is as it was saved, and how two differ. No model and no ranks are made.

With a manifest little more than that is read; only a comparison, and `describe` with ``full``, read tensors, one at a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_dsp.checkpoint import manifest, store
from megatron_dsp.checkpoint.deepspeed_files import DeepSpeedState
from megatron_dsp.checkpoint.formats import FORMATS, deepspeed_universal
from megatron_dsp.checkpoint.formats.source import TRAINING, Source
from megatron_dsp.checkpoint.manifest import Manifest
from megatron_dsp.checkpoint.parameters import Parameter
from megatron_dsp.checkpoint.state import WEIGHT, Training
from megatron_dsp.dtypes import DTYPES
from megatron_dsp.errors import UsageError

_PIECE = 2**22  # elements that are compared at once


@dataclass(frozen=True)
class CheckpointEntry:
    """A checkpoint in a folder of several.

    Attributes:
        name: of its folder.
        iteration, saved: how far it had come, and when it was saved; None where its manifest does not tell.
        bytes: of its files.
        problems: what is wrong with it, a line for each file.
        latest: whether ``latest`` names it.
        taken: whether ``--load`` would take it.
    """

    name: str
    iteration: int | None
    saved: str | None
    bytes: int
    problems: list[str]
    latest: bool
    taken: bool


@dataclass(frozen=True)
class Description:
    """What a checkpoint holds. None and empty where it does not tell.

    Attributes:
        path: its folder.
        format: a name of `FORMATS`; None where it is too damaged to tell.
        problems: what is wrong with it, a line for each file.
        checked: how that was found.
        bytes, files: of its files, and how many.
        parameters: by their names in the whole model.
        kinds: of tensors that there are for each parameter.
        training: how far it had come.
        saved: when, in UTC.
        layout: degrees, and the ZeRO stage, of the ranks that saved it.
        precision: of the model.
        versions: of what wrote it.
    """

    path: Path
    format: str | None
    problems: list[str]
    checked: str
    bytes: int
    files: int
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    kinds: tuple[str, ...] = ()
    training: Training | None = None
    saved: str | None = None
    layout: Mapping[str, int] = field(default_factory=dict)
    precision: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def elements(self) -> int:
        """Of all parameters."""
        return sum(math.prod(parameter.shape) for parameter in self.parameters.values())

    def to_json(self) -> dict[str, Any]:
        """As values that JSON knows, all tensors included."""
        tensors = [{"name": name, "shape": list(each.shape), "dim": each.dim} for name, each in self.parameters.items()]
        training = None if self.training is None else asdict(self.training)
        return {
            **{key: getattr(self, key) for key in ("format", "problems", "checked", "bytes", "files", "kinds", "saved")},
            **{key: getattr(self, key) for key in ("layout", "precision", "versions", "elements")},
            "path": str(self.path),
            "training": training,
            "parameters": tensors,
        }


class TensorDifference(NamedTuple):
    """How a tensor differs between two checkpoints.

    Attributes:
        kind, name: of the tensor.
        differing, elements: how many elements have other bits in fp32, of how many.
        absolute: the largest difference; infinite where one of the values is not finite.
        relative: the largest difference over the larger magnitude of the two values.
    """

    kind: str
    name: str
    differing: int
    elements: int
    absolute: float
    relative: float


@dataclass(frozen=True)
class Difference:
    """How two checkpoints differ.

    Attributes:
        only: names of parameters, and kinds of tensors, that the first has alone, and the second.
        shapes: of parameters that have other ones.
        training: what differs in how far they had come; empty where one of them does not say.
        buffers: names of those that differ.
        values: the tensors that differ, of each kind the largest absolute difference first.
        compared: how many tensors were compared.
    """

    only: tuple[list[str], list[str]]
    shapes: Mapping[str, tuple[Sequence[int], Sequence[int]]]
    training: Mapping[str, tuple[Any, Any]]
    buffers: list[str]
    values: list[TensorDifference]
    compared: int

    @property
    def equal(self) -> bool:
        """Whether nothing differs, bit by bit."""
        return not any((*self.only, self.shapes, self.training, self.buffers, self.values))

    def to_json(self) -> dict[str, Any]:
        """As values that JSON knows; infinite ones, which it does not, are None."""
        values = [{key: None if value == math.inf else value for key, value in each._asdict().items()} for each in self.values]
        return {**asdict(self), "values": values, "equal": self.equal}


def list_checkpoints(folder: Path, *, full: bool = False) -> tuple[list[CheckpointEntry], list[str]]:
    """The checkpoints in ``folder``, in the order in which ``--load`` tries them, and what is strange about ``latest``.

    Files are checked by their sizes, with ``full`` by their hashes too, as ``--load`` does. None where ``folder`` is a
    checkpoint itself, or no folder of this package's.
    """
    if (folder / deepspeed_universal.POINTER).exists() and store.pointer(folder) is None:
        return [], []  # it is one checkpoint, of another format
    paths, strange = store.candidates(folder)
    named, found, taken = store.pointer(folder), [], False
    for path in paths:
        problems = manifest.check(path, hashes=full)
        record = _manifest(path)
        iteration, saved = (None, None) if record is None else (record.progress["iteration"], record.saved)
        takes = not problems and not taken
        taken = taken or takes
        found.append(CheckpointEntry(path.name, iteration, saved, _sizes(path)[0], problems, path.name == named, takes))
    return found, strange


def describe(folder: Path, *, full: bool = False) -> Description:
    """What the checkpoint in ``folder`` holds, and whether it is as it was saved.

    Files are checked by their sizes where there is a manifest, with ``full`` by their hashes too. Where there is none, ``full``
    reads all tensors. Errors: UsageError where ``folder`` is no checkpoint.
    """
    path, name = _folder_and_format(folder)
    size, files = _sizes(path)
    if not (path / manifest.NAME).exists():
        if name is None:
            raise UsageError(f"{folder}: no checkpoint in one of the formats {', '.join(FORMATS)} is there; give its folder")
        return _describe_without_manifest(path, name, size, files, full)
    problems = manifest.check(path, hashes=full)
    checked = f"{'sizes and hashes' if full else 'sizes'} of all files"
    record = _manifest(path)
    if record is None:
        return Description(path, name, problems, checked, size, files)
    kinds: tuple[str, ...] = ()
    training = Training(iteration=record.progress["iteration"], consumed_samples=record.progress["consumed_samples"])
    if name is not None and not problems:
        try:
            kinds, training = _kinds_and_training(path, name, record)
        except UsageError as error:
            problems = [str(error)]
    return Description(
        path,
        name,
        problems,
        checked,
        size,
        files,
        record.model.parameters,
        kinds,
        training,
        record.saved,
        record.layout,
        record.precision,
        record.versions,
    )


def compare(first: Path, second: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> Difference:
    """How two checkpoints differ, of any formats and degrees, tensor by tensor in fp32.

    ``progress`` is told the bytes that were compared and those that there are. Errors: UsageError where one of them is no
    checkpoint, or a damaged one.
    """
    a, b = _source(first), _source(second)
    kinds = [kind for kind in a.kinds if kind in b.kinds]
    names = [name for name in a.parameters if name in b.parameters]
    shapes = {name: (a.parameters[name].shape, b.parameters[name].shape) for name in names}
    other = {name: pair for name, pair in shapes.items() if pair[0] != pair[1]}
    same = [name for name in names if name not in other]
    total, done = 4 * len(kinds) * sum(math.prod(shapes[name][0]) for name in same), 0
    values = []
    for kind in kinds:
        found = []
        for name in same:
            each = _tensor_difference(kind, name, a.read(kind, name), b.read(kind, name))
            found += [each] if each.differing else []
            done += 4 * each.elements
            progress(done, total)
        values += sorted(found, key=lambda each: -each.absolute)
    # Formats of others do not tell buffers from parameters.
    there = [{*each.parameters, *each.buffers} for each in (a, b)]
    buffers = sorted(name for name in (there[0] & there[1]) - {*names} if not _same_buffer(a, b, name))
    return Difference(
        (_only_in(a, b), _only_in(b, a)), other, _training_difference(a, b), buffers, values, len(kinds) * len(same)
    )


def _folder_and_format(folder: Path) -> tuple[Path, str | None]:
    """Where a checkpoint's own files are, and its format. Errors: UsageError where there is no such folder."""
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; give the folder of a checkpoint")
    name = next((name for name, each in FORMATS.items() if each.recognises(folder)), None)
    pointer = folder / deepspeed_universal.POINTER
    if pointer.exists():
        tag = pointer.read_text(errors="replace").strip()
        if Path(tag).name != tag or not (folder / tag).is_dir():
            raise UsageError(f"{pointer} names {tag[:80]!r}, and no such folder is there; use another checkpoint")
        return folder / tag, name
    return folder, name


def _source(folder: Path) -> Source:
    path, name = _folder_and_format(folder)
    if name is None:
        raise UsageError(f"{folder}: no checkpoint in one of the formats {', '.join(FORMATS)} is there; give its folder")
    return FORMATS[name].load(path)


def _manifest(folder: Path) -> Manifest | None:
    try:
        return manifest.read(folder)
    except UsageError:
        return None


def _sizes(folder: Path) -> tuple[int, int]:
    """Bytes of the files in a folder, and how many these are."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return sum(sizes), len(sizes)


def _kinds_and_training(folder: Path, name: str, record: Manifest) -> tuple[tuple[str, ...], Training]:
    """What the files beside the manifest tell: the kinds of tensors, and the training. Errors: UsageError for damaged ones."""
    if name == "deepspeed":
        state = DeepSpeedState(folder, record)
        return state.kinds, state.training
    try:
        told = json.loads((folder / TRAINING).read_text())
        return tuple(told["kinds"]), Training(**told["training"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{TRAINING} was changed: it does not tell what it should ({error})") from error


def _describe_without_manifest(folder: Path, name: str, size: int, files: int, full: bool) -> Description:
    """A checkpoint without a manifest: what its own files tell."""
    if name == "deepspeed":
        problem = f"{manifest.NAME} is missing: it is not of this package, or was not saved to its end"
        return Description(folder, name, [problem], "files", size, files)
    checked = f"{'all tensors were read' if full else 'headers alone'}, as there is no {manifest.NAME}"
    try:
        source = FORMATS[name].load(folder)
    except UsageError as error:
        return Description(folder, name, [str(error)], checked, size, files)
    problems = []
    for kind, parameter in [(kind, each) for kind in source.kinds for each in source.parameters] if full else []:
        try:
            source.read(kind, parameter)
        except UsageError as error:
            problems.append(str(error))
    training = None if source.training == Training() else source.training
    precision = _stored_precision(folder) if name == "safetensors" else None
    return Description(
        folder,
        name,
        list(dict.fromkeys(problems)),
        checked,
        size,
        files,
        source.parameters,
        source.kinds,
        training,
        precision=precision,
    )


def _stored_precision(folder: Path) -> str | None:
    """The dtypes of floating point tensors in safetensors files."""
    found: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    return ", ".join(names.short for names in DTYPES if names.short is not None and names.safetensors in found) or None


def _only_in(a: Source, b: Source) -> list[str]:
    """Names of parameters and buffers, and kinds of tensors, that ``a`` has and ``b`` does not."""
    names = [name for name in (*a.parameters, *a.buffers) if name not in b.parameters and name not in b.buffers]
    return [*names, *(f"all of the kind {kind}" for kind in a.kinds if kind not in b.kinds)]


def _training_difference(a: Source, b: Source) -> dict[str, tuple[Any, Any]]:
    """What differs in how far two had come. What one of them does not say is no difference."""
    if Training() in (a.training, b.training):
        return {}
    # As JSON has them: some formats turn tuples into lists.
    first, second = (json.loads(json.dumps(asdict(each.training))) for each in (a, b))
    return {
        key: (first[key], second[key])
        for key in first
        if first[key] != second[key] and first[key] is not None and second[key] is not None
    }


def _tensor_difference(kind: str, name: str, a: Tensor, b: Tensor) -> TensorDifference:
    differing, absolute, relative = 0, 0.0, 0.0
    for x, y in zip(a.reshape(-1).split(_PIECE), b.reshape(-1).split(_PIECE), strict=True):
        other = x.view(torch.int32) != y.view(torch.int32)
        count = int(other.sum())
        if count:
            x, y = x[other].double(), y[other].double()
            gap = (x - y).abs()
            over = gap / torch.maximum(x.abs(), y.abs()).clamp(min=torch.finfo(torch.float64).tiny)
            differing += count
            absolute = max(absolute, float(gap.nan_to_num(math.inf, math.inf).max()))
            relative = max(relative, float(over.nan_to_num(math.inf, math.inf).max()))
    return TensorDifference(kind, name, differing, a.numel(), absolute, relative)


def _same_buffer(a: Source, b: Source, name: str) -> bool:
    """Whether a buffer of one of them or both is the same, bit by bit."""
    x, y = (each.read(WEIGHT, name) if name in each.parameters else each.buffers[name] for each in (a, b))
    if name in a.parameters or name in b.parameters:
        x, y = x.float(), y.float()
    same = x.dtype == y.dtype and x.shape == y.shape
    return same and torch.equal(*(each.reshape(-1).view(torch.uint8) for each in (x, y)))

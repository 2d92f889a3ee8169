"""torch.distributed.checkpoint, written by one process and read without any.

The state dict is ``{"model": {name: ...}, "ema": {...}, "optimizer": {"state": {name: {"exp_avg": ...}}}}`` with buffers in
"model". What is read may be of any number of ranks. ``.metadata`` is a pickle: its globals are read first, and are all in the
list here.
"""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_dsp.checkpoint import unpickling
from megatron_dsp.checkpoint.formats.source import Source, Target, read_companion, write_companion
from megatron_dsp.checkpoint.state import AVERAGE, WEIGHT
from megatron_dsp.dtypes import DTYPES, PRECISIONS
from megatron_dsp.errors import UsageError

_METADATA = ".metadata"
_MODULE = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    *(f"{_MODULE}.{name}" for name in ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties")),
    *(f"{_MODULE}.{name}" for name in ("ChunkStorageMetadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.serialization._get_layout",
    "torch.Size",
    "collections.OrderedDict",
    "pathlib.PosixPath",  # where it was saved
    *(f"torch.{names.name}" for names in DTYPES),
}
_OPTIMIZER = re.compile(r"(?:.+\.)?optim(?:izer)?\.state\.(.+)\.(\w+)")


def recognises(folder: Path) -> bool:
    return (folder / _METADATA).exists()


def load(folder: Path) -> Source:
    """A folder of any number of ranks' files; of others its model and, by names with "optim.state" in them, its optimizer.

    Weights are floating point tensors; "model.", and what stands before it, is no part of their names. Errors: UsageError for
    files that are missing or damaged or that would run code.
    """
    companion = read_companion(folder)
    metadata = _read_metadata(folder / _METADATA)
    tensors = {key: entry for key, entry in metadata.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)}
    keys: dict[str, dict[str, str]] = {WEIGHT: {}}  # by kind and name
    buffer_keys, step_key = {}, None
    known = None if companion.model is None else companion.model.parameters
    for key, entry in tensors.items():
        of_optimizer = _OPTIMIZER.fullmatch(key)
        kind, name = (of_optimizer[2], of_optimizer[1]) if of_optimizer else (WEIGHT, re.sub(r"^(?:.+\.)?model\.", "", key))
        if kind == WEIGHT and key.startswith(f"{AVERAGE}."):
            kind, name = AVERAGE, key.removeprefix(f"{AVERAGE}.")
        if kind == "step":
            step_key = key
        elif kind == WEIGHT and not (name in known if known is not None else entry.properties.dtype.is_floating_point):
            buffer_keys[name] = key
        else:
            keys.setdefault(kind, {})[name] = key
    missing = {name for names in keys.values() for name in names} - keys[WEIGHT].keys()
    if missing:
        raise UsageError(
            f"{folder} has an optimizer's or an average's {min(missing)!r}, and no such weight; use another checkpoint"
        )

    def read_key(key: str) -> Tensor:
        return _read(folder, metadata, key)

    def read(kind: str, name: str) -> Tensor:
        parameter_key = keys[kind].get(name)
        if parameter_key is None:  # it is not trained
            return torch.zeros(tensors[keys[WEIGHT][name]].size)
        return read_key(parameter_key).float()

    training = companion.training
    if companion.model is None and step_key is not None:
        training = type(training)(step=int(read_key(step_key)))
    return Source(
        companion.parameters({name: tensors[key].size for name, key in keys[WEIGHT].items()}),
        companion.kinds or tuple(keys),
        training,
        None if companion.model is None else companion.model.layers,
        {name: read_key(key) for name, key in buffer_keys.items()},
        read,
    )


def save(source: Source, folder: Path, target: Target) -> None:
    """Write weights and their average in ``target.dtype``, the optimizer's tensors in fp32, and its step for each parameter."""
    dtype = PRECISIONS[target.dtype]
    readers: dict[str, Callable[[], Tensor]] = {}

    def placeholder(key: str, shape: Sequence[int], dtype: torch.dtype, read: Callable[[], Tensor]) -> Tensor:
        readers[key] = read
        return torch.empty(tuple(shape), dtype=dtype, device="meta")

    def parameter_placeholder(kind: str, name: str) -> Tensor:
        stored, key = (dtype, "model" if kind == WEIGHT else kind) if kind in (WEIGHT, AVERAGE) else (torch.float32, None)
        key = f"optimizer.state.{name}.{kind}" if key is None else f"{key}.{name}"
        shape = source.parameters[name].shape
        return placeholder(key, shape, stored, lambda: source.read(kind, name).to(stored).contiguous())

    model = {name: parameter_placeholder(WEIGHT, name) for name in source.parameters}
    for name, buffer in source.buffers.items():
        model[name] = placeholder(f"model.{name}", buffer.shape, buffer.dtype, buffer.contiguous)
    content: dict[str, Any] = {"model": model}
    if AVERAGE in source.kinds:
        content[AVERAGE] = {name: parameter_placeholder(AVERAGE, name) for name in source.parameters}
    if source.optimizer_kinds:
        step = torch.tensor(float(source.training.step or 0))
        content["optimizer"] = {"state": {}}
        for name in source.parameters:
            entry = {kind: parameter_placeholder(kind, name) for kind in source.optimizer_kinds}
            entry["step"] = placeholder(f"optimizer.state.{name}.step", (), torch.float32, lambda: step)
            content["optimizer"]["state"][name] = entry
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # it is not needed
        dcp.save(content, storage_writer=_Writer(folder), planner=_LazySavePlanner(readers), no_dist=True)
    write_companion(source, folder, target.dtype)


class _LazySavePlanner(dcp.DefaultSavePlanner):
    """Gives the writer each tensor when it asks for it; the state dict has only their shapes."""

    def __init__(self, readers: dict[str, Callable[[], Tensor]]):
        super().__init__()
        self._readers = readers

    def resolve_data(self, write_item: Any) -> Tensor:
        return self._readers[write_item.index.fqn]()


class _Writer(dcp.FileSystemWriter):
    """Forgets each tensor when it is written; torch's own keeps all of them until the last."""

    def write_data(self, plan: Any, planner: Any) -> Future[list[WriteResult]]:
        """Write the tensors of a plan one after another into one file."""
        path, results = Path(self.path) / "__0_0.distcp", []
        with path.open("wb") as file:
            for item in plan.items:
                tensor, start = planner.resolve_data(item), file.tell()
                if tensor.untyped_storage().nbytes() != tensor.nbytes:
                    tensor = tensor.clone()  # torch.save writes all of a storage
                torch.save(tensor, file)
                stored = _StorageInfo(path.name, start, file.tell() - start)
                results.append(WriteResult(item.index, stored.length, stored))
            file.flush()
            os.fsync(file.fileno())
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


def _read(folder: Path, metadata: Any, key: str) -> Tensor:
    """A whole tensor, put together from the parts that ranks have written."""
    entry = metadata.state_dict_metadata[key]
    if len(entry.chunks) == 1 and tuple(entry.chunks[0].sizes) == tuple(entry.size):
        return _read_part(folder, metadata, key, entry.chunks[0])
    whole = torch.empty(entry.size, dtype=entry.properties.dtype)
    filled = 0
    for chunk in entry.chunks:
        place = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
        whole[place] = _read_part(folder, metadata, key, chunk)
        filled += chunk.sizes.numel()
    if filled != whole.numel():
        raise UsageError(
            f"{folder}: its parts of {key!r} have {filled} elements instead of {whole.numel()}; use another checkpoint"
        )
    return whole


def _read_part(folder: Path, metadata: Any, key: str, chunk: Any) -> Tensor:
    stored = metadata.storage_data.get(MetadataIndex(key, chunk.offsets))
    if stored is None or stored.transform_descriptors or Path(stored.relative_path).name != stored.relative_path:
        raise UsageError(f"{folder}: {key!r} is not stored in a way that is read here; use what FileSystemWriter writes")
    path = folder / stored.relative_path
    try:
        with path.open("rb") as file:
            file.seek(stored.offset)
            data = io.BytesIO(file.read(stored.length))
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); use another checkpoint") from error
    tensor = unpickling.load_tensor(data, f"{path}: {key}")
    if tuple(tensor.shape) != tuple(chunk.sizes):
        raise UsageError(
            f"{path}: {key!r} has shape {list(tensor.shape)} instead of {list(chunk.sizes)}; use another checkpoint"
        )
    return tensor


class _Unpickler(pickle.Unpickler):
    """Finds what is in the list and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in _ALLOWED:
            raise pickle.UnpicklingError(f"it wants {module}.{name}")
        return super().find_class(module, name)


def _read_metadata(path: Path) -> Any:
    """What ``.metadata`` holds. Errors: UsageError where it wants a global that is not in the list; nothing has run then."""
    data = path.read_bytes()
    try:
        wanted = _globals(data)
        if wanted - _ALLOWED:
            raise UsageError(
                f"{path} is not opened: it wants {', '.join(sorted(wanted - _ALLOWED))}, which may run anything, and which "
                "torch.distributed.checkpoint does not write there; use a checkpoint that you trust"
            )
        return _Unpickler(io.BytesIO(data)).load()
    except UsageError:
        raise
    except Exception as error:  # whatever a damaged pickle makes of the listed classes
        raise UsageError(f"{path} is not opened: it is no metadata of torch.distributed.checkpoint ({error})") from error


def _globals(data: bytes) -> set[str]:
    """The globals that a pickle names. Errors: ValueError for one that names a global by other than two texts before it.

    Protocol 4 has these texts on the stack, where an operation puts a text of its own, or one from a memo that is filled from
    the top of the stack. Only of the two operations before is it known what they put there.
    """
    found: set[str] = set()
    memo: list[str | None] = []
    recent: list[str | None] = [None, None]  # what the last two operations put on the stack, where it is a text
    for operation, argument, _ in pickletools.genops(data):
        if operation.name == "MEMOIZE":
            memo.append(recent[-1])
        if operation.name in ("MEMOIZE", "FRAME"):  # nothing on the stack changes
            continue
        pushed = None
        if operation.name in ("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"):
            pushed = argument
        elif operation.name in ("BINGET", "LONG_BINGET"):
            pushed = memo[int(str(argument))]
        elif operation.name == "STACK_GLOBAL":
            module, name = recent
            if module is None or name is None:
                raise ValueError("a global in it has no plain name")
            found.add(f"{module}.{name}")
        elif operation.name in (
            "GLOBAL",
            "INST",
            "PUT",
            "BINPUT",
            "LONG_BINPUT",
            "EXT1",
            "EXT2",
            "EXT4",
            "PERSID",
            "BINPERSID",
        ):
            raise ValueError(f"{operation.name} is not of its protocol")
        recent = [recent[-1], pushed]
    return found

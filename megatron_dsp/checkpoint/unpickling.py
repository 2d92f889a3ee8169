"""Reading DeepSpeed's ``.pt`` files, which are pickles, without running what a pickle can run.

A pickle names the functions and classes ("globals") that it calls as it is read. `check_globals` reads the names and runs
nothing; a file that wants others than those listed below is refused. `load` does so too, and then reads with torch's restricted
unpickler (``weights_only``), which calls nothing else either.
"""

from __future__ import annotations

import importlib
import io
import pickle
import pickletools
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from megatron_dsp.checkpoint import file_names
from megatron_dsp.checkpoint.file_names import LayerFile, ModelFile, OptimizerFile, UniversalFile
from megatron_dsp.dtypes import DTYPES
from megatron_dsp.errors import RankError

_STORAGES = {f"torch.{names.storage.__name__}" for names in DTYPES} | {"torch.ComplexFloatStorage"}
_TENSORS = {"collections.OrderedDict", "torch._utils._rebuild_tensor_v2", *_STORAGES}
_FRAGMENT_ADDRESS = "deepspeed.utils.tensor_fragment.fragment_address"
_ALLOWED = {  # in files of these names
    LayerFile: _TENSORS,
    ModelFile: _TENSORS | {"torch.Size", _FRAGMENT_ADDRESS},
    OptimizerFile: _TENSORS
    | {
        "torch.Tensor",
        "torch.float16",  # of a loss scaler
        "torch._tensor._rebuild_from_type_v2",
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        _FRAGMENT_ADDRESS,
    },
    UniversalFile: _TENSORS
    | {
        "torch.Size",
        "torch.float16",
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
    },
}
# Those that torch.save writes (protocol 2). GLOBAL is the only one to reach a global, and has its name spelled out.
_OPERATIONS = {
    *("PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BUILD", "NEWOBJ", "BINPERSID", "BINPUT", "LONG_BINPUT", "BINGET"),
    *("LONG_BINGET", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"),
    *("EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_SET"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
}


def check_globals(path: Path) -> set[str]:
    """The globals that a ``.pt`` file wants, all of them in the list for files of its name. Nothing of it is unpickled.

    Errors: RankError that names the file and what it wants beside those; and for files that are no zip archives of torch.save,
    such as plain pickles, whatever they want.
    """
    allowed = _ALLOWED.get(type(file_names.parse(path.name)))
    if allowed is None:
        raise RankError(f"{path} is not opened: none of DeepSpeed's checkpoint files has such a name; remove it")
    try:
        with path.open("rb") as file:
            return _check_archive(file, str(path), str(path), allowed)
    except OSError as error:
        raise RankError(f"{path} is not opened: {error}; use another checkpoint") from error


def load_tensor(data: io.BytesIO, what: str) -> Tensor:
    """The tensor that is all of a file of torch.save, or of a part of one that is in memory; ``what``: its name for errors.

    Errors: as `check_globals`.
    """
    _check_archive(data, data, what, _TENSORS)
    data.seek(0)
    try:
        return torch.load(data, weights_only=True)
    except pickle.UnpicklingError as error:
        raise RankError(f"{what} is refused by torch's restricted unpickler; use a checkpoint that you trust") from error


def _check_archive(file: IO[bytes], archive: Any, what: str, allowed: set[str]) -> set[str]:
    """The globals of a file, all of them ``allowed``; ``archive``: what torch opens it by. Errors: RankError."""
    try:
        if file.read(4) != b"PK\x03\x04":
            raise ValueError("it is no zip archive, and may be a plain pickle")
        file.seek(0)
        reader = torch._C.PyTorchFileReader(archive)
        if "constants.pkl" in reader.get_all_records():
            raise ValueError("it is a TorchScript archive")
        wanted = _globals(reader.get_record("data.pkl"))
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise RankError(
            f"{what} is not opened: {reason}; what torch.save writes is expected, use another checkpoint"
        ) from error
    if wanted - allowed:
        raise RankError(
            f"{what} is not opened: it wants {', '.join(sorted(wanted - allowed))}, which may run anything, and which "
            "torch's and DeepSpeed's files of this kind do not have; use a checkpoint that you trust"
        )
    return wanted


def load(path: Path, map_location: Any = "cpu", *, mmap: bool = False) -> Any:
    """What a ``.pt`` file of DeepSpeed's holds; ``mmap``: tensors stay in the file until they are used.

    Errors: as `check_globals`; also RankError where it does with its globals what torch.save does not write.
    """
    known = {name.rpartition(".")[::2] for name in check_globals(path) if name.startswith("deepspeed.")}
    classes = [getattr(importlib.import_module(module), name) for module, name in known]
    try:
        with torch.serialization.safe_globals(classes):
            return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise RankError(f"{path} is refused by torch's restricted unpickler; use a checkpoint that you trust") from error


def _globals(data: bytes) -> set[str]:
    """The globals that a pickle names. Errors: ValueError where it is none, or not one that torch.save writes."""
    found = set()
    for operation, argument, _ in pickletools.genops(data):
        if operation.name not in _OPERATIONS or (operation.name == "PROTO" and argument != 2):
            raise ValueError(f"its pickle has {operation.name}, which torch.save does not write")
        if operation.name == "GLOBAL":
            found.add(str(argument).replace(" ", "."))
    return found

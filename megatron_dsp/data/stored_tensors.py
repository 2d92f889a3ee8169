"""Tensors that lie somewhere in a file: what their headers say, and reads of parts of them.

Headers of safetensors (https://huggingface.co/docs/safetensors) and of ``.npy``
(https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html) are read here at any place in a file, so that both
may lie inside a tar. Nothing is unpickled. A header that cannot be used raises ``ValueError``, without the file's name.
"""

from __future__ import annotations

import json
import math
import os
import tokenize
import weakref
from functools import lru_cache
from typing import Any, BinaryIO, NamedTuple

import torch
from numpy.lib import format as npy

from megatron_dsp.data.data_error import DataError
from megatron_dsp.dtypes import DTYPES

# What the format itself allows. Without a limit, a file that is none could ask for any amount of memory.
_LARGEST_SAFETENSORS_HEADER = 100_000_000
_KNOWN = [names for names in DTYPES if names.dtype != torch.float64]  # which no model takes
_SAFETENSORS_DTYPES = {names.safetensors: names.dtype for names in _KNOWN}
_NPY_DTYPES = {names.npy: names.dtype for names in _KNOWN if names.npy is not None}


class FileState(NamedTuple):
    """A file as it was when its headers were read."""

    path: str
    size: int
    modified: int  # nanoseconds


class StoredTensor(NamedTuple):
    """A tensor in a file: its first byte is at ``offset``, and its last dim varies fastest, or its first with ``fortran``."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    fortran: bool = False

    def read(self, file: FileState, dim: int, start: int, stop: int) -> torch.Tensor:
        """The part ``start .. stop`` of one dim. No other byte is read, except with ``fortran``: then the whole tensor is.

        Raises ``DataError`` when the file is no longer what it was.
        """
        if self.fortran:
            turned = StoredTensor(self.dtype, self.shape[::-1], self.offset).read(file, 0, 0, self.shape[-1])
            return turned.permute(*reversed(range(turned.dim()))).narrow(dim, start, stop - start)
        part = torch.empty(*self.shape[:dim], stop - start, *self.shape[dim + 1 :], dtype=self.dtype)
        if part.numel() == 0:
            return part
        row = math.prod(self.shape[dim + 1 :]) * self.dtype.itemsize
        length = (stop - start) * row
        content, source = part.view(-1).view(torch.uint8).numpy().data, _open_file(file)
        for piece in range(math.prod(self.shape[:dim])):
            source.read_into(
                content[piece * length : (piece + 1) * length], self.offset + (piece * self.shape[dim] + start) * row
            )
        return part


class _OpenFile:
    """A file that is open as long as anything refers to it. Reads share no position, so threads and forks may share it."""

    def __init__(self, file: FileState) -> None:
        self._file = file
        self._descriptor = os.open(file.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        status = os.fstat(self._descriptor)
        if (status.st_size, status.st_mtime_ns) != (file.size, file.modified):
            raise DataError(
                f"{file.path} has changed since it was opened: start again, and leave data alone while jobs read it"
            )

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from the bytes at ``offset``."""
        while buffer:
            count = os.preadv(self._descriptor, [buffer], offset)
            if count == 0:
                raise DataError(f"{self._file.path} was cut off while it was read: start again with the whole file")
            buffer, offset = buffer[count:], offset + count


@lru_cache(maxsize=32)
def _open_file(file: FileState) -> _OpenFile:
    """The open file; the least recently used of the process are closed when they are too many."""
    return _OpenFile(file)


def safetensors_header(file: BinaryIO, start: int, stop: int) -> dict[str, StoredTensor | str]:
    """The tensors of the safetensors at bytes ``start`` to ``stop`` of a file; of those of other dtypes, the dtype's name."""
    file.seek(start)
    length = int.from_bytes(file.read(8), "little")
    data = start + 8 + length
    if stop - start < 8 or not 2 <= length <= _LARGEST_SAFETENSORS_HEADER:
        raise ValueError("is not a safetensors file: it does not begin with the length of its header")
    if data > stop:
        raise ValueError(f"is cut off, or not a safetensors file: its header of {length} bytes is not whole")
    try:
        header = json.loads(file.read(length), object_pairs_hook=_unique_entries)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"is not a safetensors file: its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise ValueError("is not a safetensors file: its header is not a JSON object")
    header.pop("__metadata__", None)
    tensors: dict[str, StoredTensor | str] = {}
    end = data
    for name, entry in header.items():
        try:
            dtype_name, shape = str(entry["dtype"]), tuple(int(size) for size in entry["shape"])
            first, last = (data + int(offset) for offset in entry["data_offsets"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"is not a safetensors file: its header says {entry!r:.80} of {name!r}") from error
        dtype = _SAFETENSORS_DTYPES.get(dtype_name)
        end = max(end, last)
        if min(shape, default=0) < 0 or not data <= first <= last:
            raise ValueError(f"is damaged: {name!r} cannot have shape {list(shape)} at bytes {first} to {last}")
        if dtype is None:
            tensors[name] = dtype_name
        elif math.prod(shape) * dtype.itemsize != last - first:
            raise ValueError(f"is damaged: {name!r} of {dtype_name} {list(shape)} does not fill its {last - first} bytes")
        else:
            tensors[name] = StoredTensor(dtype, shape, first)
    if end != stop:
        raise ValueError(f"is cut off or damaged: its tensors end at byte {end - start}, and it has {stop - start}")
    return tensors


def _unique_entries(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"has {next(name for name in names if names.count(name) > 1)!r} twice")
    return entries


def npy_header(file: BinaryIO, start: int, stop: int) -> StoredTensor | str:
    """The array of the ``.npy`` at bytes ``start`` to ``stop`` of a file, or the name of its dtype when it is another one."""
    file.seek(start)
    try:
        version = npy.read_magic(file)
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
        if read is None:
            raise ValueError(f"its version is {version}, not 1.0 or 2.0")
        shape, fortran, dtype = read(file)
        if min(shape, default=0) < 0:
            raise ValueError(f"its shape is {list(shape)}")
    except (ValueError, tokenize.TokenError) as error:
        raise ValueError(f"is not an .npy array: {' '.join(str(error).split())}") from error
    offset = file.tell()
    if offset + math.prod(shape) * dtype.itemsize != stop and not dtype.hasobject:
        raise ValueError(f"is cut off or damaged: {dtype} {list(shape)} does not fill its {stop - offset} bytes")
    if dtype.str not in _NPY_DTYPES:
        return "object, which is never unpickled" if dtype.hasobject else dtype.str
    return StoredTensor(_NPY_DTYPES[dtype.str], shape, offset, fortran)

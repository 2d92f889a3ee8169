"""Writing what ``torch.save`` would, with tensors that are not there yet: each is filled in later, piece by piece.

Such a file is a zip archive without compression: a pickle that has everything but the tensors' elements, and a member of bytes
for each tensor. The size of all of it is known before an element is, so that many files can be filled at once from tensors that
are read one at a time.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import struct
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dsp.checkpoint.tensor_file import bytes_of
from megatron_dsp.dtypes import NAMES_OF

_ALIGNMENT = 64  # of a member's bytes in the file, as torch has it, so that they can be mapped into memory
_LARGE = 0xFFFFFFFF  # stands for sizes and places of 4 GiB and more, which a zip archive has in another field
_PADDING = 0x4246  # torch's name for a field of a zip header that only fills


class Placeholder:
    """A tensor in the content of a file that is being written; the file has its elements when they are appended."""

    def __init__(self, dtype: torch.dtype, shape: Sequence[int]):
        self.dtype, self.shape = dtype, tuple(shape)

    @property
    def size(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    def __reduce__(self) -> tuple[Any, ...]:
        strides = [math.prod(self.shape[dim + 1 :]) for dim in range(len(self.shape))]
        return torch._utils._rebuild_tensor_v2, (_Storage(self), 0, self.shape, tuple(strides), False, OrderedDict())


@dataclass(frozen=True)
class _Storage:
    """What a pickle of torch's has instead of a tensor's elements."""

    placeholder: Placeholder


class _Pickler(pickle.Pickler):
    """Names the records of tensors as they come."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file, protocol=2)
        self.placeholders: list[Placeholder] = []

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, _Storage):
            return None
        placeholder = value.placeholder
        self.placeholders.append(placeholder)
        return "storage", NAMES_OF[placeholder.dtype].storage, str(len(self.placeholders) - 1), "cpu", placeholder.size


class _Member:
    """A member of the archive."""

    def __init__(self, name: str, offset: int, size: int):
        """``offset``: where its header begins in the file."""
        self._name, self._offset, self.size = f"archive/{name}".encode(), offset, size
        self.written = self._checksum = 0
        start = offset + 30 + len(self._name) + len(self._large_field(size, size)) + 4
        self._fill = struct.pack("<HH", _PADDING, -start % _ALIGNMENT) + b"Z" * (-start % _ALIGNMENT)
        self.start = start + -start % _ALIGNMENT
        self.stop = self.start + size

    def write(self, file: io.BufferedRandom, data: memoryview) -> None:
        """Write its next bytes."""
        file.seek(self.start + self.written)
        file.write(data)
        self.written += data.nbytes
        self._checksum = zlib.crc32(data, self._checksum)

    @staticmethod
    def _large_field(*values: int) -> bytes:
        """The field of those that do not fit where they belong."""
        large = [value for value in values if value >= _LARGE]
        return struct.pack(f"<HH{len(large)}Q", 1, 8 * len(large), *large) if large else b""

    def header(self) -> bytes:
        """What stands before its bytes."""
        size, extra = min(self.size, _LARGE), self._large_field(self.size, self.size) + self._fill
        fixed = struct.pack("<4s5H3L2H", b"PK\3\4", 45, 0, 0, 0, 33, self._checksum, size, size, len(self._name), len(extra))
        return fixed + self._name + extra

    def entry(self) -> bytes:
        """Its entry in the directory at the end."""
        size, offset = min(self.size, _LARGE), min(self._offset, _LARGE)
        extra = self._large_field(self.size, self.size, self._offset)
        fields = 45, 45, 0, 0, 0, 33, self._checksum, size, size, len(self._name), len(extra), 0, 0, 0, 0, offset
        return struct.pack("<4s6H3L5H2L", b"PK\1\2", *fields) + self._name + extra


class TorchFile:
    """A new file with ``content``, which ``torch.load`` reads when `close` has returned.

    Tensors in ``content`` are placeholders, each a storage of its own; everything else is pickled as ``torch.save`` does.
    `append` may fill several tensors in turn. The file is not open between calls: a process cannot have many of them open.

    Attributes:
        placeholders: all that are in ``content``.
    """

    def __init__(self, path: Path, content: Any):
        self.path = path
        data = io.BytesIO()
        pickler = _Pickler(data)
        pickler.dump(content)
        texts = {"data.pkl": data.getvalue(), "byteorder": b"little", "version": b"3\n"}
        sizes = [(name, len(text)) for name, text in texts.items()]
        sizes += [(f"data/{number}", tensor.size * tensor.dtype.itemsize) for number, tensor in enumerate(pickler.placeholders)]
        self._members: list[_Member] = []
        for name, size in sizes:
            self._members.append(_Member(name, self._members[-1].stop if self._members else 0, size))
        self.placeholders = pickler.placeholders
        self._member_of = dict(zip(map(id, self.placeholders), self._members[len(texts) :], strict=True))
        with path.open("w+b") as file:
            for member, text in zip(self._members, texts.values(), strict=False):
                member.write(file, memoryview(text))

    def append(self, placeholder: Placeholder, tensor: Tensor) -> None:
        """Write the next elements of a tensor, in the order of its memory; they are cast to its dtype."""
        if tensor.numel():
            with self.path.open("r+b") as file:
                self._member_of[id(placeholder)].write(file, bytes_of(tensor.detach().to("cpu", placeholder.dtype)))

    def close(self) -> None:
        """Bring the file to the disk. Errors: ValueError where a tensor has more or fewer elements than its placeholder."""
        for member in self._members:
            if member.written != member.size:
                raise ValueError(f"{self.path}: {member.written:,} bytes of a record were written instead of {member.size:,}")
        with self.path.open("r+b") as file:
            for member in self._members:
                file.seek(member.start - len(member.header()))
                file.write(member.header())
            offset, count = self._members[-1].stop, len(self._members)
            file.seek(offset)
            directory = b"".join(member.entry() for member in self._members)
            end = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(directory), offset)
            locator = struct.pack("<4sLQL", b"PK\6\7", 0, offset + len(directory), 1)
            few, short, near = min(count, 0xFFFF), min(len(directory), _LARGE), min(offset, _LARGE)
            file.write(directory + end + locator + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, few, few, short, near, 0))
            file.flush()
            os.fsync(file.fileno())

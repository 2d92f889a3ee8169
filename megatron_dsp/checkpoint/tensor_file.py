"""Files of named tensors in the safetensors format, written one tensor after another and read in parts.

The format (https://github.com/huggingface/safetensors#format) is the length of a JSON header in 8 bytes, the header, and the
tensors' bytes without gaps, all little-endian. The package's own writer takes all tensors at once, which would be a whole model
on one rank; so files are written here.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_dsp.checkpoint.disk import durable_file
from megatron_dsp.dtypes import NAMES_OF
from megatron_dsp.errors import RankError


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's elements, in order; of a tensor on the CPU, which is copied only where it is not contiguous."""
    flat = tensor.contiguous().as_strided((tensor.numel(),), (1,))  # a view would keep any stride of a single element
    return flat.view(torch.uint8).numpy().data


@contextmanager
def create(
    path: Path, tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str]
) -> Iterator[Callable[[Tensor], None]]:
    """Write a file of ``tensors``, their dtypes and shapes by name: call what is given with each tensor, in that order.

    Those of wider dtypes stand first, so that each tensor's place is a multiple of its element's size. Errors: ValueError where
    what is written is not what was announced.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES_OF[dtype].safetensors, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with durable_file(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        left = iter(tensors.items())

        def append(tensor: Tensor) -> None:
            name, (dtype, shape) = next(left)
            if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
                raise ValueError(
                    f"{path}: {name} was announced as {dtype} {list(shape)}, not {tensor.dtype} {list(tensor.shape)}"
                )
            file.write(bytes_of(tensor.detach().cpu()))

        yield append
        missing = [name for name, _ in left]
        if missing:
            raise ValueError(f"{path}: {', '.join(missing)} were announced and not written")


class TensorFile:
    """An existing file. Its header is read at once, tensors when asked for, on the CPU.

    Attributes:
        metadata: texts by name.
        shapes: of the tensors, by name.
    """

    def __init__(self, path: Path):
        """Errors: RankError where ``path`` is no such file, or is damaged or cut off."""
        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise RankError(f"{path} cannot be read as a safetensors file ({error}); use another checkpoint") from error
        self.metadata: dict[str, str] = self._file.metadata() or {}
        self.shapes = {name: tuple(self._file.get_slice(name).get_shape()) for name in self._file.keys()}  # noqa: SIM118

    def read(self, name: str) -> Tensor:
        """A whole tensor."""
        return self._file.get_tensor(name)

    def read_flat(self, name: str, start: int, size: int) -> Tensor:
        """``size`` elements of the flattened tensor from ``start`` on. Only the rows that have them are read."""
        shape = self.shapes[name]
        if not size or not shape:
            return self.read(name).view(-1)[start : start + size]
        row = math.prod(shape[1:])
        first, end = start // row, -(-(start + size) // row)
        return self._file.get_slice(name)[first:end].reshape(-1)[start - first * row :][:size]

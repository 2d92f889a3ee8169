"""Dtypes by all the names that files, ds_configs and flags have for them: the one table of them."""

from __future__ import annotations

from typing import NamedTuple

import torch


class DtypeNames(NamedTuple):
    """A dtype by its names.

    Attributes:
        dtype: torch's.
        safetensors: its code in a safetensors file.
        storage: the class that stands for its elements in a file of ``torch.save``.
        npy: its code in an ``.npy`` file; None: NumPy does not have it.
        short: what ds_configs and flags call it; None: they do not have it.
    """

    dtype: torch.dtype
    safetensors: str
    storage: type
    npy: str | None
    short: str | None = None

    @property
    def name(self) -> str:
        """Torch's own, such as ``float32``; ds_configs know it too."""
        return str(self.dtype).removeprefix("torch.")


DTYPES = (
    DtypeNames(torch.float64, "F64", torch.DoubleStorage, "<f8", "fp64"),
    DtypeNames(torch.float32, "F32", torch.FloatStorage, "<f4", "fp32"),
    DtypeNames(torch.float16, "F16", torch.HalfStorage, "<f2", "fp16"),
    DtypeNames(torch.bfloat16, "BF16", torch.BFloat16Storage, None, "bf16"),
    DtypeNames(torch.int64, "I64", torch.LongStorage, "<i8"),
    DtypeNames(torch.int32, "I32", torch.IntStorage, "<i4"),
    DtypeNames(torch.int16, "I16", torch.ShortStorage, "<i2"),
    DtypeNames(torch.int8, "I8", torch.CharStorage, "|i1"),
    DtypeNames(torch.uint8, "U8", torch.ByteStorage, "|u1"),
    DtypeNames(torch.bool, "BOOL", torch.BoolStorage, "|b1"),
)
NAMES_OF = {names.dtype: names for names in DTYPES}
# What a model may be trained and converted in, by the short names.
PRECISIONS: dict[str, torch.dtype] = {
    short: names.dtype for short in ("fp32", "bf16", "fp16") for names in DTYPES if names.short == short
}

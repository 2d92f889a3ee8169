"""Latents of a video VAE with text embeddings, from folders of safetensors and tars. docs/data.md describes the format."""

from __future__ import annotations

import logging
import os
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import torch

from megatron_dsp.data.data_error import DataError
from megatron_dsp.data.samples import Shape, padded_conditioning
from megatron_dsp.data.stored_tensors import FileState, StoredTensor, npy_header, safetensors_header
from megatron_dsp.dtypes import NAMES_OF

logger = logging.getLogger(__name__)

ACCEPTED = "a folder that holds *.safetensors or *.tar of latents, as docs/data.md describes them"
PARTS = ("latent", "text", "mask")
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
MASKS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class _Sample(NamedTuple):
    name: str
    file: FileState
    shape: Shape
    latent: StoredTensor
    text: StoredTensor | None
    mask: StoredTensor | None

    def __str__(self) -> str:
        return f"{self.file.path}: sample {self.name!r}"


class LatentShards:
    """All samples of the ``*.safetensors`` and ``*.tar`` of a folder (searched recursively), in the same order everywhere.

    Only headers are read here. Later each read takes from disk the frames that it is asked for.

    Args:
        folder: where the files are.
        latent_dims: the order of a latent's dims, "TCHW", or "CTHW" as many VAEs give it; [C, H, W] is an image in both.
        on_bad_file: a file that cannot be used is named in a warning and left out ("skip"), or raises ("refuse").
        conditioning_width: the width D of text tokens that the model takes. None: that of the first text that is found, or
            1 where there is no text.

    Raises ``DataError`` when no file remains, or samples differ in their channels.
    """

    def __init__(
        self,
        folder: Path,
        *,
        latent_dims: Literal["TCHW", "CTHW"] = "TCHW",
        on_bad_file: Literal["skip", "refuse"] = "refuse",
        conditioning_width: int | None = None,
    ) -> None:
        if latent_dims not in ("TCHW", "CTHW"):
            raise DataError(f"latent_dims={latent_dims!r} must be 'TCHW' or 'CTHW'")
        if on_bad_file not in ("skip", "refuse"):
            raise DataError(f"on_bad_file={on_bad_file!r} must be 'skip' or 'refuse'")
        if not folder.is_dir():
            raise DataError(f"there is no folder {folder}: give {ACCEPTED}")
        self._time_dim = latent_dims.index("T")
        self._samples: list[_Sample] = []
        width = conditioning_width
        for path in _files(folder):
            try:
                found = self._read_index(path)
                width = _text_width(found, width)
            except (ValueError, tarfile.TarError) as error:
                reason = f"{path} {error}"
                if on_bad_file == "refuse":
                    raise DataError(f"{reason}: repair it, remove it, or set on_bad_file to 'skip'") from error
                logger.warning("skipped a bad file: %s", reason)
            else:
                self._samples += found
        if not self._samples:
            raise DataError(f"no usable sample in {folder}: give {ACCEPTED}")
        for sample in self._samples:
            if sample.shape.channels != self._samples[0].shape.channels:
                raise DataError(
                    f"{sample} has {sample.shape.channels} channels, and {self._samples[0]} has "
                    f"{self._samples[0].shape.channels}: all must have equally many, so give latents of one VAE, and "
                    f"latent_dims in their order of dims (it is {latent_dims!r})"
                )
        self.conditioning_width = 1 if width is None else width
        self.conditioning_tokens = max([1, *(sample.text.shape[0] for sample in self._samples if sample.text is not None)])

    def __len__(self) -> int:
        return len(self._samples)

    def shape(self, index: int) -> Shape:
        """The size of a sample's latent ``[T, C, height, width]``."""
        return self._samples[index].shape

    def read(self, index: int, start: int, stop: int) -> torch.Tensor:
        """Frames ``start`` to ``stop`` of a latent ``[stop - start, C, height, width]``, in the dtype of the file.

        Raises ``ValueError`` when they are not all in the sample, ``DataError`` when the file is no longer what it was.
        """
        sample = self._samples[index]
        if not 0 <= start <= stop <= sample.shape.frames:
            raise ValueError(f"frames {start} to {stop} are not in {sample}, which has frames 0 to {sample.shape.frames}")
        return sample.latent.read(sample.file, self._time_dim, start, stop).transpose(0, self._time_dim)

    def conditioning(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The text of a sample, float32 ``[L, D]``, and which tokens are there, bool ``[L]``; L is that of the longest text.

        Raises ``DataError`` when a mask has other values than 0 and 1.
        """
        sample = self._samples[index]
        if sample.text is None:
            text, mask = torch.empty(0, self.conditioning_width), torch.empty(0, dtype=torch.bool)
        else:
            length = sample.text.shape[0]
            text = sample.text.read(sample.file, 0, 0, length)
            mask = torch.ones(length) if sample.mask is None else sample.mask.read(sample.file, 0, 0, length)
            if not ((mask == 0) | (mask == 1)).all():
                raise DataError(f"{sample} has a mask with values other than 0 and 1: a mask says which tokens are there")
        return padded_conditioning(text, mask.bool(), self.conditioning_tokens, self.conditioning_width)

    def _read_index(self, path: Path) -> list[_Sample]:
        """The samples of a file, sorted by name; ``ValueError`` or ``TarError`` when it cannot be used."""
        if path.name.endswith(COMPRESSED):
            raise ValueError("is compressed, so that no rank could read its own frames alone: unpack it to a .tar")
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            state = FileState(str(path), status.st_size, status.st_mtime_ns)
            tensors = _tar_index(file, state.size) if path.suffix == ".tar" else safetensors_header(file, 0, state.size)
        parts: dict[str, dict[str, StoredTensor | str]] = {}
        for key, tensor in tensors.items():
            name, _, part = key.rpartition(".")
            if part in PARTS:
                parts.setdefault(name, {})[part] = tensor
        if not parts:
            raise ValueError(f"has no latents: it holds {sorted(tensors)[:3] or 'nothing'}, not NAME.latent")
        return [self._sample(name, state, parts[name]) for name in sorted(parts)]

    def _sample(self, name: str, file: FileState, parts: Mapping[str, StoredTensor | str]) -> _Sample:
        if "latent" not in parts:
            raise ValueError(f"has no latent for sample {name!r}, which has {' and '.join(parts)}")
        if "mask" in parts and "text" not in parts:
            raise ValueError(f"has a mask and no text for sample {name!r}")
        latent = _check_tensor(name, "latent", parts["latent"], FLOATS, (3, 4))
        text = _check_tensor(name, "text", parts["text"], FLOATS, (2,)) if "text" in parts else None
        mask = _check_tensor(name, "mask", parts["mask"], MASKS, (1,)) if "mask" in parts else None
        if 0 in latent.shape:
            raise ValueError(f"has an empty latent for sample {name!r}: {list(latent.shape)}")
        if text is not None and mask is not None and mask.shape[0] != text.shape[0]:
            raise ValueError(f"has a mask of {mask.shape[0]} tokens and a text of {text.shape[0]} for sample {name!r}")
        if len(latent.shape) == 3:
            latent = latent._replace(shape=(*latent.shape[: self._time_dim], 1, *latent.shape[self._time_dim :]))
        shape = Shape(latent.shape[self._time_dim], latent.shape[1 - self._time_dim], *latent.shape[2:])
        return _Sample(name, file, shape, latent, text, mask)


def holds_latents(path: Path) -> bool:
    """Whether ``path`` is a folder with files that `LatentShards` takes or refuses by name."""
    return next(_unsorted_files(path), None) is not None


def _files(folder: Path) -> list[Path]:
    return sorted(_unsorted_files(folder), key=lambda path: path.relative_to(folder).as_posix())


def _unsorted_files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.name.endswith((".safetensors", ".tar", *COMPRESSED)) and path.is_file())


def _tar_index(file: BinaryIO, size: int) -> dict[str, StoredTensor | str]:
    """The arrays of the samples of an uncompressed tar, as ``NAME.latent``, ``NAME.text`` and ``NAME.mask``."""
    tensors: dict[str, StoredTensor | str] = {}

    def add(key: str, tensor: StoredTensor | str) -> None:
        if key in tensors:
            raise ValueError(f"has {key!r} twice")
        tensors[key] = tensor

    with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            start, stop = member.offset_data, member.offset_data + member.size
            if not start <= stop <= size:
                raise ValueError(f"is cut off in {member.name!r}")
            stem, _, suffix = member.name.rpartition(".")
            if suffix != "safetensors" and (suffix != "npy" or stem.rpartition(".")[2] not in PARTS):
                continue
            try:
                if not member.isreg() or member.sparse is not None:
                    raise ValueError("is a link or a sparse file, not a plain one")
                if suffix == "npy":
                    add(stem, npy_header(file, start, stop))
                else:
                    for part, tensor in safetensors_header(file, start, stop).items():
                        add(f"{stem}.{part}", tensor)
            except ValueError as error:
                raise ValueError(f"has a bad member: {member.name!r} {error}") from error
    # tarfile takes what is no header for the end, and so a damaged tar for one of fewer samples. Nothing but zeros ends a tar.
    file.seek(archive.offset)
    rest = file.read(tarfile.BLOCKSIZE)
    while rest and not any(rest):
        rest = file.read(tarfile.RECORDSIZE)
    if rest or archive.offset == size:
        raise ValueError(f"is cut off or damaged after byte {archive.offset}, or other tars are appended to it")
    return tensors


def _check_tensor(
    name: str, part: str, tensor: StoredTensor | str, dtypes: tuple[torch.dtype, ...], dims: tuple[int, ...]
) -> StoredTensor:
    if isinstance(tensor, str) or tensor.dtype not in dtypes:
        dtype = tensor if isinstance(tensor, str) else str(tensor.dtype)
        accepted = ", ".join(NAMES_OF[dtype].name for dtype in dtypes)
        raise ValueError(f"has a {part} of dtype {dtype} for sample {name!r}: it must be one of {accepted}")
    if len(tensor.shape) not in dims:
        wanted = {"latent": "4 dims, or 3 for an image", "text": "2 dims [tokens, width]", "mask": "1 dim [tokens]"}[part]
        raise ValueError(f"has a {part} of shape {list(tensor.shape)} for sample {name!r}: it must have {wanted}")
    return tensor


def _text_width(samples: list[_Sample], width: int | None) -> int | None:
    """The width of all texts so far; ``ValueError`` when these have another."""
    for sample in samples:
        if sample.text is not None:
            own = sample.text.shape[1]
            width = own if width is None else width
            if own != width:
                raise ValueError(
                    f"has a text of width {own} for sample {sample.name!r}: it must be {width}, as others or the model"
                )
    return width

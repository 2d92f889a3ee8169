"""One video file to one memory-mapped ``.npy`` of its frames, decoded once and then opened at once.

Any number of processes, on one host or on several that share the cache folder, may ask for the same file at the same
time: each writes its own temporary file and renames it into place when it is complete, so that a cache file is either
absent or whole. Processes that lose the race have decoded in vain, nothing worse.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import uuid
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.lib.format import open_memmap, write_array_header_1_0

from megatron_dsp.data.data_error import DataError
from megatron_dsp.errors import UsageError

# Part of every cache file's name: count it up when the same video would be stored as other bytes.
CACHE_VERSION = 1


def cached_frames(path: Path, *, height: int, width: int, cache: Path) -> np.memmap:
    """The frames of the video file ``path``, read-only uint8 ``[F, height, width, 3]`` (RGB), from the cache folder.

    The first call decodes the file; frames are turned as the file says, scaled until they cover ``height`` x ``width``
    pixels and cropped around their centre. A file that has changed (by its size or time) is decoded again.

    Raises ``DataError`` when the file is not a video, or is damaged or cut off. Containers whose index can be missing
    (``.mkv``, ``.webm``, ``.mpg``) may not show that they were cut off: what is left of them is then a shorter video.
    Raises ``UsageError`` when a file is to be decoded and PyAV is not there.
    """
    target = cache / _cache_name(path, height, width)
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        _build(path, target, height, width)
    try:
        return open_memmap(target, mode="r")
    except ValueError as error:
        raise OSError(f"damaged cache file {target} ({error}): delete it, it is built again") from error


def _cache_name(path: Path, height: int, width: int) -> str:
    path = path.resolve()
    status = path.stat()
    identity = (str(path), status.st_size, status.st_mtime_ns, height, width, CACHE_VERSION)
    digest = hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
    # The stem is for human readers; it is cut because file names are limited to 255 bytes.
    return f"{path.stem[:40]}-{height}x{width}-{digest}.npy"


def _build(path: Path, target: Path, height: int, width: int) -> None:
    # Here alone: what decodes no video runs without PyAV.
    if importlib.util.find_spec("av") is None:
        raise UsageError(f"{path} is a video file, and PyAV, which decodes them, is not installed: pip install av")
    from megatron_dsp.data.video_file import decode_images

    temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex}.partial")
    try:
        with temporary.open("xb") as file:
            _write_header(file, (0, height, width, 3))
            count = 0
            for image in decode_images(path, height, width):
                file.write(image.tobytes())
                count += 1
            if count == 0:
                raise DataError(f"{path} holds no frames")
            file.seek(0)
            _write_header(file, (count, height, width, 3))
            file.flush()
            os.fsync(file.fileno())
        # The first to finish wins: a host that has mapped its file would lose it, on NFS, if another took its place.
        if not target.exists():
            os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _write_header(file: BinaryIO, shape: tuple[int, ...]) -> None:
    """The header of an ``.npy``. NumPy pads it so that it keeps its length while the first dim grows."""
    write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})

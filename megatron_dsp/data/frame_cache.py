"""One video file to one memory-mapped ``.npy`` of its frames, decoded once and then opened at once.

Any number of processes, on one host or on several that share the cache folder, may ask for the same file at the same
time: each writes its own temporary file and renames it into place when it is complete, so that a cache file is either
absent or whole. Processes that lose the race have decoded in vain, nothing worse.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.lib.format import open_memmap, write_array_header_1_0

from megatron_dsp.data.data_error import DataError

# Part of every cache file's name: count it up when the same video would be stored as other bytes.
CACHE_VERSION = 1


def cached_frames(path: Path, *, height: int, width: int, cache: Path) -> np.memmap:
    """The frames of the video file ``path``, read-only uint8 ``[F, height, width, 3]`` (RGB), from the cache folder.

    The first call decodes the file; frames are turned as the file says, scaled until they cover ``height`` x ``width``
    pixels and cropped around their centre. A file that has changed (by its size or time) is decoded again.

    Raises ``DataError`` when the file is not a video, or is damaged or cut off. Containers whose index can be missing
    (``.mkv``, ``.webm``, ``.mpg``) may not show that they were cut off: what is left of them is then a shorter video.
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
    temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex}.partial")
    try:
        with temporary.open("xb") as file:
            _write_header(file, (0, height, width, 3))
            count = 0
            for image in _decode_images(path, height, width):
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


def _decode_images(path: Path, height: int, width: int) -> Iterator[np.ndarray]:
    """The frames of a video file one after another, uint8 ``[height, width, 3]``; a few are in memory at a time."""
    reformatter = VideoReformatter()
    try:
        with av.open(str(path.resolve()), metadata_errors="replace") as container:
            if not container.streams.video:
                raise DataError(f"{path} holds no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for packet in container.demux(stream):
                frames = packet.decode()
                # libav conceals missing parts and only marks what it made up.
                if packet.is_corrupt or any(frame.is_corrupt for frame in frames):
                    raise DataError(f"{path} is damaged or cut off")
                for frame in frames:
                    yield _fit_frame(frame, reformatter, height, width)
    except av.FFmpegError as error:
        raise DataError(f"{path} is not a readable video ({error.strerror})") from error


def _fit_frame(frame: av.VideoFrame, reformatter: VideoReformatter, height: int, width: int) -> np.ndarray:
    """The frame turned upright, scaled to cover ``height`` x ``width`` and cropped around its centre: uint8 RGB."""
    quarter_turns = round(frame.rotation / 90) % 4
    rows, columns = (height, width) if quarter_turns % 2 == 0 else (width, height)
    scale = max(rows / frame.height, columns / frame.width)
    scaled_rows, scaled_columns = max(rows, round(frame.height * scale)), max(columns, round(frame.width * scale))
    scaled = reformatter.reformat(
        frame,
        width=scaled_columns,
        height=scaled_rows,
        format="rgb24",
        interpolation=Interpolation.AREA if scale < 1 else Interpolation.BICUBIC,
        threads=1,
    ).to_ndarray()
    top, left = (scaled_rows - rows) // 2, (scaled_columns - columns) // 2
    return np.rot90(scaled[top : top + rows, left : left + columns], quarter_turns)

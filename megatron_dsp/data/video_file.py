"""The frames of one video file, decoded by PyAV."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from megatron_dsp.data.data_error import DataError


def decode_images(path: Path, height: int, width: int) -> Iterator[np.ndarray]:
    """The frames of a video file one after another, uint8 ``[height, width, 3]``; a few are in memory at a time.

    Raises ``DataError`` when the file is not a video, or is damaged or cut off.
    """
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

"""Clips: windows of consecutive frames over videos that lie on disk."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch

from megatron_dsp.data.data_error import DataError
from megatron_dsp.data.videos import Video

logger = logging.getLogger(__name__)


class Window(NamedTuple):
    """Where a clip lies: the index of its video, and its first frame there."""

    video: int
    start: int


class Clips:
    """All windows of ``frames`` consecutive frames that start every ``step`` frames of each video.

    ``step`` is ``frames`` by default, so that no two clips share a frame. Videos shorter than ``frames`` are named in
    a warning and left out; ``DataError`` when none remains. ``windows[index]`` says where a clip lies in ``videos``.
    """

    def __init__(self, videos: Sequence[Video], *, frames: int, step: int | None = None) -> None:
        step = frames if step is None else step
        if frames < 1 or step < 1:
            raise DataError(f"clips of frames={frames} that start every step={step} frames: both must be >= 1")
        for video in videos:
            if len(video.frames) < frames:
                logger.warning("skipped %s: it has %d frames, a clip takes %d", video.name, len(video.frames), frames)
        self.videos = [video for video in videos if len(video.frames) >= frames]
        if not self.videos:
            longest = max((len(video.frames) for video in videos), default=0)
            raise DataError(
                f"no video is long enough for clips of frames={frames}: the longest of {len(videos)} has {longest} "
                "frames; give longer videos or fewer frames"
            )
        self.frames = frames
        self.windows = [
            Window(index, start)
            for index, video in enumerate(self.videos)
            for start in range(0, len(video.frames) - frames + 1, step)
        ]

    def __len__(self) -> int:
        return len(self.windows)

    def read(self, index: int, start: int, stop: int) -> torch.Tensor:
        """Frames ``start`` to ``stop`` of clip ``index``: uint8 ``[stop - start, 3, height, width]``.

        Only these frames are read from disk. Raises ``ValueError`` when they are not all in ``0 .. frames``.
        """
        if not 0 <= start <= stop <= self.frames:
            raise ValueError(f"frames {start} to {stop} are not in a clip, which has frames 0 to {self.frames}")
        window = self.windows[index]
        part = self.videos[window.video].frames[window.start + start : window.start + stop]
        return torch.from_numpy(part.transpose(0, 3, 1, 2).copy())

    def split(self, fraction: float) -> tuple[Clips, Clips]:
        """Training clips and held-out validation clips that share no frame with them; the same at every call.

        The last clips of each video are held out, ``ceil(fraction * len(self))`` in total over all videos. Clips that
        overlap a held-out one are in neither part. Raises ``DataError`` when nothing remains for training.
        """
        if not 0 < fraction < 1:
            raise DataError(f"fraction={fraction} of the clips cannot be held out: it must be between 0 and 1")
        training: list[Window] = []
        validation: list[Window] = []
        seen = 0
        for _, group in groupby(self.windows, key=lambda window: window.video):
            windows = list(group)
            seen += len(windows)
            # Counted on the running total, so that many videos of few clips still give the right number together.
            kept = len(windows) - (math.ceil(seen * fraction) - len(validation))
            border = windows[kept].start if kept < len(windows) else math.inf
            training += [window for window in windows[:kept] if window.start + self.frames <= border]
            validation += windows[kept:]
        if not training:
            raise DataError(
                f"holding out fraction={fraction} of {len(self)} clips leaves none for training: "
                "give a smaller fraction, more videos, or clips of fewer frames"
            )
        return self._with_windows(training), self._with_windows(validation)

    def _with_windows(self, windows: list[Window]) -> Clips:
        part = copy.copy(self)
        part.windows = windows
        return part

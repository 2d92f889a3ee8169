"""Clips of pixels as a source of samples."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch

from megatron_dsp.data import draws
from megatron_dsp.data.clips import Clips
from megatron_dsp.data.samples import Shape


@dataclass(frozen=True)
class ClipSamples:
    """Clips, with pixels in -1 .. 1.

    There is no text with them. In its place stand ``conditioning_tokens`` tokens of ``conditioning_width``, which
    tell a clip from all others: its file, its position in the file, and as many more tokens as the file has (a number
    that differs between files, so that masks matter).
    """

    clips: Clips
    conditioning_tokens: int
    conditioning_width: int

    def __post_init__(self) -> None:
        if self.conditioning_tokens < 2:
            raise ValueError(
                f"conditioning_tokens={self.conditioning_tokens} must be >= 2: one for the file, one for the place"
            )
        if self.conditioning_width < 2 or self.conditioning_width % 2:
            raise ValueError(f"conditioning_width={self.conditioning_width} must be even: half sines, half cosines")

    def __len__(self) -> int:
        return len(self.clips)

    def shape(self, index: int) -> Shape:
        """The size of a clip ``[T, 3, height, width]``."""
        height, width, channels = self.clips.videos[self.clips.windows[index].video].frames.shape[1:]
        return Shape(self.clips.frames, channels, height, width)

    def read(self, index: int, start: int, stop: int) -> torch.Tensor:
        """Frames ``start`` to ``stop`` of a clip, float32 ``[stop - start, 3, height, width]`` in -1 .. 1."""
        return self.clips.read(index, start, stop).float() / 127.5 - 1

    def conditioning(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The made-up tokens of a clip, float32 ``[L, D]``, and which of them are valid, bool ``[L]``."""
        window = self.clips.windows[index]
        name = self.clips.videos[window.video].name
        identity = int.from_bytes(hashlib.sha256(name.encode(errors="surrogateescape")).digest()[:8], "big")
        valid = 2 + identity % (self.conditioning_tokens - 1)
        mask = torch.arange(self.conditioning_tokens) < valid
        tokens = draws.features(identity, (self.conditioning_tokens, self.conditioning_width))
        tokens[1] = _sinusoid(window.start, self.conditioning_width)
        return tokens * mask[:, None], mask


def _sinusoid(position: int, width: int) -> torch.Tensor:
    """The sinusoidal embedding of a frame's position, float32 ``[width]``, scaled to mean square 1 like other tokens."""
    half = width // 2
    angles = position * torch.exp(torch.arange(half, dtype=torch.float32) * (-math.log(10000) / half))
    return math.sqrt(2) * torch.cat((angles.sin(), angles.cos()))

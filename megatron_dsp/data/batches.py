"""Batches for video diffusion: pure functions of sample positions and of the frames that a rank holds."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from megatron_dsp.data import draws
from megatron_dsp.data.clips import Clips


@dataclass(frozen=True)
class VideoBatch:
    """``B`` samples on one rank, which holds ``T_r`` of their ``T`` raw frames; only the first two are sharded.

    A token frame is ``patch_time`` raw frames that the model makes one token of, so there are
    ``T_tokens = ceil(T / patch_time)``. Conditioning is what a text encoder would give: ``L`` tokens of width ``D``.
    """

    video: torch.Tensor  # float32 [T_r, B, 3, height, width], -1 .. 1
    noise: torch.Tensor  # float32 [T_r, B, 3, height, width], standard normal
    timesteps: torch.Tensor  # float32 [T_tokens, B], in (0, 1), 1 being noise alone; 0 for clean frames
    conditioning: torch.Tensor  # float32 [B, L, D], 0 where the mask is False
    conditioning_mask: torch.Tensor  # bool [B, L], which tokens are there
    conditioning_drop: torch.Tensor  # bool [B], which samples are trained on without conditioning

    def to(self, device: torch.device | str) -> VideoBatch:
        """The same batch on another device."""
        return VideoBatch(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


@dataclass(frozen=True, kw_only=True)
class VideoBatches:
    """Makes the batch of any samples and any frames of them, whatever was made before and on whichever rank.

    A sample is a position in the endless stream of samples: ``len(clips)`` positions are an epoch. ``seed`` fixes the
    order of the clips and everything that is drawn. A sample loses its conditioning with ``drop_probability`` and
    keeps some leading token frames clean with ``clean_frame_probability``.

    There is no text with the clips. In its place stand ``conditioning_tokens`` tokens of ``conditioning_width``, which
    tell a clip from all others: its file, its position in the file, and as many more tokens as the file has (a number
    that differs between files, so that masks matter).
    """

    clips: Clips
    seed: int
    patch_time: int
    drop_probability: float
    clean_frame_probability: float
    conditioning_tokens: int
    conditioning_width: int

    def __post_init__(self) -> None:
        if self.patch_time < 1:
            raise ValueError(f"patch_time={self.patch_time} must be >= 1: so many raw frames make one token frame")
        for name in ("drop_probability", "clean_frame_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in 0 .. 1")
        if self.conditioning_tokens < 2:
            raise ValueError(
                f"conditioning_tokens={self.conditioning_tokens} must be >= 2: one for the file, one for the place"
            )
        if self.conditioning_width < 2 or self.conditioning_width % 2:
            raise ValueError(f"conditioning_width={self.conditioning_width} must be even: half sines, half cosines")

    def batch(self, samples: Sequence[int], frames: range) -> VideoBatch:
        """The samples at these positions, with the raw frames ``frames`` of each (a part of ``0 .. clips.frames``)."""
        if frames.step != 1:
            raise ValueError(f"a rank holds consecutive frames, not {frames}: its step must be 1")
        if not samples:
            raise ValueError("a batch of no samples: give at least one sample position")
        indices = [draws.sample_order(sample, len(self.clips), self.seed) for sample in samples]
        pixels = torch.stack([self.clips.read(index, frames.start, frames.stop) for index in indices], dim=1)
        video = pixels.float() / 127.5 - 1
        noise = [draws.noise(self.seed, sample, frames, video.shape[2:]) for sample in samples]
        drops = [draws.drop(self.seed, sample, self.drop_probability) for sample in samples]
        conditioning, mask = zip(*(self._conditioning(index) for index in indices), strict=True)
        return VideoBatch(
            video=video,
            noise=torch.stack(noise, dim=1),
            timesteps=torch.stack([self._timesteps(sample) for sample in samples], dim=1),
            conditioning=torch.stack(conditioning),
            conditioning_mask=torch.stack(mask),
            conditioning_drop=torch.tensor(drops),
        )

    def _timesteps(self, sample: int) -> torch.Tensor:
        token_frames = math.ceil(self.clips.frames / self.patch_time)
        clean = draws.conditioned_frames(self.seed, sample, token_frames, self.clean_frame_probability)
        timesteps = torch.full((token_frames,), draws.timestep(self.seed, sample), dtype=torch.float32)
        timesteps[:clean] = 0
        return timesteps

    def _conditioning(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The conditioning tokens ``[L, D]`` of a clip and which of them are valid ``[L]``."""
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

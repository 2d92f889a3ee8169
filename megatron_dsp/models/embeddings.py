"""What enters and leaves a video transformer: patches, positions, diffusion times, conditioning tokens.

Activations are in storage order [T, B, S, C]: T token frames, B batch, S = h * w spatial tokens (row by row),
C hidden size. Positions are computed for the sizes at hand, so any number of frames and any resolution will do.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Space positions run over [0, SPACE_EXTENT) along both sides of an image, whatever its resolution: 32 is the number of
# tokens a side of a 512 x 512 image with patch 2 and 8-fold latents, Open-Sora's reference resolution.
SPACE_EXTENT = 32.0
LONGEST_WAVELENGTH = 10_000.0  # over 2 pi; the usual base of sinusoidal and rotary positions
TIMESTEP_SCALE = 1000.0  # diffusion time 1 is step 1000 of the usual sinusoidal embedding
TIMESTEP_CHANNELS = 256


def grid_size(height: int, width: int, patch: tuple[int, int, int]) -> tuple[int, int]:
    """Spatial tokens (rows h, columns w) of a frame of height x width pixels; a started patch counts as one."""
    return math.ceil(height / patch[1]), math.ceil(width / patch[2])


def patchify(video: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """Cut a video into flattened patches, zero-padded at the end of frames, height and width to whole patches.

    Args:
        video: [frames, B, channels, height, width].
        patch: size in frames, rows and columns.

    Returns:
        [T, B, S, channels * patch volume].
    """
    frames, batch, channels, height, width = video.shape
    depth, rows, columns = patch
    padding = (0, -width % columns, 0, -height % rows, 0, 0, 0, 0, 0, -frames % depth)
    video = F.pad(video, padding) if any(padding) else video
    h, w = grid_size(height, width, patch)
    token_frames = math.ceil(frames / depth)
    parts = video.reshape(token_frames, depth, batch, channels, h, rows, w, columns)
    return parts.permute(0, 2, 4, 6, 3, 1, 5, 7).reshape(token_frames, batch, h * w, channels * depth * rows * columns)


def unpatchify(patches: Tensor, patch: tuple[int, int, int], video_shape: torch.Size) -> Tensor:
    """The inverse of :func:`patchify` for a video of ``video_shape``; the padding is cropped."""
    frames, batch, channels, height, width = video_shape
    depth, rows, columns = patch
    h, w = grid_size(height, width, patch)
    token_frames = patches.shape[0]
    parts = patches.reshape(token_frames, batch, h, w, channels, depth, rows, columns)
    video = parts.permute(0, 5, 1, 4, 2, 6, 3, 7).reshape(token_frames * depth, batch, channels, h * rows, w * columns)
    return video[:frames, :, :, :height, :width]


def sinusoid(positions: Tensor, channels: int) -> Tensor:
    """Sine and cosine of positions [...] at channels / 2 geometric frequencies: [..., channels]."""
    angles = positions[..., None] * _frequencies(channels // 2, positions)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def space_positions(h: int, w: int, like: Tensor) -> Tensor:
    """Sinusoidal positions of an h x w grid of tokens: [S, C], for the C, dtype and device of ``like`` [..., C].

    Half of the channels tell the row, half the column. A place in the image has the same position at every resolution
    (as in Open-Sora's STDiT3, https://github.com/hpcaitech/Open-Sora).
    """
    channels = like.shape[-1]
    precision = torch.promote_types(like.dtype, torch.float32)
    rows = torch.arange(h, device=like.device, dtype=precision) * (SPACE_EXTENT / h)
    columns = torch.arange(w, device=like.device, dtype=precision) * (SPACE_EXTENT / w)
    grid = [
        sinusoid(rows, channels // 2)[:, None].expand(h, w, channels // 2),
        sinusoid(columns, channels // 2)[None].expand(h, w, channels // 2),
    ]
    return torch.cat(grid, dim=-1).flatten(0, 1).to(like.dtype)


def time_rotations(token_frames: int, head_dim: int, like: Tensor) -> Tensor:
    """Rotary positions of T token frames: cosines and sines, [T, 1, 1, 1, head_dim / 2, 2], in fp32 or fp64 precision."""
    precision = torch.promote_types(like.dtype, torch.float32)
    frames = torch.arange(token_frames, device=like.device, dtype=precision)
    angles = frames[:, None] * _frequencies(head_dim // 2, frames)
    return torch.stack((angles.cos(), angles.sin()), dim=-1)[:, None, None, None]


class TimestepEmbedding(nn.Module):
    """Diffusion times in [0, 1] -> sinusoid -> MLP."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIMESTEP_CHANNELS, hidden), nn.SiLU(), nn.Linear(hidden, hidden))

    def forward(self, timesteps: Tensor) -> Tensor:
        """Embed timesteps [T, B] as [T, B, C]."""
        dtype = next(self.parameters()).dtype
        # Half precision could not tell neighbouring steps apart.
        steps = timesteps.to(torch.promote_types(dtype, torch.float32)) * TIMESTEP_SCALE
        return self.mlp(sinusoid(steps, TIMESTEP_CHANNELS).to(dtype))


class ConditioningEmbedding(nn.Module):
    """Conditioning tokens [B, L, D] -> MLP -> [B, L, C], with a learned null token for unconditional samples."""

    def __init__(self, conditioning_size: int, hidden: int) -> None:
        super().__init__()
        self.null_token = nn.Parameter(torch.empty(conditioning_size))
        self.mlp = nn.Sequential(nn.Linear(conditioning_size, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, hidden))

    def forward(self, conditioning: Tensor, mask: Tensor, drop: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Embed the tokens; returns them [B, L, C] with the mask [B, L] (bool, True = attend) to use with them.

        A sample is unconditional if ``drop`` [B] (bool) says so, or if ``mask`` leaves it no token. Its tokens all
        become the null token and all are attended to, which gives exactly the null token's value and never NaN.
        """
        unconditional = ~mask.any(dim=1)
        if drop is not None:
            unconditional = unconditional | drop
        conditioning = conditioning.to(self.null_token.dtype)
        tokens = torch.where(unconditional[:, None, None], self.null_token, conditioning)
        return self.mlp(tokens), mask | unconditional[:, None]


def _frequencies(count: int, like: Tensor) -> Tensor:
    """``count`` geometric frequencies from 1 towards 1 / LONGEST_WAVELENGTH."""
    exponents = torch.arange(count, device=like.device, dtype=like.dtype) / count
    return LONGEST_WAVELENGTH**-exponents

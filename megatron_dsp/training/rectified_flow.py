"""Rectified flow on video: the training objective, and sampling by Euler steps (Liu et al., arXiv 2209.03003).

A frame at diffusion time t is ``(1 - t) * clean + t * noise``, and the model predicts its velocity ``noise - clean``.
Everything here works on a rank's own frames.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dsp.reshard import mean_loss


def frame_times(timesteps: Tensor, patch_time: int, frames: range) -> Tensor:
    """Diffusion times of the raw frames ``frames``, [T_r, B, 1, 1, 1], from those of all token frames, [T_tokens, B]."""
    return timesteps.repeat_interleave(patch_time, dim=0)[frames.start : frames.stop, :, None, None, None]


def add_noise(video: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """Frames at their diffusion times; clean ones (time 0) stay as they are. All [T_r, B, ...]."""
    return torch.lerp(video, noise, times)


def velocity_loss(
    velocity: Tensor, video: Tensor, noise: Tensor, times: Tensor, frames: int, active: Tensor, group: dist.ProcessGroup
) -> Tensor:
    """The mean over samples of each sample's mean squared velocity error over its frames that have noise.

    ``velocity``, ``video``, ``noise`` are this rank's frames [T_r, B, C, H, W], ``times`` theirs [T_r, B, 1, 1, 1],
    ``frames`` how many the whole clip has, ``active`` [B] how many of those have noise. A mean of means of samples does not
    depend on how samples are spread over micro-batches and ranks. The result is to be averaged over data x sequence.
    """
    error = (velocity.float() - (noise - video)).square().mean(dim=(2, 3, 4))
    weight = (times[:, :, 0, 0, 0] > 0) * (frames / active.clamp(min=1))
    return mean_loss(error * weight, group=group)


@torch.no_grad()
def sample(
    velocity: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    clean: Tensor,
    clean_tokens: int,
    token_frames: int,
    patch_time: int,
    frames: range,
    steps: int,
) -> Tensor:
    """Integrate from noise (time 1) to video (time 0) in ``steps`` equal Euler steps.

    ``velocity(x, timesteps)`` is the model on this rank's frames ``x`` [T_r, B, C, H, W] with the times [T_tokens, B] of all.
    The first ``clean_tokens`` token frames are given: they are taken from ``clean``, at time 0 throughout.
    """
    x = noise.clone()
    given = [index for index, frame in enumerate(frames) if frame // patch_time < clean_tokens]
    x[given] = clean[given]
    timesteps = torch.ones(token_frames, x.shape[1], device=x.device)
    timesteps[:clean_tokens] = 0
    for step in range(steps):
        v = velocity(x, timesteps * (1 - step / steps)).to(x.dtype)
        v[given] = 0
        x -= v / steps
    return x

"""Rectified flow on video: the training objective, and sampling by Euler steps (Liu et al., arXiv 2209.03003).

A frame at diffusion time t is ``(1 - t) * clean + t * noise``, and the model predicts its velocity ``noise - clean``.
Everything here works on a rank's own frames.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dsp.data.draws import shift_timestep
from megatron_dsp.reshard import mean_loss


def frame_times(timesteps: Tensor, patch_time: int, frames: range) -> Tensor:
    """Diffusion times of the raw frames ``frames``, [T_r, B, 1, 1, 1], from those of all token frames, [T_tokens, B]."""
    return timesteps.repeat_interleave(patch_time, dim=0)[frames.start : frames.stop, :, None, None, None]


def add_noise(video: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """Frames at their diffusion times; clean ones (time 0) stay as they are. All [T_r, B, ...]."""
    return torch.lerp(video, noise, times)


def frame_weights(times: Tensor, every: Tensor) -> Tensor:
    """How much each of a rank's frames counts in the loss, [T_r, B]: those of a sample that have noise alike, T together.

    ``times`` [T_r, B, 1, 1, 1] are those of the rank's frames, ``every`` [T, B, 1, 1, 1] those of all.
    """
    active = (every > 0).sum(dim=(0, 2, 3, 4))
    return (times[:, :, 0, 0, 0] > 0) * (len(every) / active.clamp(min=1))


def velocity_loss(velocity: Tensor, target: Tensor, weights: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The mean over samples of each sample's mean squared velocity error over its frames that have noise.

    ``velocity`` and its ``target``, noise - clean, are of this rank's frames [T_r, B, C, H, W], and so are ``weights`` [T_r, B]
    (`frame_weights`). A mean of means of samples does not depend on how samples are spread over micro-batches and ranks. The
    result is to be averaged over data x sequence.
    """
    error = (velocity.float() - target).square().mean(dim=(2, 3, 4))
    return mean_loss(error * weights, group=group)


def euler_times(steps: int, tokens: int, base_tokens: int | None) -> list[float]:
    """The ``steps + 1`` times of sampling, from 1 to 0: equally spaced, then shifted as in training."""
    return [shift_timestep(1 - step / steps, tokens, base_tokens) for step in range(steps + 1)]


def guided(velocity: Callable[[bool], Tensor], scale: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598): away from what the model predicts without conditioning.

    ``velocity(conditioned)`` is the model's. ``scale`` 1 is the conditioned prediction itself: the model runs once, not twice.
    """
    conditioned = velocity(True)
    return conditioned if scale == 1 else torch.lerp(velocity(False), conditioned, scale)


@torch.no_grad()
def sample(
    velocity: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    clean: Tensor,
    clean_tokens: int,
    token_frames: int,
    patch_time: int,
    frames: range,
    times: Sequence[float],
) -> Tensor:
    """Integrate from noise (time 1) to video (time 0) by Euler steps between ``times``.

    ``velocity(x, timesteps)`` is the model on this rank's frames ``x`` [T_r, B, C, H, W] with the times [T_tokens, B] of all.
    The first ``clean_tokens`` token frames are given: they are taken from ``clean``, at time 0 throughout.
    """
    x = noise.clone()
    given = [index for index, frame in enumerate(frames) if frame // patch_time < clean_tokens]
    x[given] = clean[given]
    timesteps = torch.ones(token_frames, x.shape[1], device=x.device)
    timesteps[:clean_tokens] = 0
    for now, then in itertools.pairwise(times):
        v = velocity(x, timesteps * now).to(x.dtype)
        v[given] = 0
        x -= v * (now - then)
    return x

"""The sizes of a video transformer, and which inputs fit them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dsp.errors import UsageError
from megatron_dsp.layout import shard_range
from megatron_dsp.models.attention import Over


@dataclass(frozen=True)
class VideoDiTConfig:
    """Sizes of a :class:`VideoDiT`.

    Attributes:
        layers: layer pairs; each is one spatial and one temporal block.
        hidden: channels of a token; a multiple of 4 (sine and cosine of two space positions).
        heads: attention heads; ``hidden / heads`` must be even (rotary positions turn pairs of channels).
        patch: frames, rows and columns of a token.
        channels: channels of the video (pixels or latents).
        conditioning_size: channels of a conditioning token.
        mlp_ratio: width of the MLPs over ``hidden``.
        qk_norm: normalise the queries and keys of self-attention.
        full_attention_every: of every so many layer pairs, the last one's temporal block attends over all tokens of all frames;
            None: none does.
    """

    layers: int
    hidden: int
    heads: int
    conditioning_size: int
    patch: tuple[int, int, int] = (1, 2, 2)
    channels: int = 3
    mlp_ratio: float = 4.0
    qk_norm: bool = True
    full_attention_every: int | None = None

    @property
    def patch_channels(self) -> int:
        """Values of a token before it is embedded."""
        return self.channels * math.prod(self.patch)

    @property
    def block_dims(self) -> list[Over]:
        """What each block attends over, in the order in which they run."""
        every = self.full_attention_every
        pairs: list[tuple[Over, Over]] = [
            ("space", "all" if every is not None and pair % every == 0 else "time") for pair in range(1, self.layers + 1)
        ]
        return [over for pair in pairs for over in pair]

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "heads", "conditioning_size", "channels", "mlp_ratio"):
            if getattr(self, name) <= 0:
                raise UsageError(f"{name}={getattr(self, name)} must be greater than 0")
        if len(self.patch) != 3 or min(self.patch) < 1:
            raise UsageError(f"patch={self.patch} must be three sizes of at least 1: frames, rows, columns")
        if self.hidden % 4:
            raise UsageError(f"hidden={self.hidden} must be a multiple of 4, for sinusoidal positions in space")
        if self.hidden % (2 * self.heads):
            raise UsageError(
                f"hidden={self.hidden} over heads={self.heads} must give an even head size, for rotary positions: "
                f"choose hidden as a multiple of {2 * self.heads}"
            )
        if self.full_attention_every is not None and self.full_attention_every < 1:
            raise UsageError(f"full_attention_every={self.full_attention_every} must be at least 1, or None")


def check_inputs(
    config: VideoDiTConfig,
    group: ProcessGroup | None,
    video: Tensor,
    timesteps: Tensor,
    conditioning: Tensor,
    mask: Tensor,
    drop: Tensor | None,
) -> None:
    """Refuse arguments of `VideoDiT.forward` that do not fit the config or each other, with its errors."""
    if video.ndim != 5 or video.shape[2] != config.channels:
        raise UsageError(
            f"video has shape {tuple(video.shape)}; it must be [frames, batch, {config.channels} channels, "
            "height, width], with the channels of the config"
        )
    batch = video.shape[1]
    if timesteps.ndim != 2 or timesteps.shape[1] != batch:
        raise UsageError(
            f"timesteps have shape {tuple(timesteps.shape)}; they must be "
            f"[token frames of the whole clip, {batch}] for this batch"
        )
    size = config.conditioning_size
    if conditioning.ndim != 3 or conditioning.shape[::2] != (batch, size) or conditioning.shape[1] == 0:
        raise UsageError(
            f"conditioning has shape {tuple(conditioning.shape)}; it must be [{batch}, tokens, {size}] with at "
            "least one token: for samples without any, pass one and mask it"
        )
    for name, tensor, shape in (("mask", mask, conditioning.shape[:2]), ("drop", drop, conditioning.shape[:1])):
        if tensor is not None and (tensor.shape != shape or tensor.dtype != torch.bool):
            raise UsageError(
                f"conditioning_{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; it must be bool of shape {tuple(shape)}"
            )
    frames, token_frames, depth = video.shape[0], timesteps.shape[0], config.patch[0]
    start, stop = (0, token_frames) if group is None else shard_range(token_frames, group.size(), group.rank())
    most = (stop - start) * depth
    least = most - depth + 1 if start < stop == token_frames else most
    if not least <= frames <= most:
        raise ValueError(
            f"video has {frames} frames, but {stop - start} of the clip's {token_frames} token frames (of {depth} "
            f"frames each) belong here: give it {least} to {most} frames, or timesteps for other token frames"
        )

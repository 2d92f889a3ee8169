"""Floating-point operations of the video transformer, counted from its sizes."""

from __future__ import annotations

import math

from megatron_dsp.models.embeddings import TIMESTEP_CHANNELS, grid_size
from megatron_dsp.models.video_dit_config import VideoDiTConfig


def forward_flops(config: VideoDiTConfig, *, frames: int, height: int, width: int, conditioning_tokens: int, batch: int) -> int:
    """FLOPs of `VideoDiT`'s forward pass over ``batch`` whole clips: of matrix products and attention alone.

    A multiplication with its addition is 2 FLOPs, as in appendix B of PaLM (arXiv 2204.02311) and in
    ``torch.utils.flop_counter``. Norms, activations, positions and whatever else works element by element are not counted.
    The padding of started patches, and conditioning tokens that a mask leaves out, are counted: they are computed.

    Args:
        frames, height, width: of a clip in frames and pixels (or latents), before it is cut into patches.
        conditioning_tokens: of a sample, with those that its mask leaves out.
        batch: samples.
    """
    h, w = grid_size(height, width, config.patch)
    space, time = h * w, math.ceil(frames / config.patch[0])
    tokens, token_frames, conditioning = batch * time * space, batch * time, batch * conditioning_tokens
    hidden, inner = config.hidden, int(config.hidden * config.mlp_ratio)

    patches = 2 * tokens * config.patch_channels * hidden  # the patch embedding, and the head
    diffusion_time = token_frames * (TIMESTEP_CHANNELS * hidden + hidden * hidden + hidden * 6 * hidden)  # its MLP, modulation
    conditioning_mlp = conditioning * (config.conditioning_size * hidden + hidden * hidden)

    # Of a block: four projections of self-attention and two of cross-attention, the MLP; keys and values of the conditioning.
    linears = tokens * (6 * hidden * hidden + 2 * hidden * inner) + conditioning * 2 * hidden * hidden
    # Scores and weighted values, of a token with those that a block's two attentions let it see.
    seen = {"space": space, "time": time, "all": time * space}
    attention = sum(2 * tokens * hidden * (seen[over] + conditioning_tokens) for over in config.block_dims)
    products = patches + diffusion_time + conditioning_mlp + 2 * config.layers * linears + attention
    return 2 * products

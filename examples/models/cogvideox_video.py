"""CogVideoX's transformer, whose blocks attend over all of a text and a video at once, with the video's tokens sharded.

    python examples/models/cogvideox_video.py
    torchrun --standalone --nproc_per_node 2 examples/models/cogvideox_video.py
    deepspeed --num_gpus 2 examples/models/cogvideox_video.py

The model is the `CogVideoXTransformer3DModel` of diffusers, unmodified, on a video of N tokens and a text of L. No sequence
dim is left to shard in joint attention, but heads are: each attention takes one switch of queries, keys and values to heads,
and one back. The text is whole on every rank: its heads are split before attention and gathered after it. There are three
heads: uneven shards on two ranks, and on four one rank has none. The tables of rotary positions, a tuple, are sliced.
"""

from __future__ import annotations

from typing import Any

import torch
from common import add_noise, run
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed

import megatron_dsp as dsp
from megatron_dsp import launch

CHANNELS, PATCH, TEXT, HEAD = 4, 2, 12, 16


def make_model() -> CogVideoXTransformer3DModel:
    model = CogVideoXTransformer3DModel(
        num_attention_heads=3,
        attention_head_dim=HEAD,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        time_embed_dim=8,
        text_embed_dim=TEXT,
        num_layers=2,
        patch_size=PATCH,
        max_text_seq_length=6,
        use_rotary_positional_embeddings=True,
    )
    return add_noise(model)


def make_inputs(B: int = 2, T: int = 3, H: int = 5, W: int = 7) -> dict[str, Any]:
    """Latents of ``T`` frames of ``H`` x ``W`` patches, diffusion times, embedded texts, and rotary tables of all positions."""
    return {
        "hidden_states": torch.randn(B, T, CHANNELS, PATCH * H, PATCH * W),
        "timestep": torch.randint(1000, (B,)),
        "encoder_hidden_states": torch.randn(B, 6, TEXT),
        "image_rotary_emb": get_3d_rotary_pos_embed(HEAD, ((0, 0), (H, W)), (H, W), T),
    }


def make_plan(model: CogVideoXTransformer3DModel) -> dsp.Plan:
    rotary = {("image_rotary_emb", item): dsp.Slice("N D") for item in (0, 1)}
    needs = {"activation": "hidden_states", "outputs": {0: "B N C"}}  # output 1 is the text
    return dsp.Plan(
        shard="N",
        enter=dsp.Boundary("transformer_blocks.0", {"hidden_states": "B N C"}),
        leave=dsp.Boundary("norm_final", {0: "B N C"}),
        modules={
            "transformer_blocks.*": dsp.Needs("B N C", arguments=rotary, **needs),
            "transformer_blocks.*.attn1": dsp.Needs("B N C", attention="B heads L+N D", **needs),
        },
    )


if __name__ == "__main__":
    launch.run(lambda: run(make_model, make_inputs, make_plan))

"""Latte's transformer over video latents: frames are sharded in spatial blocks and between them, patches in temporal ones.

    python examples/models/latte_video.py
    torchrun --standalone --nproc_per_node 2 examples/models/latte_video.py
    deepspeed --num_gpus 2 examples/models/latte_video.py

The model is the `LatteTransformer3DModel` of diffusers, unmodified. Its blocks take turns on [(B T), S, C] and
[(B S), T, C], and it reshapes between them, so the plan is around: each temporal block takes two switches. The text and the
timestep come repeated for each frame, or for each patch, and are sliced. Before the first temporal block the model adds a table
of positions in time to frames that are sharded: there it finds that of the rank's frames.
"""

from __future__ import annotations

import torch
from common import add_noise, run
from diffusers import LatteTransformer3DModel

import megatron_dsp as dsp
from megatron_dsp import launch

CHANNELS, PATCH, TEXT = 4, 2, 12


def make_model(T: int = 7) -> LatteTransformer3DModel:
    """For videos of ``T`` frames, which the model fixes."""
    model = LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        sample_size=8,
        patch_size=PATCH,
        cross_attention_dim=16,
        caption_channels=TEXT,
        norm_type="ada_norm_single",
        num_embeds_ada_norm=1000,
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        activation_fn="gelu-approximate",
        attention_bias=True,
        video_length=T,
    )
    return add_noise(model)


def make_inputs(B: int = 2, T: int = 7, H: int = 4, W: int = 5) -> dict[str, torch.Tensor]:
    """Latents of ``T`` frames of ``H`` x ``W`` patches, diffusion times, and embedded texts."""
    return {
        "hidden_states": torch.randn(B, CHANNELS, T, PATCH * H, PATCH * W),
        "timestep": torch.randint(1000, (B,)),
        "encoder_hidden_states": torch.randn(B, 5, TEXT),
    }


def make_plan(model: LatteTransformer3DModel) -> dsp.Plan:
    return dsp.Plan(
        shard="T",
        sizes=dsp.Boundary("", {"hidden_states": "B channels T height width"}),
        enter=dsp.Boundary("transformer_blocks.0", {"hidden_states": "(B T) S C"}),
        leave=dsp.Boundary("norm_out", {0: "(B T) S C"}),
        modules={
            "transformer_blocks.*": dsp.Needs(
                "(B T) S C",
                whole="S",
                arguments={"encoder_hidden_states": dsp.Slice("(B T) L C"), "timestep": dsp.Slice("(B T) D")},
            ),
            "temporal_transformer_blocks.*": dsp.Needs("(B S) T C", whole="T", arguments={"timestep": dsp.Slice("(B S) D")}),
        },
        attributes={"": {"temp_pos_embed": dsp.Slice("1 T C")}},
        independent="B",
    )


if __name__ == "__main__":
    launch.run(lambda: run(make_model, make_inputs, make_plan))

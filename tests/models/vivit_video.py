"""ViViT of transformers, which attends over all of space and time; written as an example is."""

from __future__ import annotations

import torch
from common import add_noise
from transformers import VivitConfig, VivitModel

import megatron_dsp as dsp

PATCH = 4


def make_model(T: int = 5, side: int = 5, attention: str = "sdpa") -> VivitModel:
    config = VivitConfig(
        image_size=PATCH * side,
        num_frames=T,
        tubelet_size=[1, PATCH, PATCH],
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=32,
        attn_implementation=attention,
    )
    return add_noise(VivitModel(config, add_pooling_layer=False))


def make_inputs(B: int = 2, T: int = 5, side: int = 5) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(B, T, 3, PATCH * side, PATCH * side)}


def make_plan(model: VivitModel) -> dsp.Plan:
    return dsp.Plan(
        shard="N",
        enter=dsp.Boundary("layers.0", {0: "B 1+N C"}),
        leave=dsp.Boundary("layernorm", {0: "B 1+N C"}),
        modules={"layers.*.attention": dsp.Needs("B 1+N C", attention="B heads 1+N D", outputs={0: "B 1+N C"})},
    )

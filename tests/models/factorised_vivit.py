"""ViViT of vit-pytorch with factorised self-attention; written as an example is."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from common import add_noise
from torch import nn

import megatron_dsp as dsp

PATCH, CHANNELS = 4, 3


def make_model(T: int = 7, side: int = 5) -> nn.Module:
    # Without its package, which imports torchvision for other models.
    package = importlib.util.find_spec("vit_pytorch")
    spec = importlib.util.spec_from_file_location("vivit", Path(package.origin).with_name("vivit.py"))
    vivit = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(vivit)
    model = vivit.ViViT(
        image_size=PATCH * side,
        image_patch_size=PATCH,
        frames=T,
        frame_patch_size=1,
        num_classes=5,
        dim=16,
        spatial_depth=2,
        temporal_depth=2,
        heads=2,
        dim_head=8,
        mlp_dim=24,
        channels=CHANNELS,
        variant="factorized_self_attention",
        pool="mean",
    )
    return add_noise(model)


def make_inputs(B: int = 2, T: int = 7, side: int = 5) -> dict[str, torch.Tensor]:
    """Videos, and which of their frames are to be seen."""
    mask = torch.arange(B * T).view(B, T) % 3 > 0
    return {"video": torch.randn(B, CHANNELS, T, PATCH * side, PATCH * side), "mask": mask}


def make_plan(model: nn.Module) -> dsp.Plan:
    layers, grid = "factorized_transformer.layers", {0: "B T S C"}
    return dsp.Plan(
        shard="T",
        enter=dsp.Boundary("factorized_transformer", grid),
        leave=dsp.Boundary("factorized_transformer", grid, after=True),
        modules={
            f"{layers}.*.0": dsp.Needs("(B T) S C", whole="S"),
            f"{layers}.*.1": dsp.Needs("(B S) T C", whole="T", arguments={"mask": dsp.Slice("(B S) T")}),
        },
    )

"""The name map of diffusers' LatteTransformer3DModel: against that model itself, in fp64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from megatron_dsp.checkpoint.convert import convert
from megatron_dsp.checkpoint.formats.source import Target
from megatron_dsp.checkpoint.name_map import read_name_map
from megatron_dsp.models.video_dit import VideoDiT, VideoDiTConfig

pytestmark = pytest.mark.models

HEADS, HIDDEN, DEPTH, CHANNELS, TEXT, SIDE = 3, 24, 2, 4, 20, 64
CONFIG = VideoDiTConfig(DEPTH, HIDDEN, HEADS, TEXT, channels=CHANNELS, qk_norm=False)


@pytest.fixture(scope="module")
def latte() -> nn.Module:
    """As Latte-1 is made, but smaller, with weights of a size at which each matters."""
    from diffusers import LatteTransformer3DModel

    torch.manual_seed(0)
    model = LatteTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HIDDEN // HEADS,
        in_channels=CHANNELS,
        out_channels=2 * CHANNELS,
        num_layers=DEPTH,
        cross_attention_dim=HIDDEN,
        attention_bias=True,
        sample_size=SIDE,
        patch_size=2,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=TEXT,
        video_length=3,
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    return model.eval()


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory, latte: nn.Module) -> Path:
    """What ``convert`` makes of the folder that ``save_pretrained`` writes."""
    folder = tmp_path_factory.mktemp("latte")
    latte.save_pretrained(folder / "published")
    convert(folder / "published", folder / "ours", saver="safetensors", target=Target(), name_map=read_name_map("latte"))
    return folder / "ours"


def _computed(latte: nn.Module, ours: Path, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What ours and theirs compute of a video of one sample, [1, channels, frames, height, width]."""
    model = VideoDiT(CONFIG).double()
    model.load_state_dict(load_file(ours / "model.safetensors"))
    generator = torch.Generator().manual_seed(1)
    video = torch.randn(1, CHANNELS, frames, SIDE, SIDE, generator=generator, dtype=torch.float64)
    text = torch.randn(1, 5, TEXT, generator=generator, dtype=torch.float64)
    t = torch.tensor([300.0])
    with torch.no_grad():
        theirs = latte.double()(video, t, text, return_dict=False)[0][:, :CHANNELS]
        times, mask = (t / 1000).double().expand(frames, 1), torch.ones(1, 5, dtype=torch.bool)
        found = model(video.permute(2, 0, 1, 3, 4), times, text, mask)
    return found.permute(1, 2, 0, 3, 4), theirs


def test_one_frame_is_the_same(latte, ours):
    found, theirs = _computed(latte, ours, frames=1)
    # diffusers computes its positions and the embedding of times in fp32.
    torch.testing.assert_close(found, theirs, rtol=0, atol=3e-5 * float(theirs.abs().max()))


def test_of_more_frames_they_differ_as_is_said(latte, ours):
    found, theirs = _computed(latte, ours, frames=3)
    assert (found - theirs).abs().max() > 0.01 * theirs.abs().max()
    notes = json.loads((ours / "imported.json").read_text())["notes"]
    assert any("for one frame alone" in note for note in notes)


def test_a_temporal_block_is_the_same_without_positions(latte, ours):
    """Its self-attention without rotations, its cross-attention that gives 0, and its MLP."""
    model = VideoDiT(CONFIG).double()
    model.load_state_dict(load_file(ours / "model.safetensors"))
    latte = latte.double()
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 1, 5, HIDDEN, generator=generator, dtype=torch.float64)  # [T, B, S, C]
    modulation = torch.randn(1, 6, HIDDEN, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        theirs = latte.temporal_transformer_blocks[1](x[:, 0].transpose(0, 1), timestep=modulation.flatten(1).expand(5, -1))
        swapped, half = x.roll(HIDDEN // 2, -1), modulation.roll(HIDDEN // 2, -1).flatten(1)
        tokens, mask = torch.ones(1, 2, HIDDEN, dtype=torch.float64), torch.ones(1, 2, dtype=torch.bool)
        found = model.temporal_blocks[1](swapped, half[None].expand(3, -1, -1), tokens, mask)
    torch.testing.assert_close(found[:, 0].transpose(0, 1).roll(HIDDEN // 2, -1), theirs, rtol=1e-12, atol=1e-12)

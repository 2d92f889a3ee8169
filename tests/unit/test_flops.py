"""The FLOPs counted from sizes against those that torch counts while the model runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_dsp.models.flops import forward_flops
from megatron_dsp.models.video_dit import PRESETS, VideoDiT, VideoDiTConfig
from megatron_dsp.training.device_peaks import peak_tflops

# No two sizes are equal, patches are started and not filled, and attention is a large part of the whole.
UNEVEN = VideoDiTConfig(layers=2, hidden=24, heads=3, conditioning_size=10, patch=(2, 3, 2), channels=2, mlp_ratio=2.5)


@pytest.mark.parametrize(
    ("config", "frames", "height", "width", "conditioning_tokens", "batch"),
    [
        (PRESETS["tiny"], 8, 32, 48, 4, 2),
        (UNEVEN, 7, 31, 27, 5, 3),
        (replace(UNEVEN, full_attention_every=2), 7, 31, 27, 5, 3),
    ],
    ids=["tiny", "uneven", "full attention"],
)
def test_flops_are_those_that_torch_counts(config, frames, height, width, conditioning_tokens, batch):
    model = VideoDiT(config)
    token_frames = -(-frames // config.patch[0])
    inputs = (
        torch.randn(frames, batch, config.channels, height, width),
        torch.rand(token_frames, batch),
        torch.randn(batch, conditioning_tokens, config.conditioning_size),
        torch.ones(batch, conditioning_tokens, dtype=torch.bool),
    )
    # torch's counter does not know the flash kernel of CPUs; the math kernel is two matrix products, which it counts.
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            loss = model(*inputs).square().mean()
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    counted = forward_flops(
        config, frames=frames, height=height, width=width, conditioning_tokens=conditioning_tokens, batch=batch
    )
    assert counted == forward.get_total_flops()
    # The convention, twice the forward's: the video needs no gradient, so the first product's is not computed.
    assert forward.get_total_flops() + backward.get_total_flops() == pytest.approx(3 * counted, rel=0.01)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L40", None),
        ("NVIDIA A10", None),
        ("NVIDIA H20", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)
def test_peaks_are_those_of_the_named_gpu(name, peak):
    assert peak_tflops(name) == peak

"""The norms of the models: NVIDIA apex's fused kernels on GPUs where they are installed, torch's otherwise.

In a compiled graph they are torch's, which the compiler fuses with what stands around them.
"""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-6

# The extension tells: PyPI has an unrelated package named apex.
HAS_APEX = importlib.util.find_spec("fused_layer_norm_cuda") is not None
if HAS_APEX:
    from apex.normalization.fused_layer_norm import fused_layer_norm, fused_rms_norm_affine


def layer_norm(x: Tensor) -> Tensor:
    """Layer norm over the channels of x [..., channels], without weights."""
    if _use_fused(x):
        return fused_layer_norm(x, x.shape[-1:], EPSILON)
    return F.layer_norm(x, x.shape[-1:], eps=EPSILON)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMS norm (arXiv 1910.07467) over the channels of x [..., channels], times ``weight`` [channels], both of one dtype."""
    if _use_fused(x):
        return fused_rms_norm_affine(x, weight, x.shape[-1:], EPSILON)
    return F.rms_norm(x, x.shape[-1:], weight, EPSILON)


def _use_fused(x: Tensor) -> bool:
    # apex's kernels cannot be launched for an empty tensor, which a rank with an empty shard has.
    return HAS_APEX and x.is_cuda and x.numel() > 0 and not torch.compiler.is_compiling()

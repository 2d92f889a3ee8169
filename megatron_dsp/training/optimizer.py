"""AdamW and its learning rate, and whose kernels train a model."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from megatron_dsp.models import norms


def has_apex_multi_tensor() -> bool:
    """Whether NVIDIA apex with its CUDA extensions is installed. PyPI's ``apex`` is an unrelated package without them."""
    return importlib.util.find_spec("amp_C") is not None


def apex_extensions() -> dict[str, bool]:
    """NVIDIA apex's CUDA extensions that are used where they are installed, and whether they are."""
    return {"fused_layer_norm_cuda": norms.HAS_APEX, "amp_C": has_apex_multi_tensor()}


def adamw(
    parameters: Iterable[nn.Parameter],
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    device: torch.device,
) -> torch.optim.Optimizer:
    """AdamW: NVIDIA apex's FusedAdam on CUDA where apex is really there, torch's (fused on CUDA) otherwise."""
    if device.type == "cuda" and has_apex_multi_tensor():
        from apex.optimizers import FusedAdam

        return FusedAdam(parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, adam_w_mode=True)
    return torch.optim.AdamW(parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=device.type == "cuda")


def kernels(optimizer: torch.optim.Optimizer, device: torch.device) -> str:
    """For the log: whose norms and optimizer train a model on ``device``, and what NVIDIA apex's would need."""
    norms_of = "apex" if device.type == "cuda" and norms.HAS_APEX else "torch"
    chosen = f"norms of {norms_of}, {type(optimizer).__name__} of {type(optimizer).__module__.partition('.')[0]}"
    if device.type != "cuda":
        return f"{chosen}: NVIDIA apex's are for GPUs"
    missing = " and ".join(extension for extension, found in apex_extensions().items() if not found)
    return f"{chosen}: NVIDIA apex's need its CUDA extensions, {missing} not found" if missing else chosen


def warmup_cosine(optimizer: torch.optim.Optimizer, *, lr: float, min_lr: float, warmup: int, total: int) -> LambdaLR:
    """Linear warm-up over ``warmup`` iterations, then a half cosine down to ``min_lr`` at iteration ``total``."""

    def factor(iteration: int) -> float:
        if iteration < warmup:
            return (iteration + 1) / warmup
        progress = min(1.0, (iteration - warmup) / max(1, total - warmup))
        return (min_lr + (lr - min_lr) * (1 + math.cos(math.pi * progress)) / 2) / lr if lr else 0.0

    return LambdaLR(optimizer, factor)

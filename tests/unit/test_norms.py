"""Where NVIDIA apex's kernels are used, and that torch's are where they are not; tests/gpu compares the two."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_dsp.models import norms
from megatron_dsp.models.attention import HeadNorm
from megatron_dsp.models.video_dit import modulated_norm
from megatron_dsp.tensor import TensorParallel
from megatron_dsp.training import optimizer as optimizers

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def apex(monkeypatch) -> list[str]:
    """Stand-ins for apex's kernels, as if it were installed; the calls of them."""
    calls: list[str] = []

    def layer_norm(x, shape, eps):
        calls.append(f"layer norm {tuple(shape)} {eps}")
        return torch.empty_like(x)

    def rms_norm(x, weight, shape, eps):
        calls.append(f"RMS norm {tuple(shape)} {eps}")
        return torch.empty_like(x)

    monkeypatch.setattr(norms, "HAS_APEX", True)
    monkeypatch.setattr(norms, "fused_layer_norm", layer_norm, raising=False)
    monkeypatch.setattr(norms, "fused_rms_norm_affine", rms_norm, raising=False)
    return calls


def both_norms(*shape: int, device: torch.device) -> None:
    norms.layer_norm(torch.empty(shape, device=device))
    norms.rms_norm(torch.empty(shape, device=device), torch.empty(shape[-1], device=device))


def test_the_models_norms_are_torchs_on_the_cpu(apex):
    x, weight = torch.randn(3, 2, 4, 6), torch.randn(6)
    norm = HeadNorm(6, TensorParallel())
    with torch.no_grad():
        norm.weight.copy_(weight)
    shift, scale = torch.randn(2, 3, 2, 1, 6)
    # By what they mean, not by torch's own functions.
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift
    torch.testing.assert_close(modulated_norm(x, shift, scale), expected)
    torch.testing.assert_close(norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight)
    assert torch.equal(norms.layer_norm(x), F.layer_norm(x, (6,), eps=1e-6))
    assert torch.equal(norms.rms_norm(x, weight), F.rms_norm(x, (6,), weight, 1e-6))
    assert not apex


def test_the_norms_are_apexs_on_gpus(apex):
    with FakeTensorMode():
        both_norms(3, 2, 6, device=CUDA)
        assert apex == ["layer norm (6,) 1e-06", "RMS norm (6,) 1e-06"]
        both_norms(0, 2, 6, device=CUDA)  # its kernels cannot be launched for that
    assert len(apex) == 2


def test_a_compiled_graph_has_torchs_norms(apex, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with FakeTensorMode():
        both_norms(3, 2, 6, device=CUDA)
    assert not apex


@pytest.mark.skipif(norms.HAS_APEX, reason="NVIDIA apex is installed here")
def test_without_apex_the_norms_are_torchs_on_gpus():
    with FakeTensorMode():
        both_norms(3, 2, 6, device=CUDA)


def adamw(device: torch.device) -> torch.optim.Optimizer:
    parameters = [torch.nn.Parameter(torch.ones(2))]
    return optimizers.adamw(parameters, lr=0.1, weight_decay=0.3, betas=(0.8, 0.9), eps=1e-7, device=device)


@pytest.mark.parametrize("found", [False, True])
@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_adamw_is_apexs_on_gpus_where_its_extension_is(monkeypatch, device, found):
    class FusedAdam(torch.optim.SGD):
        def __init__(self, parameters, **options):
            super().__init__(parameters, lr=options["lr"])
            self.options = options

    monkeypatch.setitem(sys.modules, "apex", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "apex.optimizers", SimpleNamespace(FusedAdam=FusedAdam))
    monkeypatch.setattr(optimizers, "has_apex_multi_tensor", lambda: found)
    optimizer = adamw(device)
    if found and device == CUDA:
        # AdamW, and not without the decay: apex's own default is 0.
        assert optimizer.options == {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-7, "weight_decay": 0.3, "adam_w_mode": True}
        return
    assert type(optimizer) is torch.optim.AdamW
    group = optimizer.param_groups[0]
    assert [group[key] for key in ("lr", "betas", "eps", "weight_decay")] == [0.1, (0.8, 0.9), 1e-7, 0.3]
    assert group["fused"] == (device == CUDA)


@pytest.mark.parametrize(
    ("device", "found", "sentence"),
    [
        (CPU, (True, True), "norms of torch, AdamW of torch: NVIDIA apex's are for GPUs"),
        (CUDA, (True, True), "norms of apex, AdamW of torch"),
        (CUDA, (False, True), "fused_layer_norm_cuda not found"),
        (CUDA, (False, False), "fused_layer_norm_cuda and amp_C not found"),
    ],
)
def test_the_log_says_whose_kernels_these_are(monkeypatch, device, found, sentence):
    monkeypatch.setattr(norms, "HAS_APEX", found[0])
    monkeypatch.setattr(optimizers, "has_apex_multi_tensor", lambda: found[1])
    said = optimizers.kernels(torch.optim.AdamW([torch.ones(1)]), device)
    assert said.endswith(sentence)
    assert said.startswith(f"norms of {'apex' if device == CUDA and found[0] else 'torch'}, AdamW of torch")

"""NVIDIA apex's fused norms and FusedAdam against torch's, on one GPU."""

from __future__ import annotations

import pytest
import torch
from work import missing

from megatron_dsp.models import norms
from megatron_dsp.training.optimizer import adamw, has_apex_multi_tensor

MISSING = missing(1)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(MISSING is not None, reason=MISSING or "")]
needs_norms = pytest.mark.skipif(
    not norms.HAS_APEX, reason="needs NVIDIA apex's extension fused_layer_norm_cuda: build github.com/NVIDIA/apex with it"
)
needs_adam = pytest.mark.skipif(
    not has_apex_multi_tensor(), reason="needs NVIDIA apex's extension amp_C: build github.com/NVIDIA/apex with it"
)
# Strided as heads are, with rows to spare of a block of the kernel, and none at all.
SHAPES = [(5, 2, 33, 96), (3, 0, 4, 64)]


@needs_norms
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_fused_norms_compute_what_torchs_do(monkeypatch, name, shape, dtype, tolerance):
    torch.manual_seed(0)
    x = torch.randn(shape, device="cuda", dtype=dtype).transpose(0, 2).requires_grad_()
    weight = torch.randn(shape[-1], device="cuda", dtype=dtype, requires_grad=True)
    inputs = (x,) if name == "layer_norm" else (x, weight)
    upstream = torch.randn_like(x)
    results = []
    for fused in (True, False):
        monkeypatch.setattr(norms, "HAS_APEX", fused)
        with torch.profiler.profile() as profile:
            y = getattr(norms, name)(*inputs)
            results.append([y, *torch.autograd.grad(y, inputs, upstream)])
        by_torch = any(event.name in ("aten::native_layer_norm", "aten::rms_norm") for event in profile.events())
        assert by_torch == (not fused or x.numel() == 0)
    for by_apex, by_torch in zip(*results, strict=True):
        torch.testing.assert_close(by_apex, by_torch, rtol=tolerance, atol=tolerance)


@needs_adam
def test_fused_adam_steps_as_torchs_adamw():
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(64, 33, device="cuda")) for _ in range(2)]
    with torch.no_grad():
        parameters[1].copy_(parameters[0])
    options = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}
    fused = adamw([parameters[0]], device=torch.device("cuda"), **options)
    plain = torch.optim.AdamW([parameters[1]], **options)
    assert type(fused).__module__.startswith("apex.")
    for _ in range(5):
        gradient = torch.randn_like(parameters[0])
        for parameter, optimizer in zip(parameters, (fused, plain), strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(*parameters)

"""flash-attn's attention against torch's, on one GPU."""

from __future__ import annotations

import pytest
import torch
from work import missing

from megatron_dsp.models import attention_kernels
from megatron_dsp.models.attention_kernels import attention

MISSING = missing(1)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(MISSING is not None, reason=MISSING or ""),
    pytest.mark.skipif(not attention_kernels.HAS_FLASH, reason="needs flash-attn with its extension flash_attn_2_cuda"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [(6, 4, 33, 72), (2, 3, 0, 64)], ids=str)
def test_flash_attention_computes_what_torchs_does(monkeypatch, size, masked, dtype):
    torch.manual_seed(0)
    batch, heads, length, channels = size
    # Strided as heads are.
    shapes = [(batch, length, heads, channels), *[(batch, 9, heads, channels)] * 2]
    inputs = [torch.randn(shape, device="cuda", dtype=dtype).transpose(1, 2).requires_grad_() for shape in shapes]
    mask = (torch.rand(batch, 9, device="cuda") < 0.5).index_fill(1, torch.tensor([4], device="cuda"), True) if masked else None
    upstream = torch.randn_like(inputs[0])
    results = []
    for flash in (True, False):
        monkeypatch.setattr(attention_kernels, "HAS_FLASH", flash)
        assert attention_kernels._flash(inputs[0]) == (flash and length > 0)
        y = attention(*inputs, mask)
        results.append([y, *torch.autograd.grad(y, inputs, upstream)])
    for of_flash, of_torch in zip(*results, strict=True):
        torch.testing.assert_close(of_flash, of_torch, atol=2e-2, rtol=2e-2)

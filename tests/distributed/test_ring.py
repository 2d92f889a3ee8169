"""Ring attention against attention in one process: outputs, gradients and bytes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import scaled_dot_product_attention

import megatron_dsp as dsp
from megatron_dsp.embedded import ring


def _compare(length: int, dtype: torch.dtype, tolerance: float, storage: tuple[int, ...]) -> None:
    group = dist.group.WORLD
    size = group.size()
    shape = (2, 3, length, 8)
    # Stored in another order, as views of [T, B, S, H, D] are.
    wholes = [
        torch.randn([shape[dim] for dim in storage]).to(dtype).permute([storage.index(dim) for dim in range(4)])
        for _ in range(3)
    ]
    weight = torch.linspace(0.5, 2, 2 * 3 * length * 8).view(shape).to(dtype)
    references = [whole.double().requires_grad_() for whole in wholes]
    expected = scaled_dot_product_attention(*references)
    gradients = torch.autograd.grad((expected**2 * weight).sum(), references)

    own = [dsp.split(whole, dim=2, group=group).detach().requires_grad_() for whole in wholes]
    with dsp.ledger() as moved:
        output = ring(*own, size=length, group=group, stage="temporal")
        (output**2 * dsp.split(weight, dim=2, group=group)).sum().backward()

    def error(found: torch.Tensor, whole: torch.Tensor) -> float:
        reference = dsp.split(whole, dim=2, group=group)
        return ((found.double() - reference).abs().max() / whole.abs().max()).item()

    assert output.dtype == dtype
    assert error(output, expected) < tolerance
    for part, gradient in zip(own, gradients, strict=True):
        assert error(part.grad, gradient) < 3 * tolerance
    block = 2 * own[0].nbytes  # keys and values, or their gradients
    counted = {"ring": (size - 1, (size - 1) * block), "ring adjoint": (2 * size - 1, (2 * size - 1) * block)}
    assert moved.by("operation") == (counted if size > 1 else {})


@pytest.mark.parametrize("storage", [(0, 1, 2, 3), (2, 0, 1, 3)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_outputs_gradients_and_bytes(ranks, size, dtype, tolerance, storage):
    ranks(size, _compare, 12, dtype, tolerance, storage)


def _refuse() -> None:
    x = torch.zeros(1, 2, 3, 4)
    for size, sign in ((7, "uneven"), (8, "of length 8")):
        with pytest.raises(dsp.UsageError, match=sign):
            ring(x, x, x, size=size, group=dist.group.WORLD)
    with pytest.raises(dsp.UsageError, match="no fused attention of torch takes"):
        ring(*(x.to("meta") for x in (x, x, x)), size=6, group=dist.group.WORLD)


def test_refusals(ranks):
    ranks(2, _refuse)

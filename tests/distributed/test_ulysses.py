"""Ulysses against attention in one process: outputs and gradients in fp64, any number of heads."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import scaled_dot_product_attention

import megatron_dsp as dsp
from megatron_dsp.embedded import ulysses


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Over dim 0 of [T, B, S, H, D], with a position-dependent mask."""
    T = query.shape[0]
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    batched = (x.permute(1, 2, 3, 0, 4) for x in (query, key, value))
    return scaled_dot_product_attention(*batched, attn_mask=causal, enable_gqa=True).permute(3, 0, 1, 2, 4)


def _compare(T: int, heads: int, key_heads: int) -> None:
    group = dist.group.WORLD
    wholes = [torch.randn(T, 2, 3, h, 4, dtype=torch.float64, requires_grad=True) for h in (heads, key_heads, key_heads)]
    weight = torch.linspace(0.5, 2, T * 2 * 3 * heads * 4, dtype=torch.float64).view(T, 2, 3, heads, 4)
    expected = _attend(*wholes)
    gradients = torch.autograd.grad((expected**2 * weight).sum(), wholes)

    own = [dsp.split(whole, dim=0, group=group).detach().requires_grad_() for whole in wholes]
    with dsp.ledger() as moved:
        output = ulysses(_attend, *own, over=0, heads=-2, size=T, group=group, stage="temporal")
        (output**2 * dsp.split(weight, dim=0, group=group)).sum().backward()
    torch.testing.assert_close(output, dsp.split(expected, dim=0, group=group), rtol=1e-12, atol=1e-12)
    for part, gradient in zip(own, gradients, strict=True):
        torch.testing.assert_close(part.grad, dsp.split(gradient, dim=0, group=group), rtol=1e-11, atol=1e-11)
    calls = {operation: calls for operation, (calls, _) in moved.by("operation").items()}
    assert calls == {"switch": 2, "switch adjoint": 2}


@pytest.mark.parametrize(
    ("T", "heads", "key_heads"),
    [(8, 6, 6), (7, 5, 5), (5, 8, 2), (6, 2, 1), (2, 3, 3)],
    ids=["even", "uneven", "grouped queries", "fewer heads than ranks", "fewer frames than ranks"],
)
@pytest.mark.parametrize("size", [2, 3])
def test_outputs_and_gradients(ranks, size, T, heads, key_heads):
    ranks(size, _compare, T, heads, key_heads)


def _refuse() -> None:
    x, y = torch.zeros(2, 1, 1, 4, 2), torch.zeros(2, 1, 1, 3, 2)
    with pytest.raises(dsp.UsageError, match="4 query heads over 3 key heads"):
        ulysses(_attend, x, y, y, over=0, heads=3, size=4, group=dist.group.WORLD)


def test_heads_that_do_not_group(ranks):
    ranks(2, _refuse)

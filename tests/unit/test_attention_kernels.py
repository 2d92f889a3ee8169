"""What attention does with masks, and how flash-attn gets them; flash-attn itself runs in tests/gpu."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dsp.models import attention_kernels
from megatron_dsp.models.attention_kernels import attention, kernel_name, pack


def _inputs() -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    shapes = [(3, 2, 5, 8), (3, 2, 7, 8), (3, 2, 7, 8)]
    mask = torch.tensor([[1, 1, 0, 0, 0, 0, 0], [0, 1, 0, 1, 1, 0, 1], [1] * 7], dtype=torch.bool)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes], mask


def _by_hand(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    samples = zip(query, key, value, mask, strict=True)
    return torch.stack([(q @ k[:, m].mT / 8**0.5).softmax(-1) @ v[:, m] for q, k, v, m in samples])


def test_a_mask_hides_keys():
    inputs, mask = _inputs()
    torch.testing.assert_close(attention(*inputs, mask), _by_hand(*inputs, mask))


def test_packed_keys_are_those_of_the_mask_and_the_rest_gets_no_gradient(monkeypatch):
    def by_lengths(query, key, value, query_ends, key_ends, longest_query, longest_key):
        """flash-attn's varlen function, with its gradients of keys that no sample has: whatever is in memory."""
        assert longest_query == 5
        assert longest_key == 7
        parts = []
        for b in range(len(query_ends) - 1):
            q, k, v = (
                x[ends[b] : ends[b + 1]].transpose(0, 1)
                for x, ends in ((query, query_ends), (key, key_ends), (value, key_ends))
            )
            parts.append(F.scaled_dot_product_attention(q, k, v).transpose(0, 1))
        for x in (key, value):
            x.register_hook(lambda grad: torch.cat([grad[: key_ends[-1]], torch.full_like(grad[key_ends[-1] :], torch.nan)]))
        return torch.cat(parts)

    monkeypatch.setattr(attention_kernels, "flash_attn_varlen_func", by_lengths, raising=False)
    inputs, mask = _inputs()
    got = attention_kernels._attention_of_flash(*inputs, mask)
    expected = _by_hand(*inputs, mask)
    torch.testing.assert_close(got, expected)
    upstream = torch.randn_like(expected)
    for gradient, reference in zip(
        torch.autograd.grad(got, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(gradient, reference)


def test_packing_keeps_the_order_of_keys():
    order, there, ends = pack(torch.tensor([[False, True, True], [True, False, True]]))
    assert order.tolist() == [1, 2, 3, 5, 0, 4]
    assert there.tolist() == [True] * 4 + [False] * 2
    assert ends.tolist() == [0, 2, 4]
    assert ends.dtype == torch.int32


def test_the_log_says_whose_attention_it_is(monkeypatch):
    assert kernel_name(torch.device("cpu")) == "attention of torch: flash-attn's is for GPUs"
    monkeypatch.setattr(attention_kernels, "HAS_FLASH", False)
    assert kernel_name(torch.device("cuda")) == "attention of torch: flash-attn is not installed"
    monkeypatch.setattr(attention_kernels, "HAS_FLASH", True)
    assert kernel_name(torch.device("cuda")) == "attention of flash-attn in bf16 and fp16"

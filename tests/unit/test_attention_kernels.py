"""What attention does with masks, large batches and torch's backends; GPUs' kernels themselves run in tests/gpu."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dsp.models import attention_kernels
from megatron_dsp.models.attention_kernels import attention, kernel_name, pack

UNBOUND = 2**31 - 1


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


class _Batches(TorchDispatchMode):
    """The batch of each call of CPU's fused kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if operator is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            self.sizes.append(len(arguments[0]))
        return operator(*arguments, **(keywords or {}))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("largest_batch", "most_elements", "sizes"),
    [
        (7, UNBOUND, [7]),
        (6, UNBOUND, [4, 3]),  # as equal as they can be
        (2, UNBOUND, [2, 2, 2, 1]),
        (7, 3 * 9 * 2 * 8, [3, 3, 1]),  # of keys, the largest of the three
        (7, 1, [1] * 7),  # a sample is never divided
    ],
)
def test_a_large_batch_is_attended_in_parts(largest_batch, most_elements, sizes, masked):
    torch.manual_seed(0)
    # Strided as heads are.
    shapes = [(7, 5, 2, 8), (7, 9, 2, 8), (7, 9, 2, 8)]
    inputs = [torch.randn(shape, dtype=torch.float64).transpose(1, 2).requires_grad_() for shape in shapes]
    mask = (torch.rand(7, 9) < 0.5).index_fill(1, torch.tensor([4]), True) if masked else None
    whole = attention(*inputs, mask)
    with _Batches() as batches:
        parts = attention_kernels._attend_in_parts(*inputs, mask, largest_batch, most_elements)
    assert batches.sizes == sizes
    assert parts.transpose(1, 2).is_contiguous(), "the memory order of whole batches"
    torch.testing.assert_close(parts, whole, rtol=1e-14, atol=1e-14)
    upstream = torch.randn_like(whole)
    for gradient, reference in zip(
        torch.autograd.grad(parts, inputs, upstream), torch.autograd.grad(whole, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(gradient, reference, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("backend", [None, SDPBackend.MATH])
def test_the_backend_that_was_found_is_taken(monkeypatch, backend):
    inputs, mask = _inputs()
    monkeypatch.setitem(attention_kernels._fastest, attention_kernels._kind(*inputs, mask), backend)
    attend = attention_kernels._attention_of_torch
    with _Batches() as batches:
        got = attend(*inputs, mask)
        alone = attend(*(x[:2] for x in inputs), mask[:2])  # another kind: torch's own choice
    assert batches.sizes == ([2] if backend is SDPBackend.MATH else [3, 2])
    torch.testing.assert_close(got, _by_hand(*inputs, mask))
    torch.testing.assert_close(alone, _by_hand(*inputs, mask)[:2])


def test_a_compiled_graph_has_the_backend_that_was_found(monkeypatch):
    inputs, _ = _inputs()
    kernels = []

    def backend(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Any:
        def note(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Any:
            kernels.append({str(node.target) for node in graph.graph.nodes})
            return make_boxed_func(graph.forward)

        return aot_module_simplified(graph, examples, fw_compiler=note)

    for chosen in (None, SDPBackend.MATH):
        monkeypatch.setitem(attention_kernels._fastest, attention_kernels._kind(*inputs, None), chosen)
        torch.compiler.reset()
        torch.compile(attention_kernels._attention_of_torch, backend=backend, fullgraph=True)(*inputs, None)
    flash = "aten._scaled_dot_product_flash_attention_for_cpu.default"
    assert [flash in graph for graph in kernels] == [True, False]


def test_sizes_may_be_symbols():
    torch.compiler.reset()
    attend = torch.compile(attention_kernels._attend_in_parts, backend="aot_eager", fullgraph=True, dynamic=True)
    inputs, mask = _inputs()
    for batch in (3, 2):
        some = [x[:batch] for x in inputs]
        torch.testing.assert_close(attend(*some, mask[:batch], 2, UNBOUND), _by_hand(*some, mask[:batch]))


def test_calls_with_other_kernels_or_times_are_of_other_kinds():
    (query, key, value), mask = _inputs()
    contiguous = query.transpose(1, 2).contiguous().transpose(1, 2)
    calls = [(query, key, value, None), (query, key, value, mask), (query.detach(), key, value, None)]
    calls += [(query[:2], key[:2], value[:2], None), (contiguous, key, value, None), (query.float(), key, value, None)]
    kinds = [attention_kernels._kind(*call) for call in calls]
    with torch.no_grad():
        kinds.append(attention_kernels._kind(query, key, value, None))
    assert len(set(kinds)) == len(kinds)
    assert attention_kernels._kind(query, key, value, ~mask) == kinds[1]


def test_nothing_is_measured_on_the_cpu():
    inputs, mask = _inputs()
    before = dict(attention_kernels._fastest)
    attention_kernels._attention_of_torch(*inputs, mask)
    assert attention_kernels._fastest == before


def test_torchs_choice_stays_where_nothing_is_clearly_faster():
    flash, cudnn = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
    assert attention_kernels._choose({None: 1.0}) is None
    assert attention_kernels._choose({cudnn: 1.0}) is None, "there was no memory to time torch's choice"
    assert attention_kernels._choose({None: 1.0, flash: 0.97, cudnn: 1.0}) is None
    assert attention_kernels._choose({None: 1.0, flash: 0.5, cudnn: 0.4}) is cudnn


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

"""Which of torch's attention kernels runs on one GPU, when that is measured, and batches that are too large for a kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from work import missing

from megatron_dsp.models import attention_kernels
from megatron_dsp.models.attention_kernels import attention

MISSING = missing(1)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(MISSING is not None, reason=MISSING or "")]

TOLERANCE = {torch.bfloat16: 5e-2, torch.float32: 5e-3}  # kernels may compute in TF32


@pytest.fixture(autouse=True)
def torchs_kernels(monkeypatch):
    """Of torch alone, and nothing known of them yet."""
    monkeypatch.setattr(attention_kernels, "HAS_FLASH", False)
    monkeypatch.setattr(attention_kernels, "_fastest", {})


def _inputs(batch: int, length: int, keys: int, dtype: torch.dtype = torch.bfloat16, heads: int = 4) -> list[Tensor]:
    """Strided as heads are."""
    torch.manual_seed(0)
    shapes = [(batch, length, heads, 72), *[(batch, keys, heads, 72)] * 2]
    return [torch.randn(shape, device="cuda", dtype=dtype).transpose(1, 2).requires_grad_() for shape in shapes]


def _mask(batch: int, keys: int) -> Tensor:
    return (torch.rand(batch, keys, device="cuda") < 0.5).index_fill(1, torch.tensor([0], device="cuda"), True)


def _by_hand(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    query, key, value = (x.float() for x in (query, key, value))
    scores = query @ key.mT / query.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], -torch.inf)
    return scores.softmax(-1) @ value


def _compare(inputs: list[Tensor], mask: Tensor | None) -> None:
    got, expected = attention(*inputs, mask), _by_hand(*inputs, mask)
    upstream = torch.randn_like(got)
    gradients = torch.autograd.grad(got, inputs, upstream)
    references = torch.autograd.grad(expected, inputs, upstream.float())
    for x, reference in zip([got, *gradients], [expected, *references], strict=True):
        tolerance = TOLERANCE[got.dtype]
        torch.testing.assert_close(x.float(), reference.float(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [(64, 16, 16), (4, 300, 120)], ids=str)
def test_short_sequences_are_measured_once_and_right_afterwards(monkeypatch, size, masked, dtype):
    batch, length, keys = size
    inputs, mask = _inputs(batch, length, keys, dtype), _mask(batch, keys) if masked else None
    _compare(inputs, mask)
    assert len(attention_kernels._fastest) == 1
    monkeypatch.delattr(attention_kernels, "_measure")  # a second time would be an error
    _compare(inputs, mask)
    assert len(attention_kernels._fastest) == 1


def test_every_backend_that_says_that_it_can_is_measured():
    times = attention_kernels._measure(*_inputs(64, 16, 16), None)
    assert None in times
    assert len(times) > 1, "no fused kernel ran"
    assert all(0 < milliseconds < 1000 for milliseconds in times.values())


def test_long_sequences_are_left_to_torch():
    _compare(_inputs(2, 300, 300), None)
    assert attention_kernels._fastest == {}


def test_calls_without_gradients_are_a_kind_of_their_own():
    inputs = _inputs(64, 16, 16)
    attention(*inputs)
    with torch.no_grad():
        attention(*inputs)
    with torch.inference_mode():
        attention(*(x * 1 for x in inputs))
    assert [kind.needs_gradient for kind in attention_kernels._fastest] == [(True,) * 3, (False,) * 3]


def test_nothing_is_measured_in_a_capture_and_what_is_known_is_taken():
    inputs = [x.detach() for x in _inputs(64, 16, 16)]
    expected = _by_hand(*inputs, None)
    for known in (0, 1):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # before a capture, kernels run once
            if known:
                attention(*inputs)
            torch.nn.functional.scaled_dot_product_attention(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = attention(*inputs)
        assert len(attention_kernels._fastest) == known
        captured.zero_()
        graph.replay()
        torch.testing.assert_close(captured.float(), expected, atol=2e-2, rtol=2e-2)


def test_a_checkpoint_and_hooks_do_not_see_what_is_tried():
    inputs = _inputs(64, 16, 16)
    expected = torch.autograd.grad(_by_hand(*inputs, None).sum(), inputs)
    # It counts what is saved, in forward and again in recompute, where nothing is tried.
    again = checkpoint(attention, *inputs, use_reentrant=False)
    for gradient, reference in zip(torch.autograd.grad(again.sum(), inputs), expected, strict=True):
        torch.testing.assert_close(gradient.float(), reference.float(), atol=5e-2, rtol=5e-2)
    saved: list[list[tuple[int, ...]]] = []
    for known in (False, True):
        if not known:
            attention_kernels._fastest.clear()
        seen: list[tuple[int, ...]] = []

        def note(x: Tensor, seen: list[Any] = seen) -> Tensor:
            seen.append(tuple(x.shape))
            return x

        with saved_tensors_hooks(note, lambda x: x):
            attention(*inputs)
        saved.append(seen)
    assert saved[0] == saved[1]


@pytest.mark.parametrize("masked", [False, True])
def test_a_batch_over_the_limits_of_kernels(masked):
    batch = 65_536 + 100
    _compare(_inputs(batch, 4, 4, heads=1), _mask(batch, 4) if masked else None)
    # In two parts of one size, so of one kind.
    assert [kind.layouts[0][0] for kind in attention_kernels._fastest] == [batch // 2]

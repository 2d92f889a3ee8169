"""Ring attention on CUDA against attention in one process: its kernels and merges on one card, its blocks' way over NCCL."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from work import error, missing

import megatron_dsp as dsp
from megatron_dsp.embedded import ring
from megatron_dsp.reshard.collectives import rotate
from megatron_dsp.reshard.labels import Label

NO_CARD, NO_PAIR = missing(1), missing(2)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(NO_CARD is not None, reason=NO_CARD or "")]

CASES = {  # whose kernel, dtype, and the error of a result
    "flash bf16": (SDPBackend.FLASH_ATTENTION, torch.bfloat16, 2e-2),
    "flash fp16": (SDPBackend.FLASH_ATTENTION, torch.float16, 3e-3),
    "memory-efficient bf16": (SDPBackend.EFFICIENT_ATTENTION, torch.bfloat16, 2e-2),
    "memory-efficient fp32": (SDPBackend.EFFICIENT_ATTENTION, torch.float32, 1e-4),
}
ORDERS = [(0, 1, 2, 3), (2, 0, 1, 3)]  # of the dims in memory: views of [T, B, S, H, D] are not contiguous
LONG = 20_000_000  # cycles


def _compare(group: dist.ProcessGroup, case: str, order: tuple[int, ...], cycles: int) -> None:
    backend, dtype, tolerance = CASES[case]
    if backend is SDPBackend.FLASH_ATTENTION and torch.cuda.get_device_capability() < (8, 0):
        return  # the other cases are for such cards
    size, shape = group.size(), (2, 3, 20 * group.size(), 16)  # the memory-efficient kernel pads 20 to 32
    torch.manual_seed(0)
    wholes = [
        torch.randn([shape[dim] for dim in order]).to("cuda", dtype).permute([order.index(dim) for dim in range(4)])
        for _ in range(3)
    ]
    weight = torch.linspace(0.5, 2, 2 * 3 * shape[2] * 16).view(shape).to("cuda", dtype)
    references = [whole.double().requires_grad_() for whole in wholes]
    expected = scaled_dot_product_attention(*references)
    gradients = torch.autograd.grad((expected**2 * weight).sum(), references)
    own = [dsp.split(whole, dim=2, group=group).detach() for whole in wholes]
    with sdpa_kernel(backend):
        ring(*(x.clone() for x in own), size=shape[2], group=group)  # kernels and communicators are made
        torch.cuda.synchronize()
        late = [torch.full_like(x, torch.nan).requires_grad_() for x in own]
        torch.cuda._sleep(cycles)
        with torch.no_grad():
            for x, right in zip(late, own, strict=True):
                x.copy_(right)
        output = ring(*late, size=shape[2], group=group)
    torch.cuda._sleep(cycles)
    (output**2 * dsp.split(weight, dim=2, group=group)).sum().backward()
    for found, whole, factor in zip((output, *(x.grad for x in late)), (expected, *gradients), (1, 3, 3, 3), strict=True):
        right = dsp.split(whole, dim=2, group=group)
        wrong = error(found.detach().double(), right.detach())
        assert wrong <= factor * tolerance, f"{case}, {size} ranks: wrong by {wrong:.1e}"


def _rotate_through_host(xs: list[Tensor], *, group: dist.ProcessGroup, label: Label) -> Callable[[], list[Tensor]]:
    """For processes that share a card. Nobody but the caller keeps ``xs``; what arrives is late, on another stream."""
    stream = torch.cuda.Stream()
    on_host = rotate([x.cpu() for x in xs], group=group, label=label)()
    stream.wait_stream(torch.cuda.current_stream())
    received = [torch.empty_like(x) for x in xs]
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)
        for x, host in zip(received, on_host, strict=True):
            x.copy_(host)
        arrived = stream.record_event()

    def end() -> list[Tensor]:
        torch.cuda.current_stream().wait_event(arrived)
        return received

    return end


def _on_one_card(case: str, order: tuple[int, ...]) -> None:
    torch.cuda.set_device(0)
    module = import_module("megatron_dsp.embedded.ring")
    module.rotate = _rotate_through_host
    try:
        _compare(dist.group.WORLD, case, order, 0)
    finally:
        module.rotate = rotate


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [1, 3])
def test_kernels_and_merges_are_right(ranks, size, case, order):
    ranks(size, _on_one_card, case, order)


def _over_nccl(case: str, order: tuple[int, ...], cycles: int) -> None:
    torch.cuda.set_device(dist.get_rank())
    _compare(dist.new_group(backend="cpu:gloo,cuda:nccl"), case, order, cycles)


@pytest.mark.skipif(NO_PAIR is not None, reason=NO_PAIR or "")
@pytest.mark.parametrize("cycles", [0, LONG], ids=["at once", "late"])
@pytest.mark.parametrize("case", CASES)
def test_blocks_go_round_over_nccl(ranks, case, cycles):
    ranks(min(torch.cuda.device_count(), 4), _over_nccl, case, ORDERS[1], cycles)


def test_what_no_kernel_takes_is_refused(ranks):
    ranks(1, _refuse)


def _refuse() -> None:
    for dtype, width in ((torch.float64, 16), (torch.bfloat16, 12)):
        x = torch.zeros(1, 2, 4, width, dtype=dtype, device="cuda")
        with pytest.raises(dsp.UsageError, match="no fused attention"):
            ring(x, x, x, size=4, group=dist.group.WORLD)

"""Models with switches under torch.compile: one graph, and the results of eager mode."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import megatron_dsp as dsp
from megatron_dsp.models.video_dit import VideoDiT, VideoDiTConfig


class _Mixer(nn.Module):
    """Every primitive, with uneven shards, and a mask that moves with the tokens."""

    def __init__(self, group: dist.ProcessGroup):
        super().__init__()
        self.group = group
        self.layers = nn.ModuleList(nn.Linear(4, 4, dtype=torch.float64) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        group, (T, _, S, _) = self.group, x.shape
        x, mask = (dsp.split(whole, dim=0, group=group) for whole in (x, mask))
        x = torch.tanh(self.layers[0](x))
        x, mask = dsp.switch((x, mask), gather=0, split=2, size=T, group=group)
        x = torch.tanh(self.layers[1](x)) * mask.unsqueeze(-1)
        x = dsp.switch(x, gather=2, split=0, size=S, group=group, stage="back")
        x = x + dsp.mean(x, dim=0, size=T, group=group)
        whole = dsp.gather(self.layers[2](x), dim=0, size=T, group=group)
        return (whole * torch.linspace(0, 1, S).view(1, 1, S, 1)).square().mean() + dsp.mean_loss(x.square(), group=group)


def _gradients(model: nn.Module, run) -> tuple[float, list[Tensor], dict]:
    with dsp.ledger() as moved:
        loss = run(model)
        loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    return loss.item(), gradients, moved.by("operation")


def _compare(model: nn.Module, run, backend: str, tolerance: float) -> None:
    """Loss, gradients and what is moved; then with another shape, which the compiler may make a dynamic one."""
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    loss, gradients, moved = _gradients(model, run)
    loss_compiled, gradients_compiled, moved_compiled = _gradients(model, lambda _: run(compiled))
    assert abs(loss - loss_compiled) <= tolerance
    assert moved == moved_compiled
    for expected, found in zip(gradients, gradients_compiled, strict=True):
        assert (expected - found).abs().max() <= tolerance


def _mixer(backend: str) -> None:
    model = _Mixer(dist.group.WORLD)
    for T, S in ((7, 5), (9, 8)):
        x, mask = torch.randn(T, 2, S, 4, dtype=torch.float64), torch.rand(T, 2, S) < 0.5
        _compare(model, lambda m, x=x, mask=mask: m(x, mask), backend, 1e-14)


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.long), 3])
def test_all_primitives_in_one_graph(ranks, size):
    ranks(size, _mixer, "aot_eager")


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.long  # a compiler of C++ takes its time
def test_inductor(ranks):
    ranks(2, _mixer, "inductor")


def _video_dit(T: int) -> None:
    mesh = dsp.initialize({"sequence_parallel": {"size": dist.get_world_size()}})
    model = VideoDiT(VideoDiTConfig(layers=2, hidden=16, heads=2, conditioning_size=6)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    video = torch.randn(T, 2, 3, 4, 6, dtype=torch.float64)
    side = (
        torch.rand(T, 2, dtype=torch.float64),
        torch.randn(2, 3, 6, dtype=torch.float64),
        torch.ones(2, 3, dtype=torch.bool),
    )
    start, stop = dsp.shard_range(T, dist.get_world_size(), dist.get_rank())

    def run(m: nn.Module) -> Tensor:
        return dsp.mean_loss(m(video[start:stop], *side, group=mesh.group("sequence")).square())

    _compare(model, run, "aot_eager", 1e-13)


def test_the_video_transformer_is_one_graph(ranks):
    ranks(2, _video_dit, 5)

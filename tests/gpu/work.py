"""What the GPU tests need of a machine, and what they compare with one process, over any group and transport."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_dsp.layout import Layout, shard_range
from megatron_dsp.models.block_runner import DIMS
from megatron_dsp.models.video_dit import VideoDiT, VideoDiTConfig
from megatron_dsp.reshard import FixedOverlap, Region, Stage, set_overlap

CHAIN = ("time", "space", "time", "space")  # the sharded dim of each stage


def missing(gpus: int) -> str | None:
    """What is missing here for tests on so many GPUs; None: nothing."""
    if not torch.backends.cuda.is_built():
        return f"needs CUDA: torch {torch.__version__} is built without it"
    count = torch.cuda.device_count()
    if count < gpus:
        return f"needs {gpus} GPU{'s' * (gpus > 1)}: torch {torch.__version__} for CUDA {torch.version.cuda} sees {count}"
    if gpus > 1 and not dist.is_nccl_available():
        return f"needs NCCL: torch {torch.__version__} is built without it"
    return None


class Pause(torch.autograd.Function):
    """``x`` itself; the stream that is current sleeps for so many cycles of the GPU, forward or backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: int, backward: int) -> Tensor:
        ctx.cycles = backward
        _sleep(forward)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        _sleep(ctx.cycles)
        return gradient, None, None


def _sleep(cycles: int) -> None:
    if cycles:
        torch.cuda._sleep(cycles)


class Mix(nn.Module):
    """Mixes one dim of [T, B, S, C] and the channels. What it gives, forward and backward, is late by so many cycles."""

    def __init__(self, dim: int, size: int, channels: int):
        super().__init__()
        self.dim = dim
        self.along = nn.Parameter(torch.randn(size, size, dtype=torch.float64) / size**0.5)
        self.channels = nn.Parameter(torch.randn(channels, channels, dtype=torch.float64) / channels**0.5)
        self.forward_cycles = self.backward_cycles = 0

    def forward(self, x: Tensor) -> Tensor:
        x = Pause.apply(x, self.forward_cycles, 0)
        mixed = (x.transpose(self.dim, -1) @ self.along).transpose(self.dim, -1) @ self.channels
        return Pause.apply(x + torch.tanh(mixed), 0, self.backward_cycles)


def mixes(sizes: tuple[int, int, int, int]) -> nn.ModuleList:
    """One for each stage of the chain, which mixes time where space is sharded, and space where time is."""
    dims = [2 if sharded == "time" else 0 for sharded in CHAIN]
    return nn.ModuleList(Mix(dim, sizes[dim], sizes[3]) for dim in dims)


class Result(NamedTuple):
    """Of a pass: its output, the gradient of its input, and those of parameters."""

    output: Tensor
    gradient: Tensor
    parameters: list[Tensor]


class _Tables(nn.Module):
    """Added to the activation: a side input of every dim, as models have them."""

    def __init__(self, sizes: tuple[int, int, int, int]):
        super().__init__()
        T, B, S, C = sizes
        shapes = {"time": (T, 1, 1, C), "batch": (B, 1, C), "space": (S, C)}
        tables = {name: nn.Parameter(torch.randn(shape, dtype=torch.float64)) for name, shape in shapes.items()}
        self.tables = nn.ParameterDict(tables)

    def forward(self, x: Tensor, region: Region) -> Tensor:
        for name, table in self.tables.items():
            x = x + region.local(table, dim=0, name=name)
        return x


def compare_stages(
    group: dist.ProcessGroup,
    device: torch.device,
    overlap: FixedOverlap | None,
    cycles: int = 0,
    *,
    stream_priority: int | None = None,
) -> None:
    """Stages over ``group`` against one process, in fp64, with shards of different sizes."""
    sizes = 4 * group.size() + 1, 3, 3 * group.size() + 1, 4
    torch.manual_seed(0)
    parts, tables = mixes(sizes).to(device), _Tables(sizes).to(device)
    whole, weight = (torch.randn(sizes, dtype=torch.float64).to(device) for _ in range(2))
    parameters = [*parts.parameters(), *tables.parameters()]

    def run(group: dist.ProcessGroup | None) -> Result:
        def shard(x: Tensor, dim: int) -> Tensor:
            return x if group is None else x.tensor_split(group.size(), dim)[group.rank()]

        region = Region(Layout(DIMS, sizes, sharded=CHAIN[0]), group)

        def stage(part: nn.Module) -> Callable[[Tensor], Tensor]:
            return lambda x: part(tables(x, region))

        chain = enumerate(zip(parts, CHAIN, strict=True))
        stages = [Stage(stage(part), sharded, "stage", number=number) for number, (part, sharded) in chain]
        x = shard(whole, 0).detach().clone().requires_grad_()
        y = region.run(stages, x, independent="batch")
        for parameter in parameters:
            parameter.grad = None
        (y * y * shard(weight, 2)).sum().backward()
        return Result(y.detach(), gradient_of(x), [gradient_of(parameter) for parameter in parameters])

    single = run(None)
    set_overlap(group, overlap, stream_priority=stream_priority)
    for part in parts:
        part.forward_cycles = part.backward_cycles = cycles
    ours = run(group)
    size, rank = group.size(), group.rank()
    assert_close(ours.output, single.output.tensor_split(size, 2)[rank], 1e-12, "the output")
    assert_close(ours.gradient, single.gradient.tensor_split(size, 0)[rank], 1e-12, "the gradient of the input")
    for index, (found, right) in enumerate(zip(ours.parameters, single.parameters, strict=True)):
        assert_close(_sum(found, group), right, 1e-12, f"the gradient of parameter {index}")


def compare_video(group: dist.ProcessGroup, device: torch.device, overlap: FixedOverlap | None) -> None:
    """The video transformer over ``group`` against one process, in fp32, with shards of different sizes."""
    set_overlap(group, overlap)
    T, B, H, W = 2 * group.size() + 1, 3, 6, 10
    torch.manual_seed(0)
    model = VideoDiT(VideoDiTConfig(layers=2, hidden=32, heads=4, conditioning_size=6))
    with torch.no_grad():
        for parameter in model.parameters():  # some are initialised as 0
            parameter += 0.2 * torch.randn_like(parameter)
    model.to(device)
    video = torch.randn(T, B, 3, H, W).to(device)
    weight = torch.linspace(0.5, 2, video.numel()).view_as(video).to(device)
    mask = torch.tensor([[True, True, False], [True, False, False], [True, True, True]]).to(device)
    side = torch.rand(T, B).to(device), torch.randn(B, 3, 6).to(device), mask

    def run(frames: slice, group: dist.ProcessGroup | None) -> Result:
        model.zero_grad()
        x = video[frames].detach().clone().requires_grad_()
        y = model(x, *side, group=group)
        ((y**2 * weight[frames]).sum() / video.numel()).backward()
        return Result(y.detach(), gradient_of(x), [gradient_of(parameter) for parameter in model.parameters()])

    frames = slice(*shard_range(T, group.size(), group.rank()))
    single, ours = run(slice(None), None), run(frames, group)
    assert_close(ours.output, single.output[frames], 1e-5, "the output")
    assert_close(ours.gradient, single.gradient[frames], 1e-5, "the gradient of the video")
    # Biases of keys have no gradient but rounding, and cross-attention has small ones: hence the floor.
    floor = max(gradient.abs().max().item() for gradient in single.parameters) / 10
    for (name, _), found, right in zip(model.named_parameters(), ours.parameters, single.parameters, strict=True):
        assert_close(_sum(found, group), right, 1e-5, f"the gradient of {name}", floor)


def gradient_of(leaf: Tensor) -> Tensor:
    """A copy of it."""
    assert leaf.grad is not None  # after a backward
    return leaf.grad.clone()


def _sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Over the ranks, on the CPU, where Gloo does it whatever the group has for GPUs."""
    total = x.cpu()
    dist.all_reduce(total, group=group)
    return total.to(x.device)


def error(found: Tensor, right: Tensor, floor: float = 0.0) -> float:
    """The largest one, relative to the largest value or ``floor``; NaN where there is one."""
    return ((found - right).abs().max() / right.abs().max().clamp(min=floor)).item()


def assert_close(found: Tensor, right: Tensor, tolerance: float, about: str, floor: float = 0.0) -> None:
    """Errors: AssertionError, for a NaN too."""
    assert found.shape == right.shape, f"{about}: {tuple(found.shape)}, not {tuple(right.shape)}"
    found_error = error(found, right, floor)
    assert found_error <= tolerance, f"{about} is wrong by {found_error:.1e} of the largest value"

"""The ways to run layer pairs over a sequence group that `end_to_end.py` and `one_card.py` compare.

A layer pair is a spatial and a temporal block of the video transformer, on an activation in storage order [T, B, S, C]. All
methods have the same weights and compute the same; they differ in where the shard lies, and in what they send.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

import megatron_dsp as dsp
from megatron_dsp import launch
from megatron_dsp.errors import UsageError
from megatron_dsp.layout import Layout, shard_range
from megatron_dsp.models.attention import OverRanks, SelfAttention
from megatron_dsp.models.attention_kernels import attention
from megatron_dsp.models.block_runner import DIMS, attention_over_ranks
from megatron_dsp.models.embeddings import time_rotations
from megatron_dsp.models.video_dit import Block
from megatron_dsp.models.video_dit_config import VideoDiTConfig
from megatron_dsp.reshard import Activation, Ends, FixedOverlap, Overlap, Region, Stage, overlap_of, set_overlap
from megatron_dsp.reshard.exchange import exchange_of
from megatron_dsp.reshard.exposed import NoTransport
from megatron_dsp.reshard.transport.move import Transport
from megatron_dsp.tensor import TensorParallel, own_shard

CONDITIONING_TOKENS = 16


@dataclass(frozen=True)
class Shape:
    """Sizes of the blocks and of the activation."""

    layers: int
    hidden: int
    heads: int
    frames: int
    tokens: int
    batch_size: int

    @property
    def activation(self) -> tuple[int, int, int, int]:
        """[T, B, S, C]."""
        return self.frames, self.batch_size, self.tokens, self.hidden


class Work:
    """Blocks, and one sample with the gradient of what they make of it; the same on all ranks of a sequence group."""

    def __init__(self, shape: Shape, device: torch.device, sample: int, dtype: torch.dtype = torch.float32):
        self.shape = shape
        self.config = VideoDiTConfig(shape.layers, shape.hidden, shape.heads, conditioning_size=shape.hidden)
        self.device, self.dtype = device, dtype
        self.blocks = self.make_blocks(TensorParallel())
        torch.manual_seed(1 + sample)
        self.x = torch.randn(shape.activation).to(device, dtype)
        self.gradient = torch.randn(shape.activation).to(device, dtype) / self.x.numel()
        self.modulation = torch.randn(shape.frames, shape.batch_size, 6 * shape.hidden).to(device, dtype) / 2
        self.tokens = torch.randn(shape.batch_size, CONDITIONING_TOKENS, shape.hidden).to(device, dtype)
        self.mask = torch.ones(shape.batch_size, CONDITIONING_TOKENS, dtype=torch.bool, device=device)
        self.rotations = time_rotations(shape.frames, shape.hidden // shape.heads, like=self.x)

    def make_blocks(self, tensor: TensorParallel) -> nn.ModuleList:
        """The blocks, or this rank's shards of the same ones."""
        torch.manual_seed(0)
        blocks = nn.ModuleList()
        for _ in range(self.shape.layers):
            for block in (Block(self.config, "space", tensor), Block(self.config, "time", tensor)):
                nn.init.normal_(block.modulation_table, std=0.5)
                blocks.append(block)
        return blocks.to(self.device, self.dtype)


class Method:
    """Runs the blocks with time sharded at both ends, sends nothing, and so computes what is right on one rank alone.

    Attributes:
        x: this rank's part of the input.
        gradient: of the rank's output.
        weights: what the rank trains, by the names of ``Work.blocks``.
        transport, overlap: of the group, while the method runs.
        averages: whether gradients of weights are averaged over the group: each rank's is a part of a sum.
    """

    averages: ClassVar[bool] = True

    def __init__(self, work: Work, group: dist.ProcessGroup):
        self.work, self.group = work, group
        self.exchange = exchange_of(group)
        self.transport: Transport = self.exchange.transport
        self.overlap: Overlap | None = None
        self.blocks = work.blocks
        self.weights = dict(work.blocks.named_parameters())
        self.x = self.local(work.x)
        self.gradient = self.local(work.gradient) * self.scale
        self.modulation, self.rotations = self.local(work.modulation), self.local(work.rotations)

    @property
    def pairs(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """Spatial and temporal block of each pair."""
        return zip(self.blocks[::2], self.blocks[1::2], strict=True)

    @property
    def scale(self) -> int:
        """Gradients of activations over those of one process."""
        return self.group.size() if self.averages else 1

    def local(self, whole: Tensor) -> Tensor:
        """This rank's part of a tensor [T, ...]."""
        start, stop = shard_range(self.work.shape.frames, self.group.size(), self.group.rank())
        return whole[start:stop]

    @contextmanager
    def ready(self) -> Iterator[Tensor]:
        """For one run, forward and backward: its input, with no gradients yet, and the method's way through the exchange."""
        for weight in self.weights.values():
            weight.grad = None
        before = self.exchange.transport, overlap_of(self.group)
        self.exchange.transport = self.transport
        set_overlap(self.group, self.overlap)
        try:
            yield self.x.detach().requires_grad_()
        finally:
            self.exchange.transport, overlap = before
            set_overlap(self.group, overlap)

    def forward(self, x: Tensor) -> Tensor:
        """All pairs in turn."""
        for spatial, temporal in self.pairs:
            x = spatial(x, self.modulation, self.work.tokens, self.work.mask)
            x = temporal(x, self.modulation, self.work.tokens, self.work.mask, self.rotations)
        return x

    @property
    def settled(self) -> bool:
        """Whether further runs go as the one before; the same on all ranks."""
        return True

    def sent(self, counted: dsp.Ledger) -> tuple[int, int]:
        """Collectives, and bytes that left this rank, of one direction of a run, in which the package counted ``counted``."""
        return counted.calls, counted.bytes

    def part(self, name: str, weight: Tensor) -> Tensor:
        """What the rank has of the weight (or its gradient) called ``name``."""
        return weight

    def synchronise(self, name: str, gradient: Tensor) -> None:
        """Over the sequence group, as training would."""
        dist.all_reduce(gradient, group=self.group)
        gradient /= self.group.size()

    def gradient_group(self, mesh: dsp.Mesh) -> dist.ProcessGroup:
        """The ranks over which training averages the gradients of the weights."""
        return mesh.group("data", "sequence")


class WholeSample(Method):
    """No sequence parallelism: each rank runs all of a sample."""

    averages = False

    def local(self, whole: Tensor) -> Tensor:
        return whole


class Dsp(Method):
    """The shard moves between time and space: two switches a pair."""

    def __init__(self, work: Work, group: dist.ProcessGroup, overlap: Overlap | None = None):
        super().__init__(work, group)
        self.overlap = overlap
        t, b, s, c = work.shape.activation
        self.layout = Layout(DIMS, (t, b, s, c), sharded="time")

    def forward(self, x: Tensor) -> Tensor:
        region = Region(self.layout, self.group)
        stages = []
        for index, (spatial, temporal) in enumerate(self.pairs):
            for compute, block, sharded, kind in (
                (self._spatial, spatial, "time", "spatial"),
                (self._temporal, temporal, "space", "temporal"),
            ):
                stages.append(Stage(partial(compute, region, block), sharded, kind, number=index, has_ends=True))
        # What follows the last pair wants its frames back.
        return region.run([*stages, Stage(lambda x: x, "time", "head")], x, independent="batch")

    @property
    def settled(self) -> bool:
        return self.overlap is None or self.group.size() == 1 or bool(self.overlap.decisions)

    def _spatial(self, region: Region, block: nn.Module, x: Activation, ends: Ends) -> Activation:
        return block(x, *self._sides(region), ends=ends)

    def _temporal(self, region: Region, block: nn.Module, x: Activation, ends: Ends) -> Activation:
        return block(x, *self._sides(region), region.local(self.work.rotations, dim=0, name="time"), ends=ends)

    def _sides(self, region: Region) -> tuple[Tensor, ...]:
        modulation = region.local(self.work.modulation, dim=0, name="time")
        return (
            region.local(modulation, dim=1, name="batch"),
            region.local(self.work.tokens, dim=0, name="batch"),
            region.local(self.work.mask, dim=0, name="batch"),
        )


class NoCommunication(Dsp):
    """DSP whose switches give memory of the right shape, without waiting for anyone: what no method can be faster than."""

    def __init__(self, work: Work, group: dist.ProcessGroup):
        super().__init__(work, group)
        self.transport = NoTransport(self.exchange.transport, self.exchange.rank)

    def sent(self, counted: dsp.Ledger) -> tuple[int, int]:
        return 0, 0


class Embedded(Method):
    """Time stays sharded; temporal attention gets what it needs from the other ranks."""

    def __init__(self, work: Work, group: dist.ProcessGroup, backend: str, overlap: Overlap | None = None):
        super().__init__(work, group)
        self.backend, self.overlap = backend, overlap

    def forward(self, x: Tensor) -> Tensor:
        sides = self.modulation, self.work.tokens, self.work.mask
        over_space, over_time = self.attention()
        for spatial, temporal in self.pairs:
            x = spatial(x, *sides, over_ranks=over_space)
            x = temporal(x, *sides, self.rotations, over_ranks=over_time)
        return x

    def attention(self) -> tuple[OverRanks | None, OverRanks]:
        """Of spatial and of temporal blocks."""
        layout = Layout(DIMS, self.work.shape.activation, sharded="time")
        return None, attention_over_ranks(self.backend, "time", "time", layout, self.group)


class FlatUlysses(Embedded):
    """Ulysses of one sequence of T x S tokens: to it, spatial attention is as sharded as temporal attention."""

    def attention(self) -> tuple[OverRanks | None, OverRanks]:
        _, over_ranks = super().attention()
        return over_ranks, over_ranks


class Peer(Embedded):
    """Ulysses as others have it: queries, keys, values and results one by one, each in an all-to-all of its own."""

    _CALLS = 4

    def __init__(self, work: Work, group: dist.ProcessGroup, over_time: OverRanks):
        for count, what in ((work.shape.frames, "frames"), (work.shape.heads, "heads")):
            if count % group.size():
                raise UsageError(f"{count} {what} over {group.size()} ranks are uneven, which it does not take")
        super().__init__(work, group, "ulysses")
        self._over_time = over_time

    def attention(self) -> tuple[OverRanks | None, OverRanks]:
        return None, self._over_time

    def sent(self, counted: dsp.Ledger) -> tuple[int, int]:
        calls = self._CALLS * self.work.shape.layers
        return calls, calls * self.x.nbytes * (self.group.size() - 1) // self.group.size()


class MegatronTensor(Method):
    """Megatron's tensor parallelism: each rank has some heads and some of the MLPs' channels, of the whole activation."""

    averages = False
    _SEQUENCE_DIM: ClassVar[int | None] = None

    def __init__(self, work: Work, group: dist.ProcessGroup):
        super().__init__(work, group)
        self.blocks = work.make_blocks(TensorParallel(group, sequence_dim=self._SEQUENCE_DIM))
        self.weights = dict(self.blocks.named_parameters())
        self.rotations = work.rotations  # attention has all frames

    def local(self, whole: Tensor) -> Tensor:
        return whole

    def part(self, name: str, weight: Tensor) -> Tensor:
        return own_shard(weight, like=self.weights[name])

    def synchronise(self, name: str, gradient: Tensor) -> None:
        """Nothing: the layers' own adjoints have done it."""

    def gradient_group(self, mesh: dsp.Mesh) -> dist.ProcessGroup:
        return mesh.group("data")


class MegatronSequence(MegatronTensor):
    """Megatron-SP: tensor parallelism, with time sharded between attention and MLPs."""

    _SEQUENCE_DIM = 0

    def __init__(self, work: Work, group: dist.ProcessGroup):
        if work.shape.frames % group.size():
            raise UsageError(f"{work.shape.frames} frames over {group.size()} ranks are uneven, which it does not take")
        super().__init__(work, group)

    def local(self, whole: Tensor) -> Tensor:
        return Method.local(self, whole)


def _deepspeed_ulysses(work: Work, group: dist.ProcessGroup) -> Method:
    from deepspeed.sequence.layer import DistributedAttention

    launch.start_deepspeed(work.device.type)

    def attend_locally(query: Tensor, key: Tensor, value: Tensor, module: SelfAttention) -> Tensor:
        batch = work.shape.batch_size, work.shape.tokens
        whole = (x.unflatten(1, batch) for x in (query, key, value))
        return module.attend(*whole).flatten(1, 2)

    distributed = DistributedAttention(attend_locally, group, scatter_idx=2, gather_idx=0)

    def over_time(module: SelfAttention, x: Tensor, rotations: Tensor | None) -> Tensor:
        flat = (each.flatten(1, 2) for each in module.project(x, rotations))  # [length, batch, H, D]
        return module.finish(distributed(*flat, 1, None, module).unflatten(1, x.shape[1:3]))

    return Peer(work, group, over_time)


def _yunchang_ulysses(work: Work, group: dist.ProcessGroup) -> Method:
    from yunchang.kernels import AttnType
    from yunchang.ulysses import UlyssesAttention

    def attend_locally(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        return attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)

    distributed = UlyssesAttention(group, attn_type=AttnType.TORCH_MATH)
    distributed.attn_fn = attend_locally  # the same kernel as all others; its own need a GPU

    def over_time(module: SelfAttention, x: Tensor, rotations: Tensor | None) -> Tensor:
        batched = (each.flatten(1, 2).transpose(0, 1) for each in module.project(x, rotations))  # [batch, length, H, D]
        return module.finish(distributed(*batched).transpose(0, 1).unflatten(1, x.shape[1:3]))

    return Peer(work, group, over_time)


Make = Callable[[Work, dist.ProcessGroup], Method]


def makers_by_name(overlap: Overlap | None) -> dict[str, Make]:
    """All by name, in the order in which they run; ``overlap`` is that of the methods that have one.

    Each may refuse by UsageError, and what needs a package that is not there by ImportError.
    """
    # Ulysses is cut in a number of chunks that is not measured: 4 is what hides most here.
    of_ulysses = FixedOverlap(overlap.chunks if isinstance(overlap, FixedOverlap) else 4)
    return {
        "no_communication": NoCommunication,
        "dsp": Dsp,
        "dsp_overlap": partial(Dsp, overlap=overlap),
        "ulysses": partial(Embedded, backend="ulysses"),
        "ulysses_overlap": partial(Embedded, backend="ulysses", overlap=of_ulysses),
        "ulysses_flat": partial(FlatUlysses, backend="ulysses"),
        "ring": partial(Embedded, backend="ring"),
        "deepspeed_ulysses": _deepspeed_ulysses,
        "yunchang_ulysses": _yunchang_ulysses,
        "megatron_tp": MegatronTensor,
        "megatron_sp": MegatronSequence,
        "whole_sample": WholeSample,
    }


NAMES = list(makers_by_name(None))


class Right(NamedTuple):
    """What one process computes: output, gradient of the input, and gradients of the weights."""

    y: Tensor
    x_gradient: Tensor
    gradients: dict[str, Tensor]


def one_process(work: Work, group: dist.ProcessGroup) -> Right:
    """What every method must compute; any group will do."""
    method = WholeSample(work, group)
    with method.ready() as x:
        y = method.forward(x)
        y.backward(method.gradient)
    return Right(y.detach(), _gradient(x), {name: _gradient(weight) for name, weight in method.weights.items()})


def largest_error(method: Method, right: Right) -> float:
    """The largest error on any rank of output and gradients, relative to the largest value of each tensor.

    Gradients that should be 0, as those of the biases of keys, are compared with the others.
    """
    with method.ready() as x:
        y = method.forward(x)
        y.backward(method.gradient)
    errors = [
        _error(y, method.local(right.y)),
        _error(_gradient(x), method.local(right.x_gradient) * method.scale),
    ]
    least = max(gradient.abs().max().item() for gradient in right.gradients.values()) / 100
    for name, weight in method.weights.items():
        method.synchronise(name, _gradient(weight))
        errors.append(_error(_gradient(weight), method.part(name, right.gradients[name]), least))
    # A NaN is no small error, but to max it might be.
    worst = torch.tensor(max(error if math.isfinite(error) else math.inf for error in errors), device=y.device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return worst.item()


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None  # after a backward
    return leaf.grad


def _error(found: Tensor, right: Tensor, least: float = 0.0) -> float:
    return (found - right).abs().max().item() / max(right.abs().max().item(), least)

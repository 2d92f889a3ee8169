"""Stages in chunks against whole stages and one process: random schedules, late transports, mutations, orders and memory."""

from __future__ import annotations

import inspect
import itertools
import math
import random
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import test_deepspeed_engine
import torch
import torch.distributed as dist
from overlap_transports import LateMessages, LateTransport, RecordingTransport, mutated, unraisable
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import megatron_dsp as dsp
from megatron_dsp.layout import Layout
from megatron_dsp.models.video_dit import VideoDiT, VideoDiTConfig
from megatron_dsp.reshard import FixedOverlap, Region, Stage, chunked, legs, transports
from megatron_dsp.reshard.agreement import Agreement
from megatron_dsp.reshard.buffers import BufferPool
from megatron_dsp.reshard.exchange import exchange_of
from megatron_dsp.reshard.route import find_all_to_all
from megatron_dsp.reshard.transports import Transport

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}  # relative to the largest entry


@dataclass(frozen=True)
class Case:
    """A chain of stages on one or two activations, and the chunks that it runs in.

    ``dims`` and ``sizes`` are those of the activation, channels aside, which come last: ``channels`` into each stage and out
    of the last. ``chain`` has the sharded dim of each stage; the activation starts with ``start`` sharded. ``kind`` of the
    stages: "real" numbers, "integers" (all arithmetic is exact), or the "identity", on random bits. Those in ``checkpointed``
    compute again in backward; with ``around``, all that a region runs does. ``flight``: "alone"; or two activations, whose
    backward is "in order", "in reverse" or "summed". Where ``pause``, a region ends after so many stages, and another one
    goes on once the other activation has come as far.
    """

    seed: int
    dims: tuple[str, ...]
    sizes: tuple[int, ...]
    channels: tuple[int, ...]
    chain: tuple[str, ...]
    start: str
    independent: str | None = None
    along: str | None = "sharded"
    chunks: int = 3
    shrink: float = 1.0
    kind: str = "real"
    dtype: torch.dtype = torch.float64
    checkpointed: tuple[int, ...] = ()
    around: bool = False
    flight: str = "alone"
    pause: int = 0
    frozen: bool = False  # the input needs no gradient
    permuted: bool = False  # the input is not contiguous

    @staticmethod
    def random(seed: int, ranks: int) -> Case:
        draw = random.Random(seed)
        sequences = ["time", "space", "rows"][: draw.choice((2, 2, 3))]
        independent = draw.choice((None, "batch", "batch", "batch"))
        dtype = draw.choice((torch.float32, torch.float64))
        sizes: dict[str, int] = {}
        while not sizes or math.prod(sizes.values()) > (320 if dtype == torch.float32 else 1200):
            sizes = {
                dim: draw.randint(1, ranks) if draw.random() < 0.15 else draw.randint(2 * ranks, 4 * ranks) for dim in sequences
            }
            sizes["batch"] = 1 if draw.random() < 0.1 else draw.randint(2, 4) * (1 if independent else ranks)
        dims = draw.sample(list(sizes), len(sizes))
        shardable = sequences if independent and draw.random() < 0.8 else dims
        chain = [draw.choice(shardable)]
        for _ in range(draw.randint(1, 4)):
            chain.append(chain[-1] if draw.random() < 0.2 else draw.choice([dim for dim in shardable if dim != chain[-1]]))
        along = draw.choice(["sharded", draw.choice(chain), None, *([independent] if independent else [])])
        kind = draw.choice(("real", "real", "real", "integers", "identity"))
        # Most pauses are where both parts have a switch.
        halves = [(chain[:pause], chain[pause:]) for pause in range(1, len(chain))]
        fitting = [len(a) for a, b in halves if along in ("sharded", None, independent, *({*a} & {*b}))]
        switching = [len(a) for a, b in halves if len(a) in fitting and min(len({*a}), len({*b})) > 1]
        pause = draw.choice([0, 0, *switching] if switching or draw.random() < 0.9 else [0, *fitting])
        channels = [draw.randint(1, 4) for _ in range(len(chain) + 1)]
        return Case(
            seed,
            tuple(dims),
            tuple(sizes[dim] for dim in dims),
            tuple(channels if kind != "identity" else channels[:1] * len(channels)),
            tuple(chain),
            draw.choice(shardable),
            independent,
            along,
            draw.randint(2, 6),
            draw.choice((1.0, 1.0, 0.6, 0.5, 0.2, 2.0)),
            kind,
            dtype,
            tuple(number for number in range(len(chain)) if draw.random() < 0.3),
            draw.random() < 0.2,
            draw.choice(("alone", "alone", "in order", "in reverse", "summed")),
            pause,
            kind != "identity" and draw.random() < 0.1,
            draw.random() < 0.3,
        )

    @property
    def exact(self) -> bool:
        return self.kind != "real"

    def numbers(self, *shape: int, generator: torch.Generator | None = None) -> Tensor:
        """Random real ones. In fp32 they are positive: sums do not cancel, so that 1e-6 can be asked of gradients."""
        draw = torch.rand if self.dtype == torch.float32 else torch.randn
        return draw(*shape, generator=generator, dtype=self.dtype)

    def layout(self, sharded: str) -> Layout:
        return Layout((*self.dims, "channels"), (*self.sizes, self.channels[0]), sharded)

    def shard(self, whole: Tensor, sharded: str) -> Tensor:
        return whole.tensor_split(dist.get_world_size(), self.dims.index(sharded))[dist.get_rank()]

    def tensors(self, channels: int, count: int, salt: int) -> list[Tensor]:
        """Whole tensors like the activation, of the case's kind of numbers."""
        generator = torch.Generator().manual_seed(self.seed * 10 + salt)
        shape = [*self.sizes, channels]
        made = []
        for _ in range(count):
            if self.kind == "real":
                x = self.numbers(*shape, generator=generator)
            elif self.kind == "integers":
                x = torch.randint(-3, 4, shape, generator=generator).to(self.dtype)
            else:  # NaN of all kinds, minus zero, ...
                x = torch.randint(0, 256, [torch.Size(shape).numel() * self.dtype.itemsize], generator=generator)
                x = x.to(torch.uint8).view(self.dtype).view(shape)
            if self.permuted:
                x = x.movedim(0, -1).contiguous().movedim(-1, 0)
            made.append(x)
        return made


class Part(nn.Module):
    """What a stage computes: each dim is mixed, the sharded and the independent one aside, whose positions have weights."""

    def __init__(self, case: Case, number: int):
        super().__init__()
        self.case, self.number = case, number
        sizes = dict(zip(case.dims, case.sizes, strict=True))
        self.kept = [dim for dim in case.dims if dim in (case.chain[number], case.independent)]
        into, out = case.channels[number : number + 2]
        self.mix = nn.ParameterDict({dim: self._matrix(sizes[dim], sizes[dim]) for dim in case.dims if dim not in self.kept})
        self.mix["channels"] = self._matrix(into, out)
        self.at = nn.ParameterDict({dim: self._table(sizes[dim], out) for dim in self.kept})

    def _matrix(self, rows: int, columns: int) -> nn.Parameter:
        if self.case.kind == "real":
            return nn.Parameter(self.case.numbers(rows, columns) / rows**0.5)
        signs = torch.randint(0, 2, (rows,)) * 2 - 1  # one entry a row
        matrix = torch.zeros(rows, columns, dtype=self.case.dtype)
        matrix[torch.randperm(rows), torch.arange(rows) % columns] = signs.to(self.case.dtype)
        return nn.Parameter(matrix)

    def _table(self, size: int, channels: int) -> nn.Parameter:
        if self.case.kind == "real":
            return nn.Parameter(self.case.numbers(size, channels))
        return nn.Parameter(torch.randint(-2, 3, (size, channels)).to(self.case.dtype))

    def forward(self, region: Region, x: Tensor) -> Tensor:
        if self.case.kind == "identity":
            return x if self.number % 2 else x.clone()
        tables = [region.local(self.at[dim], dim=0, name=dim) for dim in self.kept]
        if self.number in self.case.checkpointed:
            return checkpoint(self._compute, x, *tables, use_reentrant=False)
        return self._compute(x, *tables)

    def _compute(self, x: Tensor, *tables: Tensor) -> Tensor:
        for dim, matrix in self.mix.items():
            index = -1 if dim == "channels" else self.case.dims.index(dim)
            x = (x.transpose(index, -1) @ matrix).transpose(index, -1)
        for dim, table in zip(self.kept, tables, strict=True):
            shape = [1] * x.dim()
            shape[self.case.dims.index(dim)], shape[-1] = table.shape
            x = x + table.view(shape)
        return torch.tanh(x) + 0.1 * x if self.case.kind == "real" else torch.relu(x)


Seen = list[tuple[int, dict[str, tuple[int, int]], Tensor]]  # stage, global range of each dim, what it was given


class Result(NamedTuple):
    outputs: list[Tensor]
    inputs: list[Tensor | None]  # gradients
    parameters: list[Tensor]  # gradients
    seen: list[Seen]  # of each activation
    calls: int
    sent: int


def _forward(case: Case, parts: list[Part], region: Region, seen: Seen, x: Tensor) -> Tensor:
    def compute(part: Part, x: Tensor) -> Tensor:
        seen.append((part.number, {dim: region.range(dim) for dim in case.dims}, x.detach().clone()))
        return part(region, x)

    stages = [Stage(partial(compute, part), case.chain[part.number], f"stage {part.number}") for part in parts]
    return region.run(stages, x, independent=case.independent)


def _run(case: Case, parts: list[Part], group: dist.ProcessGroup | None) -> Result:
    """Forward and backward of all activations of the case, on this rank's shards or, with no group, the whole."""
    count = 1 if case.flight == "alone" else 2
    first, last = case.start, case.chain[-1]
    wholes = case.tensors(case.channels[0], count, 1)
    xs = [whole.detach() if group is None else case.shard(whole, first).detach() for whole in wholes]
    xs = [x if x.is_contiguous() or case.permuted else x.contiguous() for x in xs]
    weights = [w if group is None else case.shard(w, last) for w in case.tensors(case.channels[-1], count, 2)]
    for x in xs:
        x.grad = None
        x.requires_grad_(not case.frozen)
    for part in parts:
        part.zero_grad()
    seen: list[Seen] = [[] for _ in xs]

    def half(stages: list[Part], start: str, number: int, x: Tensor) -> Tensor:
        def run(x: Tensor) -> Tensor:
            return _forward(case, stages, Region(case.layout(start), group), seen[number], x)

        return checkpoint(run, x, use_reentrant=False) if case.around else run(x)

    with dsp.ledger() as moved:
        ys = list(xs)
        if case.pause:
            ys = [half(parts[: case.pause], first, number, y) for number, y in enumerate(ys)]
            first = case.chain[case.pause - 1]
        ys = [half(parts[case.pause :], first, number, y) for number, y in enumerate(ys)]
        if case.kind == "identity":
            pairs = list(zip(ys, weights, strict=True))
        elif case.kind == "integers":
            pairs = [((y * weight).sum(), None) for y, weight in zip(ys, weights, strict=True)]
        else:
            pairs = [((y * y * weight).sum(), None) for y, weight in zip(ys, weights, strict=True)]
        if case.flight == "summed" and case.kind != "identity":
            pairs[0][0].add(pairs[1][0]).backward()
        elif case.flight == "summed":
            torch.autograd.backward([y for y, _ in pairs], [weight for _, weight in pairs])
        else:
            for y, weight in reversed(pairs) if case.flight == "in reverse" else pairs:
                y.backward(weight)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for part in parts for p in part.parameters()]
    return Result([y.detach() for y in ys], [x.grad for x in xs], gradients, seen, moved.calls, moved.bytes)


def _same(actual: Tensor, expected: Tensor, case: Case, about: str) -> None:
    assert actual.shape == expected.shape, f"{about}: {actual.shape}, not {expected.shape}; {case}"
    if case.kind == "identity":
        actual, expected = (x.contiguous().view(-1).view(torch.uint8) for x in (actual, expected))
    if case.exact:
        assert torch.equal(actual, expected), f"{about}: not the same bits; {case}"
    elif actual.numel():
        error = ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
        assert error <= TOLERANCE[case.dtype], f"{about}: {error}; {case}"  # and not NaN


def _compare(case: Case, parts: list[Part], chunked: Result, plain: Result) -> None:
    for number, y in enumerate(chunked.outputs):
        _same(y, plain.outputs[number], case, f"output {number}")
        if not case.frozen:
            _same(chunked.inputs[number], plain.inputs[number], case, f"gradient of input {number}")
    names = [f"{part.number} {name}" for part in parts for name, _ in part.named_parameters()]
    for name, actual, expected in zip(names, chunked.parameters, plain.parameters, strict=True):
        _same(actual, expected, case, f"gradient of {name}")
    for of_chunks, of_stages in zip(chunked.seen, plain.seen, strict=True):
        wholes = {stage: (ranges, x) for stage, ranges, x in of_stages}
        for stage, ranges, x in of_chunks:
            whole_ranges, whole = wholes[stage]
            for index, dim in enumerate(case.dims):
                start, stop = ranges[dim]
                whole = whole.narrow(index, start - whole_ranges[dim][0], stop - start)
            _same(x, whole, case, f"what stage {stage} is given at {ranges}")


def _compare_to_one_process(case: Case, parts: list[Part], results: list[Result]) -> None:
    single = _run(case, parts, None)
    sums = torch.stack([torch.cat([gradient.view(-1) for gradient in result.parameters]) for result in results])
    dist.all_reduce(sums)
    for result, gradients in zip(results, sums, strict=True):
        sizes = [gradient.numel() for gradient in single.parameters]
        summed = [part.view_as(like) for part, like in zip(gradients.split(sizes), single.parameters, strict=True)]
        expected = single._replace(
            outputs=[case.shard(y, case.chain[-1]) for y in single.outputs],
            inputs=[None if gradient is None else case.shard(gradient, case.start) for gradient in single.inputs],
        )
        _compare(case, parts, result._replace(parameters=summed), expected)


def _random_schedules(seeds: range) -> tuple[int, int]:
    """How many cases were cut, and how many chunks' computations there were beyond those of whole stages."""
    group = dist.group.WORLD
    exchange = exchange_of(group)
    cut = more = 0
    for seed in seeds:
        case = Case.random(seed, group.size())
        torch.manual_seed(seed)
        parts = [Part(case, number) for number in range(len(case.chain))]
        exchange.overlap = None
        plain = _run(case, parts, group)
        exchange.overlap = FixedOverlap(case.chunks, along=case.along, shrink=case.shrink)
        chunked = _run(case, parts, group)
        _compare(case, parts, chunked, plain)
        assert chunked.sent == plain.sent, case
        if case.dtype == torch.float64 and case.kind != "identity":
            _compare_to_one_process(case, parts, [chunked, plain])
        extra = len(chunked.seen[0]) - len(plain.seen[0])
        more += extra
        cut += extra > 0
    return cut, more


# 500 schedules, of which `make test` runs a quarter.
@pytest.mark.parametrize("block", [0, *(pytest.param(block, marks=pytest.mark.long) for block in range(1, 4))])
@pytest.mark.parametrize(("size", "cases"), [(2, 50), (3, 45), (4, 30)])
def test_random_schedules(ranks, size, cases, block):
    seeds = range(1000 * size + cases * block, 1000 * size + cases * (block + 1))
    for cut, more in ranks(size, _random_schedules, seeds):
        assert cut > 0.6 * cases
        assert more > 2 * cases


# A chain with every kind of boundary, small enough to be run for each mutation.
SMALL = Case(7, ("time", "batch", "space"), (6, 3, 6), (2, 3, 2, 2), ("time", "space", "time"), "time", "batch")
ALONG = ("sharded", "batch", "time", "space")


def _small(along: str | None = "sharded", **changes: Any) -> tuple[Case, list[Part]]:
    torch.manual_seed(0)
    case = replace(SMALL, along=along, **changes)
    return case, [Part(case, number) for number in range(len(case.chain))]


def _chunked(case: Case, parts: list[Part], transport: Transport | None = None) -> Result:
    """By the case's schedule, over another transport if one is given."""
    exchange = exchange_of(dist.group.WORLD)
    exchange.overlap = FixedOverlap(case.chunks, along=case.along, shrink=case.shrink)
    exchange.transport, usual = transport or exchange.transport, exchange.transport
    try:
        return _run(case, parts, dist.group.WORLD)
    finally:
        exchange.transport = usual
        exchange.overlap = None


def _late_values(reads_early: bool) -> list[str]:
    """What is wrong where nothing arrives before it is waited for. The same passes on all ranks, whatever they find."""
    exchange = exchange_of(dist.group.WORLD)
    wrong = []
    for along in ALONG:
        case, parts = _small(along)
        plain = _run(case, parts, dist.group.WORLD)
        transport = LateTransport(exchange.transport, exchange.rank, reads_early=reads_early)
        try:
            _compare(case, parts, _chunked(case, parts, transport), plain)
        except Exception as error:
            wrong.append(f"{along}: {error!r}")
        if set(transport.ends) != {1}:
            wrong.append(f"{along}: transfers were ended so often: {transport.ends}")
    return wrong


def late_values() -> list[str]:
    return _late_values(False)


def late_values_read_early() -> list[str]:
    return _late_values(True)


class _NothingSaved(nn.Module):
    """A stage of which backward needs nothing: a pass that is computed again stops before it."""

    number = 2

    def forward(self, region: Region, x: Tensor) -> Tensor:
        return x + 1


class _InterruptionError(Exception):
    pass


class _Interrupted(nn.Module):
    """A stage that fails in its second chunk, forward or backward."""

    def __init__(self, part: Part, *, backward: bool):
        super().__init__()
        self.part, self.number, self.backward, self.calls = part, part.number, backward, 0

    def forward(self, region: Region, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.part(region, x)
        if self.calls == 2 and self.backward:
            y.register_hook(self.fail)
        elif self.calls == 2:
            self.fail()
        return y

    def fail(self, gradient: Tensor | None = None) -> None:
        raise _InterruptionError


def _give_up(case: Case, parts: list[Part], give_up: str, transport: Transport | None = None) -> Result | None:
    """A pass that is not brought to its end, or computed again as far as needed."""
    if give_up == "checkpoint":
        return _chunked(replace(case, around=True), [*parts[:2], _NothingSaved()], transport)
    interrupted = 2 if case.along == "time" else 1  # a stage that is cut
    stages = [_Interrupted(part, backward=give_up == "backward") if part.number == interrupted else part for part in parts]
    early = torch.zeros((), requires_grad=True) * 1
    with pytest.raises(_InterruptionError):
        _chunked(case, stages, transport)
    # After an error, autograd keeps what it was about to do until it next comes to older work than that.
    early.backward()
    return None


def given_up() -> list[str]:
    """Transfers of a pass that was given up half way and that nobody waited for."""
    exchange = exchange_of(dist.group.WORLD)
    wrong = []
    for along in ALONG:
        for give_up in ("forward", "backward", "checkpoint"):
            case, parts = _small(along)
            transport = LateTransport(exchange.transport, exchange.rank)
            _give_up(case, parts, give_up, transport)
            if not transport.ends or set(transport.ends) != {1}:
                wrong.append(f"{along}, {give_up}: transfers were ended so often: {transport.ends}")
    return wrong


def twice() -> list[str]:
    """What is wrong with gradients of a graph that is gone back through twice: the second may not lie in the first."""
    wrong = []
    exchange = exchange_of(dist.group.WORLD)
    for along in ALONG:
        case, parts = _small(along, kind="identity", chain=("space", "time", "space"), start="space", channels=(2,) * 4)
        exchange.overlap = FixedOverlap(3, along=along)
        x = torch.randn_like(case.shard(case.tensors(2, 1, 1)[0], "space")).requires_grad_()
        y = _forward(case, parts, Region(case.layout("space"), dist.group.WORLD), [], x)
        first, second = (torch.autograd.grad(y, x, torch.full_like(y, n), retain_graph=True)[0] for n in (1.0, 2.0))
        if not ((first == 1).all() and (second == 2).all()):
            wrong.append(f"{along}: {first.unique()}, {second.unique()}")
    exchange.overlap = None
    return wrong


# What happens in which order, of three chunks of stages t, s and u, which have time, space and time sharded. Switches are
# numbered as they begin, forward and then backward; a computation is named by its stage and chunk.
ORDERS = {
    "sharded": (
        "t0 b0 t1 b1 t2 b2  e0 e1 e2  s0 b3 s1 b4 s2 b5  e3 e4 e5  u0 u1 u2",
        "u2 u1 u0  b6 b7 b8  e6 s2 e7 s1 e8 s0  b9 b10 b11  e9 t2 e10 t1 e11 t0",
    ),
    "batch": (
        "t0 b0 t1 b1 t2 b2  e0 s0 b3 e1 s1 b4 e2 s2 b5  e3 u0 e4 u1 e5 u2",
        "u2 b6 u1 b7 u0 b8  e6 s2 b9 e7 s1 b10 e8 s0 b11  e9 t2 e10 t1 e11 t0",
    ),
    "time": (
        "t0 b0 t1 b1 t2 b2  e0 e1 e2  s0  b3 b4 b5  e3 u0 e4 u1 e5 u2",
        "u2 b6 u1 b7 u0 b8  e8 e7 e6  s0  b9 b10 b11  e9 t2 e10 t1 e11 t0",
    ),
    "space": (
        "t0  b0 b1 b2  e0 s0 b3 e1 s1 b4 e2 s2 b5  e3 e4 e5  u0",
        "u0  b6 b7 b8  e6 s2 b9 e7 s1 b10 e8 s0 b11  e11 e10 e9  t0",
    ),
}


def orders() -> list[str]:
    """Orders that are not as written above."""
    exchange = exchange_of(dist.group.WORLD)
    usual = exchange.transport
    wrong = []
    for along, expected in ORDERS.items():
        log: list[str] = []
        exchange.transport = RecordingTransport(usual, log)
        exchange.overlap = FixedOverlap(3, along=along)
        counts: Counter[str] = Counter()

        def compute(linear: nn.Linear, name: str, x: Tensor, counts: Counter[str] = counts, log: list[str] = log) -> Tensor:
            text = f"{name}{counts[name]}"
            counts[name] += 1
            log.append(text)
            y = linear(x)
            y.register_hook(lambda gradient: log.append(text))
            return y

        stages = [
            Stage(partial(compute, nn.Linear(2, 2), name), sharded) for name, sharded in zip("tsu", SMALL.chain, strict=True)
        ]
        shape = [size // 2 if dim == "time" else size for dim, size in zip(SMALL.dims, SMALL.sizes, strict=True)]
        y = Region(SMALL.layout("time"), dist.group.WORLD).run(stages, torch.randn(*shape, 2), independent="batch")
        forward = len(log)
        y.sum().backward()
        actual = [" ".join(part) for part in (log[:forward], log[forward:])]
        wrong += [f"{along}: {a}, not {e}" for a, e in zip(actual, expected, strict=True) if a.split() != e.split()]
    exchange.transport, exchange.overlap = usual, None
    return wrong


def late_messages(module: ModuleType, *, all_to_all: bool = False) -> list[str]:
    """What is wrong with switches of the transport in ``module``, where no message arrives before it is waited for."""
    messages = module.dist = LateMessages()
    transport = module.TorchTransport(dist.group.WORLD)
    if all_to_all:
        transport._find_route = find_all_to_all
    wrong = []
    for along in ALONG:
        case, parts = _small(along)
        plain = _run(case, parts, dist.group.WORLD)
        try:
            _compare(case, parts, _chunked(case, parts, transport), plain)
        except Exception as error:
            wrong.append(f"{along}: {error!r}")
        messages.settle()
    if messages.unwaited or messages.freed:
        wrong.append(f"{messages.unwaited} messages nobody waited for, {messages.freed} freed before")
    return wrong


class Mutation(NamedTuple):
    module: ModuleType
    old: str
    new: str
    checks: tuple[str, ...]  # which have to find something wrong with it
    sentence: str


VALUES = ("late_values", "late_values_read_early")
WAIT_FOR_ARRIVALS = """        for leg in legs:
            leg.wait()
        return legs[0].target.take()
"""
WAIT_FOR_GRADIENTS = """        for leg in ctx.legs:
            leg.wait()
        return None, ctx.legs[0].source.take()
"""
GIVEN_UP = "        with torch.inference_mode():  # it may write to tensors of that mode, and to all others\n"
RECEIVE = """                work.wait()
                if message is not piece:
                    piece.copy_(message)
"""
SENT = """            for work, _ in sends:
                work.wait()
"""

MUTATIONS = {
    "arrivals: no wait": Mutation(
        legs,
        WAIT_FOR_ARRIVALS,
        "        return legs[0].target.take()\n",
        VALUES,
        "A stage computes on memory into which nothing has come yet.",
    ),
    "arrivals: the first one's wait alone": Mutation(
        legs,
        WAIT_FOR_ARRIVALS,
        WAIT_FOR_ARRIVALS.replace("in legs:", "in legs[:1]:"),
        VALUES,
        "Of the chunks that arrive in one tensor, the later ones are missing.",
    ),
    "arrivals: the last one's wait alone": Mutation(
        legs,
        WAIT_FOR_ARRIVALS,
        WAIT_FOR_ARRIVALS.replace("in legs:", "in legs[-1:]:"),
        VALUES,
        "Of the chunks that arrive in one tensor, the earlier ones are missing: the order of begin is not one of arrival.",
    ),
    "arrivals: read before the wait": Mutation(
        legs,
        WAIT_FOR_ARRIVALS,
        "        arrived = legs[0].target.take().clone()\n" + WAIT_FOR_ARRIVALS.replace("legs[0].target.take()", "arrived"),
        VALUES,
        "All transfers are waited for, but what is given on was read before.",
    ),
    "gradients: no wait": Mutation(
        legs,
        WAIT_FOR_GRADIENTS,
        "        return None, ctx.legs[0].source.take()\n",
        VALUES,
        "A stage goes backward from memory into which no gradient has come yet.",
    ),
    "gradients: the first one's wait alone": Mutation(
        legs,
        WAIT_FOR_GRADIENTS,
        WAIT_FOR_GRADIENTS.replace("in ctx.legs:", "in ctx.legs[:1]:"),
        VALUES,
        "Of a stage that ran whole and left in chunks, the gradients of the later chunks are missing.",
    ),
    "gradients: the last one's wait alone": Mutation(
        legs,
        WAIT_FOR_GRADIENTS,
        WAIT_FOR_GRADIENTS.replace("in ctx.legs:", "in ctx.legs[-1:]:"),
        VALUES,
        "Of a stage that ran whole and left in chunks, the gradients of the earlier chunks are missing.",
    ),
    "gradients: read before the wait": Mutation(
        legs,
        WAIT_FOR_GRADIENTS,
        "        arrived = ctx.legs[0].source.take().clone()\n"
        + WAIT_FOR_GRADIENTS.replace("ctx.legs[0].source.take()", "arrived"),
        VALUES,
        "All transfers are waited for, but the gradient that is given on was read before.",
    ),
    "a leg's wait does not end its transfer": Mutation(
        legs,
        "                end()\n",
        "                pass\n",
        (*VALUES, "given_up"),
        "Nothing ever waits for the transport.",
    ),
    "a leg's wait can end a transfer twice": Mutation(
        legs,
        "end, self._end = self._end, None",
        "end = self._end",
        VALUES,
        "The end of a transport is called again when the leg is freed; it is to be called once.",
    ),
    "a leg that is given up does not wait": Mutation(
        legs,
        GIVEN_UP + "            self.wait()\n",
        GIVEN_UP + "            pass\n",
        ("given_up",),
        "Of a pass that was given up half way, memory is freed into which a transfer still writes.",
    ),
    "memory of one pass serves the next": Mutation(
        legs,
        "memory, self._memory = self._memory, None",
        "memory = self._memory",
        ("twice",),
        "A second pass back through a graph writes into the gradients that the first one gave.",
    ),
    "half of the chunks of a tensor are ended": Mutation(
        chunked,
        "legs.end(ways, done)",
        "legs.end(ways[:1], done[:1])",
        VALUES,
        "A stage computes on a tensor of which only the first chunk was asked for.",
    ),
    "a switch ends as it begins": Mutation(
        legs,
        "self._stage, operation, beside=True)\n",
        "self._stage, operation, beside=True)\n        self.wait()\n",
        ("orders",),
        "Values are right, but nothing travels beside compute.",
    ),
    "gradients leave in the order of forward": Mutation(
        legs,
        "for leg in reversed(ctx.legs):",
        "for leg in ctx.legs:",
        ("orders",),
        "Values are right, but the first chunk that backward needs is the last to travel.",
    ),
    "all slices are ended before the first computes": Mutation(
        chunked,
        "arriving = (legs.end([way], [token]) for way, token in zip(ways, done, strict=True))",
        "arriving = [legs.end([way], [token]) for way, token in zip(ways, done, strict=True)]",
        ("orders",),
        "Values are right, but slices are waited for long before they are needed.",
    ),
    "transport: the end does not wait": Mutation(
        transports,
        "            wait()\n            return results\n",
        "            return results\n",
        ("late_messages",),
        "Results are given before the messages that they consist of have come.",
    ),
    "transport: no wait for receives": Mutation(
        transports,
        RECEIVE,
        RECEIVE.replace("                work.wait()\n", ""),
        ("late_messages",),
        "A message is unpacked before it has come.",
    ),
    "transport: received messages stay packed": Mutation(
        transports,
        RECEIVE,
        "                work.wait()\n",
        ("late_messages",),
        "What came into staging memory is not brought to its place.",
    ),
    "transport: no wait for sends": Mutation(
        transports,
        SENT,
        "            pass\n",
        ("late_messages",),
        "Sources and messages can be freed or changed while they are being sent.",
    ),
    "all-to-all: no wait": Mutation(
        transports,
        "            work.wait()\n            sent.clear()",
        "            sent.clear()",
        ("late_all_to_all",),
        "Messages are unpacked before the collective has written them.",
    ),
    "all-to-all: messages are not kept": Mutation(
        transports,
        "            sent.clear()  # kept until now: on CUDA the collective runs on another stream\n",
        "",
        ("late_all_to_all",),
        "Packed messages are freed while the collective reads them.",
    ),
}
CHECKS = {check.__name__: check for check in (late_values, late_values_read_early, given_up, twice, orders)}


def _check(names: Sequence[str], mutation: str | None) -> list[list[str]]:
    """What each of these checks finds wrong, in the package as it is or as it is mutated."""
    module, old, new = (transports, "", "") if mutation is None else MUTATIONS[mutation][:3]
    found = []
    for name in names:
        with mutated(module, old, new) as mutant, unraisable() as errors:
            wrong = CHECKS[name]() if name in CHECKS else late_messages(mutant, all_to_all=name == "late_all_to_all")
        found.append(wrong + errors)
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_nothing_is_wrong_where_nothing_is_early(ranks, size):
    checks = [*CHECKS, "late_messages", "late_all_to_all"]
    if size != 2:
        checks.remove("orders")  # they are written down for two ranks
    for found in ranks(size, _check, checks, None):
        assert dict(zip(checks, found, strict=True)) == {check: [] for check in checks}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutations_are_found(ranks, mutation):
    _, _, _, checks, sentence = MUTATIONS[mutation]
    for found in ranks(2, _check, checks, mutation):
        for check, wrong in zip(checks, found, strict=True):
            assert wrong, f"{check} does not find: {sentence}"


def test_every_wait_has_a_mutation():
    """Those of `side_stream` are in tests/gpu."""
    for module in (legs, transports):
        source = inspect.getsource(module)
        waits = [match.end() - 1 for match in re.finditer(r"^ +(\w+\.)?(wait|end)\(\)$", source, re.MULTILINE)]
        assert len(waits) >= 4
        mutated_parts = [
            range(source.index(old), source.index(old) + len(old)) for of, old, *_ in MUTATIONS.values() if of is module
        ]
        for wait in waits:
            line = source[:wait].count("\n") + 1
            assert any(wait in part for part in mutated_parts), f"no mutation of {module.__name__}, line {line}"


def _checked_collectives(every: int, odd_chunks: int) -> str:
    group = dist.group.WORLD
    exchange = exchange_of(group)
    case, parts = _small(sizes=(7, 3, 8))
    plain = _run(case, parts, group)
    exchange.agreement = Agreement(group, every)
    for along in ALONG:
        _compare(case, parts, _chunked(replace(case, along=along), parts), plain)
    assert exchange.agreement._count > 6 * len(ALONG)
    try:
        _chunked(replace(case, chunks=odd_chunks if exchange.rank == 1 else 2), parts)
    except dsp.UsageError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("every", [1, 4])
def test_check_collectives_with_chunks(ranks, every):
    assert ranks(3, _checked_collectives, every, 2) == [""] * 3


def test_a_rank_with_other_chunks_is_named(ranks):
    for message in ranks(3, _checked_collectives, 1, 1):
        assert "rank 1 came to collective" in message


def _inference(mode: str) -> None:
    for along in ALONG:
        case, parts = _small(along)
        group = dist.group.WORLD
        x = case.shard(case.tensors(2, 1, 1)[0], "time")
        expected = _forward(case, parts, Region(case.layout("time"), group), [], x)
        exchange_of(group).overlap = FixedOverlap(3, along=along)
        seen: Seen = []
        with getattr(torch, mode)():
            y = _forward(case, parts, Region(case.layout("time"), group), seen, x)
        exchange_of(group).overlap = None
        assert len(seen) > len(parts)
        assert not y.requires_grad
        assert y.is_inference() == (mode == "inference_mode")
        _same(y, expected.detach(), case, "output")


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_inference(ranks, mode):
    ranks(2, _inference, mode)


def _raise_in(mode: str, size: int) -> list[str]:
    """Errors of destructors, after stages have failed in the middle of their chunks; the group goes on to be used."""
    with unraisable() as errors:
        for along in ALONG:
            case, parts = _small(along, sizes=(2 * size + 1, 3, 3 * size))
            plain = _run(case, parts, dist.group.WORLD)
            for give_up in ("forward", "backward", "checkpoint"):
                if mode == "enable_grad":
                    _give_up(case, parts, give_up)
                elif give_up == "forward":
                    _give_up_inference(case, parts, mode)
                _compare(case, parts, _chunked(case, parts), plain)
    return errors


def _give_up_inference(case: Case, parts: list[Part], mode: str) -> None:
    interrupted = 2 if case.along == "time" else 1
    stages = [_Interrupted(part, backward=False) if part.number == interrupted else part for part in parts]
    x = case.shard(case.tensors(2, 1, 1)[0], "time")
    exchange_of(dist.group.WORLD).overlap = FixedOverlap(3, along=case.along)
    with pytest.raises(_InterruptionError), getattr(torch, mode)():
        _forward(case, stages, Region(case.layout("time"), dist.group.WORLD), [], x)
    exchange_of(dist.group.WORLD).overlap = None


@pytest.mark.parametrize(("size", "mode"), [(2, "no_grad"), (2, "inference_mode"), (2, "enable_grad"), (3, "enable_grad")])
def test_a_group_is_usable_after_a_stage_has_failed(ranks, size, mode):
    assert ranks(size, _raise_in, mode, size) == [[]] * size


def _sharded_batch() -> None:
    """The dim that no stage mixes is sharded by one of them."""
    for chain in (("batch", "time"), ("time", "batch", "time"), ("batch", "space", "batch")):
        for along in (*dict.fromkeys(chain), "sharded", None):
            for batch in (4, 7):
                case, parts = _small(along, chain=chain, sizes=(6, batch, 4), channels=(2,) * (len(chain) + 1))
                plain = _run(case, parts, dist.group.WORLD)
                _compare(case, parts, _chunked(case, parts), plain)


def test_the_independent_dim_may_be_sharded_by_a_stage(ranks):
    ranks(2, _sharded_batch)


# Peak memory beyond that of whole stages, in shards, in 4 equal chunks on 2 ranks. The pool's is what it keeps, too.
EXTRA = {"sharded": (0.25, 0.0), "time": (0.25, 0.0), "space": (0.5, 0.4), "batch": (1.15, 0.0)}


def _peak(overlap: FixedOverlap | None, pooled: bool) -> float:
    """The most memory at a time that forward and backward of two stages take, or what the pool leased of it; in shards."""
    group = dist.group.WORLD
    exchange = exchange_of(group)
    T, B, S, C = 64, 4, 64, 32
    stages = [Stage(nn.Linear(C, C), sharded) for sharded in ("time", "space")]
    x = torch.randn(T // group.size(), B, S, C, requires_grad=True)
    weight = torch.randn(T, B, S // group.size(), C)
    pool = exchange.transport.buffers = BufferPool()
    if not pooled:
        pool._LEAST = x.nbytes * group.size()  # all memory is torch's, which the profiler sees
    exchange.overlap = overlap
    with torch.profiler.profile(profile_memory=True) as profile:
        region = Region(Layout(("time", "batch", "space", "channels"), (T, B, S, C), "time"), group)
        region.run(stages, x, independent="batch").backward(weight)
    exchange.overlap = None
    if pooled:
        return pool._most_leased / x.nbytes
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes)) / x.nbytes


def _extra_memory() -> dict[str, tuple[float, ...]]:
    plain = [_peak(None, pooled) for pooled in (False, True)]
    return {
        along: tuple(_peak(FixedOverlap(4, along=along, shrink=1.0), pooled) - plain[pooled] for pooled in (False, True))
        for along in EXTRA
    }


def test_peak_memory_of_chunks(ranks):
    for measured in ranks(2, _extra_memory):
        for along, extra in measured.items():
            assert all(a <= b + 0.02 for a, b in zip(extra, EXTRA[along], strict=True)), (along, extra)


ENGINE = VideoDiTConfig(layers=2, hidden=32, heads=2, conditioning_size=6, patch=(1, 2, 2))


def _train(zero: int, overlap: FixedOverlap | None) -> tuple[list[float], list[str]]:
    """Losses of 5 steps through DeepSpeed, and the schedules that were run."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # DeepSpeed calls collectives by their old names
    engine_case = test_deepspeed_engine.Case(sequence=2, data=1, zero=zero, T=7, H=8, W=6)
    config = {
        "train_micro_batch_size_per_gpu": engine_case.batch,
        "zero_optimization": {"stage": zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "sequence_parallel": {"size": 2},
    }
    mesh = dsp.initialize(config)
    group = mesh.group("sequence")
    exchange_of(group).overlap = overlap
    torch.manual_seed(0)
    model = VideoDiT(ENGINE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    engine, *_ = dsp.deepspeed_initialize(model=model, optimizer=optimizer, config=config, mesh=mesh)
    frames = range(*dsp.shard_range(engine_case.T, 2, group.rank()))
    losses = []
    for step in range(5):
        loss = test_deepspeed_engine._loss(engine, test_deepspeed_engine._batch(engine_case, step), frames, group)
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item())
    engine.destroy()
    return losses, overlap.decisions if overlap else []


@pytest.mark.parametrize("zero", [2, 3])
def test_training_with_zero_in_chunks_equals_whole_stages(ranks, zero):
    plain, _ = ranks(2, _train, zero, None)[0]
    assert len(set(plain)) == 5
    for along, text in (("sharded", "3 chunks of time, 3 chunks of space"), ("batch", "2 chunks of batch")):
        for losses, decisions in ranks(2, _train, zero, FixedOverlap(3, along=along, shrink=1.0)):
            assert decisions == [f"{text}: as asked for"]
            torch.testing.assert_close(losses, plain, rtol=1e-6, atol=0)

"""Chains of stages that run in chunks, and their comparison with whole stages and with one process."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import megatron_dsp as dsp
from megatron_dsp import reshard
from megatron_dsp.layout import Layout
from megatron_dsp.reshard import Activation, Ends, FixedOverlap, Region, Stage, set_overlap
from megatron_dsp.reshard.exchange import exchange_of
from megatron_dsp.reshard.transport.move import Transport

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}  # relative to the largest entry


@dataclass(frozen=True)
class Case:
    """A chain of stages on one or two activations, and the chunks that it runs in.

    ``dims`` and ``sizes`` are those of the activation, channels aside, which come last: ``channels`` into each stage and out
    of the last. ``chain`` has the sharded dim of each stage; the activation starts with ``start`` sharded. ``kind`` of the
    stages: "real" numbers, "integers" (all arithmetic is exact), or the "identity", on random bits. Those in ``checkpointed``
    compute again in backward; with ``around``, all that a region runs does. ``cut``: what is, of `Schedule`; the stages have
    ends where it is not "stages". ``flight``: "alone"; or two activations, whose
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
    cut: str = "stages"

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

    @staticmethod
    def random_with_ends(seed: int, ranks: int) -> Case:
        """As `random`; what is cut are the ends of stages."""
        draw = random.Random(~seed)
        case = Case.random(seed, ranks)
        return replace(case, cut=draw.choice(("leave", "ends", "ends")), along=draw.choice((None, *case.dims)))

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
        if case.cut != "stages":
            self.on_entry = nn.ParameterDict({dim: self._table(sizes[dim], into) for dim in case.dims})
            self.on_leaving = nn.ParameterDict({dim: self._table(sizes[dim], out) for dim in case.dims})

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

    def run_with_ends(self, region: Region, seen: Seen, x: Activation, ends: Ends) -> Activation:
        """Each token gets what belongs to its place, at both ends of what `forward` computes."""
        if self.case.kind == "identity":
            whole, copy = ends.enter(lambda chunk: (chunk.clone(), chunk), x)
            return ends.leave(lambda chunk, other: chunk if self.number % 2 else other, whole, copy)
        on_entry, on_leaving, at = (
            {dim: region.local(table, dim=0, name=dim) for dim, table in tables.items()}
            for tables in (self.on_entry, self.on_leaving, self.at)
        )
        ranges = {dim: region.range(dim) for dim in self.case.dims}  # those of now: it is called in backward too

        def run(x: Activation) -> Activation:
            def add(chunk: Tensor, tables: dict[str, Tensor]) -> Tensor:
                for dim, table in tables.items():
                    shape = [1] * chunk.dim()
                    shape[self.case.dims.index(dim)], shape[-1] = -1, chunk.shape[-1]
                    chunk = chunk + ends.local(table, dim=0, name=dim).view(shape)
                return chunk

            changed, first = ends.enter(lambda chunk: (add(chunk, on_entry), chunk), x)
            seen.append((self.number, ranges, first.detach().clone()))
            return ends.leave(
                lambda chunk, first: add(torch.relu(chunk), on_leaving) * first[..., :1],
                self._compute(changed, *(at[dim] for dim in self.kept)),
                first.abs().clamp(max=2),
            )

        return checkpoint(run, x, use_reentrant=False) if self.number in self.case.checkpointed else run(x)

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


def forward(case: Case, parts: list[Part], region: Region, seen: Seen, x: Tensor) -> Tensor:
    def compute(part: Part, x: Tensor) -> Tensor:
        seen.append((part.number, {dim: region.range(dim) for dim in case.dims}, x.detach().clone()))
        return part(region, x)

    def with_ends(part: Part, x: Activation, ends: Ends) -> Activation:
        return part.run_with_ends(region, seen, x, ends)

    has_ends = case.cut != "stages"
    stages = [
        Stage(
            partial(with_ends if has_ends else compute, part),
            case.chain[part.number],
            "stage",
            number=part.number,
            has_ends=has_ends,
            recomputes=has_ends and part.number in case.checkpointed,
        )
        for part in parts
    ]
    return region.run(stages, x, independent=case.independent)


def run_case(case: Case, parts: list[Part], group: dist.ProcessGroup | None) -> Result:
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
            return forward(case, stages, reshard.Region(case.layout(start), group), seen[number], x)

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


def same(actual: Tensor, expected: Tensor, case: Case, about: str) -> None:
    assert actual.shape == expected.shape, f"{about}: {actual.shape}, not {expected.shape}; {case}"
    if case.kind == "identity":
        actual, expected = (x.contiguous().view(-1).view(torch.uint8) for x in (actual, expected))
    if case.exact:
        assert torch.equal(actual, expected), f"{about}: not the same bits; {case}"
    elif actual.numel():
        error = ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()
        assert error <= TOLERANCE[case.dtype], f"{about}: {error}; {case}"  # and not NaN


def compare(case: Case, parts: list[Part], chunked: Result, plain: Result) -> None:
    for number, y in enumerate(chunked.outputs):
        same(y, plain.outputs[number], case, f"output {number}")
        if not case.frozen:
            same(chunked.inputs[number], plain.inputs[number], case, f"gradient of input {number}")
    names = [f"{part.number} {name}" for part in parts for name, _ in part.named_parameters()]
    for name, actual, expected in zip(names, chunked.parameters, plain.parameters, strict=True):
        same(actual, expected, case, f"gradient of {name}")
    for of_chunks, of_stages in zip(chunked.seen, plain.seen, strict=True):
        wholes = {stage: (ranges, x) for stage, ranges, x in of_stages}
        for stage, ranges, x in of_chunks:
            whole_ranges, whole = wholes[stage]
            for index, dim in enumerate(case.dims):
                start, stop = ranges[dim]
                whole = whole.narrow(index, start - whole_ranges[dim][0], stop - start)
            same(x, whole, case, f"what stage {stage} is given at {ranges}")


def compare_to_one_process(case: Case, parts: list[Part], results: list[Result]) -> None:
    single = run_case(case, parts, None)
    sums = torch.stack([torch.cat([gradient.view(-1) for gradient in result.parameters]) for result in results])
    dist.all_reduce(sums)
    for result, gradients in zip(results, sums, strict=True):
        sizes = [gradient.numel() for gradient in single.parameters]
        summed = [part.view_as(like) for part, like in zip(gradients.split(sizes), single.parameters, strict=True)]
        expected = single._replace(
            outputs=[case.shard(y, case.chain[-1]) for y in single.outputs],
            inputs=[None if gradient is None else case.shard(gradient, case.start) for gradient in single.inputs],
        )
        compare(case, parts, result._replace(parameters=summed), expected)


# A chain with every kind of boundary, small enough to be run for each mutation.
SMALL = Case(7, ("time", "batch", "space"), (6, 3, 6), (2, 3, 2, 2), ("time", "space", "time"), "time", "batch")
HOW: dict[str, dict[str, Any]] = {
    **{along: {"along": along} for along in ("sharded", "batch", "time", "space")},
    "ends": {"along": "space", "cut": "ends"},
    "ends, computed again": {"along": "time", "cut": "ends", "checkpointed": (0, 1, 2)},
    "leave": {"along": "batch", "cut": "leave"},
}


def small(how: str = "sharded", **changes: Any) -> tuple[Case, list[Part]]:
    torch.manual_seed(0)
    case = replace(SMALL, **HOW[how] | changes)
    return case, [Part(case, number) for number in range(len(case.chain))]


def overlap_of_case(case: Case) -> FixedOverlap:
    return FixedOverlap(case.chunks, along=case.along, shrink=case.shrink, cut=case.cut)


def run_chunked(case: Case, parts: list[Part], transport: Transport | None = None) -> Result:
    """By the case's schedule, over another transport if one is given."""
    exchange = exchange_of(dist.group.WORLD)
    set_overlap(dist.group.WORLD, overlap_of_case(case))
    exchange.transport, usual = transport or exchange.transport, exchange.transport
    try:
        return run_case(case, parts, dist.group.WORLD)
    finally:
        exchange.transport = usual
        set_overlap(dist.group.WORLD, None)


class _NothingSaved(nn.Module):
    """A stage of which backward needs nothing: a pass that is computed again stops before it."""

    number = 2

    def forward(self, region: Region, x: Tensor) -> Tensor:
        return x + 1

    def run_with_ends(self, region: Region, seen: Seen, x: Activation, ends: Ends) -> Activation:
        return ends.leave(lambda chunk: chunk, *ends.enter(lambda chunk: (chunk + 1,), x))


class InterruptionError(Exception):
    pass


class Interrupted(nn.Module):
    """A stage that fails in its second chunk, forward or backward."""

    def __init__(self, part: Part, *, backward: bool):
        super().__init__()
        self.part, self.number, self.backward, self.calls = part, part.number, backward, 0

    def forward(self, region: Region, x: Tensor) -> Tensor:
        return self._fail_at_second(self.part(region, x))

    def run_with_ends(self, region: Region, seen: Seen, x: Activation, ends: Ends) -> Activation:
        def leave(run: Callable[..., Tensor], *xs: Tensor) -> Activation:
            return ends.leave(lambda *chunks: self._fail_at_second(run(*chunks)), *xs)

        return self.part.run_with_ends(region, seen, x, SimpleNamespace(enter=ends.enter, leave=leave, local=ends.local))

    def _fail_at_second(self, y: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 2 and self.backward:
            y.register_hook(self.fail)
        elif self.calls == 2:
            self.fail()
        return y

    def fail(self, gradient: Tensor | None = None) -> None:
        raise InterruptionError


def give_up_pass(case: Case, parts: list[Part], give_up: str, transport: Transport | None = None) -> Result | None:
    """A pass that is not brought to its end, or computed again as far as needed."""
    if give_up == "checkpoint":
        return run_chunked(replace(case, around=True), [*parts[:2], _NothingSaved()], transport)
    interrupted = 2 if case.along == "time" and case.cut == "stages" else 1  # a stage that is cut
    stages = [Interrupted(part, backward=give_up == "backward") if part.number == interrupted else part for part in parts]
    early = torch.zeros((), requires_grad=True) * 1
    with pytest.raises(InterruptionError):
        run_chunked(case, stages, transport)
    # After an error, autograd keeps what it was about to do until it next comes to older work than that.
    early.backward()
    return None

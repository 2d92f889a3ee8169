"""Modules of parallelized models that run in slices, whose switches travel beside compute: against one process, in fp64."""

from __future__ import annotations

import copy
import math
import random
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import test_plans
import torch
import torch.distributed as dist
from overlap_transports import LateTransport, RecordingTransport
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import megatron_dsp as dsp
from megatron_dsp.layout import Layout
from megatron_dsp.parallelize import (
    Boundary,
    Carried,
    Computed,
    LocalSize,
    Needs,
    Plan,
    Slice,
    parallelize,
    unparallelize,
    verify,
)
from megatron_dsp.reshard import FixedOverlap, Schedule, set_overlap
from megatron_dsp.reshard.exchange import exchange_of
from megatron_dsp.reshard.stages.measured_overlap import MeasuredOverlap

C = 3  # channels


@dataclass(frozen=True)
class LayerCase:
    """A layer that mixes one dim. It takes its activation in ``groups`` of dims that are flattened, channels last.

    ``table``: the dims of a side input that is whole on all ranks. ``skip``: whether one is carried with the activation.
    ``outputs``: how many activations it returns, in a tuple where there are several.
    """

    mixes: str
    groups: tuple[tuple[str, ...], ...]
    table: tuple[str, ...]
    skip: bool
    outputs: int

    @property
    def order(self) -> tuple[str, ...]:
        return tuple(dim for group in self.groups for dim in group)

    @property
    def pattern(self) -> str:
        return " ".join(f"({' '.join(group)})" if len(group) > 1 else group[0] for group in self.groups) + " C"

    def needs(self) -> Needs:
        arguments: dict[Any, Any] = {
            "shape": Computed(lambda sizes: tuple(sizes[dim] for dim in self.order)),
            "batch": LocalSize("B"),
            "table": Slice(" ".join([*self.table, "C"])),
            **({"skip": Carried(self.pattern)} if self.skip else {}),
        }
        outputs = dict.fromkeys(range(self.outputs), self.pattern) if self.outputs > 1 else {}
        return Needs(self.pattern, self.mixes, arguments=arguments, outputs=outputs)


@dataclass(frozen=True)
class Case:
    """Layers on [B, T, S, ..., C], whose other dims are sequences. ``shard`` is the dim sharded between them, or first (lazy).

    ``reentrant``: of checkpoints around each layer, if any. ``flight``: "alone", or two inputs, whose backward is "in order",
    "in reverse" or "summed".
    """

    seed: int
    sizes: dict[str, int]
    shard: str
    lazy: bool
    layers: tuple[LayerCase, ...]
    chunks: int
    shrink: float
    reentrant: bool | None
    flight: str

    @staticmethod
    def random(seed: int, ranks: int) -> Case:
        draw = random.Random(seed)
        sequences = ["T", "S", "R"][: draw.choice((2, 2, 3))]
        sizes = {"B": draw.randint(1, 5), **{dim: draw.randint(ranks, 2 * ranks + 1) for dim in sequences}}
        shard, lazy = draw.choice(sequences), draw.random() < 0.2
        layers = []
        for number in range(draw.randint(2, 3)):
            groups: list[tuple[str, ...]] = []
            for dim in sizes if lazy else draw.sample(list(sizes), len(sizes)):
                if groups and not lazy and draw.random() < 0.5:
                    groups[-1] = (*groups[-1], dim)
                else:
                    groups.append((dim,))
            layers.append(
                LayerCase(
                    shard if number == 0 else draw.choice(sequences),
                    tuple(groups),
                    tuple(draw.sample(list(sizes), draw.randint(0, 2))),
                    not lazy and draw.random() < 0.4,
                    1 if lazy else draw.choice((1, 1, 2)),
                )
            )
        return Case(
            seed,
            sizes,
            shard,
            lazy,
            tuple(layers),
            draw.randint(2, 4),
            draw.choice((1.0, 0.5)),
            draw.choice((None, None, False, True)),
            draw.choice(("alone", "alone", "in order", "in reverse", "summed")),
        )

    def plan(self) -> Plan:
        whole = {0: " ".join([*self.sizes, "C"])}
        return Plan(
            shard=self.shard,
            shardable=tuple(dim for dim in self.sizes if dim != "B"),
            enter=Boundary("embed", whole, after=True),
            leave=Boundary("head", whole),
            modules={f"layers.{number}": layer.needs() for number, layer in enumerate(self.layers)},
            switching="lazy" if self.lazy else "around",
            independent="B",
        )


class Layer(nn.Module):
    def __init__(self, case: LayerCase):
        super().__init__()
        self.case, self.linear, self.bend = case, nn.Linear(C, C), nn.Linear(C, C)

    def forward(
        self, x: Tensor, shape: tuple[int, ...], batch: int, table: Tensor, skip: Tensor | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        """``shape`` is that of x before dims were flattened, channels aside, ``batch`` the number of samples."""
        order = self.case.order
        assert batch == shape[order.index("B")]
        y = self.linear(x.reshape(*shape, C)).cumsum(order.index(self.case.mixes))
        named = sorted(self.case.table, key=order.index)
        table = table.permute(*(self.case.table.index(dim) for dim in named), -1)
        y = y + table.reshape(*(size if dim in named else 1 for dim, size in zip(order, shape, strict=True)), C)
        y = self.bend(torch.tanh(y)).view(x.shape)
        y = y if skip is None else y + skip * x
        return y if self.case.outputs == 1 else tuple(y * (index + 1) for index in range(self.case.outputs))


class Model(nn.Module):
    def __init__(self, case: Case):
        super().__init__()
        self.case, self.embed, self.head = case, nn.Linear(C, C), nn.Linear(C, 2)
        self.layers = nn.ModuleList(map(Layer, case.layers))
        self.tables = nn.ParameterList(torch.randn(*(case.sizes[dim] for dim in of.table), C) for of in case.layers)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer, table in zip(self.layers, self.tables, strict=True):
            x = self._run(layer, table, x)
        return self.head(x)

    def _run(self, layer: Layer, table: Tensor, x: Tensor) -> Tensor:
        dims, order = list(self.case.sizes), layer.case.order
        ordered = x.permute(*(dims.index(dim) for dim in order), -1)
        sizes = dict(zip(order, ordered.shape[:-1], strict=True))
        flat = ordered.reshape(*(math.prod(sizes[dim] for dim in group) for group in layer.case.groups), C)
        run = layer if self.case.reentrant is None else partial(checkpoint, layer, use_reentrant=self.case.reentrant)
        skips = [flat.tanh()] if layer.case.skip else []
        y = run(flat, tuple(sizes.values()), sizes["B"], table, *skips)
        if self.case.lazy:
            return y
        for z in y if isinstance(y, tuple) else (y,):
            x = x + z.view(ordered.shape).permute(*(order.index(dim) for dim in dims), -1)
        return x


def _make(case: Case) -> tuple[Model, list[Tensor]]:
    torch.manual_seed(case.seed)
    model, count = Model(case).double(), 1 if case.flight == "alone" else 2
    return model, [torch.randn(*case.sizes.values(), C, dtype=torch.float64) for _ in range(count)]


Result = tuple[list[Tensor], list[Tensor]]  # outputs, gradients of parameters


def _pass(model: nn.Module, xs: list[Tensor], flight: str) -> Result:
    """Forward of all inputs, then backward in the order that ``flight`` says."""
    model.zero_grad()
    ys = [model(x) for x in xs]
    weight = torch.randn(ys[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    losses = [(y**2 * weight).sum() for y in ys]
    if flight == "summed":
        losses = [torch.stack(losses).sum()]
    for loss in reversed(losses) if flight == "in reverse" else losses:
        loss.backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    return [y.detach() for y in ys], gradients


def _compare(found: Result, expected: Result, about: object = "") -> None:
    ranks = dist.get_world_size()
    for y, one in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(y, one, rtol=1e-11, atol=1e-11, msg=lambda text: f"{about}: {text}")
    for gradient, one in zip(found[1], expected[1], strict=True):
        averaged = gradient.clone()
        dist.all_reduce(averaged)
        torch.testing.assert_close(averaged / ranks, one, rtol=1e-10, atol=1e-10, msg=lambda text: f"{about}: {text}")


def _count_calls(model: Model, x: Tensor) -> Counter[int]:
    """How often a forward calls a part of each layer."""
    calls = Counter[int]()
    for number, layer in enumerate(model.layers):
        layer.bend.register_forward_hook(lambda *_, number=number: calls.update([number]))
    model(x)
    return calls


def _run_random(seeds: range) -> Counter[str]:
    """Random cases against one process; how many were of which kind."""
    mesh, kinds = dsp.Mesh(sequence=dist.get_world_size()), Counter[str]()
    group = mesh.group("sequence")
    for seed in seeds:
        case = Case.random(seed, group.size())
        model, xs = _make(case)
        expected = _pass(model, xs, case.flight)
        parallelize(model, case.plan(), mesh=mesh)
        set_overlap(group, FixedOverlap(case.chunks, along="B", shrink=case.shrink))
        calls = _count_calls(model, xs[0])
        slices = min(case.chunks, case.sizes["B"])
        sliced = [number for number in calls if calls[number] > 1]
        if not case.lazy:  # there the planner says which layers have a switch
            assert sliced == [number for number, layer in enumerate(case.layers) if layer.mixes == case.shard and slices > 1]
        assert all(calls[number] == slices for number in sliced)
        _compare(_pass(model, xs, case.flight), expected, case)
        kinds.update(
            ["sliced" if sliced else "whole", f"checkpoints {case.reentrant}", case.flight, "lazy" if case.lazy else "around"]
        )
    set_overlap(group, None)
    return kinds


@pytest.mark.parametrize(
    ("size", "seeds"),
    [
        (2, range(10)),
        (3, range(10)),
        *(
            pytest.param(size, range(start, start + 50), marks=pytest.mark.long)
            for size in (2, 3, 4)
            for start in range(100, 300, 50)
        ),
    ],
)
def test_random_models_against_one_process(ranks, size, seeds):
    kinds = ranks(size, _run_random, seeds)[0]
    assert min(kinds[kind] for kind in ("sliced", "whole", "around", "lazy", "checkpoints True", "checkpoints False")) > 0, (
        kinds
    )


FIXED = Case(
    seed=0,
    sizes={"B": 3, "T": 5, "S": 7},
    shard="T",
    lazy=False,
    layers=(
        LayerCase("T", (("B", "S"), ("T",)), ("B", "S"), True, 1),
        LayerCase("S", (("B", "T"), ("S",)), ("T",), False, 1),
        LayerCase("T", (("S", "B"), ("T",)), ("S",), False, 2),
    ),
    chunks=3,
    shrink=1.0,
    reentrant=None,
    flight="alone",
)


def _parallel(case: Case) -> tuple[Model, list[Tensor], Result, dist.ProcessGroup]:
    """A parallelized model that runs in slices, its inputs, what they give in one process, and the group."""
    mesh = dsp.Mesh(sequence=dist.get_world_size())
    model, xs = _make(case)
    expected = _pass(model, xs, case.flight)
    parallelize(model, case.plan(), mesh=mesh)
    group = mesh.group("sequence")
    set_overlap(group, FixedOverlap(case.chunks, along="B"))
    return model, xs, expected, group


def _order_of_switches() -> list[str]:
    """What begins and ends when in a pass of one layer in three slices, with the slices of the layer."""
    model, xs, expected, group = _parallel(replace(FIXED, layers=FIXED.layers[2:]))
    exchange, log = exchange_of(group), []
    layer = model.layers[0]
    layer.linear.register_forward_hook(lambda *_: log.append("forward"))
    layer.linear.register_full_backward_hook(lambda *_: log.append("backward"))
    real, exchange.transport = exchange.transport, RecordingTransport(exchange.transport, log)
    found = _pass(model, xs, "alone")
    exchange.transport = real
    _compare(found, expected)
    return log


def test_switches_travel_beside_the_other_slices(ranks):
    for log in ranks(2, _order_of_switches):
        start = log.index("b9")
        # Three slices leave at once and are waited for one by one; two outputs of each leave when they are there.
        there = "b0 b1 b2 e0 forward b3 b4 e1 forward b5 b6 e2 forward b7 b8"
        assert " ".join(log[:start]) == f"{there} e3 e5 e7 e4 e6 e8"
        # All gradients leave before the first one is waited for, those of the last slice.
        leave, last, middle, first = (
            "b9 b10 b11 b12 b13 b14",
            "e9 e12 backward b15",
            "e10 e13 backward b16",
            "e11 e14 backward b17",
        )
        assert " ".join(log[start:]) == f"{leave} {last} {middle} {first} e15 e16 e17"


def _late() -> None:
    for reads_early in (False, True):
        for flight in ("alone", "summed"):
            for reentrant in (None, False):
                case = replace(FIXED, flight=flight, reentrant=reentrant)
                model, xs, expected, group = _parallel(case)
                exchange = exchange_of(group)
                late = LateTransport(exchange.transport, exchange.rank, reads_early=reads_early)
                real, exchange.transport = exchange.transport, late
                found = _pass(model, xs, flight)
                del model
                exchange.transport = real
                _compare(found, expected, f"{reads_early} {case}")
                assert set(late.ends) == {1}


def test_nothing_is_read_before_it_was_waited_for(ranks):
    ranks(2, _late)


def _moved() -> list[tuple[int, int]]:
    """Calls and bytes of switches of whole modules, of three slices, and of one sample, which cannot be sliced."""
    moved = []
    for case in (replace(FIXED, chunks=1), FIXED, replace(FIXED, sizes={**FIXED.sizes, "B": 1})):
        model, xs, expected, _ = _parallel(case)
        with dsp.ledger() as ledger:
            found = _pass(model, xs, "alone")
        moved.append(ledger.by("operation")["switch"])
        _compare(found, expected)
    return moved


def test_slices_move_what_whole_modules_do(ranks):
    for (calls, sent), (sliced_calls, sliced_sent), (one_calls, one_sent) in ranks(2, _moved):
        # Whole, what moves together travels in one collective: two layers, there and back. Slices: 2 + 1 and 1 + 2 tensors.
        assert (calls, sliced_calls, one_calls) == (2 * 2, 3 * (2 + 1 + 1 + 2), 2 * 2)
        assert sent == sliced_sent == 3 * one_sent


class Trying:
    """An overlap that has other slices in each pass, as one that measures does."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.decisions: list[str] = []

    def choose(self, layout: Any, group: Any, sharded: Any, x: Tensor, independent: str | None, ends: bool) -> Schedule:
        self.asked.append((layout, tuple(sharded), tuple(x.shape), x.requires_grad, independent))
        chunks = len(self.asked) % 3 + 1
        return Schedule("B", True, {"B": chunks}) if chunks < 3 else Schedule("S", False, {"S": 2})


def _try() -> None:
    model, xs, expected, group = _parallel(replace(FIXED, flight="in reverse"))
    set_overlap(group, overlap := Trying())
    for _ in range(2):
        _compare(_pass(model, xs, "in reverse"), expected)
    assert len(overlap.asked) == 4  # once in a forward
    own = dsp.shard_sizes(5, 2)[group.rank()]
    layout = Layout(("B", "T", "S", "C"), (3, 5, 7, C), "T")
    assert set(overlap.asked) == {(layout, ("T", "S", "T", "S", "T"), (3, own, 7, C), True, "B")}
    set_overlap(group, measured := MeasuredOverlap([group]))
    passes = 0
    while not measured.decisions and passes < 30:
        _compare(_pass(model, xs, "in reverse"), expected)
        passes += 1
    assert len(measured.decisions) == 1


def test_the_overlap_of_the_group_chooses_once_in_a_forward(ranks):
    ranks(2, _try)


class Around(nn.Module):
    """x [B, S, T, C]: calls ``inner`` on [(B S), T, C], and on what else it takes."""

    def __init__(self, inner: nn.Module, more: Any = ()):
        super().__init__()
        self.embed, self.inner, self.head, self.more = nn.Linear(C, C), inner, nn.Linear(C, 2), more

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.inner(x.flatten(0, 1), *self.more)
        y = y[0] if isinstance(y, tuple) else y
        return self.head(x + y.view(x.shape))


class Inner(nn.Module):
    """On [(B S), T, C]; what it does beside mixing T is given by ``kind``."""

    def __init__(self, kind: str = ""):
        super().__init__()
        self.kind, self.linear, self.norm = kind, nn.Linear(C, C), nn.BatchNorm1d(C)
        self.register_buffer("cache", torch.zeros(0, dtype=torch.float64))

    def forward(self, x: Tensor, *more: Any) -> Any:
        y = self.linear(x).cumsum(1).tanh()
        if self.kind == "norm":
            y = self.norm(y.transpose(1, 2)).transpose(1, 2)
        if self.kind == "cache":
            if not self.cache.numel():
                self.cache = torch.arange(x.shape[1], dtype=x.dtype).sin()
            y = y + self.cache[:, None]
        if self.kind == "appends":
            more[0].append(y)
        return (y, y.detach()) if self.kind == "returns more" else y


INNER = Needs("(B S) T C", "T")
ENDS = {"enter": Boundary("embed", {0: "B S T C"}, after=True), "leave": Boundary("head", {0: "B S T C"})}
AROUND = Plan(shard="T", shardable=("T", "S"), modules={"inner": INNER}, independent="B", **ENDS)
REFUSED = {
    "": ((torch.zeros(3),), INNER, r"argument 1 has a tensor of shape \(3,\) that the plan does not name; name it in arg"),
    "returns more": ((), replace(INNER, outputs={0: "(B S) T C"}), r"returns a tensor of shape \(.*\) that the plan does not"),
    "norm": ((), INNER, r"changes a buffer in each call, as BatchNorm in training does; name 'B' in its whole="),
    "appends": (([],), INNER, r"it adds to a list, dict or set that it is passed"),
}


def _refused() -> None:
    mesh = dsp.Mesh(sequence=2)
    group = mesh.group("sequence")
    x = torch.randn(4, 5, 7, C, dtype=torch.float64)
    for kind, (more, needs, message) in REFUSED.items():
        model = Around(Inner(kind), more).double()
        parallelize(model, replace(AROUND, modules={"inner": needs}), mesh=mesh)
        set_overlap(group, FixedOverlap(2))
        with pytest.raises(
            dsp.UsageError, match=f"module 'inner' runs in slices of 'B', which is independent=, but .*{message}"
        ):
            model(x)
        set_overlap(group, None)
        model(x)  # whole
    for kind in ("norm", "cache"):  # in evaluation a norm changes nothing, and a cache only in the first call
        model = Around(Inner(kind)).double().eval()
        expected = _pass(copy.deepcopy(model), [x], "alone")
        parallelize(model, AROUND, mesh=mesh)
        set_overlap(group, FixedOverlap(2))
        _compare(_pass(model, [x], "alone"), expected)


def test_modules_that_cannot_be_sliced_are_refused(ranks):
    ranks(2, _refused)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"independent": "C"},
            "independent='C' must be a dim of the activation that enters, B, S, T, and not the one that is sh",
        ),
        ({"independent": "T"}, "independent='T' must be a dim of the activation"),
        ({"modules": {"inner": replace(INNER, outputs={0: "S T C"})}}, "'S T C' has no 'B', which is independent="),
        ({"modules": {"inner": Needs("1+B S T C", "T")}}, r"'1\+B S T C' has other tokens beside 'B'"),
        ({"attributes": {"inner": {"cache": Slice("B C")}}}, "'cache' depends on 'B', which is independent="),
        ({"attributes": {"inner": {"kind": LocalSize("B")}}}, "'kind' depends on 'B', which is independent="),
    ],
)
def test_plans_whose_slices_would_be_wrong_are_refused(changes, message):
    with pytest.raises(dsp.UsageError, match=message):
        replace(AROUND, **changes)


def _attribute_of_the_batch() -> None:
    mesh = dsp.Mesh(sequence=2)
    plan = replace(AROUND, attributes={"inner": {"kind": Computed(lambda sizes: str(sizes["B"]))}})
    model = parallelize(Around(Inner()).double(), plan, mesh=mesh)
    with pytest.raises(dsp.UsageError, match="attribute 'kind': its Computed asks for the size of 'B'; there are S, T"):
        model(torch.randn(2, 5, 7, C, dtype=torch.float64))


def test_attributes_do_not_depend_on_the_slice(ranks):
    ranks(2, _attribute_of_the_batch)


class Beside(nn.Module):
    """x [B, S, T, C]: ``inner`` mixes a token that stands beside T with it, on [(B S), 1+T, C]."""

    def __init__(self):
        super().__init__()
        self.embed, self.inner, self.head = nn.Linear(C, C), Inner(), nn.Linear(C, 2)
        self.token = nn.Parameter(torch.randn(C))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = torch.cat([self.token.expand(*x.shape[:2], 1, C), x], 2)
        y = self.inner(y.flatten(0, 1)).view(y.shape)
        return self.head(x + y[:, :, 1:] * y[:, :, :1])


JOINT = Plan(
    shard="T",
    shardable=("T", "S"),
    enter=Boundary("first", {0: "B T S C"}, after=True),
    leave=Boundary("last", {0: "B (T S) C"}),
    modules={
        "blocks.*": Needs("B (T S) C", "T", outputs={0: "B (T S) C"}, attention="B heads (T S) D"),
    },
    independent="B",
)


class Joint(test_plans.JointModel):
    def __init__(self) -> None:
        super().__init__(3, 3, text=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, x)[0]


SERVED = {
    "a token beside": (Beside, replace(AROUND, modules={"inner": Needs("(B S) 1+T C", "T")}), (3, 5, 7, C)),
    "attention over the shard": (Joint, JOINT, (3, 4, 5, test_plans.C)),
}


def _served() -> None:
    mesh = dsp.Mesh(sequence=dist.get_world_size())
    group = mesh.group("sequence")
    for name, (make, plan, shape) in SERVED.items():
        torch.manual_seed(0)
        model, x = make().double(), torch.randn(shape, dtype=torch.float64)
        expected = _pass(model, [x], "alone")
        set_overlap(group, overlap := FixedOverlap(3))
        verify(model, x, plan=plan, mesh=mesh)
        assert not overlap.decisions  # what verify ran was not by this one
        parallelize(model, plan, mesh=mesh)
        _compare(_pass(model, [x], "alone"), expected, name)
        assert overlap.decisions == ["3 chunks of B: as asked for"]


@pytest.mark.parametrize("size", [2, 3])
def test_tokens_beside_and_attention_over_the_shard(ranks, size):
    ranks(size, _served)


def _verify() -> None:
    mesh = dsp.Mesh(sequence=2)
    model, xs = _make(FIXED)
    verify(model, xs[0], plan=FIXED.plan(), mesh=mesh)
    wrong = nn.Sequential(MixesSamples()).double()
    ends = {0: "B S T C"}
    plan = replace(AROUND, enter=Boundary("", ends), leave=Boundary("", ends, after=True), modules={"0": Needs("B S T C", "T")})
    x = torch.randn(4, 5, 7, C, dtype=torch.float64)
    verify(wrong, x, plan=replace(plan, independent=None), mesh=mesh)
    with pytest.raises(dsp.UsageError, match="in two slices of B: module '0' is the first whose output differs"):
        verify(wrong, x, plan=plan, mesh=mesh)


class MixesSamples(nn.Module):
    """On [B, S, T, C]."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).cumsum(2) + x.mean(0)


def test_verify_runs_slices(ranks):
    ranks(2, _verify)


def _hooks_of_others() -> None:
    seen = []
    model, xs, _, group = _parallel(replace(FIXED, layers=FIXED.layers[:1]))
    layer = model.layers[0]
    layer.register_forward_pre_hook(lambda module, args: seen.append(("before", tuple(args[0].shape))))
    layer.register_forward_hook(lambda module, args, output: seen.append(("after", tuple(output.shape))))
    layer.linear.register_forward_hook(lambda *_: seen.append("within"))
    model(xs[0])
    own = dsp.shard_sizes(7, 2)[group.rank()], dsp.shard_sizes(5, 2)[group.rank()]
    # Before: what the first slice sees, where S is sharded. After: what is outside, where T is.
    assert seen == [("before", (own[0], 5, C)), "within", "within", "within", ("after", (3 * 7, own[1], C))]
    unparallelize(model)
    seen.clear()
    model(xs[0])
    assert seen.count("within") == 1


def test_hooks_of_others_see_the_first_slice_and_the_whole_output(ranks):
    ranks(2, _hooks_of_others)


class Scaled(nn.Module):
    """On [(B S), T, C]; it has a parameter of its own, and one in a module within it."""

    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(C, C), nn.Parameter(torch.ones(C))

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x * self.scale).cumsum(1) / x.shape[1]).tanh() * self.scale


def _train(zero: int, chunks: int) -> list[float]:
    """Losses of 4 steps through DeepSpeed."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # DeepSpeed calls collectives by their old names
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "sequence_parallel": {"size": 2},
    }
    mesh = dsp.initialize(config)
    set_overlap(mesh.group("sequence"), FixedOverlap(chunks))
    torch.manual_seed(0)
    model = parallelize(Around(Scaled()), AROUND, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    engine, *_ = dsp.deepspeed_initialize(model=model, optimizer=optimizer, config=config, mesh=mesh)
    losses = []
    for _ in range(4):
        x = torch.randn(4, 5, 7, C)
        loss = (engine(x) - x[..., :2]).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    engine.destroy()
    return losses


@pytest.mark.long
@pytest.mark.parametrize("zero", [1, 3])
def test_training_with_zero_in_slices_equals_whole_modules(ranks, zero):
    whole = ranks(2, _train, zero, 1)[0]
    assert len(set(whole)) == 4
    for losses in ranks(2, _train, zero, 3):
        torch.testing.assert_close(losses, whole, rtol=1e-5, atol=0)

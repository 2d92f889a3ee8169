"""What plans can say of modules beyond their activation, each in a small model, against one process in fp64."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import megatron_dsp as dsp
from megatron_dsp.parallelize import Boundary, Carried, Computed, LocalSize, Needs, Plan, Reduced, Slice, parallelize, verify

B, T, S, C = 2, 7, 5, 12  # neither T nor S is a multiple of 2, 3 or 4 ranks


class Attention(nn.Module):
    """Over dim 1 of [batch, length, C], by matrix products."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C)

    def forward(self, x: Tensor, bias: Tensor | float = 0.0) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, -1)
        return self.out((query @ key.transpose(1, 2) + bias).softmax(-1) @ value)


class ClsBlock(nn.Module):
    """x [B, 1+(S T), C]: as TimeSformer's layers, it takes the frames from a config and averages CLS over them."""

    def __init__(self, config: SimpleNamespace):
        super().__init__()
        self.config = config
        self.temporal, self.spatial, self.mlp = Attention(), Attention(), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        frames = self.config.frames
        grid = x[:, 1:].unflatten(1, (-1, frames))
        grid = grid + self.temporal(grid.flatten(0, 1)).view(grid.shape)
        cls = x[:, :1].unsqueeze(1).expand(-1, frames, -1, -1)
        attended = self.spatial(torch.cat([cls, grid.transpose(1, 2)], 2).flatten(0, 1)).unflatten(0, (-1, frames))
        grid = grid + attended[:, :, 1:].transpose(1, 2)
        x = torch.cat([x[:, :1] + attended[:, :, 0].mean(1, keepdim=True), grid.flatten(1, 2)], 1)
        return x + self.mlp(x).tanh()


class Cls(nn.Module):
    """Pixels [B, T, S, C]; tables of positions are a longer buffer and a parameter. Frames are embedded in the model itself."""

    def __init__(self, checkpointed: bool = False):
        super().__init__()
        config = SimpleNamespace(frames=T, width=C)
        self.blocks, self.head = nn.ModuleList([ClsBlock(config), ClsBlock(config)]), nn.Linear(C, 3)
        self.cls, self.space = nn.Parameter(torch.zeros(1, 1, C)), nn.Parameter(torch.zeros(1, S, 1, C))
        self.first, self.blocks[1].table = nn.Linear(C, C), nn.Parameter(torch.zeros(1, T, C))
        self.register_buffer("time", torch.linspace(0, 3, (T + 2) * C, dtype=torch.float64).sin().view(T + 2, C))
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.first(x).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), (x + self.space).flatten(1, 2)], 1)
        for index, block in enumerate(self.blocks):
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
            if index == 0:
                grid = x[:, 1:].unflatten(1, (S, -1))
                grid = grid + self.time[: grid.shape[2]]
                x = torch.cat([x[:, :1], grid.flatten(1, 2)], 1)
        return {"output": self.head(x)}


CLS = Plan(
    shard="T",
    sizes=Boundary("", {0: "B T S channels"}),
    enter=Boundary("blocks.0", {0: "B 1+(S T) C"}),
    leave=Boundary("head", {0: "B 1+(S T) C"}),
    modules={
        "blocks.*.temporal": Needs("(B S) T C", "T"),
        "blocks.*.spatial": Needs("(B T) 1+S C", "S", outputs={0: Reduced("(B T) 1+S C", over="T", by="mean")}),
    },
    attributes={"": {"time": Slice("T C")}, "blocks.*": {"config.frames": LocalSize("T")}},
)


class Positions(nn.Module):
    """x [B, T, S, C]: adds its own table, a parameter of [1, T, 1, C]."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(1, T, 1, C))

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return (x + self.table).view(-1, *grid, C)


class Down(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(C, C)

    def forward(self, x: Tensor, skips: list[Tensor]) -> Tensor:
        skips.append(x)
        return self.linear(x).tanh()


class Up(nn.Module):
    """Attends along T of [B, T, S, C] with a bias of its frames, and pops what `Down` has left."""

    def __init__(self):
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor, skips: list[Tensor], *, more: dict[str, Any]) -> tuple[list[Tensor], str]:
        x = x + skips.pop()
        attended = self.attention(x.transpose(1, 2).flatten(0, 1), more["biases"][0])
        return [x, attended.view(B, -1, x.shape[1], C).transpose(1, 2)], more["name"]


class Skips(nn.Module):
    """A U of two levels on [B, T, S, C], whose skips are a list that is appended to and popped."""

    def __init__(self):
        super().__init__()
        self.first, self.positions = nn.Linear(C, C), Positions()
        self.down, self.up = nn.ModuleList([Down(), Down()]), nn.ModuleList([Up(), Up()])
        self.last = nn.Linear(C, 3)

    def forward(self, x: Tensor, biases: list[Any]) -> Tensor:
        skips: list[Tensor] = []
        x = self.positions(self.first(x), grid=tuple(x.shape[1:3]))
        for down in self.down:
            x = down(x, skips)
        for up in self.up:
            (x, y), name = up(x, skips, more={"biases": biases, "name": "kept"})
            x = x + y
        assert (len(skips), name) == (0, "kept")
        return self.last(x)


SKIPS = Plan(
    shard="T",
    enter=Boundary("positions", {0: "B T S C"}),
    leave=Boundary("last", {0: "B T S C"}),
    modules={
        "positions": Needs("B T S C", arguments={"grid": Computed(lambda sizes: (sizes["T"], sizes["S"]))}),
        "up.*": Needs(
            "B T S C",
            "T",
            arguments={("skips", -1): Carried("B T S C"), ("more", "biases", 0): Slice("(B S) queries keys")},
            outputs={(0, 0): "B T S C", (0, 1): "B T S C"},
        ),
    },
    shardable=("T", "S"),
    attributes={"positions": {"table": Slice("1 T 1 C")}},
)


class InTurn(nn.Module):
    """One attention for both dims of [B, T, S, C], in turns."""

    def __init__(self):
        super().__init__()
        self.attention, self.first, self.last = Attention(), nn.Linear(C, C), nn.Linear(C, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(2):
            x = x + self.attention(x.flatten(0, 1)).view(x.shape)
            y = x.transpose(1, 2)
            x = x + self.attention(y.flatten(0, 1)).view(y.shape).transpose(1, 2)
        return self.last(x)


IN_TURN = Plan(
    shard="T",
    enter=Boundary("first", {0: "B T S C"}, after=True),
    leave=Boundary("last", {0: "B T S C"}),
    modules={"attention": (Needs("(B T) S C", "S"), Needs("(B S) T C", "T"))},
)


class Scores(nn.Module):
    """Of rows that attend as one (tied rows): their logits are summed over all rows R of [B, R, S, C]."""

    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(C, C), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("brsc,brtc->bst", self.query(x), self.key(x))


class Pool(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.mean(1), x


class TiedRows(nn.Module):
    """x [B, R, S, C]; returns a mean over rows [B, S, 3]."""

    def __init__(self):
        super().__init__()
        self.scores, self.value, self.pool, self.head = Scores(), nn.Linear(C, C), Pool(), nn.Linear(C, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.einsum("bst,brtc->brsc", self.scores(x).softmax(-1), self.value(x))
        pooled, _ = self.pool(x)
        return self.head(pooled)


TIED = Plan(
    shard="R",
    enter=Boundary("", {0: "B R S C"}),
    leave=Boundary("head", {0: "B S C"}),
    modules={
        "scores": Needs("B R S C", outputs={0: Reduced("B S columns", over="R")}),
        "pool": Needs("B R S C", outputs={0: Reduced("B S C", over="R", by="mean"), 1: "B R S C"}),
    },
)


class Joint(nn.Module):
    """Attention of L text tokens and the grid [B, L+(T S), C] to each other; fewer heads of keys and values are allowed."""

    def __init__(self, heads: int, groups: int):
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, C // heads
        self.query, self.out = nn.Linear(C, C), nn.Linear(C, C)
        self.key, self.value = nn.Linear(C, groups * self.size), nn.Linear(C, groups * self.size)

    def forward(self, x: Tensor, text: Tensor | None, mask: Tensor | None, causal: bool) -> tuple[Tensor, Tensor | None]:
        length = 0 if text is None else text.shape[1]
        both = x if text is None else torch.cat([text, x], 1)
        query, key, value = (
            layer(both).unflatten(2, (-1, self.size)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        grouped = self.groups < self.heads
        attended = scaled_dot_product_attention(query, key, value, mask, is_causal=causal, enable_gqa=grouped)
        both = self.out(attended.transpose(1, 2).flatten(2))
        return x + both[:, length:], None if text is None else text + both[:, :length]


class JointModel(nn.Module):
    def __init__(
        self, heads: int = 3, groups: int = 3, text: bool = True, mask: bool = False, causal: bool = False, checkpointed=False
    ):
        super().__init__()
        self.first, self.blocks = nn.Linear(C, C), nn.ModuleList([Joint(heads, groups), Joint(heads, groups)])
        self.last, self.text, self.causal = nn.Linear(C, 3), nn.Linear(C, C) if text else None, causal
        self.masked, self.heads, self.checkpointed = mask, heads, checkpointed

    def forward(self, x: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        x = self.first(x).flatten(1, 2)
        y = None if self.text is None else self.text(text)
        tokens = x.shape[1] + (0 if y is None else y.shape[1])
        mask = (torch.arange(self.heads * tokens * tokens) % 7 > 0).view(1, self.heads, tokens, tokens) if self.masked else None
        for block in self.blocks:
            run = partial(checkpoint, block, use_reentrant=False) if self.checkpointed else block
            x, y = run(x, y, mask, self.causal)
        return (self.last(x),) if y is None else (self.last(x), y)


def _joint(text: bool) -> Plan:
    return Plan(
        shard="S",
        sizes=Boundary("", {0: "B T S channels"}),
        enter=Boundary("blocks.0", {0: "B (T S) C"}),
        leave=Boundary("last", {0: "B (T S) C"}),
        modules={
            "blocks.*": Needs(
                "B (T S) C",
                outputs={0: "B (T S) C"},
                attention="B heads L+(T S) D" if text else "B heads (T S) D",
            )
        },
    )


class Layer(nn.Module):
    """Attends over dims of [B, T, S, C]: one of them, or both."""

    def __init__(self, dims: tuple[int, ...]):
        super().__init__()
        self.dims, self.qkv = dims, nn.Linear(C, 3 * C)

    def forward(self, x: Tensor) -> Tensor:
        y = x.transpose(1, 2) if self.dims == (1,) else x
        flat = y.flatten(1, 2) if len(self.dims) == 2 else y.flatten(0, 1)
        query, key, value = (z.unflatten(2, (3, -1)).transpose(1, 2) for z in self.qkv(flat).chunk(3, -1))
        y = y + scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(y.shape)
        return y.transpose(1, 2) if self.dims == (1,) else y


class Layers(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(C, C), *(Layer(dims) for dims in ((1,), (1, 2), (1,), (2,), (1, 2))), nn.Linear(C, 3))


LAYERS = Plan(
    switching="lazy",
    enter=Boundary("1", {0: "B T S C"}),
    leave=Boundary("6", {0: "B T S C"}),
    modules={
        "[13]": Needs("B T S C", "T"),
        "4": Needs("B T S C", "S"),
        "[25]": Needs("B T S C", attention="B heads (T S) D"),
    },
)


class Case(NamedTuple):
    model: Callable[..., nn.Module]
    plan: Plan
    inputs: tuple[tuple[int, ...], ...]
    calls: dict[str, int]  # of each collective in a forward, but for those of enter and leave


VIDEO, TEXT = (B, T, S, C), (B, 4, C)
CASES = {
    "a CLS token, a config, a long table": Case(Cls, CLS, (VIDEO,), {"switch": 4, "mean": 2}),
    "recomputed": Case(partial(Cls, checkpointed=True), CLS, (VIDEO,), {"switch": 4, "mean": 2}),
    "skips in a list, items, a table, values": Case(Skips, SKIPS, (VIDEO, (B * S, T, T)), {"switch": 4}),
    "a module for two dims in turn": Case(InTurn, IN_TURN, (VIDEO,), {"switch": 4}),
    "tied rows and a mean": Case(TiedRows, TIED, (VIDEO,), {"all-reduce": 2}),
    "joint attention": Case(JointModel, _joint(True), (VIDEO, TEXT), {"switch": 4, "gather": 2}),
    "recomputed attention": Case(
        partial(JointModel, checkpointed=True), _joint(True), (VIDEO, TEXT), {"switch": 4, "gather": 2}
    ),
    "grouped queries": Case(partial(JointModel, 6, 3), _joint(True), (VIDEO, TEXT), {"switch": 4, "gather": 2}),
    "a mask of each head": Case(partial(JointModel, 3, mask=True), _joint(True), (VIDEO, TEXT), {"switch": 4, "gather": 2}),
    # The first three layers stay in S; one switch, and two of heads in each of two layers.
    "a chain with full attention": Case(Layers, LAYERS, (VIDEO,), {"switch": 1 + 2 * 2}),
    "causal, one head": Case(partial(JointModel, 1, 1, text=False, causal=True), _joint(False), (VIDEO, TEXT), {"switch": 4}),
}


def _made(case: Case) -> tuple[nn.Module, tuple[Any, ...]]:
    torch.manual_seed(0)
    model = case.model().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    inputs: list[Any] = [torch.randn(shape, dtype=torch.float64) for shape in case.inputs]
    if case.model is Skips:
        inputs[1] = [inputs[1], "of time"]  # a list, which no module pops: both levels read it
    return model, tuple(inputs)


def _whole(output: Any) -> Tensor:
    tensors = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else (output,)
    return torch.cat([x.flatten() for x in tensors])


def _backward(model: nn.Module, output: Tensor) -> list[Tensor]:
    model.zero_grad()
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (output**2 * weight).sum().backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def _compare(names: list[str]) -> dict[str, dict[str, int]]:
    mesh, calls = dsp.Mesh(sequence=dist.get_world_size()), {}
    for name in names:
        case = CASES[name]
        model, inputs = _made(case)
        state, attributes = list(model.state_dict()), {n: set(vars(m)) for n, m in model.named_modules()}
        alone = _whole(model(*inputs))
        expected = _backward(model, alone)
        verify(model, inputs, plan=case.plan, mesh=mesh)
        parallelize(model, case.plan, mesh=mesh)
        with dsp.ledger() as moved:
            output = _whole(model(*inputs))
        torch.testing.assert_close(output, alone, rtol=1e-11, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")
        for gradient, one in zip(_backward(model, output), expected, strict=True):
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
            torch.testing.assert_close(gradient, one, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
        assert (list(model.state_dict()), {n: set(vars(m)) for n, m in model.named_modules()}) == (state, attributes)
        torch.testing.assert_close(_whole(copy.deepcopy(model)(*inputs)), alone, rtol=1e-11, atol=1e-11)
        calls[name] = {operation: count for operation, (count, _) in moved.by("operation").items()}
    return calls


@pytest.fixture(scope="module", params=[2, 3, pytest.param(4, marks=pytest.mark.long)])
def compared(ranks, request) -> dict[str, dict[str, int]]:
    return ranks(request.param, _compare, list(CASES))[0]


@pytest.mark.parametrize("name", CASES)
def test_outputs_gradients_and_collectives(compared, name):
    leave = {} if name == "tied rows and a mean" else {"gather": 1}  # it leaves as a mean, whole already
    expected = {
        operation: CASES[name].calls.get(operation, 0) + leave.get(operation, 0) for operation in {**CASES[name].calls, **leave}
    }
    assert compared[name] == expected


def _one_head(causal: bool) -> dict[str, int]:
    """Over equal shards: keys and values go round where Ulysses would send all to one rank, unless a mask is in the way."""
    mesh = dsp.Mesh(sequence=2)
    model, (x, text) = _made(Case(partial(JointModel, 1, 1, text=False, causal=causal), _joint(False), (VIDEO, TEXT), {}))
    x = x[:, :, :4]
    alone = _whole(model(x, text))
    expected = _backward(model, alone)
    parallelize(model, _joint(False), mesh=mesh)
    with dsp.ledger() as moved:
        output = _whole(model(x, text))
    torch.testing.assert_close(output, alone, rtol=1e-11, atol=1e-11)
    for gradient, one in zip(_backward(model, output), expected, strict=True):
        dist.all_reduce(gradient)
        torch.testing.assert_close(gradient / 2, one, rtol=1e-10, atol=1e-10)
    return {operation: count for operation, (count, _) in moved.by("operation").items()}


@pytest.mark.parametrize(("causal", "calls"), [(False, {"ring": 2}), (True, {"switch": 4})])
def test_ring_serves_attention_where_it_sends_less(ranks, causal, calls):
    assert ranks(2, _one_head, causal)[0] == {**calls, "gather": 1}


def _changed(plan: Plan, **changes: Any) -> Plan:
    return Plan(**{**vars(plan), **changes})


def _needs(plan: Plan, name: str, **changes: Any) -> dict[str, Any]:
    needs = plan.modules[name]
    assert isinstance(needs, Needs)
    return {"modules": {**plan.modules, name: Needs(**{**vars(needs), **changes})}}


class RecomputedInTurn(InTurn):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for dim in (2, 1):
            y = x.movedim(dim, 2)
            x = x + checkpoint(self.attention, y.flatten(0, 1), use_reentrant=False).view(y.shape).movedim(2, dim)
        return self.last(x)


def _single_frames(model: nn.Module) -> nn.Module:
    """A model that does something else where it finds a single frame, as some do."""
    forward = model.first.forward
    model.first.forward = lambda x: forward(x) * (2.0 if x.shape[1] == 1 else 1.0)
    return model


JOINT = CASES["joint attention"]
WRONG = {
    "CLS is not averaged": (
        CASES["a CLS token, a config, a long table"],
        _changed(CLS, **_needs(CLS, "blocks.*.spatial", outputs={})),
        # Nothing that is planned differs in block 0: what its CLS becomes is seen in what goes into the next block's attention.
        r"module 'blocks\.1\.spatial' is the first whose input differs, so what runs before it in the region does: by",
    ),
    "a config that is whole": (
        CASES["a CLS token, a config, a long table"],
        _changed(CLS, attributes={"": CLS.attributes[""]}),
        r"fails in module 'blocks\.0', which is not planned: RuntimeError",
    ),
    "a table that is whole": (
        CASES["a CLS token, a config, a long table"],
        _changed(CLS, attributes={"blocks.*": CLS.attributes["blocks.*"]}),
        r"module 'blocks\.1\.temporal' is the first whose input differs",
    ),
    "a table that is too short": (
        CASES["a CLS token, a config, a long table"],
        _changed(CLS, attributes={**CLS.attributes, "": {"space": Slice("1 T 1 C")}}),
        r"module '': attribute 'space', '1 T 1 C', has 5 rows of T, and the input 7; it needs as many",
    ),
    "a table that is not there": (
        CASES["a CLS token, a config, a long table"],
        _changed(CLS, attributes={"blocks.*": {"config.num_frames": LocalSize("T")}}),
        r"module 'blocks\.0': attribute 'config\.num_frames' is not there: a SimpleNamespace has no 'num_frames'",
    ),
    "another number than the size": (
        CASES["a CLS token, a config, a long table"],
        _changed(CLS, attributes={"blocks.*": {"config.width": LocalSize("T")}}),
        r"module 'blocks\.0': attribute 'config\.width' is 12, but the size of T is ",
    ),
    "sizes that run too late": (
        CASES["a CLS token, a config, a long table"],
        _changed(CLS, sizes=Boundary("blocks.1.mlp", {0: "B T channels"})),
        r"module 'blocks\.1\.mlp', from which sizes are taken, has not run before",
    ),
    "an item that is not there": (
        CASES["skips in a list, items, a table, values"],
        _changed(SKIPS, **_needs(SKIPS, "up.*", arguments={("more", "bias"): Slice("(B S) queries keys")})),
        r"module 'up\.0': argument 'more' is a dict, which has no item 'bias' that the plan names",
    ),
    "a skip that is not carried": (
        CASES["skips in a list, items, a table, values"],
        _changed(SKIPS, **_needs(SKIPS, "up.*", arguments={("more", "biases", 0): Slice("(B S) queries keys")})),
        r"fails in module 'up\.0': RuntimeError",
    ),
    "needs in the wrong order": (
        CASES["a module for two dims in turn"],
        _changed(IN_TURN, modules={"attention": IN_TURN.modules["attention"][::-1]}),
        r"module 'attention': argument 0 should be the shard of T=7, '\(B S\) T C', but has shape",
    ),
    "recompute of needs by call": (
        Case(RecomputedInTurn, IN_TURN, (VIDEO,), {}),
        IN_TURN,
        "module 'attention' has needs by call, and is computed again in backward, where its calls cannot be told apart",
    ),
    "sums that are means": (
        CASES["tied rows and a mean"],
        _changed(TIED, **_needs(TIED, "scores", outputs={0: Reduced("B S columns", over="R", by="mean")})),
        r"module 'scores' is the first whose output differs",
    ),
    "attention within a shard": (
        JOINT,
        _changed(JOINT.plan, **_needs(JOINT.plan, "blocks.*", attention=None)),
        r"module 'blocks\.0' is the first whose output differs",
    ),
    "attention that is not called": (
        CASES["a module for two dims in turn"],
        _changed(IN_TURN, modules={"attention": Needs("(B T) S C", attention="(B S) heads T D")}),
        "module 'attention' has attention=, but called no scaled_dot_product_attention",
    ),
    "a branch for single frames": (
        Case(lambda: _single_frames(InTurn()), IN_TURN, ((B, 3, S, C),), {}),
        _changed(IN_TURN, enter=Boundary("", {0: "B T S C"})),
        r"module 'attention' is the first whose input differs",
    ),
    "convolution over the shard": (
        Case(lambda: _convolved(InTurn()), IN_TURN, (VIDEO,), {}),
        _changed(IN_TURN, enter=Boundary("", {0: "B T S C"})),
        r"'attention' is the first whose input differs.*; 'first\.0', a Conv2d, mixes positions and is not planned",
    ),
}


def _convolved(model: nn.Module) -> nn.Module:
    """With a convolution over frames and tokens first, with channels last."""

    class Convolution(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    model.first = nn.Sequential(Convolution(C, C, 3, padding=1))
    model.first[0].__class__.__name__ = "Conv2d"
    return model


def _messages() -> dict[str, str]:
    """What verify says of each wrong plan."""
    mesh, messages = dsp.Mesh(sequence=dist.get_world_size()), {}
    for name, (case, plan, _) in WRONG.items():
        model, inputs = _made(case)
        before = [parameter.clone() for parameter in model.parameters()]
        with pytest.raises(dsp.UsageError) as error:
            verify(model, inputs, plan=plan, mesh=mesh)
        messages[name] = str(error.value)
        assert all(map(torch.equal, model.parameters(), before))
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return messages


@pytest.fixture(scope="module")
def messages(ranks) -> list[dict[str, str]]:
    return ranks(2, _messages)


@pytest.mark.parametrize("name", WRONG)
def test_verify_names_what_is_wrong(messages, name):
    own, other = (found[name] for found in messages)
    assert own == other
    assert re.search(WRONG[name][2], own), own

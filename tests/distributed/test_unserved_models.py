"""Modules that mix all dims that could be sharded, in fp64 on two ranks: refused with the reason where the plan says so, caught
by verify where it does not, and served exactly where the batch may be sharded too."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import megatron_dsp as dsp
from megatron_dsp.parallelize import Boundary, Needs, Plan, verify

B, T, S, C = 3, 5, 7, 4


class ClsBlock(nn.Module):
    """x [B, 1 + T S, C]: tokens attend to those of their frame and to the first one, which attends to all of all frames."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(C, 3 * C)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, -1)
        first = self.attend(query[:, :1], key, value)
        frames = [z[:, 1:].unflatten(1, (-1, S)) for z in (query, key, value)]
        cls = [z[:, None, :1].expand(-1, frames[0].shape[1], -1, -1) for z in (key, value)]
        key, value = (torch.cat([one, others], 2) for one, others in zip(cls, frames[1:], strict=True))
        return x + torch.cat([first, self.attend(frames[0], key, value).flatten(1, 2)], 1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (query @ key.transpose(-1, -2)).softmax(-1) @ value


class NormBlock(nn.Module):
    """x [B, T, S, C]: normalized over frames, tokens and a group of channels."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.GroupNorm(2, C), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x.movedim(-1, 1)).movedim(1, -1)).tanh()


class TriangleBlock(nn.Module):
    """x [B, I, J, C]: each pair gets the products of its two edges to any third, summed."""

    def __init__(self):
        super().__init__()
        self.edges = nn.Linear(C, 2 * C)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.edges(x).chunk(2, -1)
        return x + torch.einsum("bikc,bjkc->bijc", a, b).tanh()


class Model(nn.Module):
    """x [B, T, S, C]."""

    def __init__(self, block: Callable[[], nn.Module]):
        super().__init__()
        self.embed, self.head = nn.Linear(C, C), nn.Linear(C, 2)
        self.blocks = nn.ModuleList(block() for _ in range(2))
        self.cls = nn.Parameter(torch.zeros(1, 1, C)) if block is ClsBlock else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        if self.cls is not None:
            x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x.flatten(1, 2)], 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Case(NamedTuple):
    """A block that mixes two dims.

    Attributes:
        block: makes it.
        sizes: the pattern of the model's input.
        pattern: of what goes into the block and comes out.
        mixed: the two dims.
        shape: of the input.
        naive: what verify says of the plan that calls one of the two whole, by that dim; "" is a plan that calls none so.
    """

    block: Callable[[], nn.Module]
    sizes: str
    pattern: str
    mixed: tuple[str, str]
    shape: tuple[int, ...]
    naive: dict[str, str]

    def plan(self, whole: str | tuple[str, ...], shard: str, shardable: tuple[str, ...] = ()) -> Plan:
        return Plan(
            shard=shard,
            shardable=shardable,
            sizes=Boundary("", {0: self.sizes}),
            enter=Boundary("blocks.0", {0: self.pattern}),
            leave=Boundary("head", {0: self.pattern}),
            modules={"blocks.*": Needs(self.pattern, whole)},
        )


DIFFERS = r"module 'blocks\.0' is the first whose output differs"
CASES = {
    "a query over all tokens": Case(ClsBlock, "B T S channels", "B 1+(T S) C", ("T", "S"), (B, T, S, C), {"S": DIFFERS}),
    "GroupNorm": Case(
        NormBlock,
        "B T S channels",
        "B T S C",
        ("T", "S"),
        (B, T, S, C),
        dict.fromkeys(("", "T", "S"), DIFFERS + r".* 'blocks\.0\.norm', a GroupNorm, mixes positions and is not planned"),
    ),
    "triangle multiplication": Case(
        TriangleBlock,
        "B I J channels",
        "B I J C",
        ("I", "J"),
        (B, T, T, C),
        dict.fromkeys(("I", "J"), r"fails in module 'blocks\.0': RuntimeError"),
    ),
}


class Found(NamedTuple):
    """What became of the plans of a case."""

    honest: str
    naive: dict[str, str]
    served: float  # the largest difference, of outputs or gradients


def _refusal(function: Callable[..., object], *arguments: object, **keywords: object) -> str:
    with pytest.raises(dsp.UsageError) as error:
        function(*arguments, **keywords)
    return str(error.value)


def _found(case: Case) -> Found:
    torch.manual_seed(0)
    mesh, model, x = dsp.Mesh(sequence=2), Model(case.block).double(), torch.randn(case.shape, dtype=torch.float64)
    first, second = case.mixed
    naive = {dim: case.plan(dim or (), second if dim == first else first) for dim in case.naive}
    report = verify(model, x, plan=case.plan(case.mixed, first, (*case.mixed, "B")), mesh=mesh)
    return Found(
        honest=_refusal(case.plan, case.mixed, first),
        naive={dim: _refusal(verify, model, x, plan=plan, mesh=mesh) for dim, plan in naive.items()},
        served=max(*report.modules.values(), report.output, *report.gradients.values()),
    )


def _find() -> dict[str, Found]:
    return {name: _found(case) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def results(ranks) -> list[dict[str, Found]]:
    return ranks(2, _find)


@pytest.mark.parametrize("name", CASES)
def test_what_mixes_all_dims_is_refused_where_the_plan_says_so(results, name):
    dims = ", ".join(CASES[name].mixed)
    for found in results:
        assert f"modules['blocks.*'] needs {dims} whole, so none of {dims} can be sharded then" in found[name].honest
        assert "name another dim in shardable=" in found[name].honest


@pytest.mark.parametrize("name", CASES)
def test_verify_catches_it_where_the_plan_does_not(results, name):
    own, other = (found[name].naive for found in results)
    assert own == other
    for dim, message in CASES[name].naive.items():
        assert re.search(message, own[dim]), own[dim]


@pytest.mark.parametrize("name", CASES)
def test_a_batch_that_may_be_sharded_serves_it_exactly(results, name):
    for found in results:
        assert found[name].served < 1e-12

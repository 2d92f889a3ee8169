"""Patterns of dims, and plans that contradict themselves: arithmetic, no processes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

import megatron_dsp as dsp
from megatron_dsp.parallelize import Boundary, Carried, LocalSize, Needs, Plan, Reduced, Slice
from megatron_dsp.parallelize.call_arguments import Parameters, get, put
from megatron_dsp.parallelize.match import check_boundaries, modules_of, planned_modules
from megatron_dsp.parallelize.pattern import parse
from megatron_dsp.parallelize.routes import Route, find_routes


def test_names_and_groups():
    pattern = parse(" (B T)  S C ")
    assert pattern.dims == ((("B", "T"),), (("S",),), (("C",),))
    assert pattern.names == ("B", "T", "S", "C")


@pytest.mark.parametrize("text", ["", "()", "(B T S", "B ((T) S)", "B ... C", "B 1+ C", "B T+-S", "B(T)", "B, T"])
def test_what_is_no_pattern(text):
    with pytest.raises(dsp.UsageError, match="must be names of dims"):
        parse(text)


def test_a_dim_named_twice():
    with pytest.raises(dsp.UsageError, match="names a dim twice"):
        parse("(B T) S B")


def test_one_size_of_a_dim_is_inferred():
    assert parse("(B T) S C").sizes((14, 5, 3), {"T": 7, "S": 5}) == {"B": 2, "T": 7, "S": 5, "C": 3}


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((14, 5), "has 3 dims, the tensor 2"),
        ((13, 5, 3), "dim 0 must be a multiple of T=7"),
        ((14, 4, 3), "dim 1 must be S=5"),
    ],
)
def test_shapes_that_do_not_fit(shape, message):
    with pytest.raises(ValueError, match=message):
        parse("(B T) S C").sizes(shape, {"T": 7, "S": 5})


def test_known_flattened_dims_must_multiply():
    with pytest.raises(ValueError, match="dim 0 must be S=5 x T=7 = 35"):
        parse("(S T) C").sizes((36, 2), {"S": 5, "T": 7})


def test_a_part_of_a_flattened_dim():
    pattern, x = parse("(S B) 1+T C"), torch.arange(3 * 4 * 5 * 2).view(12, 5, 2)
    part = pattern.narrow(x, {"S": 3, "B": 4, "T": 4, "C": 2}, "B", 1, 3)
    assert torch.equal(part, x.view(3, 4, 5, 2)[:, 1:3].reshape(6, 5, 2))
    assert pattern.narrow(x, {}, "R", 1, 3) is x  # it has no such dim


def test_flatten_and_back():
    pattern, x = parse("(B T) (S P) C"), torch.arange(2 * 3 * 4 * 5 * 6).view(6, 20, 6)
    sizes = pattern.sizes(x.shape, {"T": 3, "S": 4})
    assert pattern.unflatten(x, sizes).shape == (2, 3, 4, 5, 6)
    assert torch.equal(pattern.unflatten(x, sizes), x.view(2, 3, 4, 5, 6))
    assert torch.equal(pattern.flatten(pattern.unflatten(x, sizes)), x)


def test_tokens_beside_the_grid():
    pattern = parse("B L+(S T)+2 1 C")
    assert pattern.names == ("B", "L", "S", "T", "C")
    assert pattern.dims[1] == (("L",), ("S", "T"), 2)
    sizes = pattern.sizes((2, 37, 1, 4), {"S": 5, "T": 6})
    assert sizes == {"B": 2, "L": 5, "S": 5, "T": 6, "C": 4}
    assert pattern.shape({**sizes, "T": 7}) == (2, 42, 1, 4)
    assert [size for size, _ in pattern.parts(1, sizes)] == [5, 30, 2]
    assert (pattern.index("B"), pattern.index("C")) == (0, 3)
    assert pattern.parts(1, sizes)[1][1].index("T") == 2


@pytest.mark.parametrize(
    ("text", "shape", "known", "message"),
    [
        ("B 1+(S T)", (2, 32), {"S": 5, "T": 6}, r"dim 1 must be 1 \+ S=5 x T=6 = 31"),
        ("B 1+S", (2, 0), {}, r"dim 1 must be 1 \+ S"),
        ("B 1+(S T)", (2, 33), {"T": 6}, r"dim 1 must be 1 \+ T=6"),
        ("L+N C", (7, 2), {"N": 9}, r"dim 0 must be L \+ N=9"),
        ("1 C", (2, 2), {}, "dim 0 must be 1"),
    ],
)
def test_sums_that_do_not_fit(text, shape, known, message):
    with pytest.raises(ValueError, match=message):
        parse(text).sizes(shape, known)


def test_a_pattern_has_one_sum():
    with pytest.raises(dsp.UsageError, match="has two sums"):
        parse("B 1+S 1+T")


def test_heads_are_divided_with_the_queries_of_a_group():
    pattern = parse("(B heads) N D").with_dim_after("heads", "per group")
    assert pattern.names == ("B", "heads", "per group", "N", "D")
    assert pattern.sizes((12, 5, 4), {"heads": 3, "per group": 2}) == {"B": 2, "heads": 3, "per group": 2, "N": 5, "D": 4}


ENTER, LEAVE = Boundary("blocks.0", {0: "B T S C"}), Boundary("norm", {0: "B T S C"})
TEMPORAL = Needs("(B S) T C", whole="T")
SPATIAL = Needs("(B T) S C", whole="S")


def _plan(**changes) -> Plan:
    plan = {
        "modules": {"blocks.*.temporal": TEMPORAL, "blocks.*.spatial": SPATIAL},
        "enter": ENTER,
        "leave": LEAVE,
        "shard": "T",
    }
    return Plan(**{**plan, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modules": {}}, "at least one module"),
        ({"switching": "eager"}, "switching='eager' must be"),
        ({"shard": None}, "'around' needs shard="),
        ({"switching": "lazy", "leave": None}, "without leave= is not built"),
        (
            {"enter": Boundary("blocks.0", {0: "(B T) S C"})},
            "sizes of B and T in .* cannot be told apart; find all but one in sizes=",
        ),
        ({"enter": Boundary("blocks.0", {0: "B T C"})}, "enter: the first pattern, 'B T C', must name 'S'"),
        ({"leave": Boundary("norm", {0: "B S C"})}, "leave: the first pattern, 'B S C', must name 'T'"),
        ({"modules": {"a": Needs("(B S) X C", whole="T")}}, "whole='T' is not in its pattern"),
        ({"modules": {"a": Needs("B S C", whole="S")}}, "does not name 'T', the dim sharded between"),
        ({"modules": {"a": Needs("(A X T) S C", whole="S")}}, "A and X in .* cannot be told apart"),
        ({"modules": {"a": Needs("B T S C", whole=("T", "S"))}}, "none of T, S can be sharded then"),
        (
            {"modules": {"a": Needs("B T S C", whole="S", outputs={0: "B T C"})}},
            "has no 'S', which may be sharded; if the module sums or averages over it, say Reduced",
        ),
        ({"modules": {"a": Needs("B T S C", whole="S", least=0)}}, "least=0 must be at least 1"),
        ({"modules": {"a": Needs("B T S C", whole="S", arguments={1: "B T"})}}, "say Slice"),
        ({"modules": {"a": Needs("B T S C", whole="S", arguments={1: LocalSize("C")})}}, "'C' is none of the dims T, S"),
        (
            {"modules": {"a": Needs("B T S C", whole="S", arguments={1: Carried("B T")})}, "switching": "lazy"},
            "Carried with switching='lazy' is not built",
        ),
        ({"enter": Boundary("a", {0: "B T S C", 1: "B T"}), "switching": "lazy"}, "built for one tensor"),
        ({"modules": {"a": Needs("B T+S C")}, "shardable": ("T", "S")}, "adds dims that may be sharded; at most one"),
        ({"sizes": Boundary("", {0: "B T X"}, after=True)}, "sizes: they are taken from arguments"),
        ({"sizes": Boundary("", {})}, "one tensor in each of enter=, leave= and sizes="),
        ({"attributes": {"a": {"frames": Carried("T")}}}, "'frames' is Carried.* say Slice"),
        ({"attributes": {"a": {"frames": LocalSize("F")}}}, "'F' is none of the dims T, S"),
        ({"attributes": {"a": {"frames": LocalSize("T")}}, "switching": "lazy"}, "'lazy': attributes= is not built"),
        ({"modules": {"a": (SPATIAL, TEMPORAL)}, "switching": "lazy"}, "'lazy': several needs of a module is not built"),
        ({"modules": {"a": Needs("B T S C", attention="B H T D")}}, "must be the pattern of queries, with a dim named 'heads'"),
        ({"modules": {"a": Needs("B T S C", attention="B heads S D")}}, "does not name 'T', the dim sharded between"),
        ({"modules": {"a": Needs("B T S C", "S", outputs={0: Reduced("B S C", over="C")})}}, "over one of the dims T, S"),
        ({"modules": {"a": Needs("B T S C", "S", outputs={0: Reduced("B S T C", over="T")})}}, "say by='mean'"),
    ],
)
def test_plans_that_contradict_themselves(changes, message):
    with pytest.raises(dsp.UsageError, match=message):
        _plan(**changes)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.spatial, self.temporal = nn.Linear(2, 2), nn.Linear(2, 2)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.norm = nn.ModuleList([Block(), Block()]), nn.LayerNorm(2)


def test_modules_are_matched_name_by_name():
    planned = planned_modules(Model(), _plan())
    assert list(planned) == ["blocks.0.spatial", "blocks.0.temporal", "blocks.1.spatial", "blocks.1.temporal"]
    assert planned["blocks.1.temporal"] == (TEMPORAL,)
    assert list(planned_modules(Model(), _plan(modules={"blocks.*": SPATIAL}))) == ["blocks.0", "blocks.1"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"modules": {"blocks.*.temporl": TEMPORAL}, "shardable": ("T", "S")},
            "'blocks.*.temporl' matches nothing; near are .*temporal",
        ),
        ({"modules": {"blocks.*.temporal": TEMPORAL, "blocks.0.*": SPATIAL}}, "matches both"),
        ({"modules": {"blocks.*": TEMPORAL, "blocks.*.spatial": SPATIAL}}, "'blocks.0.spatial' stands in 'blocks.0'"),
        ({"modules": {"norm": Needs("B T S C", arguments={"mask": Slice("B T")})}}, "argument 'mask' matches nothing"),
        ({"modules": {"norm": Needs("B T S C", arguments={1: Slice("B T")})}}, "argument 1 does not exist"),
        ({"enter": Boundary("block.0", {0: "B T S C"})}, "'block.0' matches nothing; near are blocks.0"),
        ({"enter": Boundary("norm", {"inputs": "B T S C"})}, "argument 'inputs' matches nothing; near are input"),
        ({"enter": Boundary("blocks.0.spatial", {0: "B T S C"}, after=True)}, "set its boundary before it"),
        ({"leave": Boundary("blocks.1.spatial", {0: "B T S C"})}, "set its boundary after it"),
    ],
)
def test_plans_that_do_not_fit_the_model(changes, message):
    plan = _plan(**changes)
    with pytest.raises(dsp.UsageError, match=message):
        check_boundaries(Model(), plan, planned_modules(Model(), plan))


def test_checkpoint_wrappers_do_not_change_names():
    model = Model()
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
    planned = planned_modules(
        model, _plan(modules={"blocks.*.spatial": SPATIAL, "blocks.*": Needs("B T S C")}, shardable=("T", "S"))
    )
    assert list(planned) == ["blocks.0", "blocks.0.spatial", "blocks.1", "blocks.1.spatial"]
    assert type(modules_of(model)["blocks.0"]) is Block


def test_arguments_are_found_and_replaced_however_they_are_passed():
    class Takes(nn.Module):
        def forward(self, x, mask=None, *, more=None, skips=()): ...

    parameters = Parameters("module 'a'", Takes())
    for passed in (((1, 2), {"more": {"b": (3, 4)}}), ((), {"x": 1, "mask": 2, "more": {"b": (3, 4)}})):
        found = {place: parameters.path(place, passed) for place in (0, "mask", ("more", "b", -1))}
        assert [get(passed, path) for path in found.values()] == [1, 2, 4]
        (args, kwargs), undo = put(passed, {found["mask"]: 7, found["more", "b", -1]: 8})
        assert (*args, *(kwargs[name] for name in ("x", "mask") if name in kwargs)) == (1, 7)
        assert kwargs["more"] == {"b": (3, 8)}
        assert (passed[1]["more"], undo) == ({"b": (3, 4)}, [])
    assert parameters.path("mask", ((1,), {})) is None
    assert parameters.path("mask", ((1, None), {})) is None
    assert parameters.path(("more", "b"), ((1,), {"more": None})) is None
    with pytest.raises(dsp.UsageError, match=r"module 'a': argument \('more', 'b'\) is a int, which has no item 0"):
        parameters.path(("more", "b", 0), ((1,), {"more": {"b": 3}}))


def test_items_of_a_list_may_be_popped_and_are_put_back_if_not():
    skips = [1, 2, 3]
    _, undo = put(((skips,), {}), {(0, -1): "three", (0, 0): "one"})
    assert skips == ["one", 2, "three"]
    skips.pop()
    skips.append(4)
    for put_back in undo:
        put_back()
    assert skips == [1, 2, 4]


def test_routes_around():
    sizes = {"B": 1, "T": 8, "S": 6}
    routes = find_routes(_plan(), {"s": (SPATIAL,), "t": (TEMPORAL,)}, sizes, bytes_per_position=4, ranks=2)
    assert routes.modules == {"s": (Route("T", "T", "T"),), "t": (Route("T", "S", "T"),)}


def test_routes_of_a_chain_are_the_planners():
    plan = _plan(switching="lazy", shard=None)
    planned = {f"{i}": (TEMPORAL if dim == "t" else SPATIAL,) for i, dim in enumerate("ttstts")}
    routes = find_routes(plan, planned, {"B": 1, "T": 16, "S": 64}, bytes_per_position=64, ranks=4)
    assert (routes.start, [route.inside for (route,) in routes.modules.values()], routes.end) == ("S", list("SSTSST"), "T")
    assert [route.before for (route,) in routes.modules.values()] == list("SSSTSS")


def test_a_chain_counts_what_attention_over_the_shard_sends():
    full = Needs("B T S C", attention="B heads (T S) D")
    plan = _plan(switching="lazy", shard=None, shardable=("T", "S", "B"), modules={"a": full})
    sizes = {"T": 16, "B": 4, "S": 64}
    routes = find_routes(plan, {"a": (full,), "b": (SPATIAL,)}, sizes, bytes_per_position=64, ranks=4)
    # A plan that took the attention of "a" for free would stay in T, whose gather copies less.
    assert [route.inside for (route,) in routes.modules.values()] == ["B", "B"]


@pytest.mark.parametrize(
    ("planned", "sizes", "message"),
    [
        ({"t": (TEMPORAL,)}, {"B": 1, "T": 2, "S": 9}, "T=2 leaves some of 4 ranks without any"),
        (
            {"t": (TEMPORAL,)},
            {"B": 1, "T": 8, "S": 3},
            "module 't' runs with S sharded and needs at least 1 .*S=3 over 4 ranks",
        ),
        ({"s": (Needs("B T S C", "S", least=3),)}, {"B": 1, "T": 11, "S": 9}, "module 's' .*at least 3 .*use at most 3 ranks"),
    ],
)
def test_too_many_ranks(planned, sizes, message):
    with pytest.raises(dsp.UsageError, match=message):
        find_routes(_plan(), planned, sizes, bytes_per_position=4, ranks=4)

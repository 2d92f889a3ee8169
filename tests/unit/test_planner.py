"""The planner against a brute force that knows no formula: it counts, rank by rank, which elements have to travel."""

from __future__ import annotations

import itertools
import math
import random
from functools import cache
from typing import NamedTuple

import pytest
import torch

from megatron_dsp import UsageError, shard_range
from megatron_dsp.planner import ANY, Attention, Cost, StageNeeds, cheapest_plan
from megatron_dsp.planner.costs import Costs

HEADS = "heads"  # the innermost dim where a stage attends


def held(shape, sharded, ranks):
    """For each rank, the indices of the elements that it holds; ``shape`` is ((dim, size), ...)."""
    found = []
    for rank in range(ranks):
        parts = [range(*shard_range(size, ranks, rank)) if dim == sharded else range(size) for dim, size in shape]
        found.append(frozenset(itertools.product(*parts)))
    return found


@cache
def sent(shape, source, target, ranks):
    """Elements that the busiest rank sends so that each rank gets what ``target`` gives it, from those that have it."""
    have, want = held(shape, source, ranks), held(shape, target, ranks)
    return max(sum(len(have[a] & (want[b] - have[b])) for b in range(ranks) if b != a) for a in range(ranks))


@cache
def sent_by_sum(shape, target, ranks):
    """The same where each rank has a summand for all elements, and each sum is wanted by the rank that ``target`` gives it."""
    want = held(shape, target, ranks)
    return max(sum(len(want[b]) for b in range(ranks) if b != a) for a in range(ranks))


@cache
def sent_round(shape, sharded, ranks):
    """Elements that the busiest rank sends while blocks go round until each has been everywhere but home; and home."""
    blocks, counts = [len(block) for block in held(shape, sharded, ranks)], [0] * ranks
    for step in range(ranks):
        if step == ranks - 1:
            everywhere = max(counts)
        counts = [count + block for count, block in zip(counts, blocks, strict=True)]
        blocks = blocks[-1:] + blocks[:-1]
    return everywhere, max(counts)


@cache
def pieces_copied(shape, dim, sharded, ranks):
    """Whether torch finds the pieces along ``dim`` of rank 0's part apart in memory."""
    sizes = [len(range(*shard_range(size, ranks, 0))) if name == sharded else size for name, size in shape]
    place = [name for name, _ in shape].index(dim)
    sizes[place] = 2  # what lies inside a piece does not matter, but one piece alone is no test
    return int(not torch.empty(sizes, device="meta").narrow(place, 0, 1).is_contiguous())


@cache
def batch_copied(shape, mixes, sharded, ranks):
    """Whether torch finds no view [batch, mixed dims] of rank 0's part."""
    sizes = [len(range(*shard_range(size, ranks, 0))) if name == sharded else size for name, size in shape]
    mixed = [index for index, (name, _) in enumerate(shape) if name in mixes]
    batch = [index for index in range(len(shape)) if index not in mixed]
    x = torch.empty([*sizes, 3], device="meta").permute(*batch, *mixed, len(shape))
    try:
        x.view(math.prod(sizes[i] for i in batch), math.prod(sizes[i] for i in mixed), 3)
    except RuntimeError:
        return 1
    return 0


def moved(shape, source, target, ranks, width):
    """(bytes forward, bytes backward, collectives, copies) of a primitive."""
    if source is None or source == target or ranks == 1:
        return 0, 0, 0, 0
    forward = width * sent(shape, source, target, ranks)
    if target is None:
        return forward, width * sent_by_sum(shape, source, ranks), 1, pieces_copied(shape, source, None, ranks)
    copies = pieces_copied(shape, target, source, ranks) + pieces_copied(shape, source, target, ranks)
    return forward, width * sent(shape, target, source, ranks), 1, copies


def ways(stage, shape, shardable, ranks):
    """All (sharded dim, served, cost) of a stage."""
    found = []
    attention = stage.attention
    for dim in shardable:
        if ranks == 1 or dim not in stage.mixes:
            found.append((dim, "plain", (0, 0, 0, batch_copied(shape, stage.mixes, dim, ranks))))
        elif attention is not None:
            groups = attention.key_value_heads or attention.heads
            at_heads = (*shape, (HEADS, groups))
            there, back = sent(at_heads, dim, HEADS, ranks), sent(at_heads, HEADS, dim, ranks)
            query, key = attention.head_bytes * attention.heads // groups, attention.head_bytes
            forward, backward = there * (query + 2 * key) + back * query, there * query + back * (query + 2 * key)
            copies = 4 * (pieces_copied(at_heads, HEADS, dim, ranks) + pieces_copied(at_heads, dim, HEADS, ranks))
            copies += batch_copied(shape, stage.mixes, None, ranks)
            found.append((dim, "ulysses", (forward, backward, 2, copies)))
            if attention.ring and groups == attention.heads and dict(shape)[dim] % ranks == 0:
                everywhere, home = (2 * key * count for count in sent_round(at_heads, dim, ranks))
                copies = 2 + batch_copied(shape, stage.mixes, dim, ranks)
                found.append((dim, "ring", (everywhere, everywhere + home, ranks - 1, copies)))
    if stage.may_run_whole:
        found.append((None, "plain", (0, 0, 0, batch_copied(shape, stage.mixes, None, ranks))))
    return found


class Problem(NamedTuple):
    stages: list
    sizes: dict
    ranks: int
    shardable: list
    bytes_per_position: list
    start: str | None
    end: str | None
    training: bool

    def plan(self):
        return cheapest_plan(self.stages, self.sizes, **{name: getattr(self, name) for name in self._fields[2:]})

    def costs(self):
        """Each stage's ways, and the cost of a primitive, remembered: ``move(source, target, boundary)``."""
        shape = tuple(self.sizes.items())
        found = [ways(stage, shape, self.shardable, self.ranks) for stage in self.stages]
        return found, cache(lambda a, b, at: moved(shape, a, b, self.ranks, self.bytes_per_position[at]))

    def key(self, choices, found, move):
        """What a plan is judged by."""
        now, sums = self.start, [0, 0, 0, 0]
        for boundary, choice in enumerate(choices):
            sharded, _, cost = found[boundary][choice]
            sums = [a + b + c for a, b, c in zip(sums, move(now, sharded, boundary), cost, strict=True)]
            now = sharded
        end = now if self.end == ANY else self.end
        forward, backward, collectives, copies = map(sum, zip(sums, move(now, end, len(choices)), strict=True))
        return forward + backward * self.training, collectives, copies, choices

    def best(self):
        """The best of all plans: what it is judged by, and its (sharded, served) stage by stage."""
        found, move = self.costs()
        key = min(self.key(choices, found, move) for choices in itertools.product(*(range(len(each)) for each in found)))
        return key[:3], [each[choice][:2] for each, choice in zip(found, key[3], strict=True)]

    def greedy(self):
        """Bytes of the plan that takes the cheapest next step."""
        found, move = self.costs()
        now, choices = self.start, ()
        for boundary, each in enumerate(found):
            steps = [sum(move(now, sharded, boundary)[:2]) + sum(cost[:2]) for sharded, _, cost in each]
            choices = (*choices, steps.index(min(steps)))
            now = each[choices[-1]][0]
        return self.key(choices, found, move)[0]


def random_problem(draw, most_plans=300):
    """A problem that some plan solves and for which a brute force looks at ``most_plans`` at most."""
    dims = draw.sample(["time", "batch", "height", "width"], draw.randint(2, 4))
    sizes = {dim: draw.choice([1, 2, 3, 4, 5] if len(dims) < 4 else [1, 2, 3]) for dim in dims}
    ranks = draw.choice([1, 2, 2, 3, 3, 4])
    shardable = draw.sample(dims, draw.randint(min(2, len(dims)), len(dims)))
    stages, plans = [], 1
    for index in range(draw.randint(1, 8)):
        mixes = tuple(draw.sample(dims, draw.choice([0, 1, 1, 1, 1, 2])))
        groups = draw.choice([1, 2, 3])
        attention = Attention(
            groups * draw.choice([1, 1, 2]), draw.randint(1, 5), draw.choice([None, groups]), ring=draw.random() < 0.5
        )
        stage = StageNeeds(f"stage {index}", mixes, attention if mixes and draw.random() < 0.4 else None, draw.random() < 0.1)
        count = len(ways(stage, tuple(sizes.items()), shardable, ranks))
        if count and plans * count <= most_plans:
            stages.append(stage)
            plans *= count
    if not stages:
        return random_problem(draw)
    widths = [draw.randint(1, 9) for _ in range(len(stages) + 1)] if draw.random() < 0.5 else [4] * (len(stages) + 1)
    start, end = draw.choice([None, *dims]), draw.choice([None, ANY, ANY, *dims])
    return Problem(stages, sizes, ranks, shardable, widths, start, end, draw.random() < 0.8)


def test_no_plan_is_cheaper_than_the_planners():
    draw = random.Random(0)
    longest = fooled = 0
    served = set()
    for _ in range(1000):
        problem = random_problem(draw)
        plan, (best, how) = problem.plan(), problem.best()
        cost = plan.cost
        assert (cost.forward + cost.backward, cost.collectives, cost.copies) == best, problem
        assert [(stage.sharded, stage.served) for stage in plan.stages] == how, problem
        served |= {(stage.served, stage.sharded is None) for stage in plan.stages}
        longest = max(longest, len(problem.stages))
        fooled += problem.greedy() > best[0]
    assert served == {("plain", False), ("plain", True), ("ulysses", False), ("ring", False)}
    assert longest == 8
    assert fooled > 50  # the problems are hard enough to tell a greedy scheduler from an exact one


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("sizes", [(4, 2, 6), (5, 1, 7), (1, 3, 2), (8, 2, 3)])
def test_bytes_are_those_that_ranks_send(sizes, ranks):
    shape = tuple(zip(("time", "batch", "space"), sizes, strict=True))
    costs = Costs(dict(shape), ranks, training=True)
    for source, target in itertools.product(("time", "batch", "space", None), repeat=2):
        assert costs.reshard(source, target, 6) == Cost(*moved(shape, source, target, ranks, 6)), (source, target)


def test_two_dims_switch_only_where_the_attended_dim_changes():
    axes = {"T": "time", "S": "space"}
    stages = [StageNeeds(f"{axes[axis]} {index}", (axes[axis],)) for index, axis in enumerate("TTSTTS")]
    sizes = {"time": 16, "batch": 1, "space": 64}
    plan = cheapest_plan(stages, sizes, ranks=4, shardable=("time", "space"), bytes_per_position=64)
    assert plan.layouts == ("space", "space", "time", "space", "space", "time")
    shard = 16 * 64 * 64 // 4
    assert plan.switches == 3
    assert plan.cost == Cost(3 * shard * 3 // 4, 3 * shard * 3 // 4, collectives=3, copies=3)
    inference = cheapest_plan(stages, sizes, ranks=4, shardable=("time", "space"), bytes_per_position=64, training=False)
    assert (inference.cost.forward, inference.cost.backward) == (plan.cost.forward, 0)


def test_a_video_transformer_leaves_by_its_narrowest_boundary():
    blocks = [StageNeeds(f"over {dim} {layer}", (dim,)) for layer in range(2) for dim in ("space", "time")]
    stages, sizes = [*blocks, StageNeeds("head", ())], {"time": 8, "batch": 2, "space": 16}

    def layouts(widths):
        arguments = {"ranks": 4, "shardable": ("time", "space"), "start": "time", "end": "time"}
        return cheapest_plan(stages, sizes, bytes_per_position=widths, **arguments).layouts

    assert layouts(384) == ("time", "space", "time", "space", "time")
    assert layouts([384] * 5 + [64]) == ("time", "space", "time", "space", "space")  # the head's patches travel, not its tokens


def test_axial_attention_over_three_dims():
    stages = [StageNeeds(f"{dim} {layer}", (dim,)) for layer in range(3) for dim in ("time", "height", "width")]
    sizes = {"time": 3, "batch": 2, "height": 4, "width": 5}
    problem = Problem(stages, sizes, 2, ["time", "height", "width"], [1] * 10, None, ANY, True)
    plan, (best, how) = problem.plan(), problem.best()
    assert plan.switches == 4
    assert (plan.cost.forward + plan.cost.backward, plan.cost.collectives, plan.cost.copies) == best
    assert list(plan.layouts) == [sharded for sharded, _ in how]


def test_a_stage_that_attends_over_everything_is_served_by_ulysses():
    stages = [
        StageNeeds("spatial", ("space",)),
        StageNeeds("joint", ("time", "space"), Attention(heads=4, head_bytes=32)),
        StageNeeds("temporal", ("time",)),
    ]
    plan = cheapest_plan(stages, {"time": 8, "space": 16}, ranks=4, shardable=("time", "space"), bytes_per_position=128)
    assert [stage.served for stage in plan.stages] == ["plain", "ulysses", "plain"]
    assert plan.cost.forward == (4 + 1) * 8 * 16 * 128 // 4 * 3 // 4  # q, k, v and the result, then one switch


def test_equals_are_told_apart_by_the_order_of_the_dims():
    sizes, one = {"a": 4, "b": 4, "c": 4}, [StageNeeds("norm", ())]
    for order in itertools.permutations(sizes):
        plan = cheapest_plan(one * 3, sizes, ranks=2, shardable=order, bytes_per_position=1)
        assert plan.layouts == (order[0],) * 3
        assert plan == cheapest_plan(one * 3, sizes, ranks=2, shardable=order, bytes_per_position=1)


def test_copies_decide_between_equal_bytes():
    # Both dims that the stages leave can take the shard. From the outermost dim a switch copies once, from an inner one twice.
    stages = [StageNeeds("over b", ("b",)), StageNeeds("over a and c", ("a", "c"))]
    plan = cheapest_plan(stages, {"a": 4, "b": 4, "c": 4}, ranks=2, shardable=("c", "b", "a"), bytes_per_position=1)
    assert plan.layouts == ("a", "b")


def test_a_plan_prints_as_a_table():
    stages = [StageNeeds("spatial", ("space",)), StageNeeds("temporal", ("time",))]
    plan = cheapest_plan(
        stages, {"time": 4, "space": 6}, ranks=2, shardable=("time", "space"), bytes_per_position=100, end=None
    )
    lines = str(plan).splitlines()
    assert [line.split()[0] for line in lines] == ["stage", "spatial", "temporal", "(end)", "total"]
    assert lines[2].split() == ["temporal", "switch", "time", "->", "space", "space", "plain", "600", "600", "1"]
    assert "switches: 1" in lines[-1]
    assert "ranks: 2" in lines[-1]


def plan_with(mixes=("time",), sizes=None, attention=None, **changed):
    arguments = {"ranks": 2, "shardable": ("time", "space"), "bytes_per_position": 8} | changed
    return cheapest_plan([StageNeeds("block", mixes, attention)], sizes or {"time": 4, "batch": 2, "space": 4}, **arguments)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            lambda: plan_with(("time", "space")),
            "'block' mixes time, space.*make batch shardable, describe its attention.*whole",
        ),
        (lambda: plan_with(("time", "space"), {"time": 4, "space": 4}), "sharded while it runs: describe its attention"),
        (lambda: plan_with(("tiem",)), "stage 'block' names the dim 'tiem'; the dims are time, batch, space"),
        (lambda: plan_with(shardable=("time", "widht")), "shardable names the dim 'widht'"),
        (lambda: plan_with(shardable=()), "at least one dim"),
        (lambda: plan_with(shardable=("space", "space")), "each once"),
        (lambda: plan_with(start="tokens"), "start names the dim 'tokens'"),
        (lambda: plan_with(end="tokens"), "end names the dim 'tokens'"),
        (lambda: plan_with(sizes={"time": 0, "space": 4}), "size 0 of dim 'time' must be at least 1"),
        (lambda: plan_with(sizes={"time": 4, "space": 4, "any": 2}), "rename"),
        (lambda: plan_with(ranks=0), "ranks=0"),
        (lambda: plan_with(bytes_per_position=0), "bytes_per_position=0"),
        (lambda: plan_with(bytes_per_position=[8, 8, 8]), "one number or 2"),
        (lambda: cheapest_plan([], {"time": 2}, ranks=2, shardable=("time",), bytes_per_position=8), "at least one stage"),
        (lambda: Attention(heads=0, head_bytes=8), "heads=0"),
        (lambda: Attention(heads=4, head_bytes=0), "head_bytes=0"),
        (lambda: Attention(heads=4, head_bytes=8, key_value_heads=3), "heads=4 over key_value_heads=3"),
    ],
)
def test_what_cannot_be_planned_is_refused(wrong, message):
    with pytest.raises(UsageError, match=message):
        wrong()

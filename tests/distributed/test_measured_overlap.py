"""The choice of a schedule by measurement, on a network whose speed the test sets."""

from __future__ import annotations

import random
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from overlap_cases import InterruptionError
from shaped_network import Network
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import megatron_dsp as dsp
from megatron_dsp.layout import Layout, shard_sizes
from megatron_dsp.reshard import WHOLE_ENDS, Ends, MeasuredOverlap, Region, Stage, overlap_of, set_overlap
from megatron_dsp.reshard.exchange import exchange_of
from megatron_dsp.reshard.exposed import exposed_seconds
from megatron_dsp.reshard.stages.link import measure_link

SIZES = (8, 2, 8, 4096)
SECONDS = 0.02  # of one stage's forward, and of its backward


class _Work(torch.autograd.Function):
    """As long as its share of the activation says, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, whole: int) -> Tensor:
        ctx.seconds = SECONDS * x.numel() / whole
        time.sleep(ctx.seconds)
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        time.sleep(ctx.seconds)
        return gradient * 2, None


def _pass(group: dist.ProcessGroup) -> None:
    rows = shard_sizes(SIZES[0], group.size())[group.rank()]
    x = torch.ones(rows, *SIZES[1:]).requires_grad_()
    region = Region(Layout(("t", "b", "s", "c"), SIZES, sharded="t"), group)
    whole = torch.Size(SIZES).numel() // group.size()
    stages = [Stage(lambda y: _Work.apply(y, whole), dim, f"{dim} {index}") for index, dim in enumerate("tsts")]
    y = region.run(stages, x, independent="b")
    assert y.eq(16).all()
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.eq(16).all()


def _choose(bandwidth: float, beside: bool) -> tuple[list[str], int]:
    group = dist.group.WORLD
    exchange = exchange_of(group)
    exchange.transport = Network(group, bandwidth, beside)
    set_overlap(group, overlap := MeasuredOverlap([group]))
    passes = 0
    while not overlap.decisions and passes < 50:
        _pass(group)
        passes += 1
    with torch.no_grad():  # the choice serves other passes of the shape too
        _pass_forward_only(group)
    return overlap.decisions, passes


def _pass_forward_only(group: dist.ProcessGroup) -> None:
    rows = shard_sizes(SIZES[0], group.size())[group.rank()]
    region = Region(Layout(("t", "b", "s", "c"), SIZES, sharded="t"), group)
    y = region.run([Stage(lambda y: y * 2, "t"), Stage(lambda y: y + 1, "s")], torch.ones(rows, *SIZES[1:]))
    assert y.eq(3).all()


def test_a_slow_network_is_overlapped(ranks):
    # A switch takes half of a stage's time: a rank sends 512 KB of the 1 MB that it holds.
    (first, passes), (second, _) = ranks(2, _choose, (1 << 19) / (SECONDS / 2), True)
    assert first == second
    assert len(first) == 1
    assert "chunks of" in first[0].split(":")[0], first
    assert "whole stages" in first[0]  # beside which it was measured
    assert passes < 40


def test_a_fast_network_keeps_whole_stages(ranks):
    for decisions, _ in ranks(2, _choose, 1e12, True):
        assert decisions[0].startswith("whole stages"), decisions


@pytest.mark.long
def test_a_network_that_waits_to_be_waited_for_keeps_whole_stages(ranks):
    for decisions, _ in ranks(2, _choose, (1 << 19) / (SECONDS / 2), False):
        assert decisions[0].startswith("whole stages"), decisions


def _measure() -> tuple[float, float, dict[str, float]]:
    group = dist.group.WORLD
    exchange = exchange_of(group)
    exchange.transport = Network(group, (1 << 19) / (SECONDS / 2))
    link = measure_link(group, torch.device("cpu"))

    def step() -> None:
        rows = shard_sizes(SIZES[0], group.size())[group.rank()]
        region = Region(Layout(("t", "b", "s", "c"), SIZES, sharded="t"), group)
        region.run([Stage(lambda y: y * 2, "t", "first"), Stage(lambda y: y + 1, "s", "second")], torch.ones(rows, *SIZES[1:]))

    return link.bandwidth, link.beside, exposed_seconds(step, group, torch.device("cpu"))


def test_what_is_measured_is_what_the_network_does(ranks):
    for bandwidth, beside, seconds in ranks(2, _measure):
        assert 0.5 < bandwidth / ((1 << 19) / (SECONDS / 2)) < 1.5
        assert beside > 0.5
        # One switch, of half a stage's time, all of it exposed.
        assert set(seconds) == {"step", "all", "second"}
        assert 0.5 < seconds["all"] / (SECONDS / 2) < 2
        assert 0.5 < seconds["second"] / (SECONDS / 2) < 2


# --- Who agrees with whom. Data ranks see shapes in orders of their own, and make passes in numbers of their own.

CHANNELS = 4
FRAMES = 4, 8, 5  # the last one's shards cannot be cut in two everywhere


class Hasty(MeasuredOverlap):
    """Tries whatever can be tried, soon, and takes what happened to be fastest: other schedules on other ranks, if it can."""

    LEAST_GAIN, _WARM_UP, _ROUNDS = -1e9, 1, 1


class Chain(nn.Module):
    """Stages over space and time, with ends or without."""

    def __init__(self, group: dist.ProcessGroup, ends: bool, again: str):
        """``again``: what is computed again in backward, "nothing", "stages" or "regions"."""
        super().__init__()
        self.group, self.ends, self.again = group, ends, again
        self.embed = nn.Linear(CHANNELS, CHANNELS)
        self.enter, self.leave = (nn.ModuleList(nn.Linear(CHANNELS, CHANNELS) for _ in range(3)) for _ in range(2))
        self.double()

    def forward(self, x: Tensor, frames: int, fail: bool = False) -> Tensor:
        """Of this rank's frames; ``fail``: the second stage raises."""
        run = partial(self._run, frames=frames, fail=fail)
        return checkpoint(run, self.embed(x), use_reentrant=False) if self.again == "regions" else run(self.embed(x))

    def _run(self, x: Tensor, frames: int, fail: bool) -> Tensor:
        region = Region(Layout(("t", "b", "s", "c"), (frames, 2, 6, CHANNELS), sharded="t"), self.group)
        stages = []
        for number, sharded in enumerate("tst"):
            compute = partial(self._stage, number, fail and number == 1)
            if self.again == "stages":
                compute = partial(checkpoint, compute, use_reentrant=False)
            recomputes = self.ends and self.again == "stages"
            stages.append(Stage(compute, sharded, "stage", number=number, has_ends=self.ends, recomputes=recomputes))
        return region.run(stages, x, independent="b")

    def _stage(self, number: int, fail: bool, x: Tensor, ends: Ends = WHOLE_ENDS) -> Any:
        if fail:
            raise InterruptionError
        whole, query = ends.enter(lambda x: (x, self.enter[number](x)), x)
        mixed = query.softmax(0 if number == 1 else 2)  # over the dim that is whole
        return ends.leave(lambda whole, mixed: whole + self.leave[number](mixed), whole, mixed)


@dataclass(frozen=True)
class Scenario:
    """Steps of one data rank: the frames of each micro-batch. The last one ends with a shape of its own on one data rank."""

    seed: int
    ends: bool
    again: str
    join: bool
    interruptions: frozenset[int]  # steps before which a pass is given up
    evaluations: frozenset[int]  # steps before which there is one, on this data rank
    steps: list[list[int]]

    @staticmethod
    def random(seed: int, data: int) -> Scenario:
        draw, own = random.Random(seed), random.Random(seed * 10 + data)
        kind = draw.choice(("shuffled", "micro-batches", "join"))
        count = 14
        shapes = draw.choice(([4], [8], [4, 8], [8, 5]))
        steps = [[own.choice(shapes)] * (own.randint(1, 3) if kind == "micro-batches" else 1) for _ in range(count)]
        ends, again = draw.random() < 0.6, draw.choice(("nothing", "nothing", "stages", "regions"))
        interruptions = frozenset(draw.sample(range(count), 2) if draw.random() < 0.3 else [])
        if kind == "join":
            interruptions, steps = frozenset(), steps[: own.randint(9, count)]
        if data == 1 and draw.random() < 0.5:
            steps[-1] = [6]
        evaluations = frozenset(own.sample(range(count), own.randint(0, 3)))
        return Scenario(seed, ends, again, kind == "join", interruptions, evaluations, steps)


def _train(mesh: dsp.Mesh, scenario: Scenario) -> tuple[list[Tensor], list[str]]:
    """The averaged gradients of each step, by the overlap of the sequence group; and the order in which gradients came.

    ZeRO 1 and 2 reduce gradients as they come: data ranks with other schedules must see the same order.
    """
    torch.manual_seed(scenario.seed)
    model, order = Chain(mesh.group("sequence"), scenario.ends, scenario.again), []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    ddp = DistributedDataParallel(model, process_group=mesh.group("data", "sequence"))
    generator = torch.Generator().manual_seed(scenario.seed * 10 + mesh.rank("data"))

    def sample(frames: int) -> Tensor:
        whole = torch.randn(frames, 2, 6, CHANNELS, dtype=torch.float64, generator=generator)
        return dsp.split(whole, dim=0, group=mesh.group("sequence"))

    found = []
    with ddp.join() if scenario.join else nullcontext():
        for number, micro_batches in enumerate(scenario.steps):
            if number in scenario.evaluations:
                with torch.no_grad():
                    model(sample(micro_batches[0]), micro_batches[0])
            if number in scenario.interruptions:
                with pytest.raises(InterruptionError):
                    ddp(sample(micro_batches[0]), micro_batches[0], fail=True)
            for index, frames in enumerate(micro_batches):
                with nullcontext() if index == len(micro_batches) - 1 else ddp.no_sync():
                    ddp(sample(frames), frames).square().sum().backward()
            found.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
            ddp.zero_grad()
    return found, order


def _compare_scenarios(seeds: list[int]) -> list[list[str]]:
    """Of each scenario, what was decided on this rank; gradients are those of whole stages."""
    mesh = dsp.Mesh(sequence=2)
    sequence, tensor = mesh.group("sequence"), mesh.group("tensor")
    link = measure_link(sequence, torch.device("cpu"), sent=1 << 16, repetitions=1)
    decisions = []
    for seed in seeds:
        scenario = Scenario.random(seed, mesh.rank("data"))
        expected, order = _train(mesh, scenario)
        overlap = Hasty([sequence, tensor])
        if seed % 10:  # a tenth measures for itself
            overlap._link = link
        set_overlap(sequence, overlap)
        found, found_order = _train(mesh, scenario)
        for step, (gradients, of_whole_stages) in enumerate(zip(found, expected, strict=True)):
            assert torch.allclose(gradients, of_whole_stages, rtol=1e-9, atol=1e-9), f"{scenario}, step {step}"
        assert found_order == order, scenario
        set_overlap(sequence, None)
        decisions.append(overlap.decisions)
    return decisions


def _check_scenarios(ranks: Any, seeds: list[int]) -> None:
    decisions = ranks(4, _compare_scenarios, seeds)
    assert decisions[0] == decisions[1]  # a sequence group's
    assert decisions[2] == decisions[3]
    assert decisions[0] != decisions[2]
    for tried in ("at both ends", "chunks of b "):
        assert any(tried in decision for of_scenario in decisions[0] for decision in of_scenario), tried


def test_data_ranks_decide_on_their_own(ranks):
    _check_scenarios(ranks, [1, 2, 3, 4, 5, 6])


@pytest.mark.long
def test_data_ranks_decide_on_their_own_in_many_scenarios(ranks):
    for start in range(0, 200, 20):  # a job may take 120 s
        _check_scenarios(ranks, list(range(start, start + 20)))


def _gather_at_each_call() -> list[str]:
    """Modules whose weights are gathered over data ranks that see shapes in orders of their own."""
    mesh = dsp.initialize({"sequence_parallel": {"size": 2}})
    sequence = mesh.group("sequence")
    overlap = overlap_of(sequence)
    model = Chain(sequence, ends=True, again="nothing")
    ranks = DeviceMesh.from_group(mesh.group("data", "sequence"), "cpu")
    for module in [*model.enter, *model.leave, model]:
        fully_shard(module, mesh=ranks)
    for number in range(16):
        frames = (4, 8)[(number + mesh.rank("data")) % 2]
        whole = torch.ones(frames, 2, 6, CHANNELS, dtype=torch.float64)
        model(dsp.split(whole, dim=0, group=sequence), frames).sum().backward()
    return overlap.decisions


def test_modules_that_are_called_together_stay_whole(ranks):
    for decisions in ranks(4, _gather_at_each_call):
        assert len(decisions) == 1
        assert decisions[0].startswith("whole stages: ranks of other sequence groups may call modules together"), decisions


def _lockstep(stage: int) -> tuple[bool, bool]:
    """Before and after DeepSpeed gets a model."""
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "sequence_parallel": {"size": 2},
    }
    mesh = dsp.initialize(config)
    overlap, model = overlap_of(mesh.group("sequence")), nn.Linear(2, 2)
    before = overlap.lockstep
    dsp.deepspeed_initialize(model=model, optimizer=torch.optim.SGD(model.parameters()), mesh=mesh, config=config)
    return before, overlap.lockstep


@pytest.mark.parametrize(("size", "stage", "expected"), [(4, 2, (True, False)), (4, 3, (True, True)), (2, 3, (False, False))])
def test_who_trains_says_whether_data_ranks_call_modules_together(ranks, size, stage, expected):
    assert ranks(size, _lockstep, stage) == [expected] * size


def _recompute_two() -> list[str]:
    """Regions that are recomputed in backward, two of them in flight."""
    group = dist.group.WORLD
    set_overlap(group, overlap := Hasty([group]))
    model = Chain(group, ends=True, again="regions")
    for _ in range(6):
        x = torch.ones(8 // group.size(), 2, 6, CHANNELS, dtype=torch.float64)
        (model(x, 8) + model(x, 8)).sum().backward()
    return overlap.decisions


def test_regions_that_are_recomputed_while_others_are_under_way_stay_whole(ranks):
    for decisions in ranks(2, _recompute_two):
        assert decisions[0].startswith("whole stages: regions are recomputed while others are under way"), decisions

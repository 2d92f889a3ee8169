"""The plans of examples/models, put on models of third parties: against the same models in one process."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

import jobs
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

import megatron_dsp as dsp
from megatron_dsp.parallelize.match import planned_modules
from megatron_dsp.parallelize.pattern import parse
from megatron_dsp.planner import Attention, StageNeeds, cheapest_plan
from megatron_dsp.reshard import FixedOverlap, set_overlap

MODELS = jobs.ROOT / "examples" / "models"
sys.path.append(str(MODELS))  # the ranks of the pool get it too

pytestmark = pytest.mark.models

FLOOR = 1e-2  # a gradient is compared relative to its own largest value, or to this part of the largest of all


def wrap(pattern: str, model: nn.Module) -> None:
    """Checkpoint the modules whose names match, in a model that has no switch of its own for it."""
    chosen = {module for name, module in model.named_modules() if fnmatchcase(name, pattern)}
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.NO_REENTRANT),
        check_fn=lambda module: module in chosen,
    )


class Case(NamedTuple):
    """A model of an example.

    Attributes:
        example: the script, in examples/models or here: make_model(**variant), make_inputs(**sizes) and make_plan(model).
        package: what it needs, as pip calls it.
        even: sizes of which 2, 3 and 4 ranks divide the plan's dims.
        uneven: sizes of which none of them divides one.
        switches: in a forward.
        checkpoint: turns gradient checkpointing on.
        variant: arguments of make_model.
        fixed: sizes that make_model takes too.
        dims: those of the plan's dims that are not sizes themselves, as products of them.
        gradients: their largest relative difference that is allowed in fp32.
        exact: the largest relative difference that is allowed in fp64.
    """

    example: str
    package: str
    even: Mapping[str, int]
    uneven: Mapping[str, int]
    switches: int
    checkpoint: Callable[[nn.Module], None]
    variant: Mapping[str, Any] = {}
    fixed: tuple[str, ...] = ()
    dims: Mapping[str, tuple[str, ...]] = {}
    gradients: float = 1e-6
    exact: float = 1e-11

    def make_model(self, sizes: Mapping[str, int]) -> nn.Module:
        """On every rank the same."""
        torch.manual_seed(0)
        example = importlib.import_module(self.example)
        return example.make_model(**self.variant, **{name: sizes[name] for name in self.fixed})

    def planned_sizes(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Of the plan's dims."""
        return {**sizes, **{dim: prod(sizes[name] for name in names) for dim, names in self.dims.items()}}


AXIAL = Case(
    example="axial_video",
    package="axial-attention",
    even={"B": 2, "T": 12, "H": 24, "W": 12},
    uneven={"B": 2, "T": 5, "H": 7, "W": 11},
    switches=4,
    checkpoint=partial(wrap, "?"),
    # Nine attentions in a row: in one process, gradients in fp32 differ from those in fp64 by 1.7e-6 already.
    gradients=4e-6,
)
CASES = {
    "toto": Case(
        example="toto_sensors",
        package="toto-ts",
        even={"B": 2, "V": 12, "T": 24},
        uneven={"B": 2, "V": 5, "T": 7},
        switches=3,
        checkpoint=partial(wrap, "layers.?"),
    ),
    "axial": AXIAL,
    "axial summed": AXIAL._replace(
        switches=3 * 2, checkpoint=partial(wrap, "?.axial_attentions.?"), variant={"summed": True}, gradients=1e-6
    ),
    "latte": Case(
        example="latte_video",
        package="diffusers",
        even={"B": 2, "T": 12, "H": 3, "W": 4},
        uneven={"B": 2, "T": 7, "H": 5, "W": 7},
        switches=2 * 2,
        checkpoint=lambda model: model.enable_gradient_checkpointing(),
        fixed=("T",),
        dims={"S": ("H", "W")},
    ),
    "timesformer": Case(
        example="timesformer_video",
        package="transformers",
        even={"B": 2, "T": 12, "side": 6},
        uneven={"B": 2, "T": 7, "side": 5},
        switches=2 * 2,
        checkpoint=lambda model: model.gradient_checkpointing_enable(),
        fixed=("T", "side"),
        dims={"S": ("side", "side")},
        gradients=2e-6,  # in one process, those in fp32 differ from those in fp64 by 9e-7
    ),
    "cogvideox": Case(
        example="cogvideox_video",
        package="diffusers",
        even={"B": 2, "T": 3, "H": 4, "W": 4},
        uneven={"B": 2, "T": 5, "H": 5, "W": 7},
        switches=2 * 2,
        checkpoint=lambda model: model.enable_gradient_checkpointing(),
        dims={"N": ("T", "H", "W")},
        gradients=2e-6,  # in one process, those in fp32 differ from those in fp64 by 1.1e-6
        exact=1e-6,  # it turns queries and keys by their positions in fp32
    ),
    "vivit": Case(
        example="vivit_video",
        package="transformers",
        even={"B": 2, "T": 3, "side": 4},
        uneven={"B": 2, "T": 5, "side": 5},
        switches=2 * 2,
        checkpoint=lambda model: model.gradient_checkpointing_enable(),
        fixed=("T", "side"),
        dims={"N": ("T", "side", "side")},
    ),
    "factorised vivit": Case(
        example="factorised_vivit",
        package="vit-pytorch",
        even={"B": 2, "T": 12, "side": 6},
        uneven={"B": 2, "T": 7, "side": 5},
        switches=2 * 2,
        checkpoint=partial(wrap, "factorized_transformer.layers.?.?"),
        fixed=("T", "side"),
        dims={"S": ("side", "side")},
        # It returns a mean, so all positions have one gradient: summed in one process, fp32 differs from fp64 by 6e-6.
        gradients=1e-5,
    ),
}
EXAMPLES = {case.example: case.package for case in CASES.values() if (MODELS / f"{case.example}.py").exists()}


def skip_without(package: str) -> None:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed; `make test-models` installs it")


class Run(NamedTuple):
    """What a forward and a backward gave."""

    output: Tensor
    gradients: dict[str, Tensor]
    calls: Counter[str]  # of each module's forward hook


class Found(NamedTuple):
    """A model under its plan, compared with the model alone."""

    output: float
    gradient: tuple[float, str]  # the largest difference, and which parameter's
    moved: dict[str, int]  # calls of each collective in the forward
    planned: dict[str, int]
    repeated: dict[str, int]  # modules that were called more often than in the model alone, and how many times as often


def _run(model: nn.Module, inputs: Mapping[str, Any], calls: Counter[str]) -> tuple[Run, dict[str, tuple[int, int]]]:
    """A forward and a backward, and what the forward moved, by operation."""
    from common import tensor

    model.zero_grad()
    calls.clear()
    with dsp.ledger() as moved:
        output = tensor(model(**inputs))
    generator = torch.Generator().manual_seed(1)
    weight = torch.rand(output.shape, generator=generator, dtype=torch.float64).to(output)  # another one at each position
    (output**2 * weight).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return Run(output.detach(), gradients, Counter(calls)), moved.by("operation")


def _planned(model: nn.Module, plan: dsp.Plan, sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """The collectives of the cheapest plan: of the whole chain, or of each module with the way back; and of leaving."""
    needs = [(name, one) for name, calls in planned_modules(model, plan).items() for one in calls]
    cheapest = partial(cheapest_plan, sizes=sizes, ranks=ranks, shardable=plan.dims, bytes_per_position=1, start=plan.shard)
    planned = Counter({"gather": 1})
    if plan.switching == "lazy":
        planned["switch"] = cheapest([StageNeeds(name, one.mixes) for name, one in needs], end=None).switches
        return dict(planned)
    for name, one in needs:
        if one.attention is not None:
            attention = Attention(heads=model.config.num_attention_heads, head_bytes=1)
            stage = cheapest([StageNeeds(name, plan.dims, attention)], end=plan.shard).stages[0]
            assert stage.served == "ulysses"
            planned["switch"] += 2  # there and back
            planned["gather"] += len(parse(one.attention).sums)  # of the heads of tokens beside
        planned["switch"] += cheapest([StageNeeds(name, one.mixes)], end=plan.shard).switches
        for output in one.outputs.values():
            planned["mean"] += isinstance(output, dsp.Reduced)
    return {operation: calls for operation, calls in planned.items() if calls}


def _difference(x: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    return float((x - expected).abs().max()) / max(float(expected.abs().max()), floor)


def _compare(case: Case, sizes: Mapping[str, int], dtype: torch.dtype, checkpointed: bool, slices: int = 1) -> Found:
    mesh, example = dsp.Mesh(sequence=dist.get_world_size()), importlib.import_module(case.example)
    model = case.make_model(sizes).to(dtype)
    assert all(parameter.unique().numel() > 1 for parameter in model.parameters()), "a parameter has no noise"
    inputs = {
        name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in example.make_inputs(**sizes).items()
    }
    plan = replace(example.make_plan(model), independent="B")
    if checkpointed:
        case.checkpoint(model)
    calls: Counter[str] = Counter()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    names = [name for name, _ in model.named_modules()], list(model.state_dict())
    alone, _ = _run(model, inputs, calls)

    dsp.parallelize(model, plan, mesh=mesh)
    assert ([name for name, _ in model.named_modules()], list(model.state_dict())) == names
    set_overlap(mesh.group("sequence"), FixedOverlap(slices))
    found, moved = _run(model, inputs, calls)
    assert found.gradients.keys() == alone.gradients.keys()
    largest = max(float(gradient.abs().max()) for gradient in alone.gradients.values())
    differences = []
    for name, gradient in found.gradients.items():
        dist.all_reduce(gradient)
        differences.append((_difference(gradient / mesh.size("sequence"), alone.gradients[name], FLOOR * largest), name))
    return Found(
        output=_difference(found.output, alone.output),
        gradient=max(differences),
        moved={operation: calls for operation, (calls, _) in moved.items()},
        planned=_planned(model, plan, case.planned_sizes(sizes), mesh.size("sequence")),
        repeated={name: called // alone.calls[name] for name, called in found.calls.items() if called != alone.calls[name]},
    )


def _compare_all(name: str, checkpointed: bool) -> dict[tuple[str, torch.dtype], Found]:
    case = CASES[name]
    return {
        (label, dtype): _compare(case, sizes, dtype, checkpointed)
        for label, sizes in (("even", case.even), ("uneven", case.uneven))
        for dtype in (torch.float32, torch.float64)
    }


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_averaged_gradients(ranks, name, checkpointed, size):
    case = CASES[name]
    skip_without(case.package)
    for found in ranks(size, _compare_all, name, checkpointed):
        for (label, dtype), (output, (gradient, parameter), moved, planned, repeated) in found.items():
            allowed = (1e-6, case.gradients) if dtype == torch.float32 else (case.exact, case.exact)
            assert output <= allowed[0], (label, dtype)
            assert gradient <= allowed[1], (label, dtype, parameter)
            assert moved == planned
            assert moved["switch"] == case.switches
            assert not repeated


def _compare_in_slices(name: str, checkpointed: bool) -> Found:
    case = CASES[name]
    return _compare(case, case.uneven, torch.float64, checkpointed, slices=2)


# Parts of the modules with a switch around them, or before them in a chain: they are called once a slice.
SLICED = {
    "toto": r"layers\.[0-9]\..*",
    "axial": r"[0-9]\.axial_attentions\.[0-9]\..*",
    "axial summed": r"[0-9]\.axial_attentions\.0\..*",
    "latte": r"temporal_transformer_blocks\.[01]\..*",
    "timesformer": r"encoder\.layer\.[01]\.temporal_attention\..*",
    "factorised vivit": r"factorized_transformer\.layers\.[01]\.1\..*",
    "cogvideox": None,  # its switches are of heads, within attention
}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", SLICED)
def test_modules_in_slices_whose_switches_overlap(ranks, name, checkpointed):
    case = CASES[name]
    skip_without(case.package)
    for found in ranks(2, _compare_in_slices, name, checkpointed):
        assert found.output <= case.exact
        assert found.gradient[0] <= case.exact, found.gradient
        assert bool(found.repeated) == (SLICED[name] is not None)
        if not checkpointed:  # which stops a recomputation before the last modules, in the last slice alone
            assert all(re.fullmatch(SLICED[name], part) for part in found.repeated), found.repeated
            assert set(found.repeated.values()) <= {2}


def _as_tuples() -> dict[str, str]:
    """The types of what models return, under plans, where they are asked for tuples instead of outputs with names."""
    mesh, types = dsp.Mesh(sequence=dist.get_world_size()), {}
    for name in TUPLES:
        case = CASES[name]
        model, example = case.make_model(case.uneven), importlib.import_module(case.example)
        inputs = {**example.make_inputs(**case.uneven), "return_dict": False}
        dsp.verify(model, inputs, plan=example.make_plan(model), mesh=mesh)
        dsp.parallelize(model, example.make_plan(model), mesh=mesh)
        types[name] = type(model(**inputs)).__name__
    return types


TUPLES = ["latte", "timesformer", "cogvideox"]


def test_models_may_return_tuples(ranks):
    for name in TUPLES:
        skip_without(CASES[name].package)
    assert ranks(2, _as_tuples)[0] == dict.fromkeys(TUPLES, "tuple")


def _left_at_the_output(place: int | str) -> tuple[str, list[str]]:
    mesh, case = dsp.Mesh(sequence=2), CASES["timesformer"]
    model, example = case.make_model(case.uneven), importlib.import_module(case.example)
    plan = replace(example.make_plan(model), leave=dsp.Boundary("", {place: "B 1+(S T) C"}, after=True))
    inputs = example.make_inputs(**case.uneven)
    dsp.verify(model, inputs, plan=plan, mesh=mesh)
    dsp.parallelize(model, plan, mesh=mesh)
    output = model(**inputs)
    assert output.last_hidden_state.shape == (case.uneven["B"], 1 + 25 * case.uneven["T"], model.config.hidden_size)
    return type(output).__name__, list(output)


@pytest.mark.parametrize("place", ["last_hidden_state", 0])
def test_the_region_may_be_left_in_an_output_with_names(ranks, place):
    skip_without(CASES["timesformer"].package)
    assert ranks(2, _left_at_the_output, place)[0] == ("BaseModelOutput", ["last_hidden_state"])


@pytest.mark.parametrize("example", EXAMPLES)
def test_a_plan_has_at_most_25_lines(example):
    skip_without(EXAMPLES[example])
    assert len(inspect.getsource(importlib.import_module(example).make_plan).splitlines()) <= 25


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_script_trains_as_one_process_does(example):
    skip_without(EXAMPLES[example])
    losses = []
    for launcher, size in (("alone", 1), ("torchrun", 2)):
        status, output = jobs.run(launcher, size, f"examples/models/{example}.py")
        assert status == 0, output
        assert f"sequence={size}" in output
        assert "verify: largest differences" in output
        steps = [(int(step), float(loss)) for step, loss in re.findall(r"step (\d)  loss (\S+) ", output)]
        assert len(steps) >= 3, output
        assert all(loss < last for (_, last), (step, loss) in pairwise(steps) if step > 0)
        losses.append([loss for _, loss in steps])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)

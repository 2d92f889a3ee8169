"""Whether a plan is right for a model: the same inputs through the model alone and parallelized."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from megatron_dsp.errors import UsageError
from megatron_dsp.mesh import Mesh
from megatron_dsp.parallelize.call_arguments import Parameters, float_tensors, get
from megatron_dsp.parallelize.hooks import attach, output_activations, refuse_parallelized, unparallelize
from megatron_dsp.parallelize.layout_changes import change_layouts
from megatron_dsp.parallelize.match import modules_of, planned_modules
from megatron_dsp.parallelize.model_plan import Plan
from megatron_dsp.parallelize.module_needs import ArgumentOrItem, Needs, Reduced
from megatron_dsp.parallelize.pattern import parse
from megatron_dsp.parallelize.reductions import reduce_output_alone
from megatron_dsp.parallelize.sharded_forward import ShardedForward
from megatron_dsp.reshard import FixedOverlap, set_overlap
from megatron_dsp.reshard.stages.overlap import whole_stages

Inputs: TypeAlias = Tensor | tuple[Any, ...] | Mapping[str, Any]
_Outputs: TypeAlias = dict[ArgumentOrItem, tuple[Tensor, str]]  # what a module returned, with patterns
_MIXING = (nn.GroupNorm, _NormBase, nn.MultiheadAttention, nn.RNNBase)
_NOISE = 0.02  # standard deviation of what parameters that are all zero get
_FLOOR = 1e-2  # a gradient is compared relative to its own largest value, or to this part of the largest of all


@dataclass(frozen=True)
class Report:
    """The largest differences between the model alone and parallelized, relative to the largest value of each tensor.

    Attributes:
        modules: of what each planned module returned, in the order in which they ran; of the last call where there are several.
        output: of what the model returned.
        gradients: of each parameter's averaged gradient.
    """

    modules: Mapping[str, float]
    output: float
    gradients: Mapping[str, float]

    def __str__(self) -> str:
        module, gradient = (max(found.values(), default=0.0) for found in (self.modules, self.gradients))
        return f"largest differences: module {module:.1e}, output {self.output:.1e}, gradient {gradient:.1e}"


def verify(model: nn.Module, inputs: Inputs, *, plan: Plan, mesh: Mesh, tolerance: float | None = None) -> Report:
    """Compare ``model`` alone with ``model`` under ``plan``: each planned module, the output, and averaged gradients.

    ``inputs`` are those of one call, equal on all ranks of the sequence group: a tensor, a tuple of arguments, or a mapping of
    names to arguments. ``tolerance`` is relative; by default it goes by the dtype of the output: 1e-9, 1e-4 and 5e-2 in 64, 32
    and 16 bits. Both runs are in evaluation mode, so without dropout, with noise in parameters that are all zero, and with a
    loss that weighs each position differently. Afterwards the model and the generators of random numbers are as they were.
    Use sizes that the ranks do not divide: many mistakes cancel where shards are equal. Where modules may run in other layouts,
    which the planner may take at other sizes, ``model`` runs in these too. With ``plan.independent`` it runs in two slices as
    well: give it two samples, or more.

    Collective over the sequence group. Every rank runs the model alone, so it must fit on one.

    Errors: UsageError, the same on all ranks: for a plan that does not fit; for the first planned module, in the order in which
    they run, whose output differs; else for the output, or a parameter.
    """
    group = mesh.group("sequence")
    if plan.leave is None:
        raise UsageError("verify compares the whole output: give the plan leave= for it")
    refuse_parallelized(model)
    planned = planned_modules(model, plan)
    agreement = _RankAgreement(group)
    with ExitStack() as trial:
        trial.enter_context(_trial_state(model))
        trial.enter_context(torch.random.fork_rng([mesh.device] if mesh.device.type == "cuda" else []))
        alone = _RunAlone()
        with agreement.fail_alike():
            alone.output = _run_model(model, inputs, planned, alone)
            alone.gradients = _gradients(model, alone.output)
        limit = _tolerance(alone.output[0].dtype) if tolerance is None else tolerance
        trial.enter_context(whole_stages(group))
        forward = attach(model, plan, group, agreement.agree)
        trial.callback(unparallelize, model)
        agreement.mixers = _find_mixers(model, planned, forward, trial)
        reports = [_compare(model, inputs, planned, alone, _Comparison(alone, forward, agreement, limit))]
        tried = [forward.routes]
        for dim in plan.dims:
            if (routes := forward.routes_with(dim)) in tried:
                continue
            tried.append(routes)
            forward.preferred = dim
            try:
                reports.append(_compare(model, inputs, planned, alone, _Comparison(alone, forward, agreement, limit)))
            except UsageError as error:
                raise UsageError(f"with {dim} sharded in all modules that allow it, as at other sizes: {error}") from error
        if plan.independent is not None:
            forward.preferred = None
            set_overlap(group, FixedOverlap(2, along=plan.independent))  # until `whole_stages` ends
            try:
                reports.append(_compare(model, inputs, planned, alone, _Comparison(alone, forward, agreement, limit)))
            except UsageError as error:
                raise UsageError(f"in two slices of {plan.independent}: {error}") from error
    modules, gradients = (
        {name: max(found[name] for found in differences) for name in differences[0]}
        for differences in ([report.modules for report in reports], [report.gradients for report in reports])
    )
    return Report(modules, max(report.output for report in reports), gradients)


def _compare(
    model: nn.Module, inputs: Inputs, planned: Mapping[str, tuple[Needs, ...]], alone: _RunAlone, comparison: _Comparison
) -> Report:
    """The parallelized ``model`` with ``alone``. Errors: as `verify`."""
    forward, agreement, limit = comparison.forward, comparison.agreement, comparison.limit
    leave = forward.plan.leave
    assert leave is not None  # `verify` has refused that
    with agreement.fail_alike():
        output = _run_model(model, inputs, planned, comparison)
        if [x.shape for x in output] != [x.shape for x in alone.output]:
            shapes = ", ".join(
                f"{tuple(x.shape)} instead of {tuple(y.shape)}" for x, y in zip(output, alone.output, strict=False)
            )
            raise UsageError(f"the model returns tensors of shape {shapes}; leave where all that follows needs is gathered")
    difference = max(map(_difference, output, alone.output))
    left = f"{'after' if leave.after else 'before'} {leave.module!r}"
    what = f"all planned modules agree, but the model's output differs, so what follows them does, or leave= {left}:"
    agreement.refuse(what, difference, limit)
    with agreement.fail_alike():
        gradients = _gradients(model, output)
    largest = max((float(gradient.abs().max()) for gradient in alone.gradients.values()), default=0.0)
    differences = {}
    for name, gradient in gradients.items():
        dist.all_reduce(gradient, group=forward.group)
        differences[name] = _difference(gradient / forward.group.size(), alone.gradients[name], _FLOOR * largest)
    worst = max(differences, key=lambda name: differences[name], default=None)
    if worst is not None:
        agreement.refuse(f"outputs agree, but the averaged gradient of parameter {worst!r} differs:", differences[worst], limit)
    return Report(comparison.differences, difference, differences)


class _Visitor(Protocol):
    """Sees what goes into planned modules, inside the switches, and what comes out of them, outside."""

    def start(self, name: str, needs: Needs, x: Tensor) -> None: ...

    def end(self, name: str, needs: Needs, found: _Outputs) -> None: ...


class _RunAlone:
    """What planned modules take and return in the model alone, what it returns, and its gradients."""

    output: list[Tensor]
    gradients: dict[str, Tensor]

    def __init__(self) -> None:
        self.module_inputs: list[tuple[str, Tensor]] = []
        self.module_outputs: list[tuple[str, _Outputs]] = []

    def start(self, name: str, needs: Needs, x: Tensor) -> None:
        self.module_inputs.append((name, x.detach().clone()))

    def end(self, name: str, needs: Needs, found: _Outputs) -> None:
        self.module_outputs.append((name, {place: (x.detach().clone(), text) for place, (x, text) in found.items()}))


class _Comparison:
    """Compares what planned modules take and return in ``forward`` with a record, and refuses more than ``limit``."""

    def __init__(self, alone: _RunAlone, forward: ShardedForward, agreement: _RankAgreement, limit: float):
        self.forward, self.agreement, self.limit = forward, agreement, limit
        self.differences = dict[str, float]()
        self._module_inputs, self._module_outputs = iter(alone.module_inputs), iter(alone.module_outputs)

    def start(self, name: str, needs: Needs, x: Tensor) -> None:
        expected, call = self._next(self._module_inputs, name), self.forward.last_calls[name]
        if call.slices:  # the module has got the first one
            dim, pattern = str(self.forward.plan.independent), parse(needs.pattern)
            sizes = pattern.sizes(expected.shape, {**self.forward.sizes, dim: call.slices[-1][1]})
            expected = pattern.narrow(expected, sizes, dim, *call.slices[0])
        whole = self._gather_whole(name, {0: (x, needs.pattern, call.route.inside)})[0]
        what = f"module {name!r} is the first whose input differs, so what runs before it in the region does:"
        self.agreement.refuse(what, _difference(whole, expected), self.limit)

    def end(self, name: str, needs: Needs, found: _Outputs) -> None:
        expected, route = self._next(self._module_outputs, name), self.forward.last_calls[name].route
        leave = self.forward.plan.leave
        left = leave.tensors if leave is not None and leave.after and leave.module == name else ()
        wholes = self._gather_whole(
            name, {place: (x, text, None if place in left else route.after) for place, (x, text) in found.items()}
        )
        differences = []
        for place, whole in wholes.items():
            kept, one = needs.outputs.get(place), expected[place][0]
            if isinstance(kept, Reduced):
                one = reduce_output_alone(one, kept, route, self.forward)
            differences.append(_difference(whole, one))
        self.differences[name] = max(differences)
        self.agreement.refuse(f"module {name!r} is the first whose output differs:", self.differences[name], self.limit)

    def _gather_whole(
        self, name: str, tensors: Mapping[ArgumentOrItem, tuple[Tensor, str, str | None]]
    ) -> dict[ArgumentOrItem, Tensor]:
        changes = {
            place: self.forward.layout_change(f"module {name!r}", x.detach(), parse(text), layout, None)
            for place, (x, text, layout) in tensors.items()
        }
        return change_layouts(changes, self.forward.group, "verify")

    def _next(self, records: Iterator[tuple[str, Any]], name: str) -> Any:
        alone, found = next(records, ("nothing", None))
        if name != alone:  # as calls are equal on all ranks, so is this
            raise UsageError(f"module {name!r} runs where {alone} runs in the model alone; do its calls depend on sizes?")
        return found


class _CommonError(UsageError):
    """What one rank found, on all of them."""


class _RankAgreement:
    """Lets the ranks of a group fail alike, before one waits for another that has failed."""

    def __init__(self, group: dist.ProcessGroup):
        self._group = group
        self.mixers: Mapping[str, str] = {}  # modules that ran on shards though they mix what may be sharded, and their types

    def agree(self, error: Exception | None) -> None:
        """Raise on all ranks where one of them has an error; collective."""
        messages: list[str | None] = [None] * self._group.size()
        dist.all_gather_object(messages, None if error is None else str(error), group=self._group)
        found = [(rank, message) for rank, message in enumerate(messages) if message is not None]
        if found:
            rank, message = found[0]
            raise _CommonError(message if len(found) == len(messages) else f"on rank {rank} of {len(messages)}: {message}")

    @contextmanager
    def fail_alike(self) -> Iterator[None]:
        """Around code of the model's, which may fail on one rank alone."""
        error: Exception | None = None
        try:
            yield
        except _CommonError:
            raise
        except Exception as found:
            error = found
        self.agree(error)

    def refuse(self, what: str, difference: float, limit: float) -> None:
        """Raise where the difference is larger than the limit, or is not a number."""
        hint = "".join(f"; {name!r}, a {kind}, mixes positions and is not planned" for name, kind in self.mixers.items())
        text = f"{what} by {difference:.1e} of its largest value, where {limit:.0e} is allowed{hint}; see docs/parallelize.md"
        self.agree(None if difference <= limit else UsageError(text))


def _find_mixers(
    model: nn.Module, planned: Mapping[str, tuple[Needs, ...]], forward: ShardedForward, exits: ExitStack
) -> Mapping[str, str]:
    """Modules that often mix positions, and are not planned: those that run in the region until ``exits``, with their types."""
    found: dict[str, str] = {}

    def recorder(name: str, module: nn.Module) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if forward.is_entered:
                found[name] = type(module).__name__

        return hook

    for name, module in modules_of(model).items():
        mixes = isinstance(module, _MIXING) or (isinstance(module, _ConvNd) and max(module.kernel_size) > 1)
        if mixes and name not in planned:
            exits.callback(module.register_forward_pre_hook(recorder(name, module)).remove)
    return found


@contextmanager
def _trial_state(model: nn.Module) -> Iterator[None]:
    """``model`` in evaluation mode, no parameter of which hides what is behind it by being zero; afterwards it is as it was.

    Not a copy: many models cannot be copied, and it would take as much memory again.
    """
    training = {module: module.training for module in model.modules()}
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    buffers = {buffer: buffer.detach().clone() for buffer in model.buffers()}
    zeros = [parameter for parameter in gradients if parameter.is_floating_point() and not parameter.any()]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for parameter in zeros:
                parameter.add_(_NOISE * torch.randn(parameter.shape, generator=generator).to(parameter))
        model.eval()
        yield
    finally:
        for module, was in training.items():
            module.training = was
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        with torch.no_grad():
            for zero in zeros:
                zero.zero_()
            for buffer, value in buffers.items():
                buffer.copy_(value)


def _run_model(model: nn.Module, inputs: Inputs, planned: Mapping[str, tuple[Needs, ...]], visitor: _Visitor) -> list[Tensor]:
    """The tensors that the model returns. ``visitor`` sees planned modules after all other hooks.

    Errors: UsageError that names the module in which code of the model raises, the planned one if it is in one.
    """
    modules, calls = modules_of(model), Counter[str]()
    running, done = list[str](), list[str]()  # modules that have not returned, the innermost last; planned ones that have
    parameters = {name: Parameters(f"module {name!r}", modules[name]) for name in planned}

    def needs_of(name: str) -> Needs:
        return planned[name][(calls[name] - 1) % len(planned[name])]

    def start(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            running.append(name)
            if name not in planned:
                return
            calls[name] += 1
            path = parameters[name].required_path(needs_of(name).activation, (args, kwargs))
            visitor.start(name, needs_of(name), get((args, kwargs), path))

        return hook

    def end(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            running.pop()
            if name in planned:
                done.append(name)
                visitor.end(name, needs_of(name), output_activations(name, needs_of(name), output))

        return hook

    handles = [module.register_forward_pre_hook(start(name), with_kwargs=True) for name, module in modules.items()]
    handles += [module.register_forward_hook(end(name)) for name, module in modules.items()]
    torch.manual_seed(0)
    try:
        if isinstance(inputs, Mapping):
            output = model(**inputs)
        else:
            output = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    except UsageError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UsageError(
            f"the model fails {_locate(running, done, planned)}: {reason}; does the plan name all side inputs and sizes there?"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    found = list(float_tensors(output))
    if not found:
        raise UsageError(f"the model returns a {type(output).__name__} without a floating tensor, so nothing can be compared")
    return found


def _locate(running: list[str], done: list[str], planned: Container[str]) -> str:
    """A place in a forward, by the modules that run there and the planned ones that have run before."""
    found = next((name for name in reversed(running) if name in planned), None)
    if found is not None:
        return f"in module {found!r}"
    after = f", after module {done[-1]!r}" if done else ""
    return f"in module {running[-1]!r}, which is not planned{after}" if running[-1] else f"in its own forward{after}"


def _gradients(model: nn.Module, output: list[Tensor]) -> dict[str, Tensor]:
    """Of each parameter, under a loss that weighs each position of the output differently."""
    model.zero_grad(set_to_none=True)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator).to(x) for x in output]
    losses = [(x * weight).sum() for x, weight in zip(output, weights, strict=True) if x.requires_grad]
    if losses:
        torch.stack([loss.double() for loss in losses]).sum().backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@torch.no_grad()
def _difference(x: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """The largest difference over the largest value of ``expected``, or over ``floor`` where that is more."""
    if x.shape != expected.shape:
        return float("inf")
    scale = max(float(expected.abs().max()), floor) if expected.numel() else 0.0
    worst = float((x.double() - expected.double()).abs().max()) if x.numel() else 0.0
    return worst if worst == 0.0 else worst / max(scale, torch.finfo(torch.float64).tiny)


def _tolerance(dtype: torch.dtype) -> float:
    return {8: 1e-9, 4: 1e-4}.get(dtype.itemsize, 5e-2)

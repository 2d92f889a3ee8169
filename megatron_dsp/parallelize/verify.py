"""Whether a plan is right for a model: the same inputs through the model alone and parallelized."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_dsp.errors import UsageError
from megatron_dsp.mesh import Mesh
from megatron_dsp.parallelize.hooks import activations, attach, refuse_parallelized
from megatron_dsp.parallelize.match import planned_modules
from megatron_dsp.parallelize.pattern import parse
from megatron_dsp.parallelize.plan import Key, Needs, Plan

Inputs: TypeAlias = Tensor | tuple[Any, ...] | Mapping[str, Any]
_Activations: TypeAlias = dict[Key, tuple[Tensor, str]]  # what a module returned, with patterns
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
    and 16 bits. Both runs are of one copy in evaluation mode, so without dropout, whose parameters that are all zero get some
    noise, with a loss that weighs each position differently. The model and the generators of random numbers stay as they are.
    Use sizes that the ranks do not divide: many mistakes cancel where shards are equal.

    Collective over the sequence group. Every rank runs the model alone, so it must fit on one.

    Errors: UsageError, the same on all ranks: for a plan that does not fit; for the first planned module, in the order in which
    they run, whose output differs; else for the output, or a parameter.
    """
    group = mesh.group("sequence")
    leave = plan.leave
    if leave is None:
        raise UsageError("verify compares the whole output: give the plan leave= for it")
    refuse_parallelized(model)
    planned = planned_modules(model, plan)
    trial = _trial_copy(model)
    together = _Together(group)
    calls: list[tuple[str, _Activations]] = []

    def record(name: str, found: _Activations) -> None:
        calls.append((name, {key: (x.detach().clone(), text) for key, (x, text) in found.items()}))

    with torch.random.fork_rng([mesh.device] if mesh.device.type == "cuda" else []):
        with together.failing():
            expected = _forward(trial, inputs, planned, record)
            expected_gradients = _gradients(trial, expected)
        limit = _tolerance(expected[0].dtype) if tolerance is None else tolerance
        region = attach(trial, plan, group, together.agree)
        modules: dict[str, float] = {}
        remaining = iter(calls)

        def compare(name: str, found: _Activations) -> None:
            alone_name, alone = next(remaining, ("nothing", {}))
            if name != alone_name:  # as calls are equal on all ranks, so is this
                raise UsageError(
                    f"module {name!r} runs where {alone_name} runs in the model alone; do its calls depend on sizes?"
                )
            left = leave.tensors if leave.after and leave.module == name else ()
            layouts = {key: None if key in left else region.routes.modules[name].after for key in found}
            moves = {key: region.move(name, x.detach(), parse(text), layouts[key], None) for key, (x, text) in found.items()}
            wholes = region.moved(moves, "verify")
            modules[name] = max(_difference(whole, alone[key][0]) for key, whole in wholes.items())
            together.refuse(f"module {name!r} is the first whose output differs", modules[name], limit)

        with together.failing():
            output = _forward(trial, inputs, planned, compare)
            if [x.shape for x in output] != [x.shape for x in expected]:
                shapes = ", ".join(
                    f"{tuple(x.shape)} instead of {tuple(y.shape)}" for x, y in zip(output, expected, strict=False)
                )
                raise UsageError(f"the model returns tensors of shape {shapes}; leave where all that follows needs is gathered")
        difference = max(map(_difference, output, expected))
        together.refuse("all planned modules agree, but the model's output differs", difference, limit)
        with together.failing():
            gradients = _gradients(trial, output)
    largest = max((float(gradient.abs().max()) for gradient in expected_gradients.values()), default=0.0)
    differences = {}
    for name, gradient in gradients.items():
        dist.all_reduce(gradient, group=group)
        differences[name] = _difference(gradient / group.size(), expected_gradients[name], _FLOOR * largest)
    worst = max(differences, key=lambda name: differences[name], default=None)
    if worst is not None:
        together.refuse(f"outputs agree, but the averaged gradient of parameter {worst!r} differs", differences[worst], limit)
    return Report(modules, difference, differences)


class _AgreedError(UsageError):
    """What one rank found, on all of them."""


class _Together:
    """Lets the ranks of a group fail alike, before one waits for another that has failed."""

    def __init__(self, group: dist.ProcessGroup):
        self._group = group

    def agree(self, error: Exception | None) -> None:
        """Raise on all ranks where one of them has an error; collective."""
        messages: list[str | None] = [None] * self._group.size()
        dist.all_gather_object(messages, None if error is None else str(error), group=self._group)
        found = [(rank, message) for rank, message in enumerate(messages) if message is not None]
        if found:
            rank, message = found[0]
            raise _AgreedError(message if len(found) == len(messages) else f"on rank {rank} of {len(messages)}: {message}")

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Around code of the model's, which may fail on one rank alone."""
        error: Exception | None = None
        try:
            yield
        except _AgreedError:
            raise
        except Exception as found:
            error = found
        self.agree(error)

    def refuse(self, what: str, difference: float, limit: float) -> None:
        """Raise where the difference is larger than the limit, or is not a number."""
        text = f"{what}: by {difference:.1e} of its largest value, where {limit:.0e} is allowed; see docs/parallelize.md"
        self.agree(None if difference <= limit else UsageError(text))


def _trial_copy(model: nn.Module) -> nn.Module:
    """A copy in which no parameter hides what is behind it by being zero."""
    trial = copy.deepcopy(model).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trial.parameters():
            if parameter.is_floating_point() and not parameter.any():
                parameter.add_(_NOISE * torch.randn(parameter.shape, generator=generator).to(parameter))
    return trial


def _forward(
    model: nn.Module, inputs: Inputs, planned: Mapping[str, Needs], visit: Callable[[str, _Activations], None]
) -> list[Tensor]:
    """The tensors that the model returns. ``visit`` sees what each planned module returns, after all other hooks.

    Errors: UsageError that names the planned module where code of the model raises.
    """
    modules, running = dict(model.named_modules()), ["outside the planned modules"]

    def start(name: str) -> Callable[..., None]:
        return lambda module, args: running.append(f"in module {name!r}")

    def end(name: str, needs: Needs) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            running.pop()
            visit(name, activations(name, needs, output))

        return hook

    handles = [modules[name].register_forward_pre_hook(start(name)) for name in planned]
    handles += [modules[name].register_forward_hook(end(name, needs)) for name, needs in planned.items()]
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
            f"the model fails {running[-1]}: {reason}; does the plan name all of its side inputs and sizes?"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    found = list(_float_tensors(output))
    if not found:
        raise UsageError(f"the model returns a {type(output).__name__} without a floating tensor, so nothing can be compared")
    return found


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


def _float_tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, (tuple, list, Mapping)):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from _float_tensors(value)


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

"""Dynamic Sequence Parallelism put on a model from outside, by forward pre-hooks and forward hooks alone.

Each module's layouts before, in and after it follow from the plan and the global sizes, not from what ran before. So a
module that is computed again in backward (gradient checkpointing) makes the same switches again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from megatron_dsp.errors import UsageError
from megatron_dsp.mesh import Mesh
from megatron_dsp.parallelize.attention_calls import AttentionCallsOverRanks
from megatron_dsp.parallelize.attributes import LocalAttributes
from megatron_dsp.parallelize.call_arguments import Parameters, Passed, get, output_item, put, replace_items
from megatron_dsp.parallelize.layout_changes import LayoutChange, change_layouts
from megatron_dsp.parallelize.match import check_boundaries, modules_of, modules_with_attributes, planned_modules
from megatron_dsp.parallelize.model_plan import Plan
from megatron_dsp.parallelize.module_needs import ArgumentOrItem, Boundary, Carried, Needs, Reduced, Slice
from megatron_dsp.parallelize.pattern import parse
from megatron_dsp.parallelize.reductions import reduce_output
from megatron_dsp.parallelize.sharded_forward import Agree, Call, ShardedForward

_handles: weakref.WeakKeyDictionary[nn.Module, list[RemovableHandle]] = weakref.WeakKeyDictionary()  # of parallelized models


def parallelize(model: nn.Module, plan: Plan, *, mesh: Mesh) -> nn.Module:
    """Let ``model`` run with its activations sharded over the mesh's sequence group, as ``plan`` says; returns ``model``.

    Parameters, names and the state dict stay as they are. Gradients of parameters are to be averaged over data x sequence
    (docs/contracts.md). The model itself is to be called, not its ``forward``. Hooks of others keep working; pre-hooks that are
    registered later see what the module sees.

    Errors: UsageError, on every rank, where the plan does not fit the model, or it is parallelized already. In a forward:
    UsageError for what all ranks see, RankError for the shape of a tensor that is not what the plan says.
    """
    attach(model, plan, mesh.group("sequence"))
    return model


def unparallelize(model: nn.Module) -> nn.Module:
    """Remove all that `parallelize` did to ``model``; returns it. Errors: UsageError where it is not parallelized."""
    if model not in _handles:
        raise UsageError(f"this {type(model).__name__} is not parallelized; pass the model that dsp.parallelize got")
    for handle in _handles.pop(model):
        handle.remove()
    return model


def refuse_parallelized(model: nn.Module) -> None:
    """Errors: UsageError where ``model`` or a part of it is parallelized."""
    for name, module in model.named_modules():
        if module in _handles:
            part = f"module {name!r} of this" if name else "this"
            raise UsageError(f"{part} {type(model).__name__} is parallelized already; call dsp.unparallelize on it first")


def attach(model: nn.Module, plan: Plan, group: dist.ProcessGroup, agree: Agree | None = None) -> ShardedForward:
    """`parallelize` over ``group``; for ``agree`` see `ShardedForward`."""
    refuse_parallelized(model)
    planned = planned_modules(model, plan)
    check_boundaries(model, plan, planned)
    modules = modules_of(model)
    pattern_of = modules_with_attributes(modules, plan)
    attributes = {name: LocalAttributes(name, modules[name], plan.attributes[pattern_of[name]]) for name in pattern_of}
    forward = ShardedForward(plan, planned, group, agree)
    handles = _handles[model] = []

    def before(name: str, hook: Callable[..., Any]) -> None:
        handles.append(modules[name].register_forward_pre_hook(hook, with_kwargs=True))

    def after(name: str, hook: Callable[..., Any]) -> None:
        handles.append(modules[name].register_forward_hook(hook, prepend=True))

    def always_after(name: str, hook: Callable[..., Any]) -> None:
        handles.append(modules[name].register_forward_hook(hook, always_call=True))

    # Where several are on one module, pre-hooks run in this order; hooks are prepended, and run in the reverse order.
    before("", lambda *_: forward.begin())
    always_after("", lambda *_: forward.finish())
    around_entry = [found for name, found in attributes.items() if _contains_entry(name, plan.enter)]
    if plan.sizes is not None:
        before(plan.sizes.module, _hook_before_sizes(forward, plan.sizes, modules[plan.sizes.module]))
    for boundary, enters in ((plan.enter, True), (plan.leave, False)):
        if boundary is not None and boundary.after:
            after(boundary.module, _hook_after_boundary(forward, boundary, enters, around_entry))
        elif boundary is not None:
            before(boundary.module, _hook_before_boundary(forward, boundary, enters, modules[boundary.module], around_entry))
    for name in modules:
        if name in planned:
            runs = _ModuleHooks(forward, name, modules[name], attributes.get(name))
            before(name, lambda module, args, kwargs, runs=runs: runs.before(module, (args, kwargs)))
            after(name, lambda module, args, output, runs=runs: runs.after(output))
            always_after(name, lambda *_, runs=runs: runs.finish())
        elif name in attributes:
            waits = attributes[name] in around_entry
            before(name, _hook_before_attributes(forward, name, attributes[name], wait=waits))
            if not waits:
                after(name, _hook_after_attributes(forward, attributes[name]))
            always_after(name, lambda *_, found=attributes[name]: found.finish())
    return forward


def _contains_entry(name: str, enter: Boundary) -> bool:
    """Whether the region is entered while the module ``name`` runs."""
    return enter.module != name and enter.module.startswith(f"{name}." if name else "")


# Hooks are closures, which copy.deepcopy leaves as they are: a copied model shares the forward and the process group.


def _hook_before_sizes(forward: ShardedForward, sizes: Boundary, module: nn.Module) -> Callable[..., Any]:
    where = f"sizes of {sizes.module!r}"
    parameters = Parameters(where, module)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with forward.agree_on_errors():
            found = {place: parameters.required_path(place, (args, kwargs)) for place in sizes.tensors}
            forward.measure(where, {place: get((args, kwargs), path) for place, path in found.items()})

    return hook


def _hook_before_boundary(
    forward: ShardedForward, boundary: Boundary, enters: bool, module: nn.Module, attributes: list[LocalAttributes]
) -> Callable[..., Any]:
    where = f"{'enter' if enters else 'leave'} before {boundary.module!r}"
    parameters = Parameters(where, module)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        passed = args, kwargs
        with forward.agree_on_errors():
            first = next(iter(boundary.tensors))
            paths = {place: parameters.path(place, passed) for place in boundary.tensors}
            paths[first] = parameters.required_path(first, passed)
            found = {place: (path, get(passed, path)) for place, path in paths.items() if path is not None}
            changes = _boundary_changes(forward, boundary, enters, where, {place: x for place, (_, x) in found.items()})
            _swap_attributes(attributes, forward if enters else None)
        whole = change_layouts(changes, forward.group, "enter" if enters else "leave")
        return put(passed, {found[place][0]: x for place, x in whole.items()})[0]

    return hook


def _hook_after_boundary(
    forward: ShardedForward, boundary: Boundary, enters: bool, attributes: list[LocalAttributes]
) -> Callable[..., Any]:
    where = f"{'enter' if enters else 'leave'} after {boundary.module!r}"

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        with forward.agree_on_errors():
            found = {place: output_item(output, place, where) for place in boundary.tensors}
            changes = _boundary_changes(forward, boundary, enters, where, found)
            _swap_attributes(attributes, forward if enters else None)
        return replace_items(output, change_layouts(changes, forward.group, "enter" if enters else "leave"))

    return hook


def _boundary_changes(
    forward: ShardedForward, boundary: Boundary, enters: bool, where: str, found: Mapping[ArgumentOrItem, Any]
) -> dict[ArgumentOrItem, LayoutChange]:
    source = None if enters else forward.leave(where)
    target = forward.enter(where, next(iter(found.values()))) if enters else None
    what = "item" if boundary.after else "argument"
    return {
        place: forward.layout_change(f"{where}: {what} {place!r}", x, parse(boundary.tensors[place]), source, target)
        for place, x in found.items()
        if x is not None
    }


def _swap_attributes(attributes: list[LocalAttributes], forward: ShardedForward | None) -> None:
    """Of modules that run now: to local values where the region is entered, back where it is left."""
    for found in attributes:
        if found.waiting:
            found.restore() if forward is None else found.make_local(forward, forward.routes.start)


def _hook_before_attributes(
    forward: ShardedForward, name: str, attributes: LocalAttributes, *, wait: bool
) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if wait:
            attributes.wait(module)
            return
        with forward.agree_on_errors():
            forward.check_entered(f"module {name!r}")
            attributes.module = module
            attributes.make_local(forward, forward.routes.start)

    return hook


def _hook_after_attributes(forward: ShardedForward, attributes: LocalAttributes) -> Callable[..., None]:
    return lambda module, args, output: attributes.make_local_in_backward(output, forward, forward.routes.start)


@dataclass
class _RunningCall:
    """A call of a planned module that has not returned."""

    exits: ExitStack
    call: Call | None = None
    attention: AttentionCallsOverRanks | None = None


class _ModuleHooks:
    """What is done before and after a planned module."""

    def __init__(self, forward: ShardedForward, name: str, module: nn.Module, attributes: LocalAttributes | None):
        self._forward, self._name, self._attributes = forward, name, attributes
        self._where = f"module {name!r}"
        self._parameters = Parameters(self._where, module)
        self._running: list[_RunningCall] = []

    def before(self, module: nn.Module, passed: Passed) -> Passed:
        """The arguments that the module gets."""
        forward, running = self._forward, _RunningCall(ExitStack())
        self._running.append(running)
        changes: dict[tuple[Any, ...], LayoutChange] = {}
        values: dict[tuple[Any, ...], Any] = {}
        with forward.agree_on_errors():
            running.call = needs, route = forward.call(self._name)
            if needs.attention is not None and module.training and getattr(module, "gradient_checkpointing", False):
                raise UsageError(
                    f"{self._where} has attention= and checkpoints its own forward (gradient_checkpointing), which would "
                    "attend within a shard when it is computed again; name the module within it that attends"
                )
            path = self._parameters.required_path(needs.activation, passed)
            where = self._parameters.describe(needs.activation)
            changes[path] = forward.layout_change(where, get(passed, path), parse(needs.pattern), route.before, route.inside)
            for place, side in needs.arguments.items():
                where, found = self._parameters.describe(place), self._parameters.path(place, passed)
                if found is None:
                    continue
                if isinstance(side, (Slice, Carried)):
                    source = route.before if isinstance(side, Carried) else None
                    changes[found] = forward.layout_change(where, get(passed, found), parse(side.pattern), source, route.inside)
                else:
                    values[found] = forward.local_value(where, get(passed, found), side, route.before, route.inside)
            if self._attributes is not None:
                running.exits.callback(self._attributes.restore)
                self._attributes.module = module
                self._attributes.make_local(forward, route.inside)
        passed, undo = put(passed, {**values, **change_layouts(changes, forward.group, self._name)})
        for put_back in undo:
            running.exits.callback(put_back)
        if needs.attention is not None:
            attention = AttentionCallsOverRanks(forward, self._name, needs.attention, route.inside)
            running.attention = running.exits.enter_context(attention)
        return passed

    def after(self, output: Any) -> Any:
        """What follows gets instead of the module's ``output``."""
        forward, running = self._forward, self._running[-1]
        running.exits.close()
        assert running.call is not None  # `before` has run
        needs, route = running.call
        if self._attributes is not None:
            self._attributes.make_local_in_backward(output, forward, route.inside)
        with forward.agree_on_errors():
            if running.attention is not None and not running.attention.calls:
                raise UsageError(
                    f"{self._where} has attention=, but called no scaled_dot_product_attention; let its library use that "
                    "(attn_implementation='sdpa'), or name the module that does"
                )
            found = output_activations(self._name, needs, output)
            changes = {
                place: forward.layout_change(f"{self._where}: output {place!r}", x, parse(text), route.inside, route.after)
                for place, (x, text) in found.items()
            }
        results = change_layouts(changes, forward.group, self._name)
        for place, kept in needs.outputs.items():
            if isinstance(kept, Reduced):
                results[place] = reduce_output(results[place], kept, route, forward, self._name)
        return replace_items(output, results)

    def finish(self) -> None:
        """The module has returned, or raised."""
        if self._running:
            self._running.pop().exits.close()


def output_activations(name: str, needs: Needs, output: Any) -> dict[ArgumentOrItem, tuple[Any, str]]:
    """The activations among what the planned module ``name`` returned, with their patterns."""
    if not needs.outputs and not isinstance(output, Tensor):
        raise UsageError(
            f"module {name!r} returns a {type(output).__name__}; say which items are activations: Needs(outputs={{0: ...}})"
        )
    found = {}
    for place, kept in (needs.outputs or {0: needs.pattern}).items():
        text = kept.pattern if isinstance(kept, Reduced) else kept
        found[place] = output_item(output, place, f"module {name!r}"), text
    return found

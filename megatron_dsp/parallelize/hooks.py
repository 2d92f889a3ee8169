"""Dynamic Sequence Parallelism put on a model from outside, by forward pre-hooks and forward hooks alone.

Each module's layouts before, in and after it follow from the plan and the global sizes, not from what ran before. So a
module that is computed again in backward (gradient checkpointing) makes the same switches again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from megatron_dsp.errors import UsageError
from megatron_dsp.mesh import Mesh
from megatron_dsp.parallelize.attention_calls import AttentionCallsOverRanks
from megatron_dsp.parallelize.attributes import LocalAttributes
from megatron_dsp.parallelize.call_arguments import (
    Parameters,
    Passed,
    containers,
    find_tensor,
    get,
    output_item,
    put,
    replace_items,
)
from megatron_dsp.parallelize.layout_changes import LayoutChange, change_layouts
from megatron_dsp.parallelize.match import check_boundaries, modules_of, modules_with_attributes, planned_modules
from megatron_dsp.parallelize.model_plan import Plan
from megatron_dsp.parallelize.module_needs import ArgumentOrItem, Boundary, Carried, Key, Needs, Reduced, Slice
from megatron_dsp.parallelize.pattern import parse
from megatron_dsp.parallelize.reductions import reduce_output
from megatron_dsp.parallelize.routes import Route
from megatron_dsp.parallelize.sharded_forward import Agree, Call, ShardedForward
from megatron_dsp.parallelize.slices import Range, SlicesFromModule, SlicesToModule

_Path: TypeAlias = tuple[Key, ...]  # an argument, or an item of one, as `Parameters.path` has found it
_Values: TypeAlias = dict[_Path, Any]
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
            after(name, lambda module, args, output, runs=runs: runs.after(module, output))
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
        moved = change_layouts(changes, forward.group, "enter" if enters else "leave")
        if enters:
            forward.choose_slices(moved[first])
        return put(passed, {found[place][0]: x for place, x in moved.items()})[0]

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
        moved = change_layouts(changes, forward.group, "enter" if enters else "leave")
        if enters:
            forward.choose_slices(moved[next(iter(boundary.tensors))])
        return replace_items(output, moved)

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
    """A call of a planned module that has not returned.

    Attributes:
        exits: what is to be undone after it.
        passed: the arguments of its caller.
        call: what the module needs this time.
        inputs: of each slice, or of the whole: what gives the values that the module gets in the places of arguments.
        lengths: of the lists, dicts and sets among the arguments.
        first: what is to be undone after the first slice, or the whole.
        attention: sees its calls of attention.
    """

    exits: ExitStack
    passed: Passed
    call: Call | None = None
    inputs: Sequence[Callable[[], _Values]] = ()
    lengths: Sequence[int] = ()
    first: ExitStack = field(default_factory=ExitStack)
    attention: AttentionCallsOverRanks | None = None


class _ModuleHooks:
    """What is done before and after a planned module.

    Where it runs in slices, its own call is that of the first one. The others follow it, by the module's forward alone.
    """

    def __init__(self, forward: ShardedForward, name: str, module: nn.Module, attributes: LocalAttributes | None):
        self._forward, self._name, self._attributes = forward, name, attributes
        self._where = f"module {name!r}"
        self._parameters = Parameters(self._where, module)
        self._running: list[_RunningCall] = []

    def before(self, module: nn.Module, passed: Passed) -> Passed:
        """The arguments that the module gets."""
        forward, running = self._forward, _RunningCall(ExitStack(), passed)
        self._running.append(running)
        with forward.agree_on_errors():
            running.call = needs, route, slices = forward.call(self._name)
            if needs.attention is not None and module.training and getattr(module, "gradient_checkpointing", False):
                raise UsageError(
                    f"{self._where} has attention= and checkpoints its own forward (gradient_checkpointing), which would "
                    "attend within a shard when it is computed again; name the module within it that attends"
                )
            changes, numbers = self._find_inputs(passed, needs, route)
            values = []
            for part in slices or (None,):
                with forward.in_slice(part):
                    sizes = forward.local_sizes(route.inside)
                    values.append({path: number(sizes) for path, number in numbers.items()})
            if slices:
                self._refuse_other_arguments(passed, [*changes, *numbers])
                running.lengths = [len(container) for container in containers(passed)]
            if self._attributes is not None:
                running.exits.callback(self._attributes.restore)
                self._attributes.module = module
                self._attributes.make_local(forward, route.inside)
        running.inputs = self._send_inputs(changes, values, slices)
        running.exits.callback(running.first.close)
        passed = self._enter_slice(running, running.call, 0, running.first)
        if needs.attention is not None:
            attention = AttentionCallsOverRanks(forward, self._name, needs.attention, route.inside)
            running.attention = running.exits.enter_context(attention)
        return passed

    def after(self, module: nn.Module, output: Any) -> Any:
        """What follows gets instead of the module's ``output``."""
        running = self._running[-1]
        assert running.call is not None  # `before` has run
        running.first.close()
        arrive = self._send_outputs(module, output, running, running.call)
        running.exits.close()
        results = arrive()
        for place, kept in running.call.needs.outputs.items():
            if isinstance(kept, Reduced):
                results[place] = reduce_output(results[place], kept, running.call.route, self._forward, self._name)
        return replace_items(output, results)

    def finish(self) -> None:
        """The module has returned, or raised."""
        if self._running:
            self._running.pop().exits.close()

    def _find_inputs(
        self, passed: Passed, needs: Needs, route: Route
    ) -> tuple[dict[_Path, LayoutChange], dict[_Path, Callable[[Mapping[str, int]], Any]]]:
        """The tensors that are to move, and what gives the other values, from the sizes that the module sees."""
        forward = self._forward
        path = self._parameters.required_path(needs.activation, passed)
        where = self._parameters.describe(needs.activation)
        changes = {path: forward.layout_change(where, get(passed, path), parse(needs.pattern), route.before, route.inside)}
        numbers: dict[_Path, Callable[[Mapping[str, int]], Any]] = {}
        for place, side in needs.arguments.items():
            where, found = self._parameters.describe(place), self._parameters.path(place, passed)
            if found is None:
                continue
            if isinstance(side, (Slice, Carried)):
                source = route.before if isinstance(side, Carried) else None
                changes[found] = forward.layout_change(where, get(passed, found), parse(side.pattern), source, route.inside)
            else:
                numbers[found] = partial(forward.local_value, where, get(passed, found), side, route.before)
        return changes, numbers

    def _send_inputs(
        self, changes: Mapping[_Path, LayoutChange], values: Sequence[_Values], slices: Sequence[Range]
    ) -> list[Callable[[], _Values]]:
        group, name = self._forward.group, self._name
        if not slices:
            moved = change_layouts(changes, group, name)
            return [lambda: {**values[0], **moved}]
        dim = str(self._forward.plan.independent)
        tensors = {path: SlicesToModule(change, dim, slices, group, name) for path, change in changes.items()}
        # The first slice of each of them leaves before the second one of any.
        arrivals = [{path: tensor.send(number) for path, tensor in tensors.items()} for number in range(len(slices))]

        def arrive(number: int) -> _Values:
            return {**values[number], **{path: arrive() for path, arrive in arrivals[number].items()}}

        return [partial(arrive, number) for number in range(len(slices))]

    def _enter_slice(self, running: _RunningCall, call: Call, number: int, exits: ExitStack) -> Passed:
        """The arguments of a slice, or of the whole, until ``exits``."""
        if call.slices:
            exits.enter_context(self._forward.in_slice(call.slices[number]))
        passed, undo = put(running.passed, running.inputs[number]())
        for put_back in undo:
            exits.callback(put_back)
        return passed

    def _send_outputs(
        self, module: nn.Module, output: Any, running: _RunningCall, call: Call
    ) -> Callable[[], dict[ArgumentOrItem, Tensor]]:
        """Run the slices that follow the first one, where there are some; what gives the activations in their new layout."""
        forward, group, name = self._forward, self._forward.group, self._name
        if not call.slices:
            with forward.agree_on_errors():
                changes = self._find_outputs(output, running, call)
            return partial(change_layouts, changes, group, name)
        results: dict[ArgumentOrItem, SlicesFromModule] = {}
        for number, part in enumerate(call.slices):
            if number:
                with ExitStack() as exits:
                    args, kwargs = self._enter_slice(running, call, number, exits)
                    output = module.forward(*args, **kwargs)
            with forward.agree_on_errors(), forward.in_slice(part):
                changes = self._find_outputs(output, running, call)
                self._refuse_other_outputs(output, changes)
                if number == 0:
                    self._refuse_changes_of_arguments(running)
                    versions = _find_versions(module)
                elif _find_versions(module) != versions:
                    raise self._explain("it changes a buffer in each call, as BatchNorm in training does", _LET_IT_RUN_WHOLE)
            for place, change in changes.items():
                if number == 0:
                    results[place] = SlicesFromModule(str(forward.plan.independent), group, name)
                results[place].send(change)
        return lambda: {place: slices.join() for place, slices in results.items()}

    def _find_outputs(self, output: Any, running: _RunningCall, call: Call) -> dict[ArgumentOrItem, LayoutChange]:
        """The activations among what the module returned, which are to move."""
        if self._attributes is not None:
            self._attributes.make_local_in_backward(output, self._forward, call.route.inside)
        if running.attention is not None and not running.attention.calls:
            raise UsageError(
                f"{self._where} has attention=, but called no scaled_dot_product_attention; let its library use that "
                "(attn_implementation='sdpa'), or name the module that does"
            )
        _, inside, after = call.route
        return {
            place: self._forward.layout_change(f"{self._where}: output {place!r}", x, parse(text), inside, after)
            for place, (x, text) in output_activations(self._name, call.needs, output).items()
        }

    def _refuse_other_arguments(self, passed: Passed, paths: Iterable[_Path]) -> None:
        """Errors: UsageError where a tensor is passed that the plan does not name: a slice may have to get a part of it."""
        (args, kwargs), undo = put(passed, dict.fromkeys(paths))
        found = {key: find_tensor(value) for key, value in [*enumerate(args), *kwargs.items()]}
        for put_back in undo:
            put_back()
        for key, x in found.items():
            if x is not None:
                raise self._explain(
                    f"argument {key!r} has a tensor of shape {tuple(x.shape)} that the plan does not name",
                    "name it in arguments=, as Slice of its dims",
                )

    def _refuse_other_outputs(self, output: Any, places: Iterable[ArgumentOrItem]) -> None:
        """Errors: UsageError where the module returned a tensor that the plan does not name: its slices cannot be joined."""
        x = find_tensor(replace_items(output, dict.fromkeys(places)))
        if x is not None:
            raise self._explain(
                f"it returns a tensor of shape {tuple(x.shape)} that the plan does not name", "name it in outputs="
            )

    def _refuse_changes_of_arguments(self, running: _RunningCall) -> None:
        """Errors: UsageError where the module has added to a list, dict or set of its caller's, or taken from it."""
        if [len(container) for container in containers(running.passed)] != running.lengths:
            raise self._explain("it adds to a list, dict or set that it is passed, or takes from it", _LET_IT_RUN_WHOLE)

    def _explain(self, reason: str, fix: str) -> UsageError:
        dim = self._forward.plan.independent
        return UsageError(
            f"{self._where} runs in slices of {dim!r}, which is independent=, but {reason}; {fix.format(dim=dim)}"
        )


_LET_IT_RUN_WHOLE = "name {dim!r} in its whole=, and it runs whole"


def _find_versions(module: nn.Module) -> list[tuple[int, int]]:
    """Of the buffers of ``module``: they are others after a buffer was changed, or replaced."""
    return [(id(buffer), 0 if buffer.is_inference() else buffer._version) for buffer in module.buffers()]


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

"""Dynamic Sequence Parallelism put on a model from outside, by forward pre-hooks and forward hooks alone.

Each module's layouts before, in and after it follow from the plan and the global sizes, not from what ran before. So a
module that is computed again in backward (gradient checkpointing) makes the same switches again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from megatron_dsp.errors import UsageError
from megatron_dsp.mesh import Mesh
from megatron_dsp.parallelize.arguments import Parameters, item, put, with_items
from megatron_dsp.parallelize.match import check_boundaries, planned_modules
from megatron_dsp.parallelize.pattern import parse
from megatron_dsp.parallelize.plan import Boundary, Carried, Key, LocalSize, Needs, Plan
from megatron_dsp.parallelize.region import Agree, Move, Region

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


def attach(model: nn.Module, plan: Plan, group: dist.ProcessGroup, agree: Agree | None = None) -> Region:
    """`parallelize` over ``group``; for ``agree`` see `Region`."""
    refuse_parallelized(model)
    planned = planned_modules(model, plan)
    check_boundaries(model, plan, planned)
    modules = dict(model.named_modules())
    region = Region(plan, planned, group, agree)
    handles = _handles[model] = []

    def before(name: str, hook: Callable[..., Any]) -> None:
        handles.append(modules[name].register_forward_pre_hook(hook, with_kwargs=True))

    def after(name: str, hook: Callable[..., Any]) -> None:
        handles.append(modules[name].register_forward_hook(hook, prepend=True))

    # Where several are on one module, pre-hooks run in this order; hooks are prepended, and run in the reverse order.
    before("", lambda *_: region.begin())
    handles.append(model.register_forward_hook(lambda *_: region.finish(), always_call=True))
    for boundary, enters in ((plan.enter, True), (plan.leave, False)):
        if boundary is not None and boundary.after:
            after(boundary.module, _after_boundary(region, boundary, enters))
        elif boundary is not None:
            before(boundary.module, _before_boundary(region, boundary, enters, Parameters(modules[boundary.module])))
    for name, needs in planned.items():
        before(name, _before_module(region, name, needs, Parameters(modules[name])))
        after(name, _after_module(region, name, needs))
    return region


# Hooks are closures, which copy.deepcopy leaves as they are: a copy of the model shares its region, and the process group.


def _before_boundary(region: Region, boundary: Boundary, enters: bool, parameters: Parameters) -> Callable[..., Any]:
    where = f"{'enter' if enters else 'leave'} before {boundary.module!r}"

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with region.checked():
            places = {key: parameters.place(key, args, kwargs) for key in boundary.tensors}
            found = {key: _get(place, args, kwargs) for key, place in places.items()}
            moves = _boundary_moves(region, boundary, enters, where, found)
        moved = region.moved(moves, "enter" if enters else "leave")
        return put(args, kwargs, {places[key]: x for key, x in moved.items()})  # type: ignore[misc]

    return hook


def _after_boundary(region: Region, boundary: Boundary, enters: bool) -> Callable[..., Any]:
    where = f"{'enter' if enters else 'leave'} after {boundary.module!r}"

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        with region.checked():
            found = {key: item(output, key, where) for key in boundary.tensors}
            moves = _boundary_moves(region, boundary, enters, where, found)
        return with_items(output, region.moved(moves, "enter" if enters else "leave"))

    return hook


def _boundary_moves(region: Region, boundary: Boundary, enters: bool, where: str, found: dict[Key, Any]) -> dict[Key, Move]:
    activation = next(iter(found))
    if found[activation] is None:
        raise UsageError(f"{where}: argument {activation!r}, the activation, was not passed")
    source = None if enters else region.leave(where)
    target = region.enter(where, found[activation]) if enters else None
    return {
        key: region.move(
            f"{where}: {'item' if boundary.after else 'argument'} {key!r}", x, parse(boundary.tensors[key]), source, target
        )
        for key, x in found.items()
        if x is not None
    }


def _before_module(region: Region, name: str, needs: Needs, parameters: Parameters) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        moves: dict[Key, Move] = {}
        values: dict[Key, Any] = {}
        with region.checked():
            route = region.route(name)
            place = parameters.place(needs.activation, args, kwargs)
            where = f"module {name!r}: argument"
            if place is None:
                raise UsageError(f"{where} {needs.activation!r}, the activation, was not passed; name it in Needs(activation=)")
            x = _get(place, args, kwargs)
            moves[place] = region.move(f"{where} {place!r}", x, parse(needs.pattern), route.before, route.inside)
            for key, side in needs.arguments.items():
                place = parameters.place(key, args, kwargs)
                if place is None:
                    continue
                value = _get(place, args, kwargs)
                if isinstance(side, LocalSize):
                    values[place] = region.local_size(f"{where} {key!r}", value, side.dim, route)
                else:
                    source = route.before if isinstance(side, Carried) else None
                    moves[place] = region.move(f"{where} {key!r}", value, parse(side.pattern), source, route.inside)
        return put(args, kwargs, {**values, **region.moved(moves, name)})

    return hook


def _after_module(region: Region, name: str, needs: Needs) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        with region.checked():
            route = region.routes.modules[name]
            moves = {
                key: region.move(f"module {name!r}: output {key!r}", x, parse(pattern), route.inside, route.after)
                for key, (x, pattern) in activations(name, needs, output).items()
            }
        return with_items(output, region.moved(moves, name))

    return hook


def activations(name: str, needs: Needs, output: Any) -> dict[Key, tuple[Any, str]]:
    """The activations among what the planned module ``name`` returned, with their patterns."""
    if not needs.outputs and not isinstance(output, Tensor):
        raise UsageError(
            f"module {name!r} returns a {type(output).__name__}; say which items are activations: Needs(outputs={{0: ...}})"
        )
    patterns = needs.outputs or {0: needs.pattern}
    return {key: (item(output, key, f"module {name!r}"), pattern) for key, pattern in patterns.items()}


def _get(place: Key | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return None if place is None else args[place] if isinstance(place, int) else kwargs[place]

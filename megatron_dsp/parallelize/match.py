"""Which modules of a model a plan speaks of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from torch import nn

from megatron_dsp.errors import UsageError
from megatron_dsp.parallelize.call_arguments import Parameters
from megatron_dsp.parallelize.model_plan import Plan, unknown_name
from megatron_dsp.parallelize.module_needs import Needs

_WRAPPED = "_checkpoint_wrapped_module"  # the name in torch's CheckpointWrapper of what it wraps


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of ``model`` by the names that they have without torch's checkpoint wrappers, which are left out."""
    named = model.named_modules()
    return {".".join(part for part in name.split(".") if part != _WRAPPED): module for name, module in named}


def planned_modules(model: nn.Module, plan: Plan) -> dict[str, tuple[Needs, ...]]:
    """The modules of ``model`` that ``plan`` speaks of, by their names, in the order of ``named_modules``: their needs by call.

    Errors: UsageError for a pattern that matches nothing, for two that match one module, for arguments that it does not take,
    and for a module within one that moves the shard.
    """
    modules = modules_of(model)
    pattern_of = _match_patterns(modules, plan.modules)
    planned = {name: plan.needs_of(pattern_of[name]) for name in modules if name in pattern_of}
    for name, all_needs in planned.items():
        parameters = Parameters(f"module {name!r}", modules[name])
        for needs in all_needs:
            for place in (needs.activation, *needs.arguments):
                parameters.check(place)
        moves_shard = plan.switching == "lazy" or any(plan.shard in needs.mixes for needs in all_needs)
        inner = [other for other in planned if other != name and other.startswith(name + "." if name else "")]
        if moves_shard and inner:
            raise UsageError(
                f"module {inner[0]!r} stands in {name!r}, which moves the shard for all in it; plan one of the two"
            )
    return planned


def modules_with_attributes(modules: Iterable[str], plan: Plan) -> dict[str, str]:
    """The modules whose attributes ``plan`` names, each with the pattern that matches it. Errors: as `planned_modules`."""
    return _match_patterns(modules, plan.attributes)


def check_boundaries(model: nn.Module, plan: Plan, planned: Mapping[str, tuple[Needs, ...]]) -> None:
    """Errors: UsageError where a boundary's module or argument is not there, or is planned and on the wrong side."""
    modules = modules_of(model)
    for boundary, wrong, right in ((plan.sizes, None, ""), (plan.enter, True, "before"), (plan.leave, False, "after")):
        if boundary is None:
            continue
        if boundary.module not in modules:
            unknown_name("module", boundary.module, list(modules))
        if boundary.after is wrong and boundary.module in planned:
            raise UsageError(
                f"module {boundary.module!r} is planned, so it must run in the region: set its boundary {right} it"
            )
        if not boundary.after:
            parameters = Parameters(f"module {boundary.module!r}", modules[boundary.module])
            for place in boundary.tensors:
                parameters.check(place)


def _match_patterns(modules: Iterable[str], patterns: Iterable[str]) -> dict[str, str]:
    pattern_of: dict[str, str] = {}
    for pattern in patterns:
        names = [name for name in modules if _matches(name, pattern)]
        if not names:
            unknown_name("module", pattern, list(modules))
        for name in names:
            if name in pattern_of:
                raise UsageError(f"module {name!r} matches both {pattern_of[name]!r} and {pattern!r}; let one of them match it")
            pattern_of[name] = pattern
    return pattern_of


def _matches(name: str, pattern: str) -> bool:
    names, patterns = name.split("."), pattern.split(".")
    return len(names) == len(patterns) and all(map(fnmatchcase, names, patterns))

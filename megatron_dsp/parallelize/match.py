"""Which modules of a model a plan speaks of."""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch import nn

from megatron_dsp.errors import UsageError
from megatron_dsp.parallelize.arguments import Parameters
from megatron_dsp.parallelize.plan import Needs, Plan, unknown_name


def planned_modules(model: nn.Module, plan: Plan) -> dict[str, Needs]:
    """The modules of ``model`` that ``plan`` speaks of, by their names, in the order of ``named_modules``.

    Errors: UsageError for a pattern that matches nothing, for two that match one module, for arguments that it does not take,
    and for a module within one that moves the shard.
    """
    modules = dict(model.named_modules())
    matched: dict[str, str] = {}
    for pattern in plan.modules:
        names = [name for name in modules if _matches(name, pattern)]
        if not names:
            unknown_name("module", pattern, list(modules))
        for name in names:
            if name in matched:
                raise UsageError(f"module {name!r} matches both {matched[name]!r} and {pattern!r}; let one of them match it")
            matched[name] = pattern
    planned = {name: plan.modules[matched[name]] for name in modules if name in matched}
    for name, needs in planned.items():
        parameters = Parameters(modules[name])
        for key in (needs.activation, *needs.arguments):
            parameters.check(name, key)
        moves = plan.switching == "lazy" or plan.shard in needs.mixes
        inner = [other for other in planned if other != name and other.startswith(name + "." if name else "")]
        if moves and inner:
            raise UsageError(
                f"module {inner[0]!r} stands in {name!r}, which moves the shard for all in it; plan one of the two"
            )
    return planned


def check_boundaries(model: nn.Module, plan: Plan, planned: dict[str, Needs]) -> None:
    """Errors: UsageError where a boundary's module or argument is not there, or is planned and on the wrong side."""
    modules = dict(model.named_modules())
    for boundary, wrong, right in ((plan.enter, True, "before"), (plan.leave, False, "after")):
        if boundary is None:
            continue
        if boundary.module not in modules:
            unknown_name("module", boundary.module, list(modules))
        if boundary.after is wrong and boundary.module in planned:
            raise UsageError(
                f"module {boundary.module!r} is planned, so it must run in the region: set its boundary {right} it"
            )
        if not boundary.after:
            parameters = Parameters(modules[boundary.module])
            for key in boundary.tensors:
                parameters.check(boundary.module, key)


def _matches(name: str, pattern: str) -> bool:
    names, patterns = name.split("."), pattern.split(".")
    return len(names) == len(patterns) and all(map(fnmatchcase, names, patterns))

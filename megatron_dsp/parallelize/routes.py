"""Which dim is sharded before, in and after each module of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeGuard

from megatron_dsp.errors import UsageError
from megatron_dsp.parallelize.model_plan import Plan
from megatron_dsp.parallelize.module_needs import Needs
from megatron_dsp.parallelize.pattern import parse
from megatron_dsp.planner import Attention, StageNeeds, cheapest_plan


class Route(NamedTuple):
    """The sharded dim of a module's activation: as it comes, while the module runs, and as it goes on."""

    before: str
    inside: str
    after: str


class Routes(NamedTuple):
    """The sharded dim where the activation enters, the routes of each module's calls, and the dim sharded at the end."""

    start: str
    modules: Mapping[str, tuple[Route, ...]]
    end: str


def may_slice(needs: Needs, route: Route, dim: str | None) -> bool:
    """Whether a module may run in slices of ``dim``, and has a switch that is to travel beside them."""
    if dim is None or dim in needs.mixes or dim not in parse(needs.pattern).names:
        return False
    return route.before != route.inside and dim not in route


def find_routes(
    plan: Plan,
    planned: Mapping[str, tuple[Needs, ...]],
    sizes: Mapping[str, int],
    *,
    bytes_per_position: int,
    ranks: int,
    preferred: str | None = None,
) -> Routes:
    """The routes of the modules ``planned``, in the order in which they run.

    ``sizes`` are the global sizes of the activation that enters, in storage order, without the channels, which
    ``bytes_per_position`` holds. Pure arithmetic: all ranks find the same. The routes are the cheapest, but that a dim that is
    ``preferred`` is sharded in all modules that allow it, as it may be the cheapest at other sizes.

    Errors: UsageError where the ranks are too many for what a module needs.
    """
    if plan.shard is not None and sizes[plan.shard] < ranks:
        raise UsageError(
            f"{plan.shard}={sizes[plan.shard]} leaves some of {ranks} ranks without any; use at most as many ranks"
        )
    stages = {
        name: [_stage_needs(name, needs, plan, sizes, bytes_per_position, ranks) for needs in calls]
        for name, calls in planned.items()
    }

    def layouts(chain: list[StageNeeds], end: str | None) -> tuple[str, ...]:
        found = cheapest_plan(
            chain, sizes, ranks=ranks, shardable=plan.dims, bytes_per_position=bytes_per_position, start=plan.shard, end=end
        )
        return tuple(dim for dim in found.layouts if dim is not None)  # None is for stages that may run whole; none may here

    if plan.switching == "lazy":
        chained = [stage for calls in stages.values() for stage in calls]
        cheapest = layouts(chained, end=None)
        chain = [preferred if _is_allowed(preferred, stage) else dim for stage, dim in zip(chained, cheapest, strict=True)]
        start = chain[0] if plan.shard is None else plan.shard
        steps = zip(planned, (start, *chain), chain, strict=False)
        return Routes(start, {name: (Route(before, inside, inside),) for name, before, inside in steps}, chain[-1])
    shard = str(plan.shard)

    def around(stage: StageNeeds) -> Route:
        if shard not in stage.mixes:
            return Route(shard, shard, shard)
        return Route(shard, preferred if _is_allowed(preferred, stage) else layouts([stage], end=shard)[0], shard)

    return Routes(shard, {name: tuple(map(around, calls)) for name, calls in stages.items()}, shard)


def _is_allowed(dim: str | None, stage: StageNeeds) -> TypeGuard[str]:
    return dim is not None and (dim not in stage.mixes or stage.attention is not None)


def _stage_needs(
    name: str, needs: Needs, plan: Plan, sizes: Mapping[str, int], bytes_per_position: int, ranks: int
) -> StageNeeds:
    """What is not to be sharded while the module runs: what it mixes, what its patterns do not name, what is too small.

    And, in a chain, what it attends over wherever its parts are, at the cost of even heads: their number is not known yet.
    """
    small = [dim for dim in plan.dims if ranks > 1 and sizes[dim] // ranks < needs.least]
    if plan.switching == "around" and plan.shard in small and plan.shard not in needs.mixes:
        raise UsageError(_explain_too_small(name, [str(plan.shard)], needs, sizes, ranks))
    named = set(parse(needs.pattern).names)
    if needs.attention is not None:
        named &= set(parse(needs.attention).names)
    kept = tuple(dict.fromkeys([*needs.mixes, *(dim for dim in plan.dims if dim not in named), *small]))
    if not set(plan.dims) - set(kept):
        raise UsageError(_explain_too_small(name, [dim for dim in small if dim not in needs.mixes], needs, sizes, ranks))
    attended = tuple(dim for dim in plan.dims if dim in needs.attends)
    if plan.switching == "lazy" and attended and not kept:
        return StageNeeds(name, attended, Attention(ranks, max(1, bytes_per_position // ranks)))
    return StageNeeds(name, kept)


def _explain_too_small(name: str, dims: list[str], needs: Needs, sizes: Mapping[str, int], ranks: int) -> str:
    given = " and ".join(f"{dim}={sizes[dim]}" for dim in dims)
    most = max(sizes[dim] for dim in dims) // needs.least
    return (
        f"module {name!r} runs with {' or '.join(dims)} sharded and needs at least {needs.least} on each rank; {given} over "
        f"{ranks} ranks leaves fewer: use at most {most} ranks, or larger sizes"
    )

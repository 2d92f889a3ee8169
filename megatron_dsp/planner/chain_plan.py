"""The cheapest plan for a chain of stages: a shortest path over stages and the layouts in which each can run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from megatron_dsp.errors import UsageError
from megatron_dsp.planner.costs import Cost, Costs
from megatron_dsp.planner.stage_needs import StageNeeds

Served = Literal["plain", "ulysses", "ring"]
ANY = "any"  # as the end of a plan: whatever layout is cheapest


class Reshard(NamedTuple):
    """A primitive between two layouts. A layout is the name of the sharded dim; None: every rank holds the whole."""

    primitive: Literal["keep", "split", "switch", "gather"]
    source: str | None
    target: str | None
    cost: Cost


class PlannedStage(NamedTuple):
    """How a stage runs.

    Attributes:
        name: the stage's.
        before: what brings the activation to its layout.
        sharded: that layout.
        served: "plain" where the module needs nothing of other ranks, else the embedded method that it attends with.
        cost: of running it so, ``before`` not included.
    """

    name: str
    before: Reshard
    sharded: str | None
    served: Served
    cost: Cost


@dataclass(frozen=True)
class ChainPlan:
    """The layout of each stage of a chain and the primitives between them; ``after`` follows the last. Printed as a table."""

    stages: tuple[PlannedStage, ...]
    after: Reshard
    ranks: int

    @property
    def layouts(self) -> tuple[str | None, ...]:
        """The sharded dim of each stage."""
        return tuple(stage.sharded for stage in self.stages)

    @property
    def reshards(self) -> tuple[Reshard, ...]:
        """The primitive before each stage, and that after the last."""
        return (*(stage.before for stage in self.stages), self.after)

    @property
    def switches(self) -> int:
        """How many switches stand between stages; those inside Ulysses are not among them."""
        return sum(reshard.primitive == "switch" for reshard in self.reshards)

    @property
    def cost(self) -> Cost:
        """Of the whole chain."""
        return sum((stage.before.cost + stage.cost for stage in self.stages), self.after.cost)

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("stage", "before it", "sharded", "served", "bytes forward", "backward", "copies")]
        for stage in self.stages:
            rows.append(_row(stage.name, stage.before, stage.served, stage.before.cost + stage.cost))
        rows.append(_row("(end)", self.after, "", self.after.cost))
        rows.append(("total", f"switches: {self.switches}", "", f"ranks: {self.ranks}", *_figures(self.cost)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row[:4], widths[:4], strict=True)]
            cells += [cell.rjust(width) for cell, width in zip(row[4:], widths[4:], strict=True)]
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)


def cheapest_plan(
    stages: Sequence[StageNeeds],
    sizes: Mapping[str, int],
    *,
    ranks: int,
    shardable: Sequence[str],
    bytes_per_position: int | Sequence[int],
    start: str | None = None,
    end: str | None = ANY,
    training: bool = True,
) -> ChainPlan:
    """The plan that sends the fewest bytes, forward and backward, for ``stages`` that run one after another.

    Exact (dynamic programming) and deterministic: of plans that send the same, the one with the fewest collectives, then with
    the fewest copies, then the one that comes first in the order of ``shardable``, compared stage by stage.

    Args:
        stages: in the order in which they run.
        sizes: the global size of each dim but the channels, in storage order, outermost first.
        ranks: of the sequence group.
        shardable: the dims that may be sharded while a stage runs.
        bytes_per_position: channels x element size of the activation: one number, or one before each stage and one after the
            last.
        start: the layout in which the activation enters. None: every rank has all of it, and a split is free.
        end: the layout in which it must leave: a dim, None for whole, or ``ANY``.
        training: whether there is a backward, whose bytes count too.

    Raises:
        UsageError: for unknown dims, sizes below 1, and a stage that no layout can serve.
    """
    _check_chain(stages, sizes, ranks, shardable, start, end)
    widths = _bytes_at_boundaries(bytes_per_position, len(stages))
    costs = Costs(sizes, ranks, training=training)
    paths = [_Path((), (), start, Cost())]
    for stage, width in zip(stages, widths, strict=False):
        # One path for each option of this stage is kept: the best that ends in it. What follows depends on no more.
        paths = [
            min((path.extend(stage, option, index, costs, width) for path in paths), key=_Path.key)
            for index, option in enumerate(_stage_options(stage, shardable, costs))
        ]
    ends = []
    for path in paths:
        after = _reshard_between(path.sharded, path.sharded if end == ANY else end, costs, widths[-1])
        ends.append((path._replace(cost=path.cost + after.cost).key(), ChainPlan(path.stages, after, ranks)))
    return min(ends, key=lambda found: found[0])[1]


class _StageOption(NamedTuple):
    """One way of running a stage."""

    sharded: str | None
    served: Served
    cost: Cost


class _Path(NamedTuple):
    """Stages that are planned already."""

    stages: tuple[PlannedStage, ...]
    choices: tuple[int, ...]  # the number of each stage's option, for ties
    sharded: str | None
    cost: Cost

    def key(self) -> tuple[int, int, int, tuple[int, ...]]:
        return self.cost.forward + self.cost.backward, self.cost.collectives, self.cost.copies, self.choices

    def extend(self, stage: StageNeeds, option: _StageOption, index: int, costs: Costs, width: int) -> _Path:
        before = _reshard_between(self.sharded, option.sharded, costs, width)
        planned = PlannedStage(stage.name, before, *option)
        return _Path((*self.stages, planned), (*self.choices, index), option.sharded, self.cost + before.cost + option.cost)


def _stage_options(stage: StageNeeds, shardable: Sequence[str], costs: Costs) -> list[_StageOption]:
    """All ways of running ``stage``, in the order of preference between equals."""
    options = []
    for dim in shardable:
        if dim not in stage.mixes or costs.ranks == 1:
            options.append(_StageOption(dim, "plain", costs.stage_copies(stage, dim)))
        elif stage.attention is not None:
            attention = stage.attention
            options.append(_StageOption(dim, "ulysses", costs.ulysses(dim, attention) + costs.stage_copies(stage, None)))
            if attention.ring and attention.groups == attention.heads and costs.sizes[dim] % costs.ranks == 0:
                options.append(_StageOption(dim, "ring", costs.ring(dim, attention) + costs.stage_copies(stage, dim)))
    if stage.may_run_whole:
        options.append(_StageOption(None, "plain", costs.stage_copies(stage, None)))
    if not options:
        others = [dim for dim in costs.sizes if dim not in stage.mixes]
        more = f"make {' or '.join(others)} shardable, " if others else ""
        raise UsageError(
            f"stage {stage.name!r} mixes {', '.join(stage.mixes)}, so none of the shardable dims ({', '.join(shardable)}) can "
            f"stay sharded while it runs: {more}describe its attention, which Ulysses can then serve, or set may_run_whole"
        )
    return options


def _reshard_between(source: str | None, target: str | None, costs: Costs, width: int) -> Reshard:
    cost = costs.reshard(source, target, width)
    if source == target:
        return Reshard("keep", source, target, cost)
    return Reshard("split" if source is None else "gather" if target is None else "switch", source, target, cost)


def _check_chain(
    stages: Sequence[StageNeeds],
    sizes: Mapping[str, int],
    ranks: int,
    shardable: Sequence[str],
    start: str | None,
    end: str | None,
) -> None:
    """Refuse arguments of `cheapest_plan` that do not fit each other."""
    if not stages:
        raise UsageError("stages is empty; a plan needs at least one stage")
    if ranks < 1:
        raise UsageError(f"ranks={ranks} must be at least 1")
    if ANY in sizes:
        raise UsageError(f"a dim named {ANY!r} cannot be told from the end {ANY!r}; rename it")
    for dim, size in sizes.items():
        if size < 1:
            raise UsageError(f"size {size} of dim {dim!r} must be at least 1")
    named: list[tuple[str, str | None]] = [("start", start), ("end", None if end == ANY else end)]
    named += [("shardable", dim) for dim in shardable]
    named += [(f"stage {stage.name!r}", dim) for stage in stages for dim in stage.mixes]
    for where, name in named:
        if name is not None and name not in sizes:
            raise UsageError(
                f"{where} names the dim {name!r}; the dims are {', '.join(sizes)} (channels, mixed by all, are not named)"
            )
    if not shardable or len(set(shardable)) < len(shardable):
        raise UsageError(f"shardable={tuple(shardable)} must name at least one dim, and each once")


def _bytes_at_boundaries(bytes_per_position: int | Sequence[int], stages: int) -> list[int]:
    """``bytes_per_position`` before each of so many stages and after the last."""
    boundaries = stages + 1
    widths = [bytes_per_position] * boundaries if isinstance(bytes_per_position, int) else list(bytes_per_position)
    if len(widths) != boundaries or min(widths) < 1:
        raise UsageError(
            f"bytes_per_position={bytes_per_position} must be at least 1, and one number or {boundaries}: before each of the "
            f"{stages} stages and after the last"
        )
    return widths


def _row(name: str, reshard: Reshard, served: str, cost: Cost) -> tuple[str, ...]:
    source, target = reshard.source or "whole", reshard.target or "whole"
    before = "keep" if reshard.primitive == "keep" else f"{reshard.primitive} {source} -> {target}"
    return name, before, target, served, *_figures(cost)


def _figures(cost: Cost) -> tuple[str, str, str]:
    return f"{cost.forward:,}", f"{cost.backward:,}", str(cost.copies)

"""What a schedule takes, from the seconds of its parts: operations on queues that run in order. Pure Python, no ranks.

A step is what the host issues: to compute a part of a stage, to begin the switch of a chunk, or to end it. `steps_of` lists
those of a forward pass as `Region.run` issues them; backward is their mirror, for autograd runs later-created nodes first. An
operation is a step's work on one queue: compute, a copy that packs, the wire, a copy that unpacks. Each waits for the one
before it on its queue, and for those on others that it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Literal, NamedTuple

from megatron_dsp.layout import Layout
from megatron_dsp.reshard.stages.schedule import SHARDED, Schedule, chunk_sizes


class StageSeconds(NamedTuple):
    """A stage, and what it takes on a whole shard, in seconds.

    ``enter`` and ``leave`` are its ends, ``body`` is what lies between; of a stage without ends, all of it. ``backward`` is
    that of all three, what is computed again included.
    """

    sharded: str
    body: float
    backward: float
    enter: float = 0.0
    leave: float = 0.0
    has_ends: bool = False
    recomputes: bool = False

    @property
    def forward(self) -> float:
        """All of it."""
        return self.enter + self.body + self.leave


class SwitchSeconds(NamedTuple):
    """What a switch of a whole shard takes: ``latency``, and on each queue what shrinks with a chunk."""

    pack: float
    latency: float
    wire: float
    unpack: float


class Queues(NamedTuple):
    """On which queues chunks are packed and unpacked."""

    pack: str
    unpack: str


ON_CPU = Queues("compute", "compute")
ON_CUDA = Queues("pack", "unpack")

Kind = Literal["enter", "body", "leave", "recompute", "begin", "end"]


class Step(NamedTuple):
    """What the host issues, for the stage of this number, or for the switch that leads to it. ``share``: of a whole shard."""

    what: Kind
    stage: int
    chunk: int = 0
    share: float = 1.0


class QueuedOperation(NamedTuple):
    """A step's work on one queue; ``after`` are the operations, by their number, that it waits for beside its queue's."""

    queue: str
    step: Step
    seconds: float
    after: tuple[int, ...] = ()


def steps_of(schedule: Schedule, stages: Sequence[StageSeconds], layout: Layout, ranks: int) -> tuple[list[Step], list[Step]]:
    """The steps of a pass, forward and backward, in the order in which the host issues them."""

    def shares(dim: str | None) -> list[float]:
        if dim is None:
            return [1.0]
        size = layout.size(dim) // (ranks if any(stage.sharded == dim for stage in stages) else 1)
        return [chunk / size for chunk in chunk_sizes(size, schedule.chunks[dim], schedule.shrink)]

    blocks = _whole_stages(schedule, stages, shares) if schedule.cut == "stages" else _ends(schedule, stages, shares)
    forward = [step for block in blocks for step in block]
    backward: list[Step] = []
    computed_again: set[int] = set()
    for block in reversed(blocks):
        # `_Departure.backward` waits for the chunks of a whole tensor in their order, all else is the mirror.
        for step in block if block[0].what == "begin" else reversed(block):
            stage = step.stage
            if step.what == "begin":
                backward.append(step._replace(what="end"))
            elif step.what == "end":
                backward.append(step._replace(what="begin"))
            else:
                # Ends are within the checkpoint, which computes all of the stage as soon as any of it is needed.
                if _runs_whole(schedule) and stages[stage].recomputes and stage not in computed_again:
                    computed_again.add(stage)
                    backward.append(Step("recompute", stage))
                backward.append(step)
    return forward, backward


Shares = Callable[[str | None], list[float]]


def _whole_stages(schedule: Schedule, stages: Sequence[StageSeconds], shares: Shares) -> list[list[Step]]:
    """As `Region._run_in_chunks`, and, where nothing is cut, as `Region.run`."""
    runs = [[number for number, _ in same] for _, same in groupby(enumerate(stages), lambda stage: stage[1].sharded)]
    cuts = [schedule.cut_dim(stages[run[0]].sharded) for run in runs]
    blocks: list[list[Step]] = []
    legs: list[Step] = []  # that lead to this run
    for index, run in enumerate(runs):
        arrives_in_chunks = cuts[index] is not None and schedule.along != SHARDED
        if legs and not arrives_in_chunks:
            blocks.append(_on(legs, "end"))
        departs = index + 1 < len(runs)
        if departs:
            following = runs[index + 1][0]
            driving = cuts[index] or (cuts[index + 1] if schedule.along != SHARDED else None)
            ways = [Step("begin", following, chunk, share) for chunk, share in enumerate(shares(driving))]
        for chunk, share in enumerate(shares(cuts[index])):
            if legs and arrives_in_chunks:
                blocks.append(_on([legs[chunk]], "end"))
            blocks += [_parts(stages, number, chunk, share) for number in run]
            if departs:
                blocks.append([ways[chunk]] if cuts[index] else ways)
        legs = ways if departs else []
    return blocks


def _ends(schedule: Schedule, stages: Sequence[StageSeconds], shares: Shares) -> list[list[Step]]:
    """As `Region._run_with_ends`."""
    chunks = list(enumerate(shares(schedule.along)))
    blocks: list[list[Step]] = []
    for number, stage in enumerate(stages):
        arrives = number > 0 and stages[number - 1].sharded != stage.sharded
        departs = number + 1 < len(stages) and stages[number + 1].sharded != stage.sharded
        enters = arrives and schedule.cut == "ends"
        for chunk, share in chunks if arrives else []:
            blocks.append([Step("end", number, chunk, share)])
            if enters and stage.has_ends:
                blocks.append([Step("enter", number, chunk, share)])
        if stage.has_ends and not enters:
            blocks.append([Step("enter", number)])
        blocks.append([Step("body", number)])
        for chunk, share in chunks if departs else [(0, 1.0)]:
            if stage.has_ends:
                blocks.append([Step("leave", number, chunk, share)])
            if departs:
                blocks.append([Step("begin", number + 1, chunk, share)])
    return blocks


def _parts(stages: Sequence[StageSeconds], number: int, chunk: int, share: float) -> list[Step]:
    parts: tuple[Kind, ...] = ("enter", "body", "leave") if stages[number].has_ends else ("body",)
    return [Step(part, number, chunk, share) for part in parts]


def _on(legs: Sequence[Step], what: Kind) -> list[Step]:
    return [leg._replace(what=what) for leg in legs]


def operations_of(
    schedule: Schedule, stages: Sequence[StageSeconds], switch: SwitchSeconds, layout: Layout, ranks: int, queues: Queues
) -> tuple[list[QueuedOperation], list[QueuedOperation]]:
    """The operations of a pass, forward and backward, in the order in which they are issued; each numbered from 0 on.

    ``queues`` are those of chunks. Whole switches pack and unpack in order with compute.
    """
    forward, backward = steps_of(schedule, stages, layout, ranks)
    queues = ON_CPU if schedule.plain else queues
    return (
        _operations(forward, lambda step: _forward_seconds(stages[step.stage], step), switch, queues),
        _operations(backward, lambda step: _backward_seconds(stages[step.stage], step, _runs_whole(schedule)), switch, queues),
    )


def _operations(
    steps: Iterable[Step], seconds: Callable[[Step], float], switch: SwitchSeconds, queues: Queues
) -> list[QueuedOperation]:
    operations: list[QueuedOperation] = []
    computed: tuple[int, ...] = ()  # the last operation of compute, and what compute waits for since then
    under_way: dict[tuple[int, int], int] = {}  # of each chunk, its operation on the wire

    def issue(queue: str, step: Step, seconds: float, after: tuple[int, ...]) -> int:
        nonlocal computed
        operations.append(QueuedOperation(queue, step, seconds, after))
        number = len(operations) - 1
        if queue == "compute":
            computed = (number,)
        return number

    for step in steps:
        chunk = step.stage, step.chunk
        if step.what == "begin":
            packed = issue(queues.pack, step, switch.pack * step.share, computed)
            under_way[chunk] = issue("wire", step, switch.latency + switch.wire * step.share, (packed,))
        elif step.what == "end":
            unpacked = issue(queues.unpack, step, switch.unpack * step.share, (under_way.pop(chunk),))
            computed = tuple({*computed, unpacked})
        else:
            issue("compute", step, seconds(step), computed)
    return operations


def _forward_seconds(stage: StageSeconds, step: Step) -> float:
    return getattr(stage, step.what) * step.share


def _runs_whole(schedule: Schedule) -> bool:
    """Whether each stage is called once, its ends aside."""
    return schedule.plain or schedule.cut != "stages"


def _backward_seconds(stage: StageSeconds, step: Step, runs_whole: bool) -> float:
    if step.what == "recompute":
        return stage.forward
    again = stage.forward if runs_whole and stage.recomputes else 0.0
    part = _forward_seconds(stage, step)
    return max(0.0, stage.backward - again) * part / stage.forward if part else 0.0


def play(operations: Sequence[QueuedOperation]) -> list[float]:
    """When each operation is done, in seconds after the first one may start."""
    done: list[float] = []
    free: dict[str, float] = {}
    for operation in operations:
        start = max([free.get(operation.queue, 0.0), *(done[number] for number in operation.after)])
        done.append(start + operation.seconds)
        free[operation.queue] = done[-1]
    return done


def find_exposed(operations: Sequence[QueuedOperation]) -> float:
    """How much longer the operations take than computing alone does."""
    computing = sum(operation.seconds for operation in operations if operation.step.what not in ("begin", "end"))
    return max(play(operations), default=0.0) - computing

"""The schedule that measured fastest: ``"overlap": {"chunks": "auto"}``."""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dsp.layout import Layout
from megatron_dsp.reshard.stages.link import Link, measure_link, slowest
from megatron_dsp.reshard.stages.moment import Moment, on_gradient
from megatron_dsp.reshard.stages.overlap import schedule_of
from megatron_dsp.reshard.stages.schedule import SHARDED, Schedule, What
from megatron_dsp.reshard.stages.stage import Stage
from megatron_dsp.reshard.stages.stage_clock import StageClock
from megatron_dsp.reshard.stages.timeline import ON_CPU, ON_CUDA, StageSeconds, find_exposed, operations_of

_PLAIN = Schedule()
_IN_LOCKSTEP = Schedule(
    reason="ranks of other sequence groups may call modules together with these, as under ZeRO 3 and FSDP2, and then none may "
    "call them more often than the others; docs/overlap.md says how to measure all the same"
)
_IN_FLIGHT = (
    "regions are recomputed while others are under way, which a trial would give other chunks; fix the chunks to overlap"
)


@dataclass
class _Trial:
    """What is known of one shape: the candidates with the seconds of their passes, until one is decided for.

    ``passes`` have begun with these candidates, ``under_way`` may be recomputed yet, ``current`` is the schedule of the last.
    """

    candidates: list[Schedule] = field(default_factory=lambda: [_PLAIN])
    seconds: list[list[tuple[Moment, Moment]]] = field(default_factory=lambda: [[]])
    clock: StageClock = field(default_factory=StageClock)
    passes: int = 0
    under_way: int = 0
    current: Schedule = _PLAIN
    decision: Schedule | None = None

    def decide(self, schedule: Schedule, reason: str) -> None:
        """Keep ``schedule`` from now on, and let go of what was timed."""
        self.decision = replace(schedule, reason=reason)
        self.begin([])

    def recompute(self) -> Schedule:
        """The schedule of a pass that is recomputed in backward: that of its forward."""
        if self.under_way > 1:
            self.decide(_PLAIN, _IN_FLIGHT)
        self.under_way = max(0, self.under_way - 1)
        return self.current

    def begin(self, candidates: list[Schedule]) -> None:
        """Let these take turns from now on."""
        self.candidates, self.seconds, self.passes = candidates, [[] for _ in candidates], 0
        self.clock = StageClock()


class MeasuredOverlap:
    """Finds for each shape the schedule whose passes are fastest, whole stages among them.

    The first passes of a shape run whole stages, whose parts are timed. From these times, and the link's latency and
    bandwidth, a timeline tells what each schedule would expose. The few that promise most take turns with whole stages, pass by
    pass, and the fastest is kept where it wins by ``LEAST_GAIN`` or more. A pass is timed from the region's beginning to the
    end of its backward. Nothing is timed while a CUDA graph is captured: such a pass runs by what was decided, else whole.

    Attributes:
        lockstep: whether ranks that are in none of the groups of ``agree`` may call modules together with these, as under
            ZeRO 3 and FSDP2, which gather a module's weights at each call. Stages then stay whole: chunks would change how
            often a module is called, and ranks that may see shapes in orders of their own have no step at which to agree on it.
    """

    LEAST_GAIN = 0.03
    _WARM_UP = 2  # passes of a shape that are not timed
    _ROUNDS = 5  # timed passes of each candidate
    _MOST = 3  # candidates beside whole stages

    def __init__(self, agree: Sequence[dist.ProcessGroup], *, lockstep: bool = False):
        """``agree`` are the groups of ranks that make the same passes in the same order, and so must cut alike.

        They are axes of a grid, as a mesh's "sequence" and "tensor". Ranks of other sequence groups decide on their own.
        """
        self._agree = agree
        self.lockstep = lockstep
        self._trials: dict[Hashable, _Trial] = {}
        self._link: Link | None = None
        self._clock: StageClock | None = None  # of the pass that begins now

    @property
    def decisions(self) -> list[str]:
        """What was decided and why, in the order of shapes."""
        return [str(trial.decision) for trial in self._trials.values() if trial.decision is not None]

    def choose(
        self, layout: Layout, group: dist.ProcessGroup, sharded: Sequence[str], x: Tensor, independent: str | None, ends: bool
    ) -> Schedule:
        """The schedule of this pass. Collective over the groups of ``agree`` when a decision is due.

        Whether one is due depends on the number of passes of this shape alone.
        """
        self._clock = None
        if self.lockstep:
            self._trials.setdefault(None, _Trial(decision=_IN_LOCKSTEP))
            return _IN_LOCKSTEP
        trial = self._trials.setdefault((layout.dims, layout.sizes, *sharded, independent, ends, x.dtype, x.device), _Trial())
        if trial.decision is not None:
            return trial.decision
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return _PLAIN
        if torch._C._current_graph_task_id() != -1:
            return trial.recompute()
        if not (torch.is_grad_enabled() and x.requires_grad):
            return _PLAIN
        if trial.passes >= self._WARM_UP + self._ROUNDS * len(trial.candidates):
            self._proceed(trial, layout, group, sharded, x, independent, ends)
        return trial.decision or self._take_turn(trial, x)

    def watch(self, stages: Sequence[Stage]) -> Sequence[Stage]:
        """The stages of the pass that `choose` was asked for last, timed where that is wanted."""
        clock, self._clock = self._clock, None
        return stages if clock is None else clock.watch(stages)

    def _take_turn(self, trial: _Trial, x: Tensor) -> Schedule:
        turn = 0 if trial.passes < self._WARM_UP else (trial.passes - self._WARM_UP) % len(trial.candidates)
        if trial.passes >= self._WARM_UP:
            device, seconds, begun = x.device, trial.seconds[turn], Moment(x.device)
            on_gradient(x, lambda: seconds.append((begun, Moment(device))))
            if len(trial.candidates) == 1:
                self._clock = trial.clock
        trial.passes += 1
        trial.under_way += 1
        trial.current = trial.candidates[turn]
        return trial.current

    def _proceed(
        self,
        trial: _Trial,
        layout: Layout,
        group: dist.ProcessGroup,
        sharded: Sequence[str],
        x: Tensor,
        independent: str | None,
        ends: bool,
    ) -> None:
        """Find candidates, or decide."""
        medians = [statistics.median([end.since(begin) for begin, end in seconds] or [0.0]) for seconds in trial.seconds]
        missing = self._ROUNDS * len(trial.candidates) - sum(len(seconds) for seconds in trial.seconds)
        unfinished, *medians = slowest([missing, *medians], self._agree, x.device)
        if unfinished:
            # Given up by an error, or still under way, and a recomputation is to find the candidates that its pass found.
            trial.begin(trial.candidates)
        elif len(trial.candidates) > 1:
            fastest = min(range(len(medians)), key=medians.__getitem__)
            if medians[fastest] > (1 - self.LEAST_GAIN) * medians[0]:
                fastest = 0
            measured = ", ".join(f"{s} {m * 1000:.1f} ms" for s, m in zip(trial.candidates, medians, strict=True))
            trial.decide(trial.candidates[fastest], f"measured passes of {measured}")
        else:
            if self._link is None:
                self._link = measure_link(group, x.device, agree=self._agree)
            possible = _possible(layout, sharded, group.size(), independent, ends)
            stages = trial.clock.read(self._agree, x.device) or _equal_stages(sharded, medians[0])
            likely, reason = self._find_likely(possible, stages, self._link, layout, group.size(), x, medians[0])
            if likely:
                trial.begin([_PLAIN, *likely])
            else:
                trial.decide(_PLAIN, reason)

    def _find_likely(
        self,
        possible: Sequence[Schedule],
        stages: Sequence[StageSeconds],
        link: Link,
        layout: Layout,
        ranks: int,
        x: Tensor,
        plain: float,
    ) -> tuple[list[Schedule], str]:
        """The schedules that promise most, if they promise anything; and what switches are of a pass of ``plain`` seconds."""
        shard = math.prod(layout.sizes) * x.element_size() // ranks  # not x's, which differs between ranks
        switch = link.seconds(shard * (ranks - 1) // ranks)
        queues = ON_CUDA if x.is_cuda else ON_CPU

        def exposed(schedule: Schedule) -> float:
            return sum(map(find_exposed, operations_of(schedule, stages, switch, layout, ranks, queues)))

        whole = exposed(_PLAIN)
        gains = [(whole - exposed(schedule), schedule) for schedule in possible]
        likely = sorted((found for found in gains if found[0] > self.LEAST_GAIN * plain), key=lambda found: -found[0])
        share = f"switches are about {whole / plain:.0%} of a pass of {plain * 1000:.1f} ms; {link}"
        return [schedule for _, schedule in likely[: self._MOST]], share


def _equal_stages(sharded: Sequence[str], plain: float) -> list[StageSeconds]:
    """Stages that were not timed, as modules of a parallelized model: each has the same share of a pass of ``plain`` seconds.

    A third of it is forward. Switches are counted in, so what is found hidden is the most that can be.
    """
    share = plain / len(sharded)
    return [StageSeconds(dim, body=share / 3, backward=2 * share / 3) for dim in sharded]


def _possible(layout: Layout, sharded: Sequence[str], ranks: int, independent: str | None, ends: bool) -> list[Schedule]:
    """The few different schedules that are worth a prediction. What chunks cost in compute is not predicted: so few of them."""
    dims = list(dict.fromkeys(sharded))
    wanted: list[tuple[What, str, int, float]] = []
    if independent:
        wanted += [("stages", independent, chunks, 1.0) for chunks in (2, 4, 8)]
    if ends:
        along = max(dims, key=layout.size)
        wanted += [("ends", along, 2, 1.0), ("ends", along, 4, 1.0), ("leave", along, 2, 0.5), ("leave", along, 3, 0.5)]
    else:
        wanted += [("stages", SHARDED, chunks, 0.5) for chunks in (2, 4)]
        wanted += [("stages", dim, chunks, 1.0) for dim in dims for chunks in (2, 4)]
    found: list[Schedule] = []
    for cut, along, chunks, shrink in wanted:
        schedule = schedule_of(layout, sharded, ranks, along, independent, chunks, shrink, cut)
        if not schedule.plain and schedule not in found:
            found.append(schedule)
    return found

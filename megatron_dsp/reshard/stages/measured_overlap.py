"""The schedule that measured fastest: ``"overlap": {"chunks": "auto"}``."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dsp.layout import Layout
from megatron_dsp.reshard.stages.link import Link, measure_link
from megatron_dsp.reshard.stages.overlap import schedule_of
from megatron_dsp.reshard.stages.schedule import SHARDED, Schedule, chunk_sizes

_PLAIN = Schedule()


@dataclass
class _Trial:
    """What is known of one shape: the candidates with the seconds of their passes, until one is decided for."""

    candidates: list[Schedule] = field(default_factory=lambda: [_PLAIN])
    seconds: list[list[Callable[[], float]]] = field(default_factory=lambda: [[]])
    passes: int = 0
    current: Schedule = _PLAIN
    decision: Schedule | None = None


class MeasuredOverlap:
    """Finds for each shape the schedule whose passes are fastest, whole stages among them.

    The first passes of a shape run whole stages. From their time and the link's latency and bandwidth follow the few schedules
    that promise most; these take turns with whole stages, pass by pass, and the fastest is kept where it wins by
    ``LEAST_GAIN`` or more. A pass is timed from the region's beginning to the end of its backward.

    ``agree`` is the group of all ranks that must cut alike: those that issue collectives together inside stages, or call
    modules together, as ZeRO 3 does. Whole regions that are recomputed in backward while other passes are under way (a
    pipeline's) want a fixed schedule.
    """

    LEAST_GAIN = 0.03
    _WARM_UP = 2  # passes of a shape that are not timed
    _ROUNDS = 5  # timed passes of each candidate

    def __init__(self, agree: dist.ProcessGroup):
        self._agree = agree
        self._trials: dict[Hashable, _Trial] = {}
        self._link: Link | None = None

    @property
    def decisions(self) -> list[str]:
        """What was decided and why, in the order of shapes."""
        return [str(trial.decision) for trial in self._trials.values() if trial.decision is not None]

    def choose(
        self, layout: Layout, group: dist.ProcessGroup, sharded: Sequence[str], x: Tensor, independent: str | None, ends: bool
    ) -> Schedule:
        """The schedule of this pass. Collective over ``agree`` when a decision is due."""
        trial = self._trials.setdefault((layout.dims, layout.sizes, tuple(sharded), x.dtype, x.device), _Trial())
        if trial.decision is None and torch._C._current_graph_task_id() != -1:
            return trial.current  # recomputed in backward, as it was in forward
        if trial.decision is None and not (torch.is_grad_enabled() and x.requires_grad):
            return _PLAIN
        if trial.decision is None:
            self._proceed(trial, layout, group, sharded, x, independent)
        if trial.decision is not None:
            return trial.decision
        turn = 0 if trial.passes < self._WARM_UP else (trial.passes - self._WARM_UP) % len(trial.candidates)
        trial.passes += 1
        trial.current = trial.candidates[turn]
        if trial.passes > self._WARM_UP:
            _time(x, trial.seconds[turn])
        return trial.current

    def _proceed(
        self,
        trial: _Trial,
        layout: Layout,
        group: dist.ProcessGroup,
        sharded: Sequence[str],
        x: Tensor,
        independent: str | None,
    ) -> None:
        """Find candidates, or decide, where enough passes were made for it: their number is the same on all ranks."""
        if trial.passes < self._WARM_UP + self._ROUNDS * len(trial.candidates):
            return
        medians = [statistics.median([tell() for tell in of_passes] or [0.0]) for of_passes in trial.seconds]
        seconds = torch.tensor(medians, dtype=torch.float64)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX, group=self._agree)
        medians = seconds.tolist()
        if len(trial.candidates) > 1:
            fastest = min(range(len(medians)), key=medians.__getitem__)
            if medians[fastest] > (1 - self.LEAST_GAIN) * medians[0]:
                fastest = 0
            measured = ", ".join(f"{s} {m * 1000:.1f} ms" for s, m in zip(trial.candidates, medians, strict=True))
            trial.decision = replace(trial.candidates[fastest], reason=f"measured passes of {measured}")
            return
        likely, reason = self._candidates(layout, group, sharded, x, independent, medians[0])
        if likely:
            trial.candidates, trial.seconds, trial.passes = [_PLAIN, *likely], [[] for _ in range(1 + len(likely))], 0
        else:
            trial.decision = replace(_PLAIN, reason=reason)

    def _candidates(
        self,
        layout: Layout,
        group: dist.ProcessGroup,
        sharded: Sequence[str],
        x: Tensor,
        independent: str | None,
        plain: float,
    ) -> tuple[list[Schedule], str]:
        """The schedules that promise most, if they promise anything; else why they don't."""
        if self._link is None:
            self._link = measure_link(group, x.device, agree=self._agree)
        link, ranks = self._link, group.size()
        shard = math.prod(layout.sizes) * x.element_size() // ranks  # not x's, which differs between ranks
        switch = link.seconds(shard * (ranks - 1) // ranks)
        switches = sum(now != then for now, then in itertools.pairwise(sharded))
        share = f"switches are about {2 * switches * switch / plain:.0%} of a pass of {plain * 1000:.1f} ms; {link}"
        if link.beside < 0.5 or plain == 0:
            return [], share
        compute = max(plain - 2 * switches * switch, 0.0) / len(sharded)
        promising: dict[str, tuple[float, Schedule]] = {}
        for along in dict.fromkeys([SHARDED, *sharded, *([independent] if independent else [])]):
            for chunks in (2, 4, 8):
                for shrink in (1.0, 0.5):
                    schedule = schedule_of(layout, sharded, ranks, along, independent, chunks, shrink)
                    gain = 2 * switches * switch - _exposed(schedule, sharded, compute, switch - link.latency, link.latency)
                    if not schedule.plain and gain > max(self.LEAST_GAIN * plain, promising.get(along, (0.0,))[0]):
                        promising[along] = gain, schedule
        best = [schedule for _, schedule in sorted(promising.values(), key=lambda found: -found[0])[:2]]
        # What chunks cost in compute is not predicted: so half as many compete too.
        fewer = [
            replace(schedule, chunks={dim: max(1, count // 2) for dim, count in schedule.chunks.items()}) for schedule in best
        ]
        return [*best, *(schedule for schedule in fewer if not schedule.plain)], share


def _exposed(schedule: Schedule, sharded: Sequence[str], compute: float, transfer: float, latency: float) -> float:
    """Seconds of a pass, forward and backward, in which nothing is computed for a switch's sake.

    ``compute`` are the seconds of a stage, forward and backward; ``transfer`` and ``latency`` those of a switch.
    """
    boundaries = [(now, then) for now, then in itertools.pairwise(sharded) if now != then]
    if schedule.independent:
        # Both ends of each switch are hidden, but for the first and the last slice of all.
        slices = schedule.chunks[schedule.along]
        hidden = compute * len(sharded) * (slices - 1) / slices
        total = 2 * len(boundaries) * (transfer + slices * latency)
        return max(2 * (transfer / slices + latency), total - hidden)
    seconds = 0.0
    for now, then in boundaries:
        leaves, arrives = schedule.cut_dim(now), None if schedule.along == SHARDED else schedule.cut_dim(then)
        dim = leaves or arrives
        parts = chunk_sizes(1000, schedule.chunks[dim], schedule.shrink) if dim else [1000]
        if not leaves:
            parts.reverse()
        for part_of_pass in (1 / 3, 2 / 3):  # forward, and backward, which mirrors it
            computed = arrived = 0.0
            for part in parts:
                computed += part / 1000 * compute * part_of_pass
                arrived = max(arrived, computed) + latency + part / 1000 * transfer
            seconds += arrived - computed
    return seconds


def _time(x: Tensor, seconds: list[Callable[[], float]]) -> None:
    """Add to ``seconds`` what tells the time until the gradient of ``x`` is there; it waits for nothing before it is asked."""
    if x.is_cuda:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(torch.cuda.current_stream(x.device))

        def elapsed() -> float:
            stop.synchronize()
            return start.elapsed_time(stop) / 1000

        def note(gradient: Tensor) -> None:
            hook.remove()  # x may enter more passes
            stop.record(torch.cuda.current_stream(x.device))
            seconds.append(elapsed)
    else:
        begun = time.perf_counter()

        def note(gradient: Tensor) -> None:
            hook.remove()
            passed = time.perf_counter() - begun
            seconds.append(lambda: passed)

    hook = x.register_hook(note)

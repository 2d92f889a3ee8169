"""What the parts of stages take, measured in passes that run whole."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dsp.reshard.stages.ends import Activation, Ends
from megatron_dsp.reshard.stages.link import slowest
from megatron_dsp.reshard.stages.moment import Moment, on_gradient
from megatron_dsp.reshard.stages.stage import Stage
from megatron_dsp.reshard.stages.timeline import StageSeconds

_PARTS = "enter", "body", "leave", "backward"  # fields of `StageSeconds`


class StageClock:
    """Times the stages of a region, pass by pass; all of them have the same stages."""

    def __init__(self) -> None:
        self._passes: list[list[_TimedStage]] = []

    def watch(self, stages: Sequence[Stage]) -> list[Stage]:
        """``stages`` for one more pass, which is timed, forward and backward."""
        timed = [_TimedStage(stage) for stage in stages]
        self._passes.append(timed)
        return [stage._replace(compute=timing.compute) for stage, timing in zip(stages, timed, strict=True)]

    def read(self, groups: Sequence[dist.ProcessGroup], device: torch.device) -> list[StageSeconds]:
        """The medians over all passes so far, of the slowest rank of ``groups``.

        Collective over ``groups``, as `slowest`. Waits until the device is through with the passes.
        """
        medians = [_median([timing.seconds() for timing in of_stage]) for of_stage in zip(*self._passes, strict=True)]
        most = iter(slowest([getattr(stage, part) for stage in medians for part in _PARTS], groups, device))
        return [_with_parts(stage, most) for stage in medians]


class _TimedStage:
    """A stage in one pass."""

    def __init__(self, stage: Stage):
        self._stage = stage
        self._moments: dict[str, Moment] = {}

    def compute(self, x: Tensor, *ends: Ends) -> Activation:
        """What the stage computes."""
        self._note("begin", x.device)
        y = self._stage.compute(x, *(_TimedEnds(of_stage, partial(self._note, device=x.device)) for of_stage in ends))
        self._note("end", x.device)
        if y.requires_grad and x.requires_grad:
            on_gradient(y, partial(self._note, "begin backward", x.device))
            on_gradient(x, partial(self._note, "end backward", x.device))
        return y

    def _note(self, point: str, device: torch.device) -> None:
        self._moments[point] = Moment(device)

    def seconds(self) -> StageSeconds:
        """What was measured; 0 for what has not been computed."""
        forward, backward, enter, leave = (self._part(part) for part in ("", "backward", "enter", "leave"))
        body = max(0.0, forward - enter - leave)
        stage = self._stage
        return StageSeconds(stage.sharded, body, backward, enter, leave, stage.has_ends, stage.recomputes)

    def _part(self, part: str) -> float:
        begin, end = (self._moments.get(f"{point} {part}".rstrip()) for point in ("begin", "end"))
        return end.since(begin) if begin and end else 0.0


class _TimedEnds:
    """Ends that note when they begin and end."""

    def __init__(self, ends: Ends, note: Callable[[str], None]):
        self._ends, self._note = ends, note

    def enter(self, run: Callable[[Tensor], tuple[Tensor, ...]], x: Activation) -> tuple[Tensor, ...]:
        return self._timed("enter", self._ends.enter, run, x)

    def leave(self, run: Callable[..., Tensor], *xs: Tensor) -> Activation:
        return self._timed("leave", self._ends.leave, run, *xs)

    def local(self, side: Tensor, *, dim: int, name: str) -> Tensor:
        return self._ends.local(side, dim=dim, name=name)

    def _timed(self, part: str, call: Callable[..., Any], *arguments: Any) -> Any:
        if torch._C._current_graph_task_id() != -1:  # computed again in backward
            return call(*arguments)
        self._note(f"begin {part}")
        result = call(*arguments)
        self._note(f"end {part}")
        return result


def _median(passes: Sequence[StageSeconds]) -> StageSeconds:
    return _with_parts(passes[0], (statistics.median(getattr(seconds, part) for seconds in passes) for part in _PARTS))


def _with_parts(stage: StageSeconds, seconds: Iterator[float]) -> StageSeconds:
    """The same stage with the next of ``seconds`` for each of its parts."""
    parts: dict[str, Any] = {part: next(seconds) for part in _PARTS}
    return stage._replace(**parts)

"""Where the time of one training step goes: stages forward and backward, switches, data, optimizer.

The step runs under torch's profiler. Its forward stages, its switches and the rest are ranges with names (`profile_range`).
What backward does has none: but autograd numbers the nodes that a thread makes, the profiler notes the number at which each
operator found the count, and backward's events bear the numbers of their nodes. So a node belongs to the stage that made it.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity

from megatron_dsp.reshard.labels import ProfileRange, find_range

_BACKWARD = "autograd::engine::evaluate_function: "


class StageTimers:
    """Times the step between its making and `read`."""

    def __init__(self, device: torch.device):
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._on_device = device.type == "cuda"
        self._profiler = torch.profiler.profile(activities=activities)
        self._profiler.start()
        self._start = time.perf_counter()

    def read(self) -> dict[str, tuple[float, float]]:
        """The least and the most seconds of any rank that has it, of each thing; collective over all ranks.

        Keys: "step"; "forward KIND" and "backward KIND" for stages, with what they communicate inside; "switch KIND" and
        "switch adjoint KIND", or "begin ..." and "wait for ..." of those that travel beside compute; "data"; "optimizer step".
        A kind is the name of a stage without its number. On CUDA the times are those of the kernels that were
        started there.
        """
        step = time.perf_counter() - self._start
        self._profiler.stop()
        own = {"step": step, **seconds_by_kind(self._profiler.events() or (), self._on_device)}
        of_ranks: list[dict[str, float]] = [{}] * dist.get_world_size()
        dist.all_gather_object(of_ranks, own)
        names = dict.fromkeys(name for times in of_ranks for name in times)
        found = {name: [times[name] for times in of_ranks if name in times] for name in names}
        return {name: (min(times), max(times)) for name, times in found.items()}


def seconds_by_kind(events: Iterable[FunctionEvent], on_device: bool) -> dict[str, float]:
    """The seconds in a profile of one step, in the order in which things first come; keys as of `StageTimers.read`."""
    events = sorted(
        (event for event in events if event.device_type == DeviceType.CPU), key=lambda event: event.time_range.start
    )
    ranges = {id(event): find_range(event.name) for event in events if event.is_user_annotation}
    stages = [event for event in events if (shown := ranges.get(id(event))) is not None and shown.what == "stage"]
    nodes = _stages_of_nodes(events, stages)
    seconds: dict[str, float] = defaultdict(float)
    for event in events:
        name = None
        if event.name.startswith(_BACKWARD):
            stage = nodes.get((event.fwd_thread or 0, event.sequence_nr))
            if stage is not None:
                name = _name("backward", ranges[id(stage)])
        elif (shown := ranges.get(id(event))) is not None:
            name = _name("forward" if shown.what == "stage" else shown.what, shown)
        if name is not None:
            seconds[name] += (event.device_time_total if on_device else event.time_range.elapsed_us()) / 1e6
    return dict(seconds)


def _stages_of_nodes(
    events: Sequence[FunctionEvent], stages: Sequence[FunctionEvent]
) -> dict[tuple[int, int], FunctionEvent | None]:
    """The stage in which each node of the graph was made, by the thread that made it and its number there."""
    starts = [stage.time_range.start for stage in stages]
    made: dict[tuple[int, int], FunctionEvent | None] = {}
    for event in events:
        if event.sequence_nr < 0 or event.fwd_thread:
            continue
        index = bisect_right(starts, event.time_range.start) - 1
        stage = stages[index] if index >= 0 and event.time_range.start < stages[index].time_range.end else None
        # An operator that makes no node sees the number of the next one: so the last that saw it made it.
        made[event.thread, event.sequence_nr] = stage
    return made


def _name(what: str, shown: ProfileRange | None) -> str:
    """What is shown of a range: all of its kind of stage together."""
    return what if shown is None or not shown.stage.kind else f"{what} {shown.stage.kind}"

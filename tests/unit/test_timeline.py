"""The timeline of a schedule: what follows from the seconds of its parts, by hand and by properties."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dsp.layout import Layout
from megatron_dsp.reshard.stages.overlap import schedule_of
from megatron_dsp.reshard.stages.schedule import SHARDED, Schedule
from megatron_dsp.reshard.stages.timeline import (
    ON_CPU,
    ON_CUDA,
    QueuedOperation,
    Queues,
    StageSeconds,
    SwitchSeconds,
    find_exposed,
    operations_of,
    play,
)

LAYOUT = Layout(("t", "b", "s", "c"), (16, 4, 16, 8), sharded="t")
ONE_STREAM = Queues("side", "side")
# Each kind of schedule: along, chunks, shrink, cut.
KINDS = [
    (SHARDED, 2, 0.5, "stages"),
    ("t", 4, 1.0, "stages"),
    ("b", 4, 1.0, "stages"),
    ("s", 3, 0.5, "leave"),
    ("s", 4, 1.0, "ends"),
    ("t", 2, 1.0, "ends"),
    ("b", 2, 1.0, "ends"),
]


def stages(*dims: str, enter: float = 2.0, body: float = 10.0, leave: float = 4.0) -> list[StageSeconds]:
    return [StageSeconds(dim, body, 2 * (enter + body + leave), enter, leave, has_ends=True) for dim in dims]


def schedule(along: str, chunks: int, shrink: float, cut: str, dims: str = "ts") -> Schedule:
    return schedule_of(LAYOUT, list(dims), 2, along, "b", chunks, shrink, cut)


def exposed(of: Schedule, switch: SwitchSeconds, queues: Queues = ON_CUDA, dims: str = "ts") -> tuple[float, float]:
    forward, backward = operations_of(of, stages(*dims), switch, LAYOUT, 2, queues)
    return find_exposed(forward), find_exposed(backward)


@pytest.mark.parametrize("queues", [ON_CPU, ON_CUDA])
def test_whole_switches_are_exposed(queues):
    assert exposed(Schedule(), SwitchSeconds(1.0, 0.5, 6.0, 2.0), queues, "tsts") == pytest.approx((3 * 9.5, 3 * 9.5))


def test_chunks_by_hand():
    wire = SwitchSeconds(0.0, 0.0, 6.0, 0.0)
    # The first half leaves after 2 of 4 s and arrives at 5, the second one at 8: the next stage starts 4 s late. In backward
    # both set out when the next stage's entrance is done: 3 s are waited for, the other 3 go beside the 4 of the first half.
    assert exposed(schedule("s", 2, 1.0, "leave"), wire) == pytest.approx((4.0, 3.0))
    # The first half enters for 1 s while the second one travels. In backward the first one's 3 s go beside 2 of the other's.
    assert exposed(schedule("s", 2, 1.0, "ends"), wire) == pytest.approx((3.0, 1.0))
    # Slices of the batch: the second half of 16 s hides the first one's way, and the first half of the next stage the second's.
    assert exposed(schedule("b", 2, 1.0, "stages"), wire) == pytest.approx((0.0, 0.0))
    # On the CPU copies are in order with compute, and so exposed whatever is cut.
    assert exposed(schedule("b", 2, 1.0, "stages"), SwitchSeconds(1.0, 0.0, 6.0, 2.0), ON_CPU) == pytest.approx((3.0, 3.0))


def test_what_is_recomputed_comes_before_any_of_a_stage_with_ends():
    again = [stage._replace(recomputes=True, backward=48.0) for stage in stages("t", "s")]
    _, backward = operations_of(schedule("s", 2, 1.0, "ends"), again, SwitchSeconds(0, 0, 6.0, 0), LAYOUT, 2, ON_CPU)
    computed = [(operation.step.what, operation.step.stage) for operation in backward if operation.queue == "compute"]
    assert [what for what, stage in computed if stage == 0][:3] == ["recompute", "leave", "leave"]
    assert sum(o.seconds for o in backward if o.step.what in ("recompute", "enter", "body", "leave")) == pytest.approx(96.0)


def late(operations: list[QueuedOperation]) -> list[QueuedOperation]:
    """Copies that start later than what they need allows, copies of the same kind before them aside."""
    done, before, found = play(operations), {"begin": 0.0, "end": 0.0}, []
    for operation, end in zip(operations, done, strict=True):
        what = operation.step.what
        if operation.queue in ("compute", "wire"):
            continue
        if end - operation.seconds > max([before[what], *(done[number] for number in operation.after)]) + 1e-9:
            found.append(operation)
        before[what] = end
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_no_copy_waits_for_what_it_does_not_need(kind):
    switch = SwitchSeconds(1.0, 0.1, 3.0, 1.0)
    for operations in operations_of(schedule(*kind), stages(*"tsts"), switch, LAYOUT, 2, ON_CUDA):
        assert not late(operations)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind[0] in ("b", "s") and kind[3] != "leave"])
def test_one_stream_for_both_copies_makes_them_wait_behind_unrelated_compute(kind):
    switch = SwitchSeconds(1.0, 0.1, 3.0, 1.0)
    pairs = [operations_of(schedule(*kind), stages(*"tsts"), switch, LAYOUT, 2, queues) for queues in (ONE_STREAM, ON_CUDA)]
    assert any(late(operations) for operations in pairs[0])
    one, two = (sum(find_exposed(operations) for operations in pair) for pair in pairs)
    assert one > two + 0.1


@given(
    st.sampled_from(KINDS),
    st.sampled_from(["ts", "tsts", "ttsst"]),
    st.tuples(*[st.floats(0, 5)] * 4),
    st.sampled_from([ON_CPU, ON_CUDA, ONE_STREAM]),
)
def test_exposure_is_between_none_and_all_of_it(kind, dims, seconds, queues):
    switch = SwitchSeconds(*seconds)
    forward, backward = exposed(schedule(*kind), switch, queues, dims)
    most = sum(now != then for now, then in itertools.pairwise(dims)) * (sum(seconds) + 7 * switch.latency)
    assert -1e-9 <= forward <= most + 1e-9
    assert -1e-9 <= backward <= most + 1e-9

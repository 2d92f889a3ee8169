"""Streams, events and lifetimes of the CUDA path on one GPU, its copies and kernels, and two processes that share the card.

Nearly every test is made twice: the package's code must be right however late streams are, and a changed copy of it, which
leaves out what the test is about, must be seen to be wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from one_card import (
    COLLECTIVE_NOT_WAITED_FOR,
    COMPUTE_NOT_WAITED_FOR,
    DONE_BEFORE_THE_END,
    MESSAGES_FORGOTTEN,
    MESSAGES_REUSED,
    ON_THE_CURRENT_STREAM,
    ONE_STREAM,
    PACKING_NOT_WAITED_FOR,
    REAL_TRANSPORT,
    RESULTS_NOT_WAITED_FOR,
    SOURCES_FORGOTTEN,
    THE_DEFAULT_STREAM,
    WHOLE_SWITCH_BESIDE,
    WHOLE_SWITCH_NOT_WAITED_FOR,
    CopiedDtypes,
    Copies,
    EchoCollectives,
    EchoGroup,
    Staged,
    echoed,
    flood,
    gpu_work,
    is_copy,
    stream_calls,
)
from torch import Tensor
from work import CHAIN, Result, compare_stages, compare_video, error, gradient_of, missing, mixes

from megatron_dsp.layout import Layout, shard_ranges
from megatron_dsp.models.attention import SelfAttention
from megatron_dsp.models.block_runner import DIMS
from megatron_dsp.models.embeddings import time_rotations
from megatron_dsp.reshard import FixedOverlap, MeasuredOverlap, Region, Stage, collectives, set_overlap
from megatron_dsp.reshard.exchange import Exchange, exchange_of
from megatron_dsp.reshard.labels import Label, Operation, StageName
from megatron_dsp.reshard.stages import overlap
from megatron_dsp.reshard.stages.legs import Landing, Leg
from megatron_dsp.reshard.transport import torch_transport
from megatron_dsp.reshard.transport.move import Move
from megatron_dsp.reshard.transport.side_streams import SideStreams
from megatron_dsp.tensor import TensorParallel

MISSING = missing(1)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(MISSING is not None, reason=MISSING or "")]

# Cycles of the GPU: tenths and hundredths of a second, in which a host launches thousands of kernels.
LONG, SHORT = 200_000_000, 50_000_000
SHAPE = (512, 1024)  # fp64: beyond what the allocator takes from its pool of small blocks
LABEL = Label(Operation.SWITCH.value)


def _full(value: float) -> Tensor:
    return torch.full(SHAPE, value, dtype=torch.float64, device="cuda")


def _move(x: Tensor, into: Tensor) -> Move:
    """To the one rank that there is."""
    return Move(x, 0, 1, shard_ranges(SHAPE[0], 1), shard_ranges(SHAPE[1], 1), into)


def _is(x: Tensor, value: float) -> bool:
    torch.cuda.synchronize()
    return bool((x == value).all())


# --- One switch on the side streams. A scenario gives whether all went right.

Scenario = Callable[[SideStreams, int], bool]


def _source_is_late(side: SideStreams, cycles: int) -> bool:
    x, into = _full(torch.nan), _full(torch.nan)
    torch.cuda.synchronize()
    torch.cuda._sleep(cycles)
    x.fill_(1)
    (y,) = side.begin(Copies(), [_move(x, into)], LABEL)()
    return _is(y.clone(), 1)


def _packing_is_late(side: SideStreams, cycles: int) -> bool:
    x, into = _full(1), _full(torch.nan)
    torch.cuda.synchronize()
    (y,) = side.begin(Copies(before_begin=cycles), [_move(x, into)], LABEL)()
    return _is(y.clone(), 1)


def _unpacking_is_late(side: SideStreams, cycles: int) -> bool:
    x, into = _full(1), _full(torch.nan)
    torch.cuda.synchronize()
    (y,) = side.begin(Copies(before_end=cycles), [_move(x, into)], LABEL)()
    return _is(y.clone(), 1)


def _messages_are_unpacked_late(side: SideStreams, cycles: int) -> bool:
    x, into = _full(1), _full(torch.nan)
    torch.cuda.synchronize()
    (y,) = side.begin(Copies(before_end=cycles), [_move(x, into)], LABEL)()
    with torch.cuda.stream(side._packing):  # where the next switch begun takes its memory
        taken = flood(x.nbytes)
    seen = y.clone()
    del taken
    return _is(seen, 1)


def _unpacking_goes_before_packing(side: SideStreams, cycles: int) -> bool:
    """What is packed next is not computed yet; what has arrived is unpacked meanwhile."""
    x, into, later = _full(1), _full(torch.nan), _full(2)
    torch.cuda.synchronize()
    end = side.begin(Copies(), [_move(x, into)], LABEL)
    torch.cuda._sleep(cycles)
    next_end = side.begin(Copies(), [_move(later, _full(torch.nan))], LABEL)
    with torch.cuda.stream(torch.cuda.Stream()):
        (y,) = end()
        torch.cuda.current_stream().synchronize()
        beside = cycles == 0 or not side._packing.query()
    (z,) = next_end()
    return _is(y, 1) and _is(z, 2) and beside


def _source_is_freed_at_once(side: SideStreams, cycles: int) -> bool:
    x, into = _full(1), _full(torch.nan)
    torch.cuda.synchronize()
    end = side.begin(Copies(before_begin=cycles), [_move(x, into)], LABEL)
    nbytes = x.nbytes
    del x
    taken = flood(nbytes)
    (y,) = end()
    del taken
    return _is(y.clone(), 1)


def _memory_of_the_result_is_still_read(side: SideStreams, cycles: int) -> bool:
    x, into = _full(1), _full(2)
    torch.cuda.synchronize()
    torch.cuda._sleep(cycles)
    before = into.clone()  # as whatever has had that memory, for which the allocator orders the current stream alone
    (y,) = side.begin(Copies(), [_move(x, into)], LABEL)()
    return _is(before, 2) and _is(y, 1)


def _compute_goes_on_meanwhile(side: SideStreams, cycles: int) -> bool:
    x, into = _full(1), _full(torch.nan)
    torch.cuda.synchronize()
    end = side.begin(Copies(before_begin=cycles), [_move(x, into)], LABEL)
    torch.cuda.current_stream().synchronize()
    # Without a sleep there may be nothing left to wait for.
    beside = cycles == 0 or not side._packing.query()
    (y,) = end()
    return _is(y, 1) and beside


FAULTS: list[tuple[Scenario, type[SideStreams]]] = [
    (_source_is_late, COMPUTE_NOT_WAITED_FOR),
    (_packing_is_late, RESULTS_NOT_WAITED_FOR),
    (_unpacking_is_late, RESULTS_NOT_WAITED_FOR),
    (_packing_is_late, PACKING_NOT_WAITED_FOR),
    (_unpacking_is_late, DONE_BEFORE_THE_END),
    (_messages_are_unpacked_late, MESSAGES_REUSED),
    (_unpacking_goes_before_packing, ONE_STREAM),
    (_source_is_freed_at_once, SOURCES_FORGOTTEN),
    (_memory_of_the_result_is_still_read, COMPUTE_NOT_WAITED_FOR),
    (_compute_goes_on_meanwhile, ON_THE_CURRENT_STREAM),
]
DEVICE = torch.device("cuda", 0)


@pytest.mark.parametrize("priority", [0, -1])
@pytest.mark.parametrize("scenario", dict.fromkeys(scenario for scenario, _ in FAULTS), ids=lambda scenario: scenario.__name__)
def test_one_switch_is_right(scenario, priority):
    side = SideStreams(DEVICE, priority)
    assert scenario(side, 0)
    assert scenario(side, LONG)
    assert side._packing.priority == priority


@pytest.mark.parametrize(("scenario", "fault"), FAULTS, ids=lambda each: each.__name__)
def test_a_fault_in_one_switch_is_seen(scenario, fault):
    side = fault(DEVICE, -1)
    scenario(side, 0)  # may be right by chance
    assert not scenario(side, LONG)


# --- The package's own transport, beside a stream that stands for NCCL's.


class World:
    """An `EchoGroup` with its exchange, and what delays its collectives."""

    def __init__(self, size: int, module: ModuleType, monkeypatch: pytest.MonkeyPatch):
        self.group, self.collectives = EchoGroup(size), EchoCollectives()
        for each in (torch_transport, module):  # the package's has to make the exchange's own transport
            monkeypatch.setattr(each, "dist", self.collectives)
            monkeypatch.setattr(each, "_all_to_all", self.collectives.all_to_all)
        self.exchange: Exchange = exchange_of(self.group)
        self.exchange.transport = module.TorchTransport(self.group)

    def use(self, side: type[SideStreams]) -> SideStreams:
        """Make it the group's."""
        self.packing()  # what the group has already
        overlap._overlaps[self.group].side_streams[DEVICE] = made = side(DEVICE, -1)
        return made

    def packing(self) -> torch.cuda.Stream:
        """The one that chunks over the group pack on."""
        return overlap.side_streams(self.group, DEVICE)._packing

    def switch(self, xs: list[Tensor], gather: int, split: int, sizes: list[int]) -> list[Tensor]:
        """A whole switch, without gradients."""
        return collectives.switch(xs, gather, split, sizes, self.exchange.members.name, *LABEL)


@pytest.fixture
def world(monkeypatch) -> Callable[..., World]:
    return lambda size=2, module=REAL_TRANSPORT: World(size, module, monkeypatch)


def _message_is_late(world: World, cycles: int) -> bool:
    """What is sent is strided, and so travels as a packed copy."""
    T, S = SHAPE
    x = _full(1)
    into = torch.full((2 * T, S // 2), torch.nan, dtype=torch.float64, device="cuda")
    world.collectives.cycles = cycles
    side = world.use(SideStreams)
    torch.cuda.synchronize()
    end = side.begin(world.exchange.transport, [Move(x, 0, 1, shard_ranges(2 * T, 2), shard_ranges(S, 2), into)], LABEL)
    with torch.cuda.stream(side._packing):  # where the next switch begun takes its memory
        taken = flood(x.nbytes)
    (y,) = end()
    seen = y.clone()
    del taken
    return _is(seen, 1)


def test_messages_live_until_they_are_there(world):
    here = world()
    assert _message_is_late(here, 0)
    assert _message_is_late(here, LONG)


@pytest.mark.parametrize("fault", [MESSAGES_FORGOTTEN, COLLECTIVE_NOT_WAITED_FOR], ids=["forgotten", "not waited for"])
def test_a_fault_in_messages_is_seen(world, fault):
    here = world(module=fault)
    _message_is_late(here, 0)
    assert not _message_is_late(here, LONG)


class _OnTheSideStream(Landing):
    """Whose memory is the side stream's, as that of a switch would be that made its result there."""

    def open(self, shape: list[int], like: Tensor, exchange: Exchange) -> Tensor:
        with torch.cuda.stream(overlap.side_streams(exchange.group, like.device)._packing):
            return super().open(shape, like, exchange)


def _result_is_read_late(world: World, landing: Landing, cycles: int) -> bool:
    T, S = SHAPE
    x = _full(1)
    leg = Leg(world.exchange, 0, 1, 2 * T, shard_ranges(2 * T, 2), shard_ranges(S, 2), Landing(), landing, StageName())
    torch.cuda.synchronize()
    leg.begin(x)
    leg.wait()
    y = landing.take()
    torch.cuda._sleep(cycles)
    seen, nbytes = y.clone(), y.nbytes
    del y
    with torch.cuda.stream(world.packing()):
        taken = flood(nbytes)
    right = _is(seen, 1)
    del taken
    return right


def test_memory_of_results_goes_back_to_the_stream_that_reads_them(world):
    here = world()
    for cycles in (0, LONG):
        assert _result_is_read_late(here, Landing(), cycles)
    _result_is_read_late(here, _OnTheSideStream(), 0)
    assert not _result_is_read_late(here, _OnTheSideStream(), LONG)


# --- A whole switch: in order on the current stream, and nothing beside.


def _strided() -> Tensor:
    """Of `SHAPE`, and nowhere contiguous."""
    return torch.full(SHAPE[::-1], torch.nan, dtype=torch.float64, device="cuda").t()


def _whole_switch_is_late(world: World, cycles: int) -> bool:
    """Its source, and the collective; and memory that it lets go of is taken again at once. It packs and it unpacks."""
    x = _strided()
    world.collectives.cycles = cycles
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # The memory that the switch will take: what is read there too early must not be right by chance.
        spoilt = [_full(torch.nan) for _ in range(4)]
        del spoilt
        torch.cuda.synchronize()
        torch.cuda._sleep(cycles)
        x.fill_(1)
        (y,) = world.switch([x], 1, 0, [2 * SHAPE[1]])
        taken = flood(x.nbytes)
        seen = y.clone()
    right = _is(seen, 1)
    del taken
    return right


def test_a_whole_switch_is_right_however_late(world):
    here = world()
    assert _whole_switch_is_late(here, 0)
    assert _whole_switch_is_late(here, LONG)
    assert here.collectives.synchronous == [True, True]


def test_a_fault_in_a_whole_switch_is_seen(world):
    here = world(module=WHOLE_SWITCH_NOT_WAITED_FOR)
    _whole_switch_is_late(here, 0)
    assert not _whole_switch_is_late(here, LONG)


def _stream_calls_of_a_whole_switch(world: World) -> list[str]:
    """Forward and backward, on a stream that is not the default."""
    rows, columns = SHAPE
    x = _strided().fill_(1).requires_grad_()
    gradient = torch.ones(rows // 2, 2 * columns, dtype=torch.float64, device="cuda")
    torch.cuda.synchronize()
    where = world.exchange.members.name, *LABEL

    class Switch(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            with stream_calls() as ctx.calls:
                return collectives.switch([x], 1, 0, [2 * columns], *where)[0]

        @staticmethod
        def backward(ctx, gradient):
            with stream_calls() as calls:
                moved = collectives.switch([gradient], 0, 1, [rows], *where)[0]
            ctx.calls += calls
            return moved

    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(2):  # once to find what is kept of its shape
            y = Switch.apply(x)
            calls = y.grad_fn.calls
            (found,) = torch.autograd.grad(y, x, gradient)
    assert _is(found, 1)
    return calls


def test_a_whole_switch_has_no_stream_beside(world):
    assert _stream_calls_of_a_whole_switch(world()) == []


def test_a_whole_switch_with_a_stream_beside_is_seen(world):
    assert {"Stream.record_event", "Stream.wait_event"} <= {*_stream_calls_of_a_whole_switch(world(module=WHOLE_SWITCH_BESIDE))}


# --- Whole passes: stages, collectives and gradients are late, and the forward pass runs on a stream that is not the default.

SIZES = 12, 3, 12, 8


class Passes:
    """A chain of stages in a world of two ranks, on a stream of its own, and what plain torch computes."""

    def __init__(self, world: World, how: FixedOverlap | None):
        self.world, self.stream = world, torch.cuda.Stream()
        set_overlap(world.group, how)
        torch.manual_seed(0)
        self.parts = mixes(SIZES).to(DEVICE)
        world.use(SideStreams)

    def sample(self, seed: int) -> tuple[Tensor, Tensor]:
        """An input, and the gradient of its output."""
        T, B, S, C = SIZES
        generator = torch.Generator().manual_seed(seed)
        shapes = (T // 2, B, S, C), (T, B, S // 2, C)
        x, gradient = (torch.randn(shape, dtype=torch.float64, generator=generator).to(DEVICE) for shape in shapes)
        torch.cuda.synchronize()
        return x.requires_grad_(), gradient

    def be_late(self, forward: int, backward: int, collectives: int) -> None:
        """By so many cycles, from the next forward pass on."""
        for part in self.parts:
            part.forward_cycles, part.backward_cycles = forward, backward
        self.world.collectives.cycles = collectives

    def forward(self, x: Tensor) -> Tensor:
        """In a region."""
        region = Region(Layout(DIMS, SIZES, sharded="time"), self.world.group)
        parts = enumerate(zip(self.parts, CHAIN, strict=True))
        stages = [Stage(part, sharded, "stage", number=number) for number, (part, sharded) in parts]
        with torch.cuda.stream(self.stream):
            return region.run(stages, x, independent="batch")

    def result(self, x: Tensor, y: Tensor, gradient: Tensor) -> Result:
        """Go back, from the stream that is current: autograd itself goes to that of the forward pass."""
        x.grad = None
        self.parts.zero_grad()
        y.backward(gradient)
        torch.cuda.synchronize()
        return Result(y.detach(), gradient_of(x), [gradient_of(parameter) for parameter in self.parts.parameters()])

    def right(self, x: Tensor, gradient: Tensor) -> Result:
        """Without a region, or anything beside."""
        self.be_late(0, 0, 0)
        y = x
        for number, part in enumerate(self.parts):
            if number:
                dims = {"time": 0, "space": 2}
                y = echoed(y, dims[CHAIN[number - 1]], dims[CHAIN[number]], 2)
            y = part(y)
        return self.result(x, y, gradient)

    def warm_up(self) -> None:
        """With other numbers than those that count: memory that is read too early must not hold the right ones."""
        x, gradient = self.sample(100)
        self.be_late(0, 0, 0)
        self.result(x, self.forward(x), gradient)
        self.right(x, gradient)


def _wrong_by(found: Result, right: Result) -> float:
    """The largest error; infinity where there is a NaN."""
    pairs = [*zip(found[:2], right[:2], strict=True), *zip(found.parameters, right.parameters, strict=True)]
    errors = [error(a, b) for a, b in pairs]
    return max(torch.inf if each != each else each for each in errors)


ALONG = ("sharded", "batch", "time", "space")
OVERLAPS = {"whole stages": None, **{along: FixedOverlap(3, along=along, shrink=1.0) for along in ALONG}}


@pytest.mark.parametrize("late", [(SHORT, SHORT, SHORT), (0, 0, LONG)], ids=["everything", "collectives"])
@pytest.mark.parametrize("along", OVERLAPS)
def test_passes_are_right_however_late(world, along, late):
    passes = Passes(world(), OVERLAPS[along])
    passes.warm_up()
    graphs = passes.sample(1), passes.sample(2)
    rights = [passes.right(*graph) for graph in graphs]
    for order in ((0, 1), (1, 0)):  # of going back; both graphs are there before
        passes.be_late(*late)
        outputs = [passes.forward(x) for x, _ in graphs]
        for number in order:
            x, gradient = graphs[number]
            assert _wrong_by(passes.result(x, outputs[number], gradient), rights[number]) <= 1e-12, f"graph {number}"


@pytest.mark.parametrize(
    "fault", [COMPUTE_NOT_WAITED_FOR, RESULTS_NOT_WAITED_FOR, THE_DEFAULT_STREAM], ids=lambda fault: fault.__name__
)
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_a_fault_in_passes_is_seen(world, way, fault):
    here = world()
    passes = Passes(here, OVERLAPS["sharded"])
    passes.warm_up()
    x, gradient = passes.sample(1)
    right = passes.right(x, gradient)
    if way == "forward":
        here.use(fault)
        passes.be_late(SHORT, 0, LONG)
        y = passes.forward(x)
        torch.cuda.synchronize()
        assert not error(y.detach(), right.output) <= 1e-12  # it may be NaN
        return
    passes.be_late(0, SHORT, 0)
    y = passes.forward(x)
    torch.cuda.synchronize()
    assert error(y.detach(), right.output) <= 1e-12
    here.use(fault)
    here.collectives.cycles = LONG
    found = passes.result(x, y, gradient)
    assert not error(found.gradient, right.gradient) <= 1e-12


@pytest.mark.parametrize("along", OVERLAPS)
def test_the_host_waits_for_nothing(world, along):
    passes = Passes(world(), OVERLAPS[along])
    passes.warm_up()
    x, gradient = passes.sample(1)
    right = passes.right(x, gradient)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(passes.stream):
            torch.cuda._sleep(10 * LONG)
            awake = passes.stream.record_event()
        y = passes.forward(x)
        y.backward(gradient)
        # All of the pass was launched while its stream slept: the mode above does not know of every wait.
        waited = awake.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not waited
    torch.cuda.synchronize()
    assert error(y.detach(), right.output) <= 1e-12


@pytest.mark.parametrize("along", [*OVERLAPS, "auto"])
def test_a_pass_can_be_captured(world, along):
    # By the third pass of a shape "auto" would time it: events that tell the time cannot be captured.
    passes = Passes(world(), MeasuredOverlap([]) if along == "auto" else OVERLAPS[along])
    passes.warm_up()
    x, gradient = passes.sample(1)
    leaves = [x, *passes.parts.parameters()]

    def run() -> Result:
        y = passes.forward(x)
        found, *of_parameters = torch.autograd.grad(y, leaves, gradient)
        return Result(y.detach(), found, of_parameters)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=passes.stream):
        captured = run()
    for seed in (2, 3):
        with torch.no_grad():
            for held, other in zip((x, gradient), passes.sample(seed), strict=True):
                held.copy_(other)
        right = passes.right(x, gradient)
        graph.replay()
        torch.cuda.synchronize()
        assert _wrong_by(captured, right) <= 1e-12


# --- What the GPU does.

RANKS = 8
SWITCHES = {
    # gather, split, and the ends at which there is anything to copy.
    "from the outermost dim": (0, 2, 1),
    "to the outermost dim": (2, 0, 1),
    "between inner dims": (1, 2, 2),
}
SHARDS = {
    # A rank's shape, what all ranks' shards lack of its size times theirs, and the copies at an end: for each size of a shard.
    "even": ((8, 16, 24, 64), 0, 1),
    "uneven": ((9, 17, 25, 64), 3, 2),
}


@pytest.mark.parametrize("tensors", [1, 3])
@pytest.mark.parametrize("shards", SHARDS)
@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_copies_each_piece_once(world, name, shards, tensors, record_property):
    gather, split, ends = SWITCHES[name]
    shape, lacking, most_an_end = SHARDS[shards]
    here = world(size=RANKS)
    here.collectives.moves = False
    xs = [torch.randn(shape, device="cuda") for _ in range(tensors)]
    # The pieces of several tensors lie in one message, at both ends.
    most = most_an_end * (ends if tensors == 1 else 2) * tensors
    work = gpu_work(lambda: here.switch(xs, gather, split, [RANKS * shape[gather] - lacking] * tensors))
    record_property("gpu work", "; ".join(work))
    assert len(work) <= most, work
    assert all(map(is_copy, work)), work


@pytest.mark.parametrize("name", SWITCHES)
def test_a_chunk_copies_each_piece_once(world, name, record_property):
    gather, split, most = SWITCHES[name]
    here = world(size=RANKS)
    here.collectives.moves = False
    x = torch.randn(SHARDS["even"][0], device="cuda")
    size = RANKS * x.shape[gather]
    ranges = shard_ranges(size, RANKS), shard_ranges(x.shape[split], RANKS)

    def run() -> Tensor:
        landing = Landing()
        leg = Leg(here.exchange, gather, split, size, *ranges, Landing(), landing, StageName())
        leg.begin(x)
        leg.wait()
        return landing.take()

    work = gpu_work(run)
    record_property("gpu work", "; ".join(work))
    assert len(work) <= most, work
    assert all(map(is_copy, work)), work


def _copied_as(world: World, x: Tensor) -> set[torch.dtype]:
    """The dtypes of what a switch of ``x`` between inner dims copies, at either end."""
    move = Move(x, 1, 2, shard_ranges(RANKS * x.shape[1], RANKS), shard_ranges(x.shape[2], RANKS))
    world.collectives.moves = False
    with CopiedDtypes() as copied:
        world.exchange.begin([move], LABEL, 0, at_once=True)()
    assert len(copied.found) == 2
    return set(copied.found)


def test_bf16_is_copied_16_bytes_at_a_time(world, record_property):
    here = world(size=RANKS)
    wide, odd = (torch.randn(8, 16, 24, size, device="cuda").bfloat16() for size in (1152, 1151))
    unaligned = torch.randn(1 + wide.numel(), device="cuda").bfloat16()[1:].view(wide.shape)
    assert _copied_as(here, wide) == {torch.complex128}
    assert _copied_as(here, odd) == {torch.bfloat16}
    assert _copied_as(here, unaligned) == {torch.bfloat16, torch.complex128}  # as it is sent, and as it has come


FUSED = re.compile("flash|fmha|sdpa|attention", re.IGNORECASE)


@pytest.mark.parametrize("over", ["space", "time"])
def test_attention_takes_strided_views(over, record_property):
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        pytest.skip(f"needs compute capability 8.0 for fused attention in bf16: this card has {capability[0]}.{capability[1]}")
    module = SelfAttention(256, 4, over, qk_norm=True, tensor=TensorParallel()).to(DEVICE, torch.bfloat16)
    x = torch.randn(16, 2, 64, 256, device=DEVICE, dtype=torch.bfloat16)
    rotations = time_rotations(16, 64, like=x) if over == "time" else None
    with torch.no_grad():
        projected = module.project(x, rotations)
        forward = gpu_work(lambda: module.attend(*projected))
    record_property("gpu work forward", "; ".join(forward))
    fused = [index for index, name in enumerate(forward) if FUSED.search(name)]
    assert fused, forward
    assert not any(map(is_copy, forward[: fused[0]])), forward  # of queries, keys or values
    if over == "space":  # in the result's order, whatever kernel it is
        assert not any(map(is_copy, forward)), forward
    leaves = [each.detach().requires_grad_() for each in projected]
    gradient = torch.randn_like(projected[0])

    def forward_and_backward() -> None:
        torch.autograd.grad(module.attend(*leaves), leaves, gradient)

    both = gpu_work(forward_and_backward)
    record_property("gpu work forward and backward", "; ".join(both))
    assert sum(bool(FUSED.search(name)) for name in both) > len(fused), both


# --- Two processes that share the card.


def _share(cycles: int) -> dist.ProcessGroup:
    torch.cuda.set_device(DEVICE)
    group = dist.group.WORLD
    exchange_of(group).transport = Staged(group, cycles)
    return group


def _stages(how: FixedOverlap | None, priority: int, cycles: int) -> None:
    group = _share(cycles)
    compare_stages(group, DEVICE, how, cycles, stream_priority=priority)
    made = [side._packing.priority for side in overlap._overlaps[group].side_streams.values()]
    assert made == ([] if how is None else [priority])


@pytest.mark.parametrize("priority", [0, -1])
@pytest.mark.parametrize("cycles", [0, SHORT], ids=["at once", "late"])
@pytest.mark.parametrize("along", OVERLAPS)
def test_two_processes_compute_what_one_does(ranks, along, cycles, priority):
    ranks(2, _stages, OVERLAPS[along], priority, cycles)


def _video(how: FixedOverlap | None) -> None:
    compare_video(_share(0), DEVICE, how)


@pytest.mark.parametrize("along", OVERLAPS)
def test_two_processes_run_the_video_transformer(ranks, along):
    ranks(2, _video, OVERLAPS[along])

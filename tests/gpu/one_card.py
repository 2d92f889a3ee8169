"""What the tests on one GPU move tensors with, and changed copies of the package's code.

Time is made visible by `torch.cuda._sleep`: what was not waited for is read long before it is there. A kernel's first launch
may wait for the whole device while its code is loaded, and so may the first allocation of its kind: run everything once before.
"""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dsp.reshard.labels import Label
from megatron_dsp.reshard.transport import side_streams, torch_transport
from megatron_dsp.reshard.transport.buffers import BufferPool
from megatron_dsp.reshard.transport.move import Beside, End, Move
from megatron_dsp.reshard.transport.side_streams import SideStreams
from megatron_dsp.reshard.transport.torch_transport import TorchTransport


class Copies:
    """A transport of one rank, on the current stream: `begin` packs a message, its end unpacks it, each after a sleep.

    Nobody but the caller keeps sources alive.
    """

    name = "copies"

    def __init__(self, before_begin: int = 0, before_end: int = 0):
        self.buffers = BufferPool()
        self._cycles = before_begin, before_end

    def begin(self, moves: Sequence[Move], label: Label, *, at_once: bool = False, beside: Beside | None = None) -> End:
        assert beside is None  # it is what stands beside
        results = [move.result(0, self.buffers) for move in moves]
        messages = [torch.empty_like(move.x) for move in moves]
        torch.cuda._sleep(self._cycles[0])
        for move, message in zip(moves, messages, strict=True):
            message.copy_(move.x)
        cycles = self._cycles[1]

        def end() -> list[Tensor]:
            torch.cuda._sleep(cycles)
            for message, result in zip(messages, results, strict=True):
                result.copy_(message)
            return results

        return end


class EchoGroup:
    """Stands for a group of ``size`` ranks in one process, whose other ranks send back what they are sent.

    Shards are to be even. Then a switch gives `echoed`, with its adjoint.
    """

    group_desc = "echo"

    def __init__(self, size: int):
        self._size = size
        self.group_name = f"echo {id(self)}"

    def size(self) -> int:
        """Of the group."""
        return self._size

    def rank(self) -> int:
        """Of this process."""
        return 0


def echoed(x: Tensor, gather: int, split: int, size: int) -> Tensor:
    """What a switch of ``x`` gives in an `EchoGroup`."""
    return torch.cat(x.chunk(size, split), gather)


class EchoCollectives:
    """Stands for torch.distributed in `TorchTransport`, with an `EchoGroup`, and its `all_to_all` for that module's own.

    As NCCL does it. A synchronous call is one more kernel of the current stream, and gives nothing to wait for. An asynchronous
    one runs on a stream of its own, which waits for what the current stream has been given; whoever waits for the work makes
    their current stream wait for it. Nobody but the caller keeps messages alive. Messages take ``cycles`` of the GPU before
    they go; where not ``moves``, they do not go at all. ``synchronous`` says of each call whether it was.
    """

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self.cycles, self.moves = 0, True
        self.synchronous: list[bool] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def get_backend_config(self, group: EchoGroup) -> str:
        """That of a mesh's groups on GPUs."""
        return "cpu:gloo,cuda:nccl"

    def all_to_all(
        self,
        group: EchoGroup,
        arriving: Tensor,
        message: Tensor,
        arriving_splits: list[int],
        splits: list[int],
        options: dist.AllToAllOptions,
    ) -> _EchoWork | None:
        """Each rank's part comes back from it: with even shards, as it lies."""
        self.synchronous.append(not options.asyncOp)
        if not options.asyncOp:
            self._go(arriving, message)
            return None
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._go(arriving, message)
        return _EchoWork(self._stream.record_event())

    def _go(self, arriving: Tensor, message: Tensor) -> None:
        if self.cycles:
            torch.cuda._sleep(self.cycles)
        if self.moves:
            assert arriving.is_contiguous()
            assert message.is_contiguous()
            arriving.copy_(message)


class _EchoWork:
    def __init__(self, done: torch.cuda.Event):
        self._done = done

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self._done)


class Staged:
    """Through pinned host memory and Gloo, for processes that share a card, which NCCL refuses.

    All on the current stream, for which the host waits before Gloo reads: its threads know no streams. Results come after
    ``cycles`` of the GPU.
    """

    name = "staged"

    def __init__(self, group: dist.ProcessGroup, cycles: int):
        self._real, self._rank, self._cycles = TorchTransport(group), group.rank(), cycles
        self.buffers = BufferPool()

    def begin(self, moves: Sequence[Move], label: Label, *, at_once: bool = False, beside: Beside | None = None) -> End:
        if beside is not None:
            return beside.begin(self, moves, label)
        results = [move.result(self._rank, self.buffers) for move in moves]
        on_host = []
        for move, result in zip(moves, results, strict=True):
            x, into = (torch.empty(like.shape, dtype=like.dtype, pin_memory=True) for like in (move.x, result))
            x.copy_(move.x, non_blocking=True)
            on_host.append(move._replace(x=x, into=into))
        torch.cuda.current_stream().synchronize()
        end_on_host = self._real.begin(on_host, label, at_once=at_once)

        def end() -> list[Tensor]:
            arrived = end_on_host()
            torch.cuda._sleep(self._cycles)
            for move, result, whole in zip(on_host, results, arrived, strict=True):
                # A chunk has arrived in its places alone.
                copy = whole.to(result.device, non_blocking=True)
                for place, piece in zip(move.targets(result), move.targets(copy), strict=True):
                    place.copy_(piece)
            return results

        return end


def flood(nbytes: int) -> list[Tensor]:
    """Bytes 0xFF (NaN) in all memory that a tensor of ``nbytes`` could get on the current stream without asking the device.

    It is the caller's until the list is dropped.
    """
    reserved, taken = torch.cuda.memory_reserved(), []
    while torch.cuda.memory_reserved() == reserved:
        taken.append(torch.full([nbytes], 0xFF, dtype=torch.uint8, device="cuda"))
    return taken


@contextmanager
def stream_calls() -> Iterator[list[str]]:
    """What orders or changes streams in the block, by the names of torch's functions."""
    calls: list[str] = []
    of = {
        torch.cuda.Stream: ("record_event", "wait_event", "wait_stream", "synchronize"),
        torch.cuda.Event: ("record", "wait", "synchronize"),
        torch.cuda.StreamContext: ("__enter__",),
        torch.cuda: ("set_stream", "synchronize"),
    }
    with pytest.MonkeyPatch.context() as patch:
        for owner, names in of.items():
            for name in names:
                patch.setattr(owner, name, _noted(getattr(owner, name), f"{owner.__name__}.{name}", calls))
        yield calls


def _noted(function: Callable[..., Any], name: str, calls: list[str]) -> Callable[..., Any]:
    def call(*arguments: Any, **keywords: Any) -> Any:
        calls.append(name)
        return function(*arguments, **keywords)

    return call


class CopiedDtypes(TorchDispatchMode):
    """In the block, ``found`` gets the dtype of the elements of each copy in place."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[torch.dtype] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if function is torch.ops.aten.copy_.default:
            assert arguments[0].dtype == arguments[1].dtype
            self.found.append(arguments[0].dtype)
        return function(*arguments, **(keywords or {}))


def gpu_events(run: Callable[[], object]) -> list[dict[str, Any]]:
    """The kernels and copies that the GPU does for ``run``, in the order of their starts. None: the profiler sees nothing."""
    run()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    done = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    return sorted(done, key=lambda event: float(event["ts"]))


NO_PROFILER = "needs a profiler that sees the GPU's work: CUPTI is missing, or may not be used here"


def gpu_work(run: Callable[[], object]) -> list[str]:
    """The names of `gpu_events`."""
    names = [event["name"] for event in gpu_events(run)]
    if not names:
        pytest.skip(NO_PROFILER)
    return names


def is_copy(name: str) -> bool:
    """Whether a kernel or copy of this name only moves data."""
    return "memcpy" in name.lower() or "copy" in name.lower() or name.startswith("CatArray")


def changed(module: ModuleType, *changes: tuple[str, str]) -> ModuleType:
    """A copy of ``module``, for itself alone, whose source has the second text for the first in each of ``changes``."""
    source = inspect.getsource(module)
    for old, new in changes:
        assert source.count(old) == 1, f"{source.count(old)} times in {module.__name__}, to be changed there:\n{old}"
        source = source.replace(old, new)
    copy = ModuleType(module.__name__)
    exec(compile(source, f"{module.__file__} (changed)", "exec"), copy.__dict__)
    return copy


def _side_streams(fault: str, *changes: tuple[str, str]) -> type[SideStreams]:
    made = changed(side_streams, *changes).SideStreams
    made.__name__ = fault  # in names of tests
    return made


_PACK = "        with torch.cuda.stream(self._packing):\n            end = tr"
_DONE = "            done = self._unpacking.record_event()\n"
_UNPACK = "            with torch.cuda.stream(self._unpacking):\n"
_ENDS = f"{_UNPACK}                results = end()  # this stream waits for the collective\n"

# Made when this is imported, so that a test run without a GPU finds changes that no longer fit the source.
COMPUTE_NOT_WAITED_FOR = _side_streams(
    "compute is not waited for", ("        self._packing.wait_event(compute.record_event())\n", "")
)
PACKING_NOT_WAITED_FOR = _side_streams("packing is not waited for", ("            self._unpacking.wait_event(begun)\n", ""))
RESULTS_NOT_WAITED_FOR = _side_streams("results are not waited for", ("stream.wait_event(done)", "pass"))
MESSAGES_REUSED = _side_streams(
    "packing reuses messages", ("torch.cuda.current_stream(device), self._packing}", "torch.cuda.current_stream(device)}")
)
DONE_BEFORE_THE_END = _side_streams("done before the end", (_ENDS + _DONE, _DONE + _ENDS))
SOURCES_FORGOTTEN = _side_streams(
    "sources are forgotten", ("        def finish()", "        sources.clear()\n\n        def finish()")
)
ON_THE_CURRENT_STREAM = _side_streams(
    "on the current stream", (_PACK, "        if True:\n            end = tr"), (_UNPACK, "            if True:\n")
)
ONE_STREAM = _side_streams(
    "one stream",
    (
        "self._packing, self._unpacking = (torch.cuda.Stream(device, priority=priority) for _ in range(2))",
        "self._packing = self._unpacking = torch.cuda.Stream(device, priority=priority)",
    ),
)
THE_DEFAULT_STREAM = _side_streams(
    "the default stream for the current one",
    ("compute = torch.cuda.current_stream", "compute = torch.cuda.default_stream"),
    ("{compute, torch.cuda.current_stream", "{compute, torch.cuda.default_stream"),
)

REAL_TRANSPORT = changed(torch_transport)
MESSAGES_FORGOTTEN = changed(torch_transport, ("[message, *xs]", "[]"))
COLLECTIVE_NOT_WAITED_FOR = changed(torch_transport, ("        work.wait()\n        sent.clear()", "        sent.clear()"))
# Of whole switches.
_ASYNCHRONOUS = "self._in_order if at_once else ", ""
WHOLE_SWITCH_BESIDE = changed(torch_transport, _ASYNCHRONOUS)
WHOLE_SWITCH_NOT_WAITED_FOR = changed(torch_transport, _ASYNCHRONOUS, ("if work is not None:", "if work is None:"))

"""How long compute is held up by switches: while it begins them, and while it waits for them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_dsp.reshard.exchange import exchange_of
from megatron_dsp.reshard.labels import Label
from megatron_dsp.reshard.transport.move import Beside, End, Move, Transport

Result = TypeVar("Result")


class SwitchTimer:
    """Adds up the time of begins and ends of switches, without waiting for a device.

    On the CPU this is the time of the calls: packing, posting, waiting, unpacking. On CUDA it is that between events on the
    current stream before and after a call: what that stream packs and unpacks itself, and how long it waits for another one.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._seconds = 0.0
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def time(self, call: Callable[[], Result]) -> Result:
        """What ``call`` returns; its time is added, unless a CUDA graph captures it: replays cannot be timed within."""
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return call()
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device)
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record(stream)
            result = call()
            stop.record(stream)
            self._events.append((start, stop))
            return result
        started = time.perf_counter()
        result = call()
        self._seconds += time.perf_counter() - started
        return result

    def collect(self) -> None:
        """Let go of the events that the device has passed; to be called now and then, as after each step."""
        while self._events and self._events[0][1].query():
            start, stop = self._events.popleft()
            self._seconds += start.elapsed_time(stop) / 1000

    def take(self) -> float:
        """The seconds since this was last called, of the switches that the device is through with."""
        self.collect()
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class TimedTransport:
    """A transport whose begins and ends are timed."""

    def __init__(self, transport: Transport, timer: SwitchTimer):
        self._transport, self._timer = transport, timer
        self.name, self.buffers = transport.name, transport.buffers

    def begin(self, moves: Sequence[Move], label: Label, *, at_once: bool = False, beside: Beside | None = None) -> End:
        """As `Transport.begin`."""
        end = self._timer.time(lambda: self._transport.begin(moves, label, at_once=at_once, beside=beside))
        return lambda: self._timer.time(end)


@contextmanager
def time_switches(group: dist.ProcessGroup, timer: SwitchTimer) -> Iterator[None]:
    """In the block, ``timer`` adds up the switches over ``group``."""
    exchange = exchange_of(group)
    usual = exchange.transport
    exchange.transport = TimedTransport(usual, timer)
    try:
        yield
    finally:
        exchange.transport = usual

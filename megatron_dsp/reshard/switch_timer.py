"""How long compute is held up by switches: while it begins them, and while it waits for them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

import torch

from megatron_dsp.reshard.moves import Move
from megatron_dsp.reshard.transports import End

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

    def begin(self, begin: Callable[[list[Move]], End], moves: list[Move]) -> End:
        """``begin(moves)``, timed, as is the end that it returns."""
        end = self._timed(lambda: begin(moves))
        return lambda: self._timed(end)

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

    def _timed(self, call: Callable[[], Result]) -> Result:
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

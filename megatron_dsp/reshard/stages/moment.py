"""Points in time of a device, and of the host where tensors are on the CPU."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor


class Moment:
    """When the device has done what its current stream was given so far; of the CPU, now. It waits for nothing when it is made.

    On CUDA it is an event that tells the time: not to be made while a CUDA graph is captured.
    """

    def __init__(self, device: torch.device):
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record(torch.cuda.current_stream(device))
        else:
            self._seconds = time.perf_counter()

    def since(self, earlier: Moment) -> float:
        """The seconds since an earlier one of the same device. Waits until the device has come so far."""
        if self._event is None or earlier._event is None:
            return self._seconds - earlier._seconds
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1000


def on_gradient(x: Tensor, call: Callable[[], None]) -> None:
    """Call ``call`` once, when the gradient of ``x`` is there, on the stream on which it is computed."""

    def note(gradient: Tensor) -> None:
        hook.remove()  # x may enter more passes
        call()

    hook = x.register_hook(note)

"""Batches that a thread of its own makes, the next ones while one is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch

from megatron_dsp.data.batches import VideoBatch, VideoBatches


class BatchRequest(NamedTuple):
    """All that a batch is a function of: it is ``batches.batch(positions, frames)``."""

    batches: VideoBatches
    positions: tuple[int, ...]
    frames: range


class BatchesAhead:
    """Makes batches on one thread, for a device; those that are expected next before they are asked for.

    What is made ahead is the same as what is made when it is asked for, whatever the threads do meanwhile. There is one thread
    for all batches, so that sources of samples are never read by two at a time.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._coming: dict[BatchRequest, Future[VideoBatch]] = {}

    def take(self, request: BatchRequest, then: Sequence[BatchRequest] | None = None) -> VideoBatch:
        """The batch, on the device. Waits for the thread if it has not made it yet, and never for the device.

        ``then``: the requests that are expected next, which the thread goes on with; what was expected before and is not
        among them is dropped. None: what is expected stays. Errors are those of reading, with their traceback, and come
        with the batch that they belong to.
        """
        for wanted in (request, *(then or ())):
            if wanted not in self._coming:
                self._coming[wanted] = self._begin(wanted)
        batch = self._coming.pop(request)
        if then is not None:
            for other in self._coming.keys() - set(then):
                self._coming.pop(other).cancel()
        # Queued on the current stream. Torch gives pinned memory to nobody else before such a copy of it is done.
        return batch.result().to(self._device, non_blocking=True)

    def _begin(self, request: BatchRequest) -> Future[VideoBatch]:
        # Pinned here: that calls CUDA, which another thread must not while this one captures a graph.
        memory = request.batches.empty(request.positions, request.frames, pin_memory=self._device.type == "cuda")
        return self._thread.submit(request.batches.batch, request.positions, request.frames, memory)

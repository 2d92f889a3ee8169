"""A CUDA stream beside that of compute, on which switches pack and unpack.

Semantics relied on (https://pytorch.org/docs/stable/notes/cuda.html, "CUDA streams"): work on a stream runs in order; an event
recorded on one stream and waited for on another orders the two; the caching allocator gives memory that was freed to later
allocations of the *same* stream at once; ``Work.wait`` of NCCL makes the stream that is current wait for the collective.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_dsp.reshard.labels import Label
from megatron_dsp.reshard.transport.move import End, Move, Transport


class SideStream:
    """One for each group and device. ``priority``: CUDA's, lower first."""

    def __init__(self, device: torch.device, priority: int):
        self._stream = torch.cuda.Stream(device, priority=priority)

    def begin(self, transport: Transport, moves: Sequence[Move], label: Label) -> End:
        """`Transport.begin` on this stream, after what the current stream has been given so far.

        The memory of results (``into`` in each move) is the current stream's. Tensors are kept alive by reference, not by
        ``record_stream``: sources and results until the current stream waits for this one, so that whoever frees them
        later does it in order; messages, allocated here, until this stream waits for their collective.
        """
        compute = torch.cuda.current_stream(self._stream.device)
        # Sources are computed, and whatever had the results' memory before is through with it.
        ready = compute.record_event()
        self._stream.wait_event(ready)
        with torch.cuda.stream(self._stream):
            end = transport.begin(moves, label)
        sources = [move.x for move in moves]

        def finish() -> list[torch.Tensor]:
            with torch.cuda.stream(self._stream):
                results = end()
            done = self._stream.record_event()
            # Memory of sources and results goes back to that of compute, also where the end is called elsewhere, as by a
            # destructor.
            for stream in {compute, torch.cuda.current_stream(self._stream.device)}:
                stream.wait_event(done)
            sources.clear()  # kept until now
            return results

        return finish

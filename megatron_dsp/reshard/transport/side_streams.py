"""Two CUDA streams beside that of compute: on one of them switches pack, on the other they unpack.

What is packed waits for what computes it. On one stream an arrival that is there would be unpacked behind a chunk that is still
computed.

Semantics relied on (https://pytorch.org/docs/stable/notes/cuda.html, "CUDA streams"): work on a stream runs in order; an event
recorded on one stream and waited for on another orders the two; the caching allocator gives memory that was freed to later
allocations of the *same* stream at once; ``Work.wait`` of NCCL makes the stream that is current wait for the collective.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_dsp.reshard.labels import Label
from megatron_dsp.reshard.transport.move import End, Move, Transport


class SideStreams:
    """Those of a group and a device. ``priority``: CUDA's, lower first."""

    def __init__(self, device: torch.device, priority: int):
        self._packing, self._unpacking = (torch.cuda.Stream(device, priority=priority) for _ in range(2))

    def begin(self, transport: Transport, moves: Sequence[Move], label: Label) -> End:
        """`Transport.begin` on these streams, after what the current stream has been given so far.

        The memory of results (``into`` in each move) is the current stream's. Tensors are kept alive by reference, not by
        ``record_stream``: sources, results and messages until both the current stream and that of packing, whose memory
        messages are, wait for what was unpacked, so that whoever frees or reuses them later does it in order.
        """
        device = self._packing.device
        compute = torch.cuda.current_stream(device)
        # Sources are computed, and whatever had the results' memory before is through with it.
        self._packing.wait_event(compute.record_event())
        with torch.cuda.stream(self._packing):
            end = transport.begin(moves, label)
        begun = self._packing.record_event()
        sources = [move.x for move in moves]

        def finish() -> list[torch.Tensor]:
            self._unpacking.wait_event(begun)
            with torch.cuda.stream(self._unpacking):
                results = end()  # this stream waits for the collective
            done = self._unpacking.record_event()
            # Memory of sources and results goes back to that of compute, also where the end is called elsewhere, as by a
            # destructor. Packing waits for no more than it would: what it packs next is computed behind this.
            for stream in {compute, torch.cuda.current_stream(device), self._packing}:
                stream.wait_event(done)
            sources.clear()  # kept until now
            return results

        return finish

"""How the bytes of a switch travel: the interface, and the way through torch.distributed.

A transport moves shards from one dim to another and nothing else; it knows neither gradients nor stages. All dtypes travel.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dsp.errors import UsageError
from megatron_dsp.reshard.buffers import BufferPool
from megatron_dsp.reshard.moves import Move, Parcel, parcels

End = Callable[[], list[Tensor]]  # waits for what was begun and returns its results; to be called once
Pieces = list[list[Tensor]]  # of each move, of each rank


class Transport(Protocol):
    """Moves the shards of tensors over the ranks of one group."""

    name: str
    buffers: BufferPool  # of results and messages

    def check(self, x: Tensor) -> None:
        """Raise UsageError where this transport cannot move ``x``; before any rank enters the collective."""

    def begin(self, moves: list[Move]) -> End:
        """Start one collective that makes all ``moves``; its results are contiguous, those with ``into`` that very memory.

        Several may be under way, begun in the same order on every rank. Sources must not change before the end.
        """


class TorchTransport:
    """Through torch.distributed: in place at an end where a message is contiguous, by a staging copy where it is not.

    The rank's own piece does not enter the collective: one copy takes it to its place. So a switch from or to the outermost
    dim copies each element at most once. On CUDA it is one all-to-all, on the CPU sends and receives that are posted together.
    """

    name = "torch"
    # On the CPU, runs of at least so many bytes travel one by one and uncopied: about what a message costs more than a copy.
    _LEAST_RUN = 512 << 10
    _TAG = 0xD5  # keeps switches apart from other messages between the same ranks

    def __init__(self, group: dist.ProcessGroup):
        # A weak reference: the group is the key that keeps its exchange, and so this, alive.
        self._group = weakref.ref(group)
        self._rank, self._size = group.rank(), group.size()
        self._backends = dict(entry.split(":") for entry in dist.get_backend_config(group).split(","))
        self.buffers = BufferPool()

    def check(self, x: Tensor) -> None:
        backend = self._backends.get(x.device.type)
        if backend is None or (x.is_cuda and backend == "gloo"):
            raise UsageError(
                f'transport "torch" cannot move a tensor on {x.device}: the backends of its group are {self._backends}; '
                "start torch.distributed with one for that device (NCCL for CUDA, Gloo for the CPU), or move the tensor"
            )

    def begin(self, moves: list[Move]) -> End:
        group = self._group()
        if group is None:  # to torch it would mean the world
            raise RuntimeError("the process group of this switch was destroyed; make a new mesh")
        results = [move.result(self._rank, self.buffers) for move in moves]
        sources = [move.sources() for move in moves]
        targets = [move.targets(result) for move, result in zip(moves, results, strict=True)]
        post = self._post_messages if moves[0].x.device.type == "cpu" else self._post_all_to_all
        wait = post(moves, sources, targets, group)
        for source, target in zip(sources, targets, strict=True):
            target[self._rank].copy_(source[self._rank])

        def end() -> list[Tensor]:
            wait()
            return results

        return end

    def _post_messages(
        self, moves: list[Move], sources: Pieces, targets: Pieces, group: dist.ProcessGroup
    ) -> Callable[[], None]:
        receives = [
            (parcel, cast(dist.Work, dist.irecv(parcel.message, group=group, group_src=peer, tag=self._TAG)))
            for peer, parcel in self._parcels(moves, targets, -1)
        ]
        sends = []
        for peer, parcel in self._parcels(moves, sources, 1):
            message = parcel.pack()
            sends.append((message, cast(dist.Work, dist.isend(message, group=group, group_dst=peer, tag=self._TAG))))

        def wait() -> None:
            for parcel, work in receives:
                work.wait()
                parcel.unpack()
            for _, work in sends:
                work.wait()

        return wait

    def _parcels(self, moves: list[Move], pieces: Pieces, step: int) -> Iterator[tuple[int, Parcel]]:
        """The messages to or from each other rank, the nearest in the direction of ``step`` first: not all to the same one."""
        to, messages = [], []
        for peer in ((self._rank + step * distance) % self._size for distance in range(1, self._size)):
            for move, of_ranks in zip(moves, pieces, strict=True):
                piece = of_ranks[peer]
                if piece.numel():
                    parts = move.runs(piece) if move.run(piece) >= self._LEAST_RUN else [piece]
                    to += [peer] * len(parts)
                    messages += [[part] for part in parts]
        return zip(to, parcels(messages, self.buffers), strict=True)

    def _post_all_to_all(
        self, moves: list[Move], sources: Pieces, targets: Pieces, group: dist.ProcessGroup
    ) -> Callable[[], None]:
        nothing = moves[0].x.new_empty(0, dtype=torch.uint8)
        others = [rank for rank in range(self._size) if rank != self._rank]
        received, sent = (
            parcels([[of_ranks[rank] for of_ranks in pieces] for rank in others], self.buffers) for pieces in (targets, sources)
        )
        outputs, inputs = [parcel.message for parcel in received], [parcel.pack() for parcel in sent]
        for messages in (outputs, inputs):
            messages.insert(self._rank, nothing)
        work = dist.all_to_all(outputs, inputs, group=group, async_op=True)

        def wait() -> None:
            work.wait()
            inputs.clear()  # kept until now: the collective runs on another stream
            for parcel in received:
                parcel.unpack()

        return wait

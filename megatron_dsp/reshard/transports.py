"""How the bytes of a switch travel: the interface, and the way through torch.distributed.

A transport moves shards from one dim to another and nothing else; it knows neither gradients nor stages. All dtypes travel.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Protocol, cast

import torch.distributed as dist
from torch import Tensor

from megatron_dsp.errors import UsageError
from megatron_dsp.reshard.buffers import BufferPool
from megatron_dsp.reshard.moves import Move, as_bytes
from megatron_dsp.reshard.route import AllToAll, Kept, Messages, Side, find_all_to_all, find_messages

End = Callable[[], list[Tensor]]  # waits for what was begun and returns its results; to be called once


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

    So a switch from or to the outermost dim copies each element at most once. On CUDA it is one all-to-all; on the CPU, sends
    and receives that are posted together, which reach more of a network's bandwidth than Gloo's all-to-all does, and one copy
    takes the rank's own piece to its place.
    """

    name = "torch"
    # On the CPU, runs of at least so many bytes travel one by one and uncopied: about what a message costs more than a copy.
    _LEAST_RUN = 512 << 10
    _MOST_ROUTES = 256  # that are kept; a model has a few for each of its shapes
    _TAG = 0xD5  # keeps switches apart from other messages between the same ranks

    def __init__(self, group: dist.ProcessGroup):
        # A weak reference: the group is the key that keeps its exchange, and so this, alive.
        self._group = weakref.ref(group)
        self._rank, self._size = group.rank(), group.size()
        self._backends = dict(entry.split(":") for entry in dist.get_backend_config(group).split(","))
        self.buffers = BufferPool()
        self._routes: Kept[Messages | AllToAll] = Kept(self._MOST_ROUTES)

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
        sources = [move.x for move in moves]
        geometry = tuple(move.geometry(result) for move, result in zip(moves, results, strict=True))
        route = self._routes.get(geometry, lambda: self._find_route(moves, results))
        if isinstance(route, Messages):
            wait = self._post_messages(route, sources, results, group)
        else:
            wait = self._post_all_to_all(route, sources, results, group)

        def end() -> list[Tensor]:
            wait()
            return results

        return end

    def _find_route(self, moves: list[Move], results: list[Tensor]) -> Messages | AllToAll:
        if moves[0].x.device.type == "cpu":
            return find_messages(moves, results, self._rank, self._LEAST_RUN)
        return find_all_to_all(moves, results)

    def _post_messages(
        self, route: Messages, sources: list[Tensor], results: list[Tensor], group: dist.ProcessGroup
    ) -> Callable[[], None]:
        receives, sends = [], []
        memory = route.receive_staging.after(results, self.buffers)
        for peer, place, staged in route.receives:
            piece = place.of(memory)
            message = piece if staged is None else staged.of(memory)
            work = cast(dist.Work, dist.irecv(message, group=group, group_src=peer, tag=self._TAG))
            receives.append((work, piece, message))
        memory = route.send_staging.after(sources, self.buffers)
        for peer, place, staged in route.sends:
            message = place.of(memory)
            if staged is not None:
                message = staged.of(memory).copy_(message)
            # The message too: it must live until it has gone.
            sends.append((cast(dist.Work, dist.isend(message, group=group, group_dst=peer, tag=self._TAG)), message))
        for source, target in route.own:
            target.of(results).copy_(source.of(sources))

        def wait() -> None:
            for work, piece, message in receives:
                work.wait()
                if message is not piece:
                    piece.copy_(message)
            for work, _ in sends:
                work.wait()

        return wait

    def _post_all_to_all(
        self, route: AllToAll, sources: list[Tensor], results: list[Tensor], group: dist.ProcessGroup
    ) -> Callable[[], None]:
        received, places = self._lay_out(route.receive, results)
        sent, pieces = self._lay_out(route.send, sources)
        for piece, copy in pieces:
            copy.copy_(piece)
        work = dist.all_to_all(received, sent, group=group, async_op=True)

        def wait() -> None:
            work.wait()
            sent.clear()  # kept until now: on CUDA the collective runs on another stream
            for place, copy in places:
                place.copy_(copy)

        return wait

    def _lay_out(self, side: Side, tensors: list[Tensor]) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
        """The parts as bytes, and the pieces that are not in place there, each with its copy."""
        memory = side.staging.after(tensors, self.buffers)
        parts = [as_bytes(part.of(memory)) for part in side.parts]
        return parts, [(place.of(memory), copy.of(memory)) for place, copy in side.copies]

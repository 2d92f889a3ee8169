"""A switch as messages between each two ranks, posted together, which reach more of a CPU's network than Gloo's all-to-all."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dsp.reshard.transport.buffers import BufferPool
from megatron_dsp.reshard.transport.move import End, Move
from megatron_dsp.reshard.transport.pieces import Strided, contiguous_strides

_TAG = 0xD5  # keeps switches apart from other messages between the same ranks


class Piece(NamedTuple):
    """A part of one of several tensors."""

    tensor: int
    place: Strided

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        """The part: a view."""
        return self.place.of(tensors[self.tensor])


class Message(NamedTuple):
    """A piece that travels between this rank and ``peer``: in place, or as a contiguous copy in staging memory."""

    peer: int
    piece: Piece
    copy: Piece | None


class Staging(NamedTuple):
    """Memory for copies of pieces: so many bytes, with a view of each dtype. No dtypes: none is needed."""

    dtypes: tuple[torch.dtype, ...]
    size: int

    def after(self, tensors: Sequence[Tensor], buffers: BufferPool) -> list[Tensor]:
        """``tensors``, and the views: what pieces are given in."""
        if not self.dtypes:
            return list(tensors)
        memory = buffers.empty([self.size], torch.uint8, tensors[0].device)
        return [*tensors, *(memory.view(dtype) for dtype in self.dtypes)]


class Messages:
    """A switch as sends and receives. One copy takes the rank's own pieces to their places.

    Contiguous runs of at least ``least_run`` bytes travel one by one, in place.
    """

    def __init__(self, moves: Sequence[Move], rank: int, least_run: int):
        """Of moves with these shapes, strides and dtypes."""
        xs, results = [move.x for move in moves], [move.result_like(rank) for move in moves]
        self._shapes = [result.shape for result in results]
        sources, targets = [move.sources() for move in moves], [move.targets(r) for move, r in zip(moves, results, strict=True)]
        self._sends, self._send_staging = _find(moves, xs, sources, rank, 1, least_run)
        self._receives, self._receive_staging = _find(moves, results, targets, rank, -1, least_run)
        self._own = [
            (_piece(index, source[rank], x), _piece(index, target[rank], result))
            for index, (source, target, x, result) in enumerate(zip(sources, targets, xs, results, strict=True))
        ]

    def begin(self, moves: Sequence[Move], group: dist.ProcessGroup, buffers: BufferPool, at_once: bool) -> End:
        """As `Transport.begin`."""
        sources = [move.x for move in moves]
        results = [
            buffers.empty(shape, move.x.dtype, move.x.device) if move.into is None else move.into
            for move, shape in zip(moves, self._shapes, strict=True)
        ]
        receives, sends = [], []
        memory = self._receive_staging.after(results, buffers)
        for peer, piece, copy in self._receives:
            place = piece.of(memory)
            message = place if copy is None else copy.of(memory)
            work = cast(dist.Work, dist.irecv(message, group=group, group_src=peer, tag=_TAG))
            receives.append((work, place, message))
        memory = self._send_staging.after(sources, buffers)
        for peer, piece, copy in self._sends:
            message = piece.of(memory)
            if copy is not None:
                message = copy.of(memory).copy_(message)
            # The message too: it must live until it has gone.
            sends.append((cast(dist.Work, dist.isend(message, group=group, group_dst=peer, tag=_TAG)), message))
        for source, target in self._own:
            target.of(results).copy_(source.of(sources))

        def end() -> list[Tensor]:
            for work, place, message in receives:
                work.wait()
                if message is not place:
                    place.copy_(message)
            for work, _ in sends:
                work.wait()
            return results

        return end


def _find(
    moves: Sequence[Move], tensors: Sequence[Tensor], pieces: list[list[Tensor]], rank: int, step: int, least_run: int
) -> tuple[list[Message], Staging]:
    """The messages of one direction: to the nearest rank first, and from it: not all ranks to the same one at once."""
    messages: list[Message] = []
    dtypes, used = list(dict.fromkeys(tensor.dtype for tensor in tensors)), 0
    # Where one dtype follows another, it starts at a multiple of 16 bytes.
    aligned = 16 if len(tensors) > 1 else 1
    ranks = len(moves[0].split_ranges.parts)
    for peer in ((rank + step * distance) % ranks for distance in range(1, ranks)):
        for index, (move, tensor) in enumerate(zip(moves, tensors, strict=True)):
            whole = pieces[index][peer]
            if not whole.numel():
                continue
            for part in runs(move, whole) if move.run_bytes(whole) >= least_run else [whole]:
                copy = None
                if not part.is_contiguous():
                    place = Strided(used // part.element_size(), tuple(part.shape), contiguous_strides(part.shape))
                    copy = Piece(len(tensors) + dtypes.index(part.dtype), place)
                    used += -(-part.numel() * part.element_size() // aligned) * aligned
                messages.append(Message(peer, _piece(index, part, tensor), copy))
    return messages, Staging(tuple(dtypes) if used else (), used)


def runs(move: Move, piece: Tensor) -> list[Tensor]:
    """The parts that ``piece`` consists of and that are contiguous at both ends."""
    outer = piece.shape[: max(move.gather, move.split)]
    return [piece[index] for index in itertools.product(*map(range, outer))]


def _piece(index: int, part: Tensor, tensor: Tensor) -> Piece:
    """Where ``part`` lies in ``tensor``, the ``index``-th."""
    start, shape = int(part.storage_offset() - tensor.storage_offset()), tuple(part.shape)
    # A tensor of one element is contiguous with any stride, but Gloo wants stride 1.
    return Piece(index, Strided(start, shape, contiguous_strides(shape) if part.is_contiguous() else part.stride()))

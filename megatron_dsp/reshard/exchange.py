"""The exchange object of a group: the only place of this package that calls collectives on activations.

Bytes are moved as bytes, so every dtype travels, bitwise; only sums know their dtype.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dsp.errors import UsageError
from megatron_dsp.layout import shard_ranges, shard_sizes
from megatron_dsp.reshard.agreement import Agreement
from megatron_dsp.reshard.moves import Move, as_bytes
from megatron_dsp.reshard.packing import counts, pack, shard_shapes, unpack
from megatron_dsp.reshard.side_stream import SideStream
from megatron_dsp.reshard.switch_timer import SwitchTimer
from megatron_dsp.reshard.trace import named
from megatron_dsp.reshard.transports import End, TorchTransport, Transport

if TYPE_CHECKING:
    from megatron_dsp.reshard.overlap import Overlap

# torch 2.13 renames these two and warns at the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_ROTATION_TAG = 0xD7  # keeps rotations apart from other messages between the same ranks

_exchanges: weakref.WeakKeyDictionary[dist.ProcessGroup, Exchange] = weakref.WeakKeyDictionary()
_by_name: weakref.WeakValueDictionary[str, Exchange] = weakref.WeakValueDictionary()


def exchange_of(group: dist.ProcessGroup) -> Exchange:
    """The one exchange object of ``group``; it lives as long as the group does."""
    exchange = _exchanges.get(group)
    if exchange is None:
        exchange = _exchanges[group] = _by_name[group.group_name] = Exchange(group)
    return exchange


def exchange_named(name: str) -> Exchange:
    """The exchange of the group whose ``group_name`` this is: what a compiled graph can hold."""
    try:
        return _by_name[name]
    except KeyError:
        raise RuntimeError(f"the process group {name!r} was destroyed; make a new mesh") from None


def open_exchanges() -> list[Exchange]:
    """The exchanges of all groups that have moved something."""
    return list(_exchanges.values())


class Exchange:
    """Collectives of one group, with a count of what was sent. A switch goes through the group's transport, the others through
    torch.distributed.

    ``counts`` maps (stage, operation) to (calls, bytes sent to other ranks) since the group was made.
    """

    def __init__(self, group: dist.ProcessGroup):
        # A weak reference: the group is the key that keeps this object alive.
        self._group = weakref.ref(group)
        self.size = group.size()
        self.rank = group.rank()
        self.name = group.group_desc
        self.transport: Transport = TorchTransport(group)
        self.transport_reason = "no config was given"
        self.agreement: Agreement | None = None  # with "check_collectives"
        self.overlap: Overlap | None = None
        # While exposed communication is measured: what moves the switches to these kinds of stages instead (None: to all).
        self.removed: tuple[Transport, frozenset[str] | None] | None = None
        self.stream_priority = -1  # of the stream that packs and unpacks beside compute; -1: before it
        self.timer: SwitchTimer | None = None  # while the time that switches take of compute's is measured
        self._side_streams: dict[torch.device, SideStream] = {}
        self.counts: dict[tuple[str, str], tuple[int, int]] = {}

    @property
    def group(self) -> dist.ProcessGroup:
        group = self._group()
        if group is None:
            raise RuntimeError(f"the process group {self.name!r} was destroyed; make a new mesh")
        return group

    def switch(
        self, xs: list[Tensor], gather: list[int], split: list[int], sizes: list[int], stage: str, operation: str
    ) -> list[Tensor]:
        """In one collective, move the shard of each tensor from dim ``gather``, of global size ``sizes``, to dim ``split``."""
        with named(f"{operation} {stage}"):
            return self.begin_switch(self.moves(xs, gather, split, sizes), stage, operation)()

    def moves(self, xs: list[Tensor], gather: list[int], split: list[int], sizes: list[int]) -> list[Move]:
        """What `switch` moves."""
        return [
            Move(
                x,
                gather_dim,
                split_dim,
                shard_ranges(size, self.size),
                shard_ranges(x.shape[split_dim], self.size),
            )
            for x, gather_dim, split_dim, size in zip(xs, gather, split, sizes, strict=True)
        ]

    def begin_switch(self, moves: list[Move], stage: str, operation: str, *, beside: bool = False) -> End:
        """Start one collective that makes all ``moves``. What is returned waits for it, and is to be called once.

        Sources must not change before that. ``beside``: packing and unpacking leave the current stream to compute, on CUDA.
        """
        for x, *_ in moves:
            if x.layout != torch.strided or x.device != moves[0].x.device:
                raise UsageError(
                    f"switch: a tensor with layout {x.layout} on {x.device}; dense tensors (torch.strided) are moved, together "
                    "only from one device: convert it first"
                )
            self.transport.check(x)
        if self.agreement is not None:
            wholes = (_whole(move.x, move.gather, sum(b - a for a, b in move.gather_ranges)) for move in moves)
            dims = f"gather {[move.gather for move in moves]}, split {[move.split for move in moves]}"
            self.agreement.check(_text(operation, stage, *wholes, dims))
        moves = [move._replace(x=_plain(move.x)) for move in moves]
        self.count(stage, operation, self.sent_by_switch(moves))
        transport = self.transport
        if self.removed is not None and (self.removed[1] is None or stage.split(" ")[0] in self.removed[1]):
            transport = self.removed[0]
        begin = transport.begin
        if beside and moves[0].x.is_cuda:
            begin = partial(self._side_stream(moves[0].x.device).begin, transport)
        return begin(moves) if self.timer is None else self.timer.begin(begin, moves)

    def _side_stream(self, device: torch.device) -> SideStream:
        stream = self._side_streams.get(device)
        if stream is None:
            stream = self._side_streams[device] = SideStream(device, self.stream_priority)
        return stream

    def rotate(self, xs: list[Tensor], stage: str, operation: str) -> Callable[[], list[Tensor]]:
        """Start sending each tensor to the next rank of the group. What is returned waits for those of the previous rank.

        Tensors are contiguous, of equal shapes on all ranks, and must not change before that.
        """
        if self.agreement is not None:
            self.agreement.check(_text(operation, stage, *(f"{list(x.shape)} {x.dtype}" for x in xs)))
        received = [torch.empty_like(x) for x in xs]
        group, after, before = self.group, (self.rank + 1) % self.size, (self.rank - 1) % self.size
        works = dist.batch_isend_irecv(
            [dist.P2POp(dist.irecv, as_bytes(x), group=group, group_peer=before, tag=_ROTATION_TAG) for x in received]
            + [dist.P2POp(dist.isend, as_bytes(x), group=group, group_peer=after, tag=_ROTATION_TAG) for x in xs]
        )
        self.count(stage, operation, sum(x.nbytes for x in xs))

        def end() -> list[Tensor]:
            for work in works:
                work.wait()
            return received

        return end

    def gather(self, x: Tensor, dim: int, size: int, stage: str, operation: str) -> Tensor:
        """The whole tensor, of which every rank has its shard of ``dim``."""
        if self.agreement is not None:
            self.agreement.check(_text(operation, stage, _whole(x, dim, size), f"dim {dim}"))
        shapes = shard_shapes(x.shape, dim, shard_sizes(size, self.size))
        send = _plain(x).contiguous().view(-1)
        received = send.new_empty(sum(counts(shapes)))
        if len(set(shapes)) == 1:
            _all_gather(as_bytes(received), as_bytes(send), group=self.group)
        else:
            # Gloo's all-gather refuses uneven shards; NCCL's is itself a broadcast from each rank.
            pieces = received.split(counts(shapes))
            pieces[self.rank].copy_(send)
            works = [
                dist.broadcast(as_bytes(piece), group=self.group, group_src=rank, async_op=True)
                for rank, piece in enumerate(pieces)
                if piece.numel()
            ]
            for work in works:
                work.wait()
        self.count(stage, operation, self.sent_by_gather(x))
        return unpack(received, dim, shapes)

    def reduce_scatter(self, x: Tensor, dim: int, stage: str, operation: str) -> Tensor:
        """This rank's shard of ``dim`` of the sum over ranks of ``x``."""
        if self.agreement is not None:
            self.agreement.check(_text(operation, stage, _whole(x, dim, x.shape[dim]), f"dim {dim}"))
        shapes = shard_shapes(x.shape, dim, shard_sizes(x.shape[dim], self.size))
        send, send_sizes = pack(_plain(x), dim, shapes), counts(shapes)
        own, width = send_sizes[self.rank], send.element_size()
        self.count(stage, operation, self.sent_by_reduce_scatter(x, dim))
        if len(set(send_sizes)) == 1:
            received = send.new_empty(own)
            _reduce_scatter(received, send, group=self.group)
            return received.view(shapes[self.rank])
        pieces = send.new_empty(self.size * own)
        dist.all_to_all_single(
            as_bytes(pieces), as_bytes(send), [own * width] * self.size, [size * width for size in send_sizes], group=self.group
        )
        return pieces.view(self.size, *shapes[self.rank]).sum(0)

    def all_reduce(self, x: Tensor, stage: str, operation: str) -> Tensor:
        """The sum of ``x`` over all ranks."""
        if self.agreement is not None:
            self.agreement.check(_text(operation, stage, f"{list(x.shape)} {x.dtype}"))
        total = _plain(x).clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.group)
        self.count(stage, operation, self.sent_by_all_reduce(x))
        return total

    def sent_by_switch(self, moves: list[Move]) -> int:
        """The bytes that leave this rank in a switch."""
        return sum(move.sent_to_others(self.rank) for move in moves)

    def sent_by_gather(self, x: Tensor) -> int:
        """The bytes that leave this rank in a gather of its shard ``x``."""
        return x.nbytes * (self.size - 1)

    def sent_by_reduce_scatter(self, x: Tensor, dim: int) -> int:
        """The bytes that leave this rank in a reduce-scatter over dim ``dim`` of ``x``."""
        size = x.shape[dim]
        own = shard_sizes(size, self.size)[self.rank]
        return x.nbytes // size * (size - own) if size else 0

    def sent_by_all_reduce(self, x: Tensor) -> int:
        """The bytes that leave this rank in an all-reduce of ``x``, by a ring."""
        return ring_all_reduce_bytes(x.nbytes, self.size)

    def count(self, stage: str, operation: str, sent: int) -> None:
        """Note a collective that sends ``sent`` bytes."""
        calls, sent_before = self.counts.get((stage, operation), (0, 0))
        self.counts[stage, operation] = (calls + 1, sent_before + sent)


def ring_all_reduce_bytes(size: int, ranks: int) -> int:
    """The bytes that leave each of ``ranks`` ranks in an all-reduce of ``size`` bytes: a reduce-scatter and an all-gather."""
    return 2 * (ranks - 1) * size // ranks


def _plain(x: Tensor) -> Tensor:
    """``x`` without a pending conjugation or minus sign, which its bytes do not show."""
    return x.resolve_conj().resolve_neg()


def _text(operation: str, stage: str, *about: str) -> str:
    """A collective in words that are the same on all ranks."""
    return ", ".join([operation, *([f"stage {stage!r}"] if stage else []), *about])


def _whole(x: Tensor, dim: int, size: int) -> str:
    return f"whole shape {[*x.shape[:dim], size, *x.shape[dim + 1 :]]} {x.dtype}"

"""The exchange object of a group: the only place of this package that calls torch's collectives on activations.

Bytes are moved as bytes, so every dtype travels, bitwise; only sums know their dtype.
"""

from __future__ import annotations

import weakref

import torch.distributed as dist
from torch import Tensor

from megatron_dsp.layout import shard_sizes
from megatron_dsp.reshard.packing import as_bytes
from megatron_dsp.reshard.transports import TorchTransport, Transport

# torch 2.13 renames these two and warns at the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_exchanges: weakref.WeakKeyDictionary[dist.ProcessGroup, Exchange] = weakref.WeakKeyDictionary()


def exchange_of(group: dist.ProcessGroup) -> Exchange:
    """The one exchange object of ``group``; it lives as long as the group does."""
    exchange = _exchanges.get(group)
    if exchange is None:
        exchange = _exchanges[group] = Exchange(group)
    return exchange


def open_exchanges() -> list[Exchange]:
    """The exchanges of all groups that have moved something."""
    return list(_exchanges.values())


class Exchange:
    """Collectives of one group, with a count of what was sent. A switch goes through the group's transport, the others through
    torch.distributed, on flat, contiguous tensors.

    ``counts`` maps (stage, operation) to (calls, bytes sent to other ranks) since the group was made.
    """

    def __init__(self, group: dist.ProcessGroup):
        # A weak reference: the group is the key that keeps this object alive.
        self._group = weakref.ref(group)
        self.size = group.size()
        self.rank = group.rank()
        self.name = group.group_desc
        self.transport: Transport = TorchTransport(group)
        self.counts: dict[tuple[str, str], tuple[int, int]] = {}

    @property
    def group(self) -> dist.ProcessGroup:
        group = self._group()
        if group is None:
            raise RuntimeError(f"the process group {self.name!r} was destroyed; make a new mesh")
        return group

    def switch(self, x: Tensor, gather: int, split: int, size: int, stage: str, operation: str) -> Tensor:
        """Move the shard of ``x`` from dim ``gather``, of global size ``size``, to dim ``split``, which is whole in ``x``."""
        gather_sizes, split_sizes = shard_sizes(size, self.size), shard_sizes(x.shape[split], self.size)
        moved = self.transport.switch(x, gather, split, gather_sizes, split_sizes)
        if x.numel():
            others = x.shape[split] - split_sizes[self.rank]
            self._count(stage, operation, x.numel() // x.shape[split] * others * x.element_size())
        else:
            self._count(stage, operation, 0)
        return moved

    def all_gather(self, send: Tensor, receive_sizes: list[int], stage: str, operation: str) -> Tensor:
        """Every rank's flat tensor, one after another in the order of ranks."""
        received = send.new_empty(sum(receive_sizes))
        if len(set(receive_sizes)) == 1:
            _all_gather(as_bytes(received), as_bytes(send), group=self.group)
        else:
            # Gloo's all-gather refuses uneven shards; NCCL's is itself a broadcast from each rank.
            pieces = received.split(receive_sizes)
            pieces[self.rank].copy_(send)
            works = [
                dist.broadcast(as_bytes(piece), group=self.group, group_src=rank, async_op=True)
                for rank, piece in enumerate(pieces)
                if piece.numel()
            ]
            for work in works:
                work.wait()
        self._count(stage, operation, send.numel() * send.element_size() * (self.size - 1))
        return received

    def reduce_scatter(self, send: Tensor, send_sizes: list[int], stage: str, operation: str) -> Tensor:
        """The sum over ranks of what each sends to this one; ``send`` holds the pieces for all ranks, in their order."""
        own = send_sizes[self.rank]
        if len(set(send_sizes)) == 1:
            received = send.new_empty(own)
            _reduce_scatter(received, send, group=self.group)
            self._count(stage, operation, (send.numel() - own) * send.element_size())
            return received
        pieces = send.new_empty(self.size * own)
        width = send.element_size()
        dist.all_to_all_single(
            as_bytes(pieces), as_bytes(send), [own * width] * self.size, [size * width for size in send_sizes], group=self.group
        )
        self._count(stage, operation, (send.numel() - own) * width)
        return pieces.view(self.size, own).sum(0)

    def all_reduce(self, tensor: Tensor, stage: str, operation: str) -> Tensor:
        """The sum of ``tensor`` over all ranks, in place."""
        dist.all_reduce(tensor, group=self.group)
        self._count(stage, operation, 2 * (self.size - 1) * tensor.numel() * tensor.element_size() // self.size)
        return tensor

    def _count(self, stage: str, operation: str, sent: int) -> None:
        calls, sent_before = self.counts.get((stage, operation), (0, 0))
        self.counts[stage, operation] = (calls + 1, sent_before + sent)

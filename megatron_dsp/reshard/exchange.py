"""The exchange object of a group: the only place of this package that calls torch's collectives on activations.

Bytes are moved as bytes, so every dtype travels, bitwise; only sums know their dtype.
"""

from __future__ import annotations

import weakref

import torch
import torch.distributed as dist
from torch import Tensor

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
    """Collectives of one group over flat, contiguous tensors, with a count of what was sent.

    ``counts`` maps (stage, operation) to (calls, bytes sent to other ranks) since the group was made.
    """

    def __init__(self, group: dist.ProcessGroup):
        # A weak reference: the group is the key that keeps this object alive.
        self._group = weakref.ref(group)
        self.size = group.size()
        self.rank = group.rank()
        self.name = group.group_desc
        self.counts: dict[tuple[str, str], tuple[int, int]] = {}

    @property
    def group(self) -> dist.ProcessGroup:
        group = self._group()
        if group is None:
            raise RuntimeError(f"the process group {self.name!r} was destroyed; make a new mesh")
        return group

    def all_to_all(self, send: Tensor, send_sizes: list[int], receive_sizes: list[int], stage: str, operation: str) -> Tensor:
        """Send ``send_sizes[p]`` elements of the flat ``send`` to each rank p; return what came, in the order of ranks."""
        received = send.new_empty(sum(receive_sizes))
        width = send.element_size()
        # Even shards too are sent with their sizes: whether they are even is not what each rank could see from its own.
        dist.all_to_all_single(
            _as_bytes(received),
            _as_bytes(send),
            [size * width for size in receive_sizes],
            [size * width for size in send_sizes],
            group=self.group,
        )
        self._count(stage, operation, (send.numel() - send_sizes[self.rank]) * width)
        return received

    def all_gather(self, send: Tensor, receive_sizes: list[int], stage: str, operation: str) -> Tensor:
        """Every rank's flat tensor, one after another in the order of ranks."""
        received = send.new_empty(sum(receive_sizes))
        if len(set(receive_sizes)) == 1:
            _all_gather(_as_bytes(received), _as_bytes(send), group=self.group)
        else:
            # Gloo's all-gather refuses uneven shards; NCCL's is itself a broadcast from each rank.
            pieces = received.split(receive_sizes)
            pieces[self.rank].copy_(send)
            works = [
                dist.broadcast(_as_bytes(piece), group=self.group, group_src=rank, async_op=True)
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
        pieces = self.all_to_all(send, send_sizes, [own] * self.size, stage, operation)
        return pieces.view(self.size, own).sum(0)

    def all_reduce(self, tensor: Tensor, stage: str, operation: str) -> Tensor:
        """The sum of ``tensor`` over all ranks, in place."""
        dist.all_reduce(tensor, group=self.group)
        self._count(stage, operation, 2 * (self.size - 1) * tensor.numel() * tensor.element_size() // self.size)
        return tensor

    def _count(self, stage: str, operation: str, sent: int) -> None:
        calls, sent_before = self.counts.get((stage, operation), (0, 0))
        self.counts[stage, operation] = (calls + 1, sent_before + sent)


def _as_bytes(flat: Tensor) -> Tensor:
    # A tensor of one element is contiguous with any stride, but only stride 1 can be viewed as bytes.
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8)

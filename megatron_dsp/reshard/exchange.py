"""The exchange of a group: its transport, what it has counted, and the one way in for what travels over it.

It lives as long as the group does, in a weak table. It knows nothing of overlap, of timing, or of what is measured: those are
transports that wrap another one, and the room above this one.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dsp.errors import UsageError
from megatron_dsp.reshard.agreement import Agreement
from megatron_dsp.reshard.labels import Label
from megatron_dsp.reshard.transport.move import Beside, End, Move, Transport
from megatron_dsp.reshard.transport.torch_transport import TorchTransport

_exchanges: weakref.WeakKeyDictionary[dist.ProcessGroup, Exchange] = weakref.WeakKeyDictionary()
_by_name: weakref.WeakValueDictionary[str, Exchange] = weakref.WeakValueDictionary()


def exchange_of(group: dist.ProcessGroup) -> Exchange:
    """The one exchange of ``group``."""
    exchange = _exchanges.get(group)
    if exchange is None:
        exchange = _exchanges[group] = Exchange(group)
        _by_name[exchange.members.name] = exchange
    return exchange


def describe_transport(group: dist.ProcessGroup) -> str:
    """By which transport switches over ``group`` travel, and why it was chosen."""
    exchange = exchange_of(group)
    return f"{exchange.transport.name}: {exchange.transport_reason}"


def find_exchange(name: str) -> Exchange:
    """The exchange whose `Members.name` this is: what a compiled graph can hold."""
    exchange = _by_name.get(name)
    if exchange is None:
        raise RuntimeError(f"the process group {name!r} was destroyed; make a new mesh")
    return exchange


def open_exchanges() -> list[Exchange]:
    """The exchanges of all groups that have moved something."""
    return list(_exchanges.values())


class Members(NamedTuple):
    """What primitives need of a group; constants to torch.compile."""

    name: str  # by which operators find the group
    description: str
    size: int
    rank: int


class Exchange:
    """A group's transport and counts.

    Attributes:
        members: of the group.
        transport, transport_reason: what switches go through, and why it was chosen.
        agreement: with "check_collectives".
        counts: of each label, (calls, bytes sent to other ranks) since the group was made.
        shapes: what collectives have found of a shape, by a key of theirs, so that it is found once.
    """

    def __init__(self, group: dist.ProcessGroup):
        # A weak reference: the group is the key that keeps this object alive.
        self._group = weakref.ref(group)
        self.size = group.size()
        self.rank = group.rank()
        self.description = group.group_desc
        # With rank and size: what a compiler keeps on the disk for one rank is not taken for another's, or for another world's.
        name = f"{group.group_name} rank {self.rank} of {self.size}"
        self.members = Members(name, self.description, self.size, self.rank)
        self.transport: Transport = TorchTransport(group)
        self.transport_reason = "no config was given"
        self.agreement: Agreement | None = None
        self.counts: dict[Label, tuple[int, int]] = {}
        self.shapes: dict[Hashable, Any] = {}

    @property
    def group(self) -> dist.ProcessGroup:
        group = self._group()
        if group is None:
            raise RuntimeError(f"the process group {self.description!r} was destroyed; make a new mesh")
        return group

    def begin(self, moves: list[Move], label: Label, sent: int, *, at_once: bool = False, beside: Beside | None = None) -> End:
        """Start one collective that makes all ``moves``. What is returned waits for it, and is to be called once.

        Sources must not change before that. ``sent`` are the bytes that leave this rank (`bytes_to_others`). ``at_once``: what
        is returned is called next. ``beside``: packing and unpacking leave the current stream to compute. Errors: UsageError
        for what cannot be moved, before anything is sent.
        """
        device = moves[0].x.device
        for index, move in enumerate(moves):
            x = move.x
            if x.layout != torch.strided or x.device != device:
                raise UsageError(
                    f"switch: a tensor with layout {x.layout} on {x.device}; dense tensors (torch.strided) are moved, together "
                    "only from one device: convert it first"
                )
            if x.is_conj() or x.is_neg():
                moves[index] = move._replace(x=resolve_flags(x))
        if self.agreement is not None:
            self.agreement.check(in_words(label, *_moves_in_words(moves)))
        end = self.transport.begin(moves, label, at_once=at_once, beside=beside)
        self.count(label, sent)
        return end

    def count(self, label: Label, sent: int) -> None:
        """Note a collective that sends ``sent`` bytes."""
        calls, sent_before = self.counts.get(label, (0, 0))
        self.counts[label] = (calls + 1, sent_before + sent)


def bytes_to_others(moves: Sequence[Move], rank: int) -> int:
    """The bytes that leave ``rank`` in a switch."""
    return sum(elements_to_others(move, rank) * move.x.element_size() for move in moves)


def elements_to_others(move: Move, rank: int) -> int:
    """How many of the tensor's elements leave ``rank``."""
    start, stop = move.split_ranges.parts[rank]
    return move.x.numel() // max(move.x.shape[move.split], 1) * (move.split_ranges.total - (stop - start))


def resolve_flags(x: Tensor) -> Tensor:
    """``x`` without a pending conjugation or minus sign, which its bytes do not show."""
    return x.resolve_conj().resolve_neg()


def in_words(label: Label, *about: str) -> str:
    """A collective in words that are the same on all ranks."""
    stage = [f"stage {str(label.stage)!r}"] if label.kind else []
    return ", ".join([label.operation, *stage, *about])


def whole_in_words(x: Tensor, dim: int, size: int) -> str:
    """The tensor of which each rank has its shard of ``dim``."""
    return f"whole shape {[*x.shape[:dim], size, *x.shape[dim + 1 :]]} {x.dtype}"


def _moves_in_words(moves: Sequence[Move]) -> list[str]:
    wholes = [whole_in_words(move.x, move.gather, move.gather_ranges.total) for move in moves]
    return [*wholes, f"gather {[move.gather for move in moves]}, split {[move.split for move in moves]}"]

"""The way of a switch through torch.distributed: one all-to-all, or on the CPU messages between each two ranks."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dsp.errors import UsageError
from megatron_dsp.reshard.labels import Label
from megatron_dsp.reshard.transport.buffers import BufferPool
from megatron_dsp.reshard.transport.messages import Messages
from megatron_dsp.reshard.transport.move import End, Move
from megatron_dsp.reshard.transport.pieces import Copy, find_side, is_aligned

# torch 2.13 renames it. Its wrapper in Python takes longer than a rank's packing does, to check what holds here already.
_all_to_all = getattr(dist.ProcessGroup, "all_to_all_single", None) or dist.ProcessGroup.alltoall_base

# What every backend takes as it is; of other dtypes the bytes travel.
_SENT_AS_THEY_ARE = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.uint8)


class TorchTransport:
    """In place at an end where a message lies in order, by a copy where it does not. So a switch from or to the outermost dim
    copies each element once.

    How a switch travels depends on shapes alone: it is found once, and kept.
    """

    name = "torch"
    # On the CPU, runs of at least so many bytes travel one by one and uncopied: about what a message costs more than a copy.
    _LEAST_RUN = 512 << 10
    _MOST_ROUTES = 256  # that are kept; a model has a few for each of its shapes

    def __init__(self, group: dist.ProcessGroup):
        # A weak reference: the group is the key that keeps its exchange, and so this, alive.
        self._group = weakref.ref(group)
        self._rank = group.rank()
        self._backends = dict(entry.split(":") for entry in dist.get_backend_config(group).split(","))
        self.buffers = BufferPool()
        self._routes: dict[Hashable, Messages | AllToAll] = {}

    def begin(self, moves: Sequence[Move], label: Label, *, at_once: bool) -> End:
        group = self._group()
        if group is None:  # to torch it would mean the world
            raise RuntimeError("the process group of this switch was destroyed; make a new mesh")
        key = tuple([
            (
                x.shape, x.stride(), x.dtype, x.device, not (x.data_ptr() | x.storage_offset()) & 15,  # type: ignore[operator]
                gather, split, gather_ranges, split_ranges, None if into is None else (into.shape, is_aligned(into)),
            )
            for x, gather, split, gather_ranges, split_ranges, into in moves
        ])  # fmt: skip
        route = self._routes.get(key)
        if route is None:
            if len(self._routes) >= self._MOST_ROUTES:
                self._routes.clear()
            route = self._routes[key] = self._find_route(moves)
        return route.begin(moves, group, self.buffers, at_once)

    def _find_route(self, moves: Sequence[Move]) -> Messages | AllToAll:
        device = moves[0].x.device
        backend = self._backends.get(device.type)
        if backend is None or (device.type == "cuda" and backend == "gloo"):
            raise UsageError(
                f'transport "torch" cannot move a tensor on {device}: the backends of its group are {self._backends}; '
                "start torch.distributed with one for that device (NCCL for CUDA, Gloo for the CPU), or move the tensor"
            )
        if device.type == "cpu":
            return Messages(moves, self._rank, self._LEAST_RUN)
        return AllToAll(moves, self._rank)


class AllToAll:
    """A switch as one all-to-all, which the rank's own pieces pass through too."""

    def __init__(self, moves: Sequence[Move], rank: int):
        """Of moves with these shapes, strides and dtypes."""
        xs, dtypes = [move.x for move in moves], {move.x.dtype for move in moves}
        only = dtypes.pop() if len(moves) == 1 else torch.uint8
        self._dtype = only if only in _SENT_AS_THEY_ARE else torch.uint8
        self._shapes = [move.result_shape(rank) for move in moves]
        results = [
            x.new_empty(shape) if m.into is None else m.into for x, m, shape in zip(xs, moves, self._shapes, strict=True)
        ]
        self._sent = find_side(xs, [move.split for move in moves], [move.split_ranges for move in moves], self._dtype)
        places = [move.gather for move in moves], [move.gather_ranges for move in moves]
        self._received = find_side(results, *places, self._dtype)
        if all(move.gather_ranges.even and move.split_ranges.even for move in moves):
            # All ranks see this alike: those that give sizes and those that do not may run different collectives.
            self._sent, self._received = self._sent._replace(splits=[]), self._received._replace(splits=[])
        self._beside, self._in_order = dist.AllToAllOptions(), dist.AllToAllOptions()
        self._beside.asyncOp, self._in_order.asyncOp = True, False

    def begin(self, moves: Sequence[Move], group: dist.ProcessGroup, buffers: BufferPool, at_once: bool) -> End:
        """As `Transport.begin`. Memory is from torch's allocator, which knows streams; ``buffers`` are the CPU's."""
        sent, received, dtype = self._sent, self._received, self._dtype
        xs = [move.x for move in moves]
        x, results = xs[0], []
        for move, shape in zip(moves, self._shapes, strict=True):
            results.append(move.x.new_empty(shape) if move.into is None else move.into)
        message = x.new_empty(sent.size, dtype=dtype) if sent.copies else _flat(x, dtype)
        for copy in sent.copies:
            in_message, piece = _ends(copy, message, xs)
            in_message.copy_(piece)
        arriving = x.new_empty(received.size, dtype=dtype) if received.copies else _flat(results[0], dtype)
        # Where it ends at once, NCCL runs it on the current stream, in order with the copies: no events.
        options = self._in_order if at_once else self._beside
        work = _all_to_all(group, arriving, message, received.splits, sent.splits, options)
        if at_once:
            if work is not None:
                work.wait()
            self._unpack(arriving, results)
            return lambda: results
        kept = [message, *xs]  # on CUDA the collective runs on another stream

        def end() -> list[Tensor]:
            work.wait()
            kept.clear()
            self._unpack(arriving, results)
            return results

        return end

    def _unpack(self, arriving: Tensor, results: list[Tensor]) -> None:
        for copy in self._received.copies:
            in_message, piece = _ends(copy, arriving, results)
            piece.copy_(in_message)


def _ends(copy: Copy, message: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Where elements lie in the message, and in the tensor."""
    index, dtype, in_tensor, in_message = copy
    tensor = tensors[index]
    if tensor.dtype is not dtype:
        tensor = tensor.view(dtype)
    if message.dtype is not dtype:
        message = message.view(dtype)
    return in_message.of(message), in_tensor.of(tensor)


def _flat(x: Tensor, dtype: torch.dtype) -> Tensor:
    flat = x.view(-1)
    return flat if x.dtype is dtype else flat.view(dtype)

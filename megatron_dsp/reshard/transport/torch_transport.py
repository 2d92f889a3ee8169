"""The way of a switch through torch.distributed: one all-to-all, or on the CPU messages between each two ranks."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dsp.errors import UsageError
from megatron_dsp.reshard.labels import Label
from megatron_dsp.reshard.transport.buffers import BufferPool
from megatron_dsp.reshard.transport.messages import Messages
from megatron_dsp.reshard.transport.move import Beside, End, Move
from megatron_dsp.reshard.transport.pieces import PieceCopy, find_side, is_aligned

# torch 2.13 renames it. Its wrapper in Python takes the host about as long as packing, to check what holds here already.
_all_to_all = getattr(dist.ProcessGroup, "all_to_all_single", None) or dist.ProcessGroup.alltoall_base

# What every backend takes as it is; of other dtypes the bytes travel.
_SENT_AS_THEY_ARE = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.uint8)


class TorchTransport:
    """In place at an end where one tensor's pieces lie in order, by a copy where they do not. So a switch of one tensor from or
    to the outermost dim copies each element once. How it travels depends on shapes alone: it is found once, and kept.
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

    def begin(self, moves: Sequence[Move], label: Label, *, at_once: bool = False, beside: Beside | None = None) -> End:
        if beside is not None:
            return beside.begin(self, moves, label)
        group = self._group()
        if group is None:  # to torch it would mean the world
            raise RuntimeError("the process group of this switch was destroyed; make a new mesh")
        key: tuple[object, ...] = ()
        for x, gather, split, gather_ranges, split_ranges, into in moves:
            aligned = not (x.data_ptr() | x.storage_offset()) & 15  # type: ignore[operator]
            key += (x.shape, x.stride(), x.dtype, x.device, aligned, gather, split, gather_ranges, split_ranges)
            key += (None,) if into is None else (into.shape, is_aligned(into))
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
        results = [move.result_like(rank) for move in moves]
        self._shapes = [result.shape for result in results]
        self._sent = find_side(xs, [move.split for move in moves], [move.split_ranges for move in moves], self._dtype)
        places = [move.gather for move in moves], [move.gather_ranges for move in moves]
        self._received = find_side(results, *places, self._dtype)
        if all(move.gather_ranges.even and move.split_ranges.even for move in moves):
            # All ranks see this alike: those that give sizes and those that do not may run different collectives.
            self._sent, self._received = self._sent._replace(splits=[]), self._received._replace(splits=[])
        self._asynchronous, self._in_order = dist.AllToAllOptions(), dist.AllToAllOptions()
        self._asynchronous.asyncOp, self._in_order.asyncOp = True, False

    def begin(self, moves: Sequence[Move], group: dist.ProcessGroup, buffers: BufferPool, at_once: bool) -> End:
        """As `Transport.begin`. Memory is from torch's allocator, which knows streams; ``buffers`` are the CPU's."""
        xs, results = [], []
        for (x, _, _, _, _, into), shape in zip(moves, self._shapes, strict=True):
            xs.append(x)
            results.append(x.new_empty(shape) if into is None else into)
        sent, received, dtype = self._sent, self._received, self._dtype
        if sent.copies is None:
            message = _flat(x, dtype)
        else:
            message = x.new_empty(sent.size, dtype=dtype)
            for copy in sent.copies:
                in_message, piece = _ends(copy, message, xs)
                in_message.copy_(piece)
        arriving = _flat(results[0], dtype) if received.copies is None else x.new_empty(received.size, dtype=dtype)
        # Where it ends at once, NCCL runs it on the current stream, in order with the copies: no events.
        options = self._in_order if at_once else self._asynchronous
        work = _all_to_all(group, arriving, message, received.splits, sent.splits, options)
        if not at_once:
            # What is sent too: on CUDA the collective runs on another stream.
            return partial(self._end, work, arriving, results, [message, *xs])
        if work is not None:
            work.wait()
        if received.copies:
            self._unpack(arriving, results)
        return lambda: results

    def _end(self, work: dist.Work, arriving: Tensor, results: list[Tensor], sent: list[Tensor]) -> list[Tensor]:
        work.wait()
        sent.clear()  # kept until now
        self._unpack(arriving, results)
        return results

    def _unpack(self, arriving: Tensor, results: list[Tensor]) -> None:
        for copy in self._received.copies or ():
            in_message, piece = _ends(copy, arriving, results)
            piece.copy_(in_message)


def _ends(copy: PieceCopy, message: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Where elements lie in the message, and in the tensor."""
    index, dtype, (start, shape, strides), (at, _, steps) = copy
    tensor = tensors[index]
    if tensor.dtype is not dtype:
        tensor = tensor.view(dtype)
    if message.dtype is not dtype:
        message = message.view(dtype)
    piece = tensor.as_strided(shape, strides, tensor.storage_offset() + start) if start else tensor.as_strided(shape, strides)
    return message.as_strided(shape, steps, at) if steps else message.view(shape), piece


def _flat(x: Tensor, dtype: torch.dtype) -> Tensor:
    flat = x.view(-1)
    return flat if x.dtype is dtype else flat.view(dtype)

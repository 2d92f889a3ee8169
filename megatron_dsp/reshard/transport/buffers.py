"""Memory for what switches send and return, reused on the CPU.

Fresh memory of tens of MB costs several times its use, in page faults: malloc maps it anew and gives it back each time. On CUDA
torch's caching allocator does this already, aware of streams, and is left to it.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from collections.abc import Sequence

import torch
from torch import Tensor


class _Block:
    """An ordinary storage of torch, which may be resized, shared and saved as any other."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.storage = torch.UntypedStorage(size)
        self._handle, self._address = self.storage._cdata, self.storage.data_ptr()

    @property
    def is_free(self) -> bool:
        """Whether nothing but the pool holds it.

        Tensors count in torch, in any thread, those that autograd saved and those of a collective's worker among them; torch
        has no public name for that, and only its newer versions tell Python. Storages that a user took from a tensor are this
        very object, and count in Python.
        """
        return torch._C._storage_Use_Count(self._handle) == 1 and self._references() == _REFERENCES_OF_POOL

    @property
    def is_intact(self) -> bool:
        """Whether its memory is that of the beginning: not resized, nor moved to be shared with other processes."""
        return self.storage.nbytes() == self.size and self.storage.data_ptr() == self._address

    def _references(self) -> int:
        return sys.getrefcount(self.storage)


_REFERENCES_OF_POOL = _Block(1)._references()


class BufferPool:
    """Tensors over blocks of memory that are handed out again when the last view of a tensor is dead.

    A block is free when nothing can read it, autograd's saved tensors and a collective's worker included, so it is never handed
    out too early. The pool never holds more than was once in use at the same time.
    """

    _LEAST = 64 << 10  # bytes; malloc serves less than this from memory that it keeps

    def __init__(self) -> None:
        self._blocks: list[_Block] = []  # the one that was handed out longest ago first
        self._most_in_use = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised contiguous tensor."""
        size = math.prod(shape) * dtype.itemsize
        if device.type != "cpu" or size < self._LEAST:
            return torch.empty(shape, dtype=dtype, device=device)
        # Not by a view: autograd lets nobody write to a view that a function of its own returns.
        return torch.empty(0, dtype=dtype, device=device).set_(self._take(size)).resize_(tuple(shape))

    def _take(self, size: int) -> torch.UntypedStorage:
        # Forward frees memory, if at all, in the order in which it was handed out, and backward in the reverse order.
        for distance in range((len(self._blocks) + 1) // 2):
            for index in (-1 - distance, distance):
                block = self._blocks[index]
                if block.size == size and block.is_free and block.is_intact:
                    self._blocks.append(self._blocks.pop(index))
                    return block.storage
        block = _Block(size)
        _ask_for_huge_pages(block.storage)
        self._make_room(size)
        self._blocks.append(block)
        return block.storage

    def _make_room(self, size: int) -> None:
        """Give free blocks back to torch, so that with ``size`` bytes more there are no more than were in use at once."""
        free = {block for block in self._blocks if block.is_free}
        in_use = size + sum(block.storage.nbytes() for block in self._blocks if block not in free)
        self._most_in_use = max(self._most_in_use, in_use)
        room = self._most_in_use - in_use
        kept = []
        for block in reversed(self._blocks):
            if block in free:
                if not block.is_intact or block.size > room:
                    continue
                room -= block.size
            kept.append(block)
        self._blocks = kept[::-1]


def _ask_for_huge_pages(storage: torch.UntypedStorage) -> None:
    """Fewer page faults where Linux gives huge pages to those who ask. torch does not; NumPy does, from that size on."""
    if storage.nbytes() >= 4 << 20 and hasattr(mmap, "MADV_HUGEPAGE"):
        first = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        size = storage.data_ptr() + storage.nbytes() - first
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)

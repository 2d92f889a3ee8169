"""Memory for what switches send and return, reused on the CPU.

Fresh memory of tens of MB costs several times its use, in page faults: malloc maps it anew and gives it back each time. On CUDA
torch's caching allocator does this already, aware of streams, and is left to it.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class _Lease(np.ndarray):
    """A view of a block that can be referred to weakly: it dies with the storage of the tensor over it."""


class BufferPool:
    """Tensors over blocks of memory that return to the pool when the last view of a tensor is dead.

    A storage lives as long as anything can read it, autograd's saved tensors and a collective's worker included, so a block is
    never handed out too early. The pool never holds more than was once in use at the same time.
    """

    _LEAST = 1 << 20  # bytes; malloc serves less than this from memory that it keeps

    def __init__(self) -> None:
        self._free: list[Tensor] = []  # the longest unused first
        # Blocks come back from any thread, at any time: appending is all that is done there.
        self._returned: deque[Tensor] = deque()
        self._leased = self._most_leased = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised contiguous tensor."""
        size = math.prod(shape) * dtype.itemsize
        if device.type != "cpu" or size < self._LEAST:
            return torch.empty(shape, dtype=dtype, device=device)
        block = self._take(size)
        lease = block.numpy().view(_Lease)
        weakref.finalize(lease, self._returned.append, block).atexit = False
        return torch.frombuffer(lease, dtype=torch.uint8).view(dtype).view(tuple(shape))

    def _take(self, size: int) -> Tensor:
        while self._returned:
            block = self._returned.popleft()
            self._leased -= block.numel()
            self._free.append(block)
        self._leased += size
        self._most_leased = max(self._most_leased, self._leased)
        for index in reversed(range(len(self._free))):
            if self._free[index].numel() == size:
                return self._free.pop(index)
        kept = sum(block.numel() for block in self._free)
        while self._free and self._leased + kept > self._most_leased:
            kept -= self._free.pop(0).numel()
        return torch.empty(size, dtype=torch.uint8)

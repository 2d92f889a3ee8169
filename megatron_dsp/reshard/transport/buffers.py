"""Memory for what switches send and return, reused on the CPU.

Fresh memory of tens of MB costs several times its use, in page faults: malloc maps it anew and gives it back each time. On CUDA
torch's caching allocator does this already, aware of streams, and is left to it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class _Lease(np.ndarray):
    """A view of a block, owned by the storage of the tensor over it. When that dies, the block goes back."""

    block: np.ndarray
    returned: deque[np.ndarray]

    def __del__(self) -> None:
        self.returned.append(self.block)


class BufferPool:
    """Tensors over blocks of memory that return to the pool when the last view of a tensor is dead.

    A storage lives as long as anything can read it, autograd's saved tensors and a collective's worker included, so a block is
    never handed out too early. The pool never holds more than was once in use at the same time.
    """

    _LEAST = 64 << 10  # bytes; malloc serves less than this from memory that it keeps

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []  # the longest unused first
        # Blocks come back from any thread, at any time: appending is all that is done there.
        self._returned: deque[np.ndarray] = deque()
        self._leased = self._most_leased = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised contiguous tensor."""
        size = math.prod(shape) * dtype.itemsize
        if device.type != "cpu" or size < self._LEAST:
            return torch.empty(shape, dtype=dtype, device=device)
        block = self._take(size)
        lease = block.view(_Lease)
        lease.block, lease.returned = block, self._returned
        # Not by a view: autograd lets nobody write to a view that a function of its own returns.
        return torch.frombuffer(lease, dtype=dtype).resize_(tuple(shape))

    def _take(self, size: int) -> np.ndarray:
        while self._returned:
            block = self._returned.popleft()
            self._leased -= block.nbytes
            self._free.append(block)
        self._leased += size
        self._most_leased = max(self._most_leased, self._leased)
        for index in reversed(range(len(self._free))):
            if self._free[index].nbytes == size:
                return self._free.pop(index)
        kept = sum(block.nbytes for block in self._free)
        while self._free and self._leased + kept > self._most_leased:
            kept -= self._free.pop(0).nbytes
        # NumPy asks the kernel for huge pages, which torch does not; and torch aligns its tensors to 64 bytes.
        block = np.empty(size + 64, dtype=np.uint8)
        start = -block.ctypes.data % 64
        return block[start : start + size]

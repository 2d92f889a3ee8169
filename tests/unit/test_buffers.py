from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_dsp.reshard.transport.buffers import BufferPool

LIKE = torch.float32, torch.device("cpu")
N = 1 << 19  # float32: 2 MiB, more than the least that is pooled


def test_memory_is_reused_once_nothing_reads_it():
    pool = BufferPool()
    x = pool.empty([N], *LIKE)
    address, view = x.data_ptr(), x[3:]
    del x
    other = pool.empty([N], *LIKE)
    assert other.data_ptr() != address, "a view still reads it"
    del view
    assert pool.empty([N // 2, 2], torch.int32, torch.device("cpu")).data_ptr() == address


def _storage(x: Tensor) -> Any:
    return x.untyped_storage()


def _array(x: Tensor) -> Any:
    return x.numpy()


def _capsule(x: Tensor) -> Any:
    return torch.utils.dlpack.to_dlpack(x)


def _detached_in_a_thread(x: Tensor) -> Any:
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(x.detach)


@pytest.mark.parametrize("hold", [_storage, _array, _capsule, _detached_in_a_thread])
def test_memory_that_is_held_otherwise_is_not_reused(hold):
    pool = BufferPool()
    x = pool.empty([N], *LIKE)
    address, held = x.data_ptr(), hold(x)
    del x
    other = pool.empty([N], *LIKE)
    assert other.data_ptr() != address
    del held
    assert pool.empty([N], *LIKE).data_ptr() == address


def test_memory_can_be_resized_and_is_then_not_reused():
    pool = BufferPool()
    x = pool.empty([N], *LIKE).fill_(1.0)
    size = x.nbytes
    x.untyped_storage().resize_(0)  # as those who bring activations to other memory do
    x.untyped_storage().resize_(size)
    x.fill_(2.0)
    y = pool.empty([N], *LIKE).fill_(3.0)
    assert (x == 2).all()
    x.untyped_storage().resize_(2 * size)
    del x
    others = [pool.empty([N], *LIKE) for _ in range(2)]
    assert [other.untyped_storage().nbytes() for other in others] == [size, size]
    assert (y == 3).all()


def test_memory_that_is_shared_with_other_processes_is_not_reused():
    pool = BufferPool()
    x = pool.empty([N], *LIKE)
    x.share_memory_()
    del x
    assert not pool.empty([N], *LIKE).is_shared()


def test_memory_that_backward_needs_is_not_reused():
    pool = BufferPool()
    weight = torch.full((N,), 2.0, requires_grad=True)
    x = pool.empty([N], *LIKE)
    x.fill_(3.0)
    y = (weight * x).sum()
    del x
    others = [pool.empty([N], *LIKE).fill_(7.0) for _ in range(3)]
    y.backward()
    assert (weight.grad == 3).all()
    del others, y


def test_memory_comes_back_from_other_threads():
    pool = BufferPool()
    held = [pool.empty([N], *LIKE)]
    address = held[0].data_ptr()
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert pool.empty([N], *LIKE).data_ptr() == address


def test_the_pool_holds_no_more_than_was_in_use_at_once():
    pool = BufferPool()
    for step in range(200):
        kept = [pool.empty([N + 1024 * (step % 17)], *LIKE) for _ in range(3)]
        del kept
    pool.empty([N], *LIKE)
    held = sum(block.storage.nbytes() for block in pool._blocks)
    assert held <= pool._most_in_use <= 3 * 4 * (N + 1024 * 17)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool, torch.complex128, torch.float8_e4m3fn])
def test_dtypes_shapes_and_alignment(dtype):
    x = BufferPool().empty([3, 0, 2], dtype, torch.device("cpu"))
    assert x.shape == (3, 0, 2)
    x = BufferPool().empty([4, N], dtype, torch.device("cpu"))
    assert (x.dtype, x.shape, x.is_contiguous()) == (dtype, (4, N), True)
    assert x.data_ptr() % 64 == 0

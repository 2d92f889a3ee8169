from __future__ import annotations

import threading

import pytest
import torch

from megatron_dsp.reshard.transport.buffers import BufferPool

LIKE = torch.float32, torch.device("cpu")
N = 1 << 19  # float32: 2 MiB, more than the least that is pooled


def test_memory_is_reused_once_nothing_reads_it():
    pool = BufferPool()
    x = pool.empty([N], *LIKE)
    address, view = x.data_ptr(), x[3:]
    del x
    assert pool.empty([N], *LIKE).data_ptr() != address, "a view still reads it"
    del view
    assert pool.empty([N // 2, 2], torch.int32, torch.device("cpu")).data_ptr() == address


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
    held = sum(block.nbytes for block in pool._free) + sum(block.nbytes for block in pool._returned)
    assert held <= pool._most_leased <= 3 * 4 * (N + 1024 * 17)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool, torch.complex128, torch.float8_e4m3fn])
def test_dtypes_shapes_and_alignment(dtype):
    x = BufferPool().empty([3, 0, 2], dtype, torch.device("cpu"))
    assert x.shape == (3, 0, 2)
    x = BufferPool().empty([4, N], dtype, torch.device("cpu"))
    assert (x.dtype, x.shape, x.is_contiguous()) == (dtype, (4, N), True)
    assert x.data_ptr() % 64 == 0

"""Under mpirun: random switches through MPI against slices of the whole tensor, and their gradients. Prints "equal"."""

import random

import torch
import torch.distributed as dist

import megatron_dsp as dsp
from megatron_dsp import launch
from megatron_dsp.reshard.exchange import exchange_of

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
]


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def main() -> None:
    size = launch.start().world_size
    mesh = dsp.initialize({"sequence_parallel": {"size": size, "transport": "mpi"}})
    group = mesh.group("sequence")
    assert exchange_of(group).transport.name == "mpi"
    random.seed(0)
    for case in range(300):
        shape = [random.randint(0 if random.random() < 0.1 else 1, 6) for _ in range(random.randint(2, 6))]
        gather, split = random.sample(range(len(shape)), 2)
        storage = random.sample(range(len(shape)), len(shape))
        generator = torch.Generator().manual_seed(case)
        stored = torch.randint(-9, 9, [shape[dim] for dim in storage], generator=generator).to(random.choice(DTYPES))
        whole = stored.permute([storage.index(dim) for dim in range(len(shape))])
        y = dsp.switch(dsp.split(whole, dim=gather), gather=gather, split=split, size=shape[gather])
        expected = whole.tensor_split(size, split)[group.rank()]
        assert y.shape == expected.shape
        assert torch.equal(bits(y), bits(expected)), (shape, gather, split, whole.dtype)

    x = torch.randn(dsp.shard_sizes(7, size)[group.rank()], 5, dtype=torch.float64, requires_grad=True)
    dsp.switch(x, gather=0, split=1, size=7).square().sum().backward()
    assert torch.equal(x.grad, 2 * x.detach())
    if dist.get_rank() == 0:
        print("equal")


launch.run(main)

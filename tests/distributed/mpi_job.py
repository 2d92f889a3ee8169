"""Under mpirun: random switches through MPI against slices of the whole tensor, and their gradients. Prints "equal".

Takes the name of the transport that the config asks for, "mpi" or "auto".
"""

import random
import sys

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


def whole_tensor(shape: list[int]) -> torch.Tensor:
    """Random, with a random dtype and order of storage."""
    storage = random.sample(range(len(shape)), len(shape))
    generator = torch.Generator().manual_seed(random.randrange(1 << 31))
    stored = torch.randint(-9, 9, [shape[dim] for dim in storage], generator=generator).to(random.choice(DTYPES))
    return stored.permute([storage.index(dim) for dim in range(len(shape))])


def main() -> None:
    size = launch.start().world_size
    mesh = dsp.initialize({"sequence_parallel": {"size": size, "transport": sys.argv[1]}})
    group = mesh.group("sequence")
    exchange = exchange_of(group)
    assert exchange.transport.name == "mpi"
    print(exchange.transport_reason)
    random.seed(0)
    for case in range(300):
        shape = [random.randint(0 if random.random() < 0.1 else 1, 6) for _ in range(random.randint(2, 6))]
        gather, split = random.sample(range(len(shape)), 2)
        # Now and then runs of more than 64 KiB, which travel as messages of their own; and several tensors at once.
        shapes = [[*shape, 40000] if case % 20 == 0 else shape] * random.choice([1, 1, 3])
        wholes = [whole_tensor(shape) for shape in shapes]
        xs = [dsp.split(whole, dim=gather) for whole in wholes]
        ys = dsp.switch(xs, gather=gather, split=split, size=shape[gather])
        for whole, y in zip(wholes, ys, strict=True):
            expected = whole.tensor_split(size, split)[group.rank()]
            assert y.shape == expected.shape
            assert torch.equal(bits(y), bits(expected)), (shape, gather, split, whole.dtype)

    x = torch.randn(dsp.shard_sizes(7, size)[group.rank()], 5, dtype=torch.float64, requires_grad=True)
    dsp.switch(x, gather=0, split=1, size=7).square().sum().backward()
    assert torch.equal(x.grad, 2 * x.detach())
    with torch.profiler.profile(record_shapes=True) as profile:
        dsp.switch(x.detach(), gather=0, split=1, size=7)
    assert not [event.name for event in profile.events() if event.name in ("aten::copy_", "aten::clone", "aten::cat")]
    if dist.get_rank() == 0:
        print("equal")


launch.run(main)

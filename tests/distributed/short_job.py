"""A short job that leaves everything as a careless user would: a mesh, groups and tensors in globals, nothing destroyed.

`short_job.py run` ends through launch.run, `short_job.py plain` just ends, `short_job.py deepspeed` trains one step first.
"""

import sys

import torch
import torch.distributed as dist

import megatron_dsp as dsp
from megatron_dsp import launch

mesh = group = engine = x = y = whole = None


def main() -> None:
    global mesh, group, engine, x, y, whole
    config = {"train_micro_batch_size_per_gpu": 1, "sequence_parallel": {"size": 4}}
    mesh = dsp.initialize(config)
    group = mesh.group("sequence")
    x = torch.randn(2, 1024, 512, requires_grad=True)  # large enough for reused memory
    for _ in range(20):
        y = dsp.switch(x, gather=0, split=1, size=8, group=group)
        y.sum().backward()
        whole = dsp.gather(y, dim=1, size=1024)
    if sys.argv[1] == "deepspeed":
        model = torch.nn.Linear(512, 4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        engine, *_ = dsp.deepspeed_initialize(model=model, optimizer=optimizer, config=config, mesh=mesh)
        engine.backward(engine(y.detach()).sum())
        engine.step()
    dist.all_reduce(torch.ones(1000))


if sys.argv[1] == "plain":
    main()
else:
    launch.run(main)

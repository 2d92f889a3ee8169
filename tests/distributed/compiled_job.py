"""A model that is compiled once and called at several shapes, on two ranks: fails where it differs from eager mode.

`compiled_job.py BACKEND`: started several times with one folder of compiled code, each rank has to find its own there.
"""

import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn

import megatron_dsp as dsp
from megatron_dsp import launch

# Uneven over space, and equal over time: ranks have inputs of one shape and results of two.
SHAPES = ((4, 5), (4, 7), (6, 7), (8, 8), (4, 5))


class Mixer(nn.Module):
    """Every primitive, with uneven shards, and a mask that moves with the tokens."""

    def __init__(self, group: dist.ProcessGroup):
        super().__init__()
        self.group = group
        self.layers = nn.ModuleList(nn.Linear(4, 4, dtype=torch.float64) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        group, (T, _, S, _) = self.group, x.shape
        x, mask = (dsp.split(whole, dim=0, group=group) for whole in (x, mask))
        x = torch.tanh(self.layers[0](x))
        x, mask = dsp.switch((x, mask), gather=0, split=2, size=T, group=group)
        x = torch.tanh(self.layers[1](x)) * mask.unsqueeze(-1)
        x = dsp.switch(x, gather=2, split=0, size=S, group=group, stage="back")
        x = x + dsp.mean(x, dim=0, size=T, group=group)
        whole = dsp.gather(self.layers[2](x), dim=0, size=T, group=group)
        return (whole * torch.linspace(0, 1, S).view(1, 1, S, 1)).square().mean() + dsp.mean_loss(x.square(), group=group)


def find_gradients(model: nn.Module, run) -> tuple[float, list[Tensor], dict]:
    with dsp.ledger() as moved:
        loss = run(model)
        loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    return loss.item(), gradients, moved.by("operation")


def main() -> int:
    mesh = dsp.initialize({"sequence_parallel": {"size": 2}})
    torch.manual_seed(0)
    model = Mixer(mesh.group("sequence"))
    compiled = torch.compile(model, backend=sys.argv[1])

    def switch(x: Tensor, size: int) -> Tensor:
        return dsp.switch(x * 2, gather=0, split=2, size=size, group=mesh.group("sequence")) + 1

    compiled_switch = torch.compile(switch, backend=sys.argv[1])
    worst = 0.0
    for T, S in SHAPES:
        x, mask = torch.randn(T, 2, S, 4, dtype=torch.float64), torch.rand(T, 2, S) < 0.5
        expected, found = (find_gradients(model, lambda _, run=run, x=x, mask=mask: run(x, mask)) for run in (model, compiled))
        assert expected[2] == found[2], "other collectives"
        pairs = [(torch.tensor(expected[0]), torch.tensor(found[0])), *zip(expected[1], found[1], strict=True)]
        shard = dsp.split(x, dim=0)  # given from outside: two ranks compile the same, of results with other sizes
        pairs.append((switch(shard, T), compiled_switch(shard, T)))
        worst = max(worst, *((a - b).abs().max().item() for a, b in pairs))
    print(f"rank {dist.get_rank()} is off by {worst:.1e}", flush=True)
    return 0 if worst <= 1e-14 else 1


if __name__ == "__main__":
    launch.run(main)

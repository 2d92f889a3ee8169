"""A factorised model under torch's FSDP2 (fully_shard), over data and sequence axes, with gradient accumulation.

    python examples/fsdp2.py
    torchrun --standalone --nproc_per_node 4 examples/fsdp2.py --sequence 2

Weights are sharded, and gradients averaged, over data x sequence. Every rank also trains a copy of the model in plain torch,
on everything, and the weights must agree in the end.
"""

from __future__ import annotations

import argparse
import copy

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import megatron_dsp as dsp
from megatron_dsp import launch

T, S, C = 7, 5, 16  # frames, tokens a frame, channels; neither T nor S need be a multiple of the ranks
SAMPLES, BATCH, MICRO_BATCHES, EPOCHS, LR = 16, 8, 2, 2, 0.1


class Factorised(nn.Module):
    """Attends over space and over time; x is [B, T, S, C], or with ``sharded`` this rank's frames of it."""

    def __init__(self) -> None:
        super().__init__()
        self.spatial, self.temporal = (nn.TransformerEncoderLayer(C, 2, 4 * C, 0.0, batch_first=True) for _ in range(2))
        self.head = nn.Linear(C, C)

    def forward(self, x: Tensor, sharded: bool = False) -> Tensor:
        x = attend(self.spatial, x)
        if sharded:
            x = dsp.switch(x, gather=1, split=2, size=T)  # all frames of some tokens
        x = attend(self.temporal, x.transpose(1, 2)).transpose(1, 2)
        if sharded:
            x = dsp.switch(x, gather=2, split=1, size=S)  # and back
        return x + self.head(x)


def attend(layer: nn.Module, x: Tensor) -> Tensor:
    """Run a layer over the third dim of x, every position of the first two apart."""
    return layer(x.flatten(0, 1)).view(x.shape)


def train(model: Factorised, data: TensorDataset, mesh: dsp.Mesh) -> None:
    """Train over the mesh: micro-batches of this rank's samples, and of those its frames."""
    ranks = DeviceMesh.from_group(mesh.group("data", "sequence"), mesh.device.type)
    for module in (model.spatial, model.temporal, model):
        fully_shard(module, mesh=ranks)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    sampler = dsp.sampler(data, mesh)
    loader = DataLoader(data, BATCH // MICRO_BATCHES // mesh.size("data"), sampler=sampler)
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for number, (x, target) in enumerate(loader, start=1):
            x, target = (dsp.split(whole.to(mesh.device), dim=1) for whole in (x, target))
            last = number % MICRO_BATCHES == 0
            model.set_requires_gradient_sync(last)  # average once a step
            loss = dsp.mean_loss((model(x, sharded=True) - target) ** 2)
            (loss / MICRO_BATCHES).backward()
            if last:
                optimizer.step()
                optimizer.zero_grad()


def train_alone(model: nn.Module, data: TensorDataset) -> None:
    """The same in plain torch: whole batches of whole samples."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    sampler = DistributedSampler(data, num_replicas=1, rank=0)
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        for x, target in DataLoader(data, BATCH, sampler=sampler):
            ((model(x) - target) ** 2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sequence", type=int, default=1, help="degree of the sequence axis; data fills the ranks")
    mesh = dsp.initialize({"sequence_parallel": {"size": parser.parse_args().sequence}})
    torch.manual_seed(0)  # the same weights and samples on all ranks
    data = TensorDataset(*torch.randn(2, SAMPLES, T, S, C, dtype=torch.float64))
    model = Factorised().double()  # so that rounding is far below any mistake
    expected = copy.deepcopy(model)
    model.to(mesh.device)
    train(model, data, mesh)
    train_alone(expected, data)

    difference = 0.0
    for weight, other in zip(model.parameters(), expected.parameters(), strict=True):
        difference = max(difference, ((weight.full_tensor().cpu() - other).abs().max() / other.abs().max()).item())
    if dist.get_rank() == 0:
        print(f"{mesh}: weights differ from one process by {difference:.1e}, relative")
    if difference > 1e-10:
        raise RuntimeError("the run over ranks does not equal one process")


if __name__ == "__main__":
    launch.run(main)

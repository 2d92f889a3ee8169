"""An ordinary factorised attention model, made sequence parallel.

    python examples/factorised_attention.py
    torchrun --standalone --nproc_per_node 2 examples/factorised_attention.py

The model alternates attention over space (S tokens of a frame) and over time (T frames). Its layers are torch's own,
unmodified. `forward_sharded` runs the same layers with the shard on the dim that each does not mix. Every rank also trains
a copy of the model in plain torch, on everything, and the two must agree.
"""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import Tensor, nn

import megatron_dsp as dsp
from megatron_dsp import launch

B, T, S, C = 2, 5, 6, 16  # batch, frames, tokens a frame, channels; neither T nor S need be a multiple of the ranks
STEPS, LR = 5, 0.1


class Factorised(nn.Module):
    """Attends over space and over time in turns. Knows nothing of ranks."""

    def __init__(self, pairs: int = 2):
        super().__init__()
        self.spatial, self.temporal = (
            nn.ModuleList(nn.TransformerEncoderLayer(C, 2, 4 * C, dropout=0, batch_first=True) for _ in range(pairs))
            for _ in range(2)
        )
        self.head = nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        for spatial, temporal in zip(self.spatial, self.temporal, strict=True):
            x = over_space(spatial, x)
            x = over_time(temporal, x)
        return self.head(x)


def over_space(layer: nn.Module, x: Tensor) -> Tensor:
    """Run a [batch, length, C] layer over dim 2 of x [B, T, S, C], any part of T."""
    return layer(x.flatten(0, 1)).view(x.shape)


def over_time(layer: nn.Module, x: Tensor) -> Tensor:
    """Run a [batch, length, C] layer over dim 1 of x [B, T, S, C], any part of S."""
    return over_space(layer, x.transpose(1, 2)).transpose(1, 2)


def forward_sharded(model: Factorised, x: Tensor) -> Tensor:
    """``model(x)`` over the ranks of the current mesh: x is whole on every rank, the result is this rank's frames."""
    x = dsp.split(x, dim=1)
    for spatial, temporal in zip(model.spatial, model.temporal, strict=True):
        x = over_space(spatial, x)
        x = dsp.switch(x, gather=1, split=2, size=T)  # frames become whole, the tokens of a frame are sharded
        x = over_time(temporal, x)
        x = dsp.switch(x, gather=2, split=1, size=S)  # and back
    return model.head(x)


def average(gradients: Tensor, mesh: dsp.Mesh) -> None:
    """The one gradient rule: an average over data x sequence. DDP, FSDP2 and ``dsp.deepspeed_initialize`` do the same."""
    group = mesh.group("data", "sequence")
    dist.all_reduce(gradients, group=group)
    gradients /= group.size()


def step_down(model: nn.Module, loss: Tensor, mesh: dsp.Mesh | None = None) -> tuple[Tensor, ...]:
    """One step of gradient descent; returns the gradients, averaged over the mesh."""
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss, parameters)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if mesh is not None:
                average(gradient, mesh)
            parameter.sub_(gradient, alpha=LR)
    return gradients


def difference(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def main() -> None:
    mesh = dsp.initialize({"sequence_parallel": {"size": launch.start().world_size}})
    torch.manual_seed(0)  # the same weights and data on all ranks
    model = Factorised().to(mesh.device, torch.float64)
    reference = copy.deepcopy(model)
    x, target = torch.randn(2, B, T, S, C, device=mesh.device, dtype=torch.float64)

    def show(text: str) -> None:
        if dist.get_rank() == 0:
            print(text, flush=True)

    show(f"{mesh}, on {mesh.device.type}")
    outputs = gradients = 0.0
    for step in range(STEPS):
        y = forward_sharded(model, x)
        loss = dsp.mean_loss((y - dsp.split(target, dim=1)) ** 2)
        expected = reference(x)
        expected_loss = ((expected - target) ** 2).mean()

        outputs = max(outputs, difference(dsp.gather(y.detach(), dim=1, size=T), expected))
        for gradient, other in zip(step_down(model, loss, mesh), step_down(reference, expected_loss), strict=True):
            gradients = max(gradients, difference(gradient, other))
        mean = loss.detach().clone()
        average(mean, mesh)
        show(f"step {step}  loss {mean.item():.12f}  in one process {expected_loss.item():.12f}")
    show(f"largest relative difference to one process: outputs {outputs:.1e}, averaged gradients {gradients:.1e}")
    if max(outputs, gradients) > 1e-10:
        raise RuntimeError("the sharded run does not equal one process")


if __name__ == "__main__":
    launch.run(main)

"""What the examples on models of third parties share: a plan compared with one process, and training under DeepSpeed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import megatron_dsp as dsp
from megatron_dsp import launch

CONFIG = Path(__file__).with_name("ds_config.json")
STEPS, LR = 3, 0.1  # of SGD: under Adam, a wrong factor in gradients would not show
TOLERANCE = 1e-5  # of losses, relative; in fp32 they agree to about 1e-6


def add_noise(model: nn.Module, scale: float = 0.05) -> nn.Module:
    """Add the same noise to ``model``'s parameters on every rank; returns ``model``. Layers that start at zero hide errors."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


def tensor(output: Any) -> Tensor:
    """What a model returned, or the first item of it."""
    return output if isinstance(output, Tensor) else output[0]


def run(
    make_model: Callable[[], nn.Module], make_inputs: Callable[[], dict[str, Any]], make_plan: Callable[[nn.Module], dsp.Plan]
) -> None:
    """Verify a plan, then train a model under it with DeepSpeed, and the same model in plain torch on every rank.

    All ranks are one sequence group, and the data degree is 1: every rank makes the same weights and inputs.

    Errors: UsageError where the plan is wrong; RuntimeError where the losses are not those of one process.
    """
    config = json.loads(CONFIG.read_text())
    config["sequence_parallel"]["size"] = launch.start().world_size
    mesh = dsp.initialize(config)

    def made() -> nn.Module:
        torch.manual_seed(0)
        return make_model().to(mesh.device)

    def show(text: str) -> None:
        if dist.get_rank() == 0:
            print(text, flush=True)

    model, alone = made(), made()  # twice, as not all models can be copied
    inputs = {name: x.to(mesh.device) if isinstance(x, Tensor) else x for name, x in make_inputs().items()}
    plan = make_plan(model)
    show(f"{mesh}, on {mesh.device.type}")
    show(f"verify: {dsp.verify(model, inputs, plan=plan, mesh=mesh)}")

    dsp.parallelize(model, plan, mesh=mesh)
    optimizer, optimizer_alone = (torch.optim.SGD(m.parameters(), LR) for m in (model, alone))
    engine, *_ = dsp.deepspeed_initialize(model=model, optimizer=optimizer, config=config, mesh=mesh)
    target = torch.randn(tensor(alone(**inputs)).shape).to(mesh.device)  # another one at each position
    for step in range(STEPS):
        loss, loss_alone = ((tensor(m(**inputs)) - target).square().mean() for m in (engine, alone))
        engine.backward(loss)
        engine.step()
        loss_alone.backward()
        optimizer_alone.step()
        optimizer_alone.zero_grad()
        show(f"step {step}  loss {loss.item():.8f}  in one process {loss_alone.item():.8f}")
        if abs(loss.item() - loss_alone.item()) > TOLERANCE * loss_alone.item():
            raise RuntimeError(f"step {step}: the loss {loss.item()} is not that of one process, {loss_alone.item()}")

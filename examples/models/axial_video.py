"""Axial attention over video: along time, height and width in turns, or along all three at once and added up.

    python examples/models/axial_video.py
    torchrun --standalone --nproc_per_node 2 examples/models/axial_video.py
    deepspeed --num_gpus 2 examples/models/axial_video.py

The models are three `AxialAttention` of axial-attention each, unmodified, on activations [B, T, H, W, C]. In turns, their nine
attentions take four switches. Added up, those along time take two each, there and back, and the others none.
"""

from __future__ import annotations

from functools import partial

import torch
from axial_attention import AxialAttention
from common import add_noise, run
from torch import nn

import megatron_dsp as dsp
from megatron_dsp import launch

C = 16


def make_model(summed: bool = False) -> nn.Sequential:
    # Nine attentions in a row, without residuals, average all positions away unless they are sharp: large weights.
    return add_noise(
        nn.Sequential(*(AxialAttention(C, num_dimensions=3, heads=4, sum_axial_out=summed) for _ in range(3))),
        0.05 if summed else 0.25,
    )


def make_inputs(B: int = 2, T: int = 5, H: int = 6, W: int = 7) -> dict[str, torch.Tensor]:
    return {"input": torch.randn(B, T, H, W, C)}


def make_plan(model: nn.Sequential) -> dsp.Plan:
    """Lazy where one attention hands its tensor to the next; around where three take the same tensor, which stays as it is."""
    return dsp.Plan(
        enter=dsp.Boundary("", {"input": "B T H W C"}),
        leave=dsp.Boundary("", {0: "B T H W C"}, after=True),
        modules={f"*.axial_attentions.{i}": dsp.Needs("B T H W C", whole=dim) for i, dim in enumerate("THW")},
        **({"switching": "around", "shard": "T"} if model[0].sum_axial_out else {"switching": "lazy"}),
    )


def main() -> None:
    for summed in (False, True):
        run(partial(make_model, summed), make_inputs, make_plan)


if __name__ == "__main__":
    launch.run(main)

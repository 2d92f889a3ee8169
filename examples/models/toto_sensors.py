"""Toto's transformer over records of many sensors, sharded over sensors or over time, whichever a layer does not attend along.

    python examples/models/toto_sensors.py
    torchrun --standalone --nproc_per_node 2 examples/models/toto_sensors.py
    deepspeed --num_gpus 2 examples/models/toto_sensors.py

The model is the `Transformer` of toto-ts, unmodified, on activations [B, V, T, D]: batch, variates (one a sensor), times,
features. Its layers hand one tensor on, so the plan is lazy: six layers, of which the third and the last attend along variates
and the others along time, take three switches.
"""

from __future__ import annotations

import torch
from common import add_noise, run
from toto.model.transformer import Transformer

import megatron_dsp as dsp
from megatron_dsp import launch


def make_model() -> Transformer:
    model = Transformer(
        num_layers=6,
        embed_dim=32,
        num_heads=4,
        mlp_hidden_dim=64,
        dropout=0.0,
        spacewise_every_n_layers=3,
        spacewise_first=False,
        use_memory_efficient_attention=False,  # it is xFormers'
    )
    return add_noise(model)


def make_inputs(B: int = 2, V: int = 5, T: int = 9) -> dict[str, torch.Tensor]:
    """Records, and the group of each sensor at each time: layers over sensors attend within groups."""
    return {"inputs": torch.randn(B, V, T, 32), "id_mask": torch.randint(2, (B, V, T)).float()}


def make_plan(model: Transformer) -> dsp.Plan:
    needs = {
        "TIME": dsp.Needs("B V T D", whole="T", activation="inputs"),
        "SPACE": dsp.Needs(
            "B V T D", whole="V", activation="inputs", arguments={"attention_mask": dsp.Slice("(B T) heads rows columns")}
        ),
    }
    return dsp.Plan(
        switching="lazy",
        enter=dsp.Boundary("layers.0", {"inputs": "B V T D"}),
        leave=dsp.Boundary(f"layers.{len(model.layers) - 1}", {0: "B V T D"}, after=True),
        modules={f"layers.{i}": needs[layer.attention_axis.name] for i, layer in enumerate(model.layers)},
    )


if __name__ == "__main__":
    launch.run(lambda: run(make_model, make_inputs, make_plan))

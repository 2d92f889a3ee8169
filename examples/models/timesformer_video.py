"""TimeSformer's divided attention over video, with frames sharded, and with a token that belongs to no frame.

    python examples/models/timesformer_video.py
    torchrun --standalone --nproc_per_node 2 examples/models/timesformer_video.py
    deepspeed --num_gpus 2 examples/models/timesformer_video.py

The model is the `TimesformerModel` of transformers, unmodified. Between modules an activation is [B, 1 + S T, C]: a class
token, then patches. Each layer attends over time on [(B S), T, C], which takes two switches, then over space on
[(B T), 1 + S, C]: there each frame has a class token of its own, and the layer goes on with their mean over all frames, which
is an all-reduce. The layers read the number of frames in their config, and find that of the rank's shard.
"""

from __future__ import annotations

import torch
from common import add_noise, run
from transformers import TimesformerConfig, TimesformerModel

import megatron_dsp as dsp
from megatron_dsp import launch

PATCH = 4


def make_model(T: int = 7, side: int = 5) -> TimesformerModel:
    """For videos of ``T`` frames of ``side`` x ``side`` patches, which the model fixes."""
    config = TimesformerConfig(
        image_size=PATCH * side,
        patch_size=PATCH,
        num_frames=T,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
    )
    return add_noise(TimesformerModel(config))


def make_inputs(B: int = 2, T: int = 7, side: int = 5) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(B, T, 3, PATCH * side, PATCH * side)}


def make_plan(model: TimesformerModel) -> dsp.Plan:
    return dsp.Plan(
        shard="T",
        sizes=dsp.Boundary("", {"pixel_values": "B T channels height width"}),
        enter=dsp.Boundary("encoder.layer.0", {"hidden_states": "B 1+(S T) C"}),
        leave=dsp.Boundary("layernorm", {0: "B 1+(S T) C"}),
        modules={
            "encoder.layer.*.temporal_attention": dsp.Needs("(B S) T C", whole="T", outputs={0: "(B S) T C"}),
            "encoder.layer.*.attention": dsp.Needs(
                "(B T) 1+S C", whole="S", outputs={0: dsp.Reduced("(B T) 1+S C", over="T", by="mean")}
            ),
        },
        attributes={"encoder.layer.*": {"config.num_frames": dsp.LocalSize("T")}},
        independent="B",
    )


if __name__ == "__main__":
    launch.run(lambda: run(make_model, make_inputs, make_plan))

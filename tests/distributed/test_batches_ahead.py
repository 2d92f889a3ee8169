"""What the video transformer reads ahead is what the training loop asks for next, on every data rank."""

from __future__ import annotations

from itertools import chain
from types import SimpleNamespace

import numpy as np
import torch

import megatron_dsp as dsp
from megatron_dsp.data import Clips, ClipSamples, Video, VideoBatches
from megatron_dsp.models.video_dit import VideoDiTConfig
from megatron_dsp.training.loop import _micro_batches
from megatron_dsp.training.video_diffusion import VideoDiffusion

MICRO, STEPS, DATA, ITERATIONS = 2, 3, 2, 4
GLOBAL = MICRO * STEPS * DATA
# What the loop asks of an engine to know the positions of a step.
ENGINE = SimpleNamespace(train_micro_batch_size_per_gpu=lambda: MICRO, gradient_accumulation_steps=lambda: STEPS)


def _read_ahead() -> list[bool]:
    """Of each micro-batch of a run, whether what is then expected are the loop's next two."""
    mesh = dsp.Mesh()
    frames = np.random.default_rng(0).integers(0, 256, (40, 4, 4, 3), dtype=np.uint8)
    samples = ClipSamples(Clips([Video("clip.mp4", frames)], frames=2), conditioning_tokens=2, conditioning_width=4)
    training, validation = (
        VideoBatches(
            samples=samples,
            global_batch_size=GLOBAL,
            seed=seed,
            patch=(1, 2, 2),
            drop_probability=0.0,
            clean_frame_probability=0.0,
        )
        for seed in (0, 1)
    )
    config = VideoDiTConfig(layers=1, hidden=8, heads=2, conditioning_size=4, patch=(1, 2, 2))
    workload = VideoDiffusion(config, mesh, "dsp", training=training, validation=validation)
    steps = (_micro_batches(ENGINE, mesh, GLOBAL * iteration) for iteration in range(ITERATIONS))
    micro_batches = list(chain.from_iterable(steps))
    right = []
    for number, positions in enumerate(micro_batches[:-2]):
        (noisy, *_), _ = workload.micro_batch(positions, validation=False)
        assert torch.isfinite(noisy).all()
        if number % 4 == 1:
            workload.micro_batch(positions, validation=True)
        following = [workload._request(training, later) for later in micro_batches[number + 1 : number + 3]]
        right.append(list(workload._ahead._coming) == following)
    return right


def test_what_is_read_ahead_is_what_the_loop_asks_for_next(ranks):
    assert ranks(DATA, _read_ahead) == [[True] * (STEPS * ITERATIONS - 2)] * DATA

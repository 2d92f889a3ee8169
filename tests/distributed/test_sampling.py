"""Sampling and evaluation on several ranks: what one process gives, in a part of its memory."""

from __future__ import annotations

import itertools
from pathlib import Path

import jobs
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from test_latents import write_latents

from megatron_dsp.layout import shard_range
from megatron_dsp.models.video_dit import VideoDiT, VideoDiTConfig
from megatron_dsp.reshard.exchange import exchange_of
from megatron_dsp.training import rectified_flow

TRAIN, SAMPLE, EVALUATE = (f"pretrain_scripts/{name}_video.py" for name in ("pretrain", "sample", "evaluate"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with latents, and a checkpoint of a few iterations on them, with moving averages."""
    folder = tmp_path_factory.mktemp("sampling")
    write_latents(folder)
    arguments = ["--data-path", folder, "--micro-batch-size", 4, "--lr", 0.02, "--train-iters", 12, "--clip-grad", 1]
    more = ["--ema-decay", 0.8, "--save", folder / "run", "--sample-steps", 0, "--eval-iters", 0]
    status, output = jobs.run("alone", 1, TRAIN, *arguments, *more)
    assert status == 0, output
    return folder


def _sampled(trained: Path, folder: Path, ranks: int, sequence: int, *more: object) -> dict[str, torch.Tensor]:
    arguments = ["--data-path", trained, "--load", trained / "run", "--samples-dir", folder, "--num-samples", 3]
    how = ["--micro-batch-size", 2, "--sample-steps", 4, "--guidance-scale", 3, "--dynamic-sequence-parallel-size", sequence]
    status, output = jobs.run("torchrun" if ranks > 1 else "alone", ranks, SAMPLE, *arguments, *how, *more)
    assert status == 0, output
    assert "peak memory a rank" in output
    return {f"{path.name} {name}": tensor for path in sorted(folder.iterdir()) for name, tensor in load_file(path).items()}


@pytest.mark.parametrize(("ranks", "sequence"), [(2, 2), pytest.param(4, 4, marks=pytest.mark.long)])
def test_sampling_equals_one_process(trained, tmp_path, ranks, sequence):
    more = ["--ema", "--given-frames", 1, "--timestep-base-tokens", 10]
    alone = _sampled(trained, tmp_path / "alone", 1, 1, *more)
    assert len(alone) == 4  # two files, of two samples and of one, each real and sampled
    together = _sampled(trained, tmp_path / "together", ranks, sequence, *more)
    assert together.keys() == alone.keys()
    for name, clip in together.items():
        torch.testing.assert_close(clip, alone[name], rtol=1e-5, atol=1e-5)
    raw = _sampled(trained, tmp_path / "raw", 1, 1, *more[1:])
    assert any((raw[name] - clip).abs().max() > 1e-3 for name, clip in alone.items())  # other weights than the average


@pytest.mark.long
def test_data_ranks_share_the_samples(trained, tmp_path):
    alone = _sampled(trained, tmp_path / "alone", 1, 1)
    together = _sampled(trained, tmp_path / "together", 4, 2)
    assert together.keys() == alone.keys()
    for name, clip in together.items():
        torch.testing.assert_close(clip, alone[name], rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_evaluation_equals_one_process(trained):
    losses = []
    for ranks in (1, 4):
        arguments = ["--data-path", trained, "--load", trained / "run", "--dynamic-sequence-parallel-size", min(ranks, 2)]
        status, output = jobs.run(
            "torchrun" if ranks > 1 else "alone", ranks, EVALUATE, *arguments, "--eval-iters", 4 // min(ranks, 2)
        )
        assert status == 0, output
        losses.append(float(output.split("validation loss of 4 samples:")[1].split()[0]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


CONFIG = VideoDiTConfig(layers=2, hidden=64, heads=4, conditioning_size=8, patch=(1, 2, 2), channels=4)
T, H, W = 8, 32, 32


def _peak() -> int:
    """The most memory at a time that two steps of sampling take on this rank; noise and result aside."""
    group = dist.group.WORLD
    exchange_of(group).transport.buffers._LEAST = 1 << 62  # all memory is torch's, which the profiler sees
    torch.manual_seed(0)
    model = VideoDiT(CONFIG).eval()
    frames = range(*shard_range(T, group.size(), group.rank()))
    noise = torch.randn(len(frames), 1, 4, H, W)
    conditioning, mask = torch.randn(1, 3, 8), torch.ones(1, 3, dtype=torch.bool)

    def velocity(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return model(x, timesteps, conditioning, mask, group=group)

    with torch.profiler.profile(profile_memory=True) as profile:
        rectified_flow.sample(velocity, noise, noise, 0, T, 1, frames, [1.0, 0.5, 0.0])
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def test_a_rank_takes_its_part_of_the_memory_of_activations(ranks):
    (alone,) = ranks(1, _peak)
    for size in (2, 4):
        assert max(ranks(size, _peak)) / alone <= 1 / size + 0.1

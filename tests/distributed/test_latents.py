"""Training on latents and text of several sizes: equal to one process, and resumed at a sample."""

from __future__ import annotations

import json
from pathlib import Path

import jobs
import pytest
import torch
from safetensors.torch import save_file

SCRIPT = "pretrain_scripts/pretrain_video.py"
# (frames, height, width): images and videos, uneven over two ranks, and with fewer token frames than ranks.
BUCKETS = [(1, 8, 12), (5, 8, 12), (3, 12, 8), (7, 4, 8)]


def write_latents(folder: Path) -> None:
    """One shard for each bucket, of different numbers of samples, with texts of different lengths, some without."""
    torch.manual_seed(0)
    for bucket, (frames, height, width) in enumerate(BUCKETS):
        tensors = {}
        for sample in range(5 + 3 * bucket):
            name = f"{bucket}_{sample}"
            tensors[f"{name}.latent"] = torch.randn(frames, 4, height, width)
            if sample % 4:
                tensors[f"{name}.text"] = torch.randn(sample % 4 + 1, 6)
                tensors[f"{name}.mask"] = torch.arange(sample % 4 + 1) < max(1, sample % 4)
        save_file(tensors, folder / f"shard{bucket}.safetensors")


@pytest.fixture(scope="module")
def latents(tmp_path_factory) -> list[object]:
    folder = tmp_path_factory.mktemp("latents")
    write_latents(folder)
    # Whole stages: a resumed run measures anew, and may choose chunks, which round differently.
    overlap = {"overlap": {"enabled": False}}
    config = {"train_batch_size": 4, "gradient_clipping": 1.0, "zero_optimization": {"stage": 1}, "sequence_parallel": overlap}
    (folder / "ds_config.json").write_text(json.dumps(config))
    shift = ["--timestep-base-tokens", 12, "--lr", 1e-3, "--log-interval", 1, "--sample-steps", 0, "--eval-interval", 1000]
    return ["--deepspeed_config", folder / "ds_config.json", "--data-path", folder, *shift]


def _losses(ranks: int, *arguments: object) -> dict[int, float]:
    status, output = jobs.run("torchrun" if ranks > 1 else "alone", ranks, SCRIPT, *arguments)
    assert status == 0, output
    return jobs.losses(output)


def test_mixed_buckets_equal_one_process(latents):
    alone = _losses(1, *latents, "--train-iters", 12, "--micro-batch-size", 4)
    assert len(alone) == 12
    sharded = _losses(3, *latents, "--train-iters", 12, "--micro-batch-size", 4, "--dynamic-sequence-parallel-size", 3)
    assert sharded == pytest.approx(alone, rel=1e-5)


@pytest.mark.long
def test_200_steps_of_mixed_buckets_equal_one_process_and_resume_in_the_middle(latents, tmp_path):
    alone = _losses(1, *latents, "--train-iters", 200, "--micro-batch-size", 4)
    arguments = [*latents, "--train-iters", 200, "--micro-batch-size", 2, "--dynamic-sequence-parallel-size", 2]
    whole = _losses(4, *arguments, "--save", tmp_path, "--save-interval", 100)
    assert len(whole) == 200
    assert whole == pytest.approx(alone, rel=1e-5)
    (tmp_path / "latest").write_text("global_step100")
    resumed = _losses(4, *arguments, "--load", tmp_path)
    assert resumed == {iteration: loss for iteration, loss in whole.items() if iteration > 100}


@pytest.mark.long
def test_a_pipeline_takes_buckets(latents):
    alone = _losses(1, *latents, "--train-iters", 20, "--micro-batch-size", 4)
    degrees = ["--dynamic-sequence-parallel-size", 2, "--pipeline-model-parallel-size", 2]
    piped = _losses(4, *latents, "--train-iters", 20, "--micro-batch-size", 2, *degrees)
    assert piped == pytest.approx(alone, rel=1e-5)

"""What a job is told to change after it has run out of memory."""

from __future__ import annotations

import re
from dataclasses import replace

from megatron_dsp import config as configs
from megatron_dsp.models.video_dit import PRESETS
from megatron_dsp.training.dry_run import Job, dry_run
from megatron_dsp.training.out_of_memory import suggest


def _job(sequence: int, **changes: object) -> Job:
    config = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 1, "sequence_parallel": {"size": sequence}}
    zero = {"zero_optimization": {"stage": 1, "reduce_bucket_size": 1000}}
    model = replace(PRESETS["tiny"], channels=3, layers=1)
    job = Job(model=model, world_size=16, config=configs.load({**config, **zero}), frames=16, height=64, width=64)
    return replace(job, **changes)


def _memory(job: Job) -> int:
    return max(costs.total for costs in dry_run(job))


def test_the_smallest_degree_that_fits_is_named():
    said = suggest(_job(2), _memory(_job(8)))
    assert "sequence degree 8 (" in said
    for sign in ("for 16 frames of 64 x 64", "--recompute-granularity full (", "--dry-run 16"):
        assert sign in said


def test_only_what_is_left_is_named():
    said = suggest(_job(8, recompute=True), 1)
    assert "--recompute" not in said
    assert "sequence degree" not in said
    assert "more ranks" in said


def test_a_job_that_no_dry_run_knows_gets_no_figures():
    job = _job(2)
    offloading = {**job.config.deepspeed, "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}
    said = suggest(replace(job, config=replace(job.config, deepspeed=offloading)), 1)
    assert re.search(r"--recompute-granularity full.*sequence axis.*offload", said)
    assert "GiB" not in said

"""A job whose GPU has no more memory, for real."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from work import missing

from megatron_dsp import config as configs
from megatron_dsp.errors import RankError
from megatron_dsp.models.video_dit import PRESETS
from megatron_dsp.training.dry_run import Job
from megatron_dsp.training.out_of_memory import explain_out_of_memory

MISSING = missing(1)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(MISSING is not None, reason=MISSING or "")]


def _job() -> Job:
    config = configs.load({"train_micro_batch_size_per_gpu": 1, "sequence_parallel": {"size": 2}})
    model = replace(PRESETS["tiny"], channels=3, layers=1)
    return Job(model=model, world_size=4, config=config, frames=16, height=64, width=64)


def test_the_error_says_what_to_change():
    said = r"out of memory.*--recompute-granularity full.*sequence degree 4.*--dry-run 4"
    with pytest.raises(RankError, match=said), explain_out_of_memory(_job):
        torch.empty(1 << 50, dtype=torch.uint8, device="cuda")

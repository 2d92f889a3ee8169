"""Whole jobs, killed -9 at random times while they save, and resumed from what they leave."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import time
from pathlib import Path

import jobs
import psutil
import pytest

from megatron_dsp.checkpoint import manifest, store

_SCRIPT = "pretrain_scripts/pretrain_video.py"
_KILLS = 20


def _kill(job) -> None:
    """End all processes of a job at once; a launcher's ranks may be in sessions of their own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(job.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
    jobs.finish(job)


def _wait_for_a_save(folder: Path, count: int) -> None:
    """Return when the ``count``-th save from now on has begun."""
    seen: set[str] = set()
    deadline = time.monotonic() + 120
    while len(seen) < count:
        assert time.monotonic() < deadline, f"no save began, {len(seen)} before it"
        time.sleep(0.002)
        seen |= {path.name for path in folder.glob(".*.saving")}


@pytest.mark.long
def test_jobs_that_are_killed_while_they_save(tmp_path):
    config = {"train_batch_size": 4, "gradient_clipping": 1.0, "zero_optimization": {"stage": 1}}
    (tmp_path / "ds_config.json").write_text(json.dumps(config))
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    arguments = [
        *("--deepspeed_config", tmp_path / "ds_config.json", "--data-cache-path", tmp_path / "cache"),
        *("--num-frames", 5, "--img-h", 12, "--img-w", 20, "--lr", 1e-3, "--lr-decay-iters", 500, "--log-interval", 1),
        *("--sample-steps", 0, "--eval-iters", 0, "--dynamic-sequence-parallel-size", 2, "--micro-batch-size", 4),
        *("--ema-decay", 0.9),
    ]
    saving = ["--save", folder, "--save-interval", 1, "--keep", 2]
    draws, reached, inside = random.Random(0), 0, 0
    for _ in range(_KILLS):
        resuming = ["--load", folder] if reached else []
        job = jobs.start("torchrun", 2, _SCRIPT, *arguments, "--train-iters", 10_000, *saving, *resuming)
        try:
            _wait_for_a_save(folder, draws.randint(2, 4))
            time.sleep(draws.uniform(0, 0.15))
        finally:
            _kill(job)
        inside += any(path.name.startswith(".") for path in folder.iterdir())

        for path in folder.glob("global_step*"):
            assert manifest.check(path) == []
        assert len(list(folder.glob("global_step*"))) <= 3
        path, known = store.newest_good(folder)
        assert all("came after" in line for line in known)
        iteration = manifest.read(path).progress["iteration"]
        assert iteration > reached  # each job saved at least once before
        reached = iteration
    print(f"{inside} of {_KILLS} kills came while files were written or deleted; iteration {reached} reached")
    assert inside >= _KILLS // 4

    last = reached + 3
    status, resumed = jobs.run("torchrun", 2, _SCRIPT, *arguments, "--train-iters", last, *saving, "--load", folder)
    assert status == 0, resumed
    left = {path.name for path in folder.iterdir() if not path.name.startswith("zero_to_")}
    assert left == {"latest", f"global_step{last - 1}", f"global_step{last}"}
    status, whole = jobs.run("torchrun", 2, _SCRIPT, *arguments, "--train-iters", last)
    assert status == 0, whole
    assert jobs.losses(resumed) == {each: loss for each, loss in jobs.losses(whole).items() if each > reached}

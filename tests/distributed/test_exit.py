"""A finished job exits with 0, again and again. Gloo's threads make an end without care fail in some of the runs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

JOB = Path(__file__).with_name("short_job.py")
ROOT = Path(__file__).parents[2]


def _exit_statuses(way: str) -> list[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, str(JOB), way],
            env={
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": "4",
                "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "PYTHONPATH": str(ROOT),
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for rank in range(4)
    ]
    try:
        return [process.wait(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize("way", ["run", pytest.param("deepspeed", marks=pytest.mark.long)])
def test_a_finished_job_exits_with_0(way):
    assert _exit_statuses(way) == [0] * 4


@pytest.mark.long
@pytest.mark.parametrize(("way", "runs"), [("run", 100), ("deepspeed", 20), ("plain", 20)])
def test_finished_jobs_always_exit_with_0(way, runs):
    assert [_exit_statuses(way) for _ in range(runs)] == [[0] * 4] * runs

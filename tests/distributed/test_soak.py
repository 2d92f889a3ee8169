from __future__ import annotations

import jobs
import pytest


@pytest.mark.long
@pytest.mark.parametrize(("launcher", "transport"), [("torchrun", "torch"), ("mpirun", "mpi")])
def test_twenty_thousand_switches_leave_nothing_behind(launcher, transport):
    status, output = jobs.run(launcher, 2, "tests/distributed/soak_job.py", 20004)
    assert status == 0, output
    assert output.count(f"kept: 20004 switches through {transport}") == 2

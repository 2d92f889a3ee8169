from __future__ import annotations

import jobs
import pytest


@pytest.mark.parametrize("size", [2, 4])
def test_switches_through_mpi_are_bitwise_slices(size):
    status, output = jobs.run("mpirun", size, "tests/distributed/mpi_job.py")
    assert status == 0, output
    assert "equal" in output


def test_without_mpirun_it_says_what_is_missing():
    status, output = jobs.run("torchrun", 2, "tests/distributed/mpi_job.py")
    assert status != 0
    assert 'error: transport "mpi" needs' in output

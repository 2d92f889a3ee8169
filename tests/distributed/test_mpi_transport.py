from __future__ import annotations

import jobs
import pytest

JOB = "tests/distributed/mpi_job.py"


@pytest.mark.parametrize(("size", "transport"), [(2, "mpi"), pytest.param(4, "auto", marks=pytest.mark.long)])
def test_switches_through_mpi_are_bitwise_slices_without_copies(size, transport):
    status, output = jobs.run("mpirun", size, JOB, transport)
    assert status == 0, output
    assert "equal" in output
    assert ("mpirun started this job" in output) == (transport == "auto")


@pytest.mark.long
def test_without_mpirun_it_says_what_is_missing():
    status, output = jobs.run("torchrun", 2, JOB, "mpi")
    assert status != 0
    assert 'error: transport "mpi" needs' in output

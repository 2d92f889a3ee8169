"""Who a process is, by the variables of each launcher; and how ``launch.run`` ends one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dsp import UsageError
from megatron_dsp.errors import RankError
from megatron_dsp.launch import Process, _device_index, _export, discover, set_nccl_defaults

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "gpu003",
    "MASTER_PORT": "29500",
}
DEEPSPEED = {
    "CROSS_RANK": "0",
    "CROSS_SIZE": "1",
    "LOCAL_SIZE": "4",
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "3",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
BY_HAND = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "gpu003", "MASTER_PORT": "1234"}
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "2",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[003-007,9],login",
}
ALONE = Process(rank=0, world_size=1, local_rank=0, launcher="alone")


def test_torchrun():
    assert discover(TORCHRUN) == Process(5, 8, 1, "torchrun", "gpu003", 29500)


def test_deepspeed_on_one_host_leaves_the_port_that_all_such_jobs_share():
    found = discover(DEEPSPEED)
    assert found == Process(3, 4, 3, "deepspeed", "127.0.0.1", found.master_port)
    assert found.master_port != 29500
    assert 1024 <= found.master_port < 32768, "in the ephemeral range, another process may hold it"
    assert discover(DEEPSPEED | {"RANK": "0", "LOCAL_RANK": "0"}).master_port == found.master_port


@pytest.mark.parametrize(
    "variables",
    [{"MASTER_PORT": "29501"}, {"CROSS_SIZE": "2", "LOCAL_SIZE": "2"}],
    ids=["explicit port", "several hosts"],
)
def test_deepspeed_keeps_the_port(variables):
    environ = DEEPSPEED | variables
    assert discover(environ).master_port == int(environ["MASTER_PORT"])


def test_by_hand():
    assert discover(BY_HAND) == Process(1, 2, 0, "environment", "gpu003", 1234)
    assert discover(BY_HAND | {"LOCAL_RANK": "1"}).local_rank == 1


@pytest.mark.parametrize("missing", sorted(BY_HAND))
def test_variables_by_hand_count_only_together(missing):
    assert discover({name: value for name, value in BY_HAND.items() if name != missing}) == ALONE


def test_srun():
    found = discover(SLURM)
    assert found == Process(6, 8, 2, "srun", "gpu003", found.master_port)
    assert 1024 <= found.master_port < 32768
    assert discover(SLURM | {"SLURM_PROCID": "0"}).master_port == found.master_port
    assert discover(SLURM | {"SLURM_STEP_ID": "1"}).master_port != found.master_port
    chosen = discover(SLURM | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"})
    assert (chosen.master_addr, chosen.master_port) == ("10.0.0.1", 1234)


@pytest.mark.parametrize(("devices", "own"), [(1, 0), (8, 2)])  # --gpus-per-task, and all GPUs of the host
def test_deepspeed_is_told_of_a_device_that_srun_shows(devices, own):
    process, environ = discover(SLURM), {}
    index = _device_index(process, devices)
    _export(process, index, environ)
    assert (index, environ["LOCAL_RANK"]) == (own, str(own))
    assert process.local_rank == 2


def test_what_the_user_says_of_nccl_stays():
    environ = {"TORCH_NCCL_HIGH_PRIORITY": "0"}
    set_nccl_defaults(environ)
    assert environ == {"TORCH_NCCL_HIGH_PRIORITY": "0", "NCCL_LAUNCH_ORDER_IMPLICIT": "1"}


def test_other_launchers_show_each_rank_its_own_gpu():
    with pytest.raises(RankError, match="local rank 1 has no GPU: this host shows 1"):
        _device_index(discover(BY_HAND | {"LOCAL_RANK": "1"}), 1)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[003-007,9],login", "gpu003"),
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node1,gpu[2-3]", "node1"),
        ("a-[01-02]-ib", "a-01-ib"),
        ("n[7,9]", "n7"),
        ("rack[0-1]node[3-4]", "rack0node3"),
    ],
)
def test_first_host_of_a_slurm_list(nodes, first):
    assert discover(SLURM | {"SLURM_STEP_NODELIST": nodes}).master_addr == first


@pytest.mark.parametrize("step", [{}, {"SLURM_STEP_NUM_TASKS": "1"}], ids=["no step", "step of one task"])
def test_a_plain_slurm_allocation_is_no_launch(step):
    environ = {"SLURM_JOB_ID": "77", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8", **step}
    assert discover(environ) == ALONE
    assert discover({}) == ALONE


@pytest.mark.parametrize("outer", [DEEPSPEED, SLURM, {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}])
def test_the_innermost_launcher_wins(outer):
    assert discover(outer | TORCHRUN).launcher == "torchrun"
    assert discover(SLURM | DEEPSPEED).launcher == "deepspeed"
    assert discover(SLURM | BY_HAND).launcher == "environment"


@pytest.mark.parametrize(
    ("environ", "wrong"),
    [
        (TORCHRUN, {"RANK": None}),
        (TORCHRUN, {"WORLD_SIZE": None}),
        (TORCHRUN, {"MASTER_PORT": None}),
        (TORCHRUN, {"RANK": "first"}),
        (TORCHRUN, {"RANK": "8"}),
        (TORCHRUN, {"RANK": "-1"}),
        (TORCHRUN, {"MASTER_PORT": "99999"}),
        (TORCHRUN, {"LOCAL_RANK": "gpu0"}),
        (TORCHRUN, {"LOCAL_RANK": "-1"}),
        (DEEPSPEED, {"MASTER_PORT": None}),
        (BY_HAND, {"WORLD_SIZE": "0"}),
        (BY_HAND, {"MASTER_PORT": "http"}),
        (SLURM, {"SLURM_PROCID": None}),
        (SLURM, {"SLURM_PROCID": "8"}),
        (SLURM, {"SLURM_LOCALID": None}),
        (SLURM, {"SLURM_STEP_NUM_TASKS": "many"}),
        (SLURM, {"SLURM_STEP_NODELIST": ""}),
        (SLURM, {"MASTER_PORT": "http"}),
    ],
    ids=lambda value: "-".join(map(str, next(iter(value.items())))) if len(value) == 1 else "",
)
def test_incomplete_and_impossible_values_are_named(environ, wrong):
    environ = {name: value for name, value in (environ | wrong).items() if value is not None}
    ((name, value),) = wrong.items()
    with pytest.raises(UsageError, match=rf"{name}={value!r}|{name}={value}\b") as error:
        discover(environ)
    assert "\n" not in str(error.value)


def test_mpirun_without_mpi4py_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(UsageError, match="pip install mpi4py"):
        discover({"OMPI_COMM_WORLD_SIZE": "2"})


# A process that has imported the package forks one for each case; importing takes seconds, and MPI must not start in pytest's.
FORKS = """
import json, os, sys, tempfile
from megatron_dsp import UsageError, launch

running = {}
for name, (source, environ) in json.load(sys.stdin).items():
    files = [tempfile.TemporaryFile() for _ in range(2)]
    child = os.fork()
    if child == 0:
        os.environ.update(environ)
        for number, file in enumerate(files, 1):
            os.dup2(file.fileno(), number)
        namespace = {"UsageError": UsageError, "launch": launch, "os": os, "sys": sys}
        exec("def main():\\n" + "\\n".join("    " + line for line in source.splitlines()), namespace)
        launch.run(namespace["main"])
    running[name] = child, files
results = {}
for name, (child, files) in running.items():
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for file in files:
        file.seek(0)
    results[name] = [status, *(file.read().decode() for file in files)]
json.dump(results, sys.stdout)
"""
BROKEN_PIPE = """
receiver, sender = os.pipe()
os.close(receiver)
os.dup2(sender, 1)
print("a line")
"""
CASES = {
    "None": ("print('done')", {}),
    "7": ("print('done'); return 7", {}),
    "exit()": ("sys.exit()", {}),
    "exit(3)": ("print('done'); sys.exit(3)", {}),
    "exit(text)": ("sys.exit('no data')", {}),
    "interrupt": ("raise KeyboardInterrupt", {}),
    "exception": ("print('before'); raise RuntimeError('at step 3')", TORCHRUN | {"RANK": "2"}),
    "usage": ("raise UsageError('size=3: must be even')", {}),
    "usage, rank 2": ("raise UsageError('size=3: must be even')", TORCHRUN | {"RANK": "2"}),
    "usage, rank 1 of mpirun": (
        "raise UsageError('size=3: must be even')",
        {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
    ),
    "usage, rank 1 of srun": ("raise UsageError('size=3: must be even')", SLURM | {"SLURM_PROCID": "1"}),
    "usage, stale RANK": ("raise UsageError('size=3: must be even')", {"RANK": "2"}),
    "impossible RANK": ("launch.discover()", BY_HAND | {"RANK": "x"}),
    "RANK beyond the world": ("launch.discover()", BY_HAND | {"RANK": "2"}),
    "no GPU": ("launch.start('cuda')", TORCHRUN | {"LOCAL_RANK": "2", "CUDA_VISIBLE_DEVICES": ""}),
    "refused": ("raise ConnectionRefusedError(111, 'Connection refused')", {}),
    "output closed": (BROKEN_PIPE, {}),
    "mpirun": ("print(launch.discover().launcher, launch.discover().world_size)", BY_HAND | {"OMPI_COMM_WORLD_SIZE": "1"}),
    "other mpirun": (
        "try: launch.discover()\nexcept UsageError as error: print(error)",
        BY_HAND | {"OMPI_COMM_WORLD_SIZE": "4"},
    ),
}


@pytest.fixture(scope="module")
def ended():
    """Name of a case -> (exit status, stdout, stderr) of a process that ran it through ``launch.run``."""
    # Nothing of a launcher around the tests; and output that waits in buffers until somebody flushes it.
    inherited = {name: os.environ[name] for name in ("PATH", "HOME", "OMP_NUM_THREADS") if name in os.environ}
    done = subprocess.run(
        [sys.executable, "-c", FORKS],
        input=json.dumps(CASES),
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parent,  # -c puts the folder before PYTHONPATH
        env=inherited | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("None", [0, "done\n", ""]),
        ("7", [7, "done\n", ""]),
        ("exit()", [0, "", ""]),
        ("exit(3)", [3, "done\n", ""]),
        ("exit(text)", [1, "", "no data\n"]),
        ("interrupt", [130, "", ""]),
        ("usage", [1, "", "error: size=3: must be even\n"]),
        ("usage, rank 2", [1, "", ""]),
        ("usage, rank 1 of mpirun", [1, "", ""]),
        ("usage, rank 1 of srun", [1, "", ""]),
        ("usage, stale RANK", [1, "", "error: size=3: must be even\n"]),
    ],
)
def test_run_ends_with_the_status_of_main_and_its_whole_output(ended, case, expected):
    assert ended[case] == expected


def test_run_shows_a_traceback_once_with_the_rank(ended):
    status, out, err = ended["exception"]
    assert (status, out) == (1, "before\n")
    assert err.startswith("[rank 2 on ")
    assert err.count("Traceback") == err.count("RuntimeError: at step 3") == 1
    assert ", in main" in err


@pytest.mark.parametrize("case", ["impossible RANK", "RANK beyond the world"])
def test_run_shows_a_wrong_rank_in_one_line(ended, case):
    status, _, err = ended[case]
    assert status == 1
    assert "error: " in err
    assert "RANK=" in err
    assert "Traceback" not in err
    assert err.count("\n") == 1


def test_run_shows_what_one_rank_alone_may_see(ended):
    status, _, err = ended["no GPU"]
    assert status == 1
    assert "rank 5" in err
    assert "local rank 2 has no GPU" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("case", ["refused", "output closed"])
def test_run_blames_no_other_rank_where_there_is_none(ended, case):
    status, _, err = ended[case]
    assert status == 1
    assert "another rank" not in err
    assert "Connection refused" in err or "Broken pipe" in err


def test_mpirun_wins_over_a_stale_rank(ended):
    assert ended["mpirun"] == [0, "mpirun 1\n", ""]


def test_mpirun_of_another_mpi_is_refused(ended):
    _, out, _ = ended["other mpirun"]
    assert "mpirun started 4 processes, but mpi4py sees 1: they belong to different MPIs" in out

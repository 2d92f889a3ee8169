"""Checkpoints of real engines: what a save leaves, ranks that cannot write, damaged files and files that would run code."""

from __future__ import annotations

import gc
import logging
import os
import resource
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import planted
import pytest
import torch
import torch.distributed as dist
from torch import nn

import megatron_dsp as dsp
from megatron_dsp.checkpoint import manifest, store
from megatron_dsp.checkpoint.manifest import StoredFile
from megatron_dsp.training import checkpointing
from megatron_dsp.training.checkpointing import Progress
from megatron_dsp.training.ema import EMA

_OF_RANK_1 = "zero_pp_rank_1_mp_rank_00_optim_states.pt"


@contextmanager
def _engine(zero: int, **more: Any) -> Iterator[tuple[Any, dsp.Mesh]]:
    warnings.filterwarnings("ignore", category=FutureWarning)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **more,
    }
    mesh = dsp.initialize(config)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    engine, *_ = dsp.deepspeed_initialize(model=model, optimizer=optimizer, config=config, mesh=mesh)
    dsp.seed(mesh, 7)
    _step(engine)
    try:
        yield engine, mesh
    finally:
        engine.destroy()
        gc.collect()


def _step(engine: Any) -> None:
    dtype = next(engine.module.parameters()).dtype
    engine.backward(engine(torch.ones(2, 40, dtype=dtype)).float().square().mean())
    engine.step()


def _on_rank_0(function: Any, *arguments: Any) -> None:
    dist.barrier()
    if dist.get_rank() == 0:
        function(*arguments)
    dist.barrier()


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith("zero_to_")}  # DeepSpeed's scripts


def _leaves(folder: Path, zero: int) -> None:
    with _engine(zero, bf16={"enabled": True}) as (engine, mesh):
        ema = EMA(engine, mesh, 0.9)
        for step in (1, 2, 3):
            checkpointing.save(engine, folder, Progress(step, 4 * step), mesh, ema, keep=2)
        assert type(engine.checkpoint_engine).__name__ == "TorchCheckpointEngine"
        with pytest.raises(dsp.UsageError, match="keep=0: at least"):
            checkpointing.save(engine, folder, Progress(4, 16), mesh, keep=0)
    path = folder / "global_step3"
    assert _names(folder) == {"latest", "global_step2", "global_step3"}
    assert store.newest_good(folder) == (path, [])
    found = manifest.read(path)
    assert found.files.keys() == _names(path) - {manifest.NAME}
    assert found.progress == {"iteration": 3, "consumed_samples": 12}
    assert found.layout == {"pipe": 1, "data": 2, "sequence": 1, "tensor": 1, "zero_stage": zero}
    assert (found.precision, found.contents) == ("bf16", ["optimizer", "random numbers", "ema", "weights"])
    assert found.versions["torch"] == torch.__version__


@pytest.mark.parametrize("zero", [pytest.param(0, marks=pytest.mark.long), 1, pytest.param(2, marks=pytest.mark.long), 3])
def test_what_a_save_leaves(ranks, tmp_path, zero):
    ranks(2, _leaves, tmp_path, zero)


@contextmanager
def _small_files(limited: bool) -> Iterator[None]:
    """This process can write no file of more than 5,000 bytes; those of these checkpoints, but for the manifest, are longer."""
    before, output = resource.getrlimit(resource.RLIMIT_FSIZE), [os.dup(1), os.dup(2)]
    if limited:
        with open(os.devnull, "wb") as nowhere:
            for number in (1, 2):  # what is printed goes into a file too, under pytest
                os.dup2(nowhere.fileno(), number)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        for number, kept in enumerate(output, start=1):
            os.dup2(kept, number)
            os.close(kept)


def _one_fails(folder: Path, zero: int) -> list[str]:
    """Rank 0 alone writes the weights, which it gathers from the others, and DeepSpeed's scripts."""
    messages = []
    with _engine(zero) as (engine, mesh):
        ema = EMA(engine, mesh, 0.9)
        checkpointing.save(engine, folder, Progress(1, 4), mesh, ema)
        for failing in (0, 1):
            with pytest.raises(dsp.UsageError) as error, _small_files(dist.get_rank() == failing):
                checkpointing.save(engine, folder, Progress(2, 8), mesh, ema, keep=1)
            messages.append(str(error.value))
            assert f"global_step2 is not saved, and the checkpoint before it stays the latest: rank {failing}: " in messages[-1]
            assert "(File too large)" in messages[-1]
            dist.barrier()
            assert _names(folder) == {"latest", "global_step1"}
            assert store.newest_good(folder) == (folder / "global_step1", [])
            dist.barrier()
        checkpointing.save(engine, folder, Progress(2, 8), mesh, ema, keep=1)
        assert _names(folder) == {"latest", "global_step2"}
    return messages


@pytest.mark.parametrize("zero", [pytest.param(0, marks=pytest.mark.long), pytest.param(1, marks=pytest.mark.long), 3])
def test_all_ranks_fail_where_one_cannot_write(ranks, tmp_path, zero):
    one, other = ranks(2, _one_fails, tmp_path, zero)
    assert one == other


def _into_a_full_disk() -> str:
    def write() -> None:
        if dist.get_rank() == 1:
            with Path("/dev/full").open("wb") as file:
                file.write(b"any")

    with pytest.raises(dsp.UsageError) as error:
        checkpointing._on_all_ranks("--save here", write)
    return str(error.value)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_called_so(ranks):
    one, other = ranks(2, _into_a_full_disk)
    assert one == other
    assert one.startswith("--save here: rank 1: the disk is full (No space left on device); free space there")


def _of_hosts(folder: Path) -> None:
    with (
        _engine(1) as (engine, mesh),
        pytest.raises(dsp.UsageError, match=r"rank 1: .* is not there for this one; give a folder on a file system that all"),
    ):
        checkpointing.save(engine, folder / str(dist.get_rank()), Progress(1, 4), mesh)


def test_a_folder_that_each_host_has_for_itself(ranks, tmp_path):
    ranks(2, _of_hosts, tmp_path)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _rerecord(path: Path) -> None:
    """Let the manifest say that a file is as it should be."""
    record = manifest.read(path.parent)
    files = {**record.files, path.name: StoredFile(path.stat().st_size, manifest.sha256(path))}
    manifest.write(path.parent, replace(record, files=files))


def _plant(path: Path, made: Path) -> None:
    """Let a file of a checkpoint make a folder."""
    torch.save({**torch.load(path, weights_only=False), "more": planted.Makes(made)}, path)
    _rerecord(path)


def _plant_on_class(path: Path) -> None:
    planted.set_on_class(path)
    _rerecord(path)


def _damage(folder: Path, made: Path) -> list[str]:
    """Load after one damage after the other; the warnings."""
    warned: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron_dsp").addHandler(handler)
    with _engine(1) as (engine, mesh):
        for step in (1, 2, 3):
            checkpointing.save(engine, folder, Progress(step, 4 * step), mesh)
        assert checkpointing.load(engine, folder, mesh) == Progress(3, 12)
        _on_rank_0(_flip, folder / "global_step3" / _OF_RANK_1)
        assert checkpointing.load(engine, folder, mesh) == Progress(2, 8)
        plain = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40))  # of whose files none is damaged
        assert checkpointing.load_weights(plain, folder, mesh, ema=False) == Progress(3, 12)
        _on_rank_0(_flip, folder / "global_step3" / "weights_tp_00_pp_00.safetensors")
        assert checkpointing.load_weights(plain, folder, mesh, ema=False) == Progress(2, 8)

        _on_rank_0(_plant_on_class, folder / "global_step2" / "mp_rank_00_model_states.pt")
        with pytest.raises(dsp.UsageError, match=r"mp_rank_00_model_states.pt is refused by torch's restricted unpickler"):
            checkpointing.load(engine, folder, mesh)
        # Of rank 1 alone, and refused on both.
        _on_rank_0(_plant, folder / "global_step2" / _OF_RANK_1, made)
        with pytest.raises(dsp.UsageError, match=f"{_OF_RANK_1} is not opened: it wants posix.mkdir"):
            checkpointing.load(engine, folder, mesh)

        for step in (1, 2):
            _on_rank_0((folder / f"global_step{step}" / "rng_rank_00001.safetensors").unlink)
        with pytest.raises(dsp.UsageError, match="no good checkpoint there") as error:
            checkpointing.load(engine, folder, mesh)
        for part in ("global_step3 is damaged (weights_tp_00", f"{_OF_RANK_1} was changed"):
            assert part in str(error.value)
        for step in (1, 2):
            assert f"global_step{step} is damaged (rng_rank_00001.safetensors is missing)" in str(error.value)
    logging.getLogger("megatron_dsp").removeHandler(handler)
    return warned


def test_damaged_checkpoints_are_passed_over_and_code_is_not_run(ranks, tmp_path):
    made = tmp_path / "made"
    warned, others = ranks(2, _damage, tmp_path / "runs", made)
    assert not made.exists()
    torch.load(tmp_path / "runs" / "global_step2" / _OF_RANK_1, weights_only=False)
    assert made.exists(), "the file would have run nothing, and shows nothing"
    assert others == []
    assert f"{_OF_RANK_1} was changed: it holds other bytes than were saved" in warned[0]
    assert warned[0].endswith("taking global_step2")


def _refused(folder: Path, more: dict[str, Any], sign: str) -> None:
    os.environ.update(CROSS_SIZE="1", CROSS_RANK="0")  # DeepSpeed's other writers need them, and its launcher alone sets them
    with _engine(1, checkpoint=more) as (engine, mesh), pytest.raises(dsp.UsageError, match=sign):
        checkpointing.save(engine, folder, Progress(1, 2), mesh)
    del os.environ["CROSS_SIZE"], os.environ["CROSS_RANK"]


@pytest.mark.parametrize(
    ("more", "sign"),
    [
        ({"checkpoint_serialization": False}, '"checkpoint_serialization": false in the ds_config'),
        ({"use_node_local_storage": True}, '"use_node_local_storage": true in the ds_config'),
        ({"writer": {"type": "python"}}, "FastCheckpointEngine write checkpoints"),
        pytest.param(  # which starts a process
            {"writer": {"type": "python", "decoupled": True}}, "DecoupledCheckpointEngine write", marks=pytest.mark.long
        ),
    ],
)
def test_writers_that_cannot_be_made_safe_are_refused(ranks, tmp_path, more, sign):
    ranks(2, _refused, tmp_path, more, sign)
    assert not list(tmp_path.iterdir())

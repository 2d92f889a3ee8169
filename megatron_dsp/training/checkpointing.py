"""Checkpoints through DeepSpeed's engine, with what DeepSpeed does not record beside them (docs/checkpoints.md).

The files are DeepSpeed's, whole weights and their average in safetensors files, the states of random numbers, and a manifest of
all of it. Here is what the ranks do together; the order on the disk is `checkpoint.store`'s.

While a checkpoint is written, a rank that cannot write a file goes on to the end: the others are on their way into collectives.
Then all of them raise its error.
"""

from __future__ import annotations

import errno
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from megatron_dsp.checkpoint import manifest, store, unpickling
from megatron_dsp.checkpoint.deepspeed_files import DeepSpeedState
from megatron_dsp.checkpoint.disk import sync
from megatron_dsp.checkpoint.file_names import WeightsFile, parse, random_numbers_file, step_folder
from megatron_dsp.checkpoint.manifest import CONTENTS, Manifest, StoredFile
from megatron_dsp.checkpoint.parameters import Model, whole_names
from megatron_dsp.checkpoint.state import AVERAGE, WEIGHT
from megatron_dsp.errors import RankError, UsageError
from megatron_dsp.mesh import AXES, Mesh, RankGrid
from megatron_dsp.training import master_weights, rng
from megatron_dsp.training.ema import EMA
from megatron_dsp.training.engine_state import CheckpointReader, check_model, model_of, restore
from megatron_dsp.training.master_weights import MasterWeights

_T = TypeVar("_T")

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a run has come."""

    iteration: int = 0
    consumed_samples: int = 0


def save(engine: Any, folder: Path, progress: Progress, mesh: Mesh, ema: EMA | None = None, *, keep: int | None = None) -> None:
    """Save engine, optimizer, schedule, progress, random numbers, whole weights and their average; every rank calls it.

    ``folder/latest`` names the new checkpoint when all of it is on the disk. After that, with ``keep``, all but the newest so
    many are deleted. Where DeepSpeed has the weights in files of its own, the whole ones are left out.

    Errors: UsageError, the same on all ranks, where one cannot write; the checkpoint before stays the latest then.
    """
    refuse_other_writers(engine)
    if keep is not None and keep < 1:
        raise UsageError(f"keep={keep}: at least the checkpoint that is saved stays; give 1 or more, or None for all")
    tag = step_folder(progress.iteration)
    path = folder / store.temporary_name(tag)
    what = f"--save {folder}: {tag} is not saved, and the checkpoint before it stays the latest"
    try:
        _on_rank_0(what, lambda: store.begin(folder, tag))
        _on_all_ranks(what, lambda: _sizes(path, [""]))  # of the folder itself, to see that it is the same on all hosts
        files, model = _CheckpointEngine(engine.checkpoint_engine, path), model_of(engine, mesh)
        contents = _write(engine, files, progress, mesh, model, ema)
        names = {name for of_rank in _on_all_ranks(what, files.finish) for name in of_rank}
        sizes = _on_rank_0(what, lambda: _sizes(path, names))
        hashes = _on_all_ranks(what, lambda: _hashes(path, _own_share(sizes)))
        stored = {name: StoredFile(sizes[name], digest) for of_rank in hashes for name, digest in of_rank.items()}
        record = Manifest.new(asdict(progress), _layout(engine, mesh), _precision(engine), contents, model, stored)
        _on_rank_0(what, lambda: store.publish(folder, tag, record, keep))
    except UsageError:
        if dist.get_rank() == 0:
            with suppress(OSError):  # what stays there misleads nobody, and the next save removes it
                store.abandon(folder, tag)
        raise


def refuse_other_writers(engine: Any) -> None:
    """Errors: UsageError where the ds_config has DeepSpeed write in a way that `save` cannot make safe."""
    writer = type(engine.checkpoint_engine).__name__
    if writer != "TorchCheckpointEngine":
        raise UsageError(
            f'the ds_config has {writer} write checkpoints ("writer" in its section "checkpoint", or "datastates_ckpt"); what '
            "it writes may not be on the disk when it returns, and may not load again: remove that"
        )
    if not engine.checkpoint_engine.zipfile_serialization:
        raise UsageError(
            '"checkpoint_serialization": false in the ds_config writes plain pickles, which are not loaded again; remove it'
        )
    if engine.use_node_local_storage():
        raise UsageError(
            '"use_node_local_storage": true in the ds_config leaves each host a part of a checkpoint; remove it, and save to a '
            "file system that all hosts share"
        )


def load(
    engine: Any,
    folder: Path,
    mesh: Mesh,
    ema: EMA | None = None,
    *,
    optimizer: bool = True,
    random_numbers: bool = True,
) -> Progress:
    """Resume from the latest good checkpoint in ``folder``; every rank calls it.

    It is the one that ``latest`` names; where that is damaged, the newest that is not, with a warning. It may have been saved
    at any degrees of tensor, pipe, sequence and data, and in any ZeRO stage. ``ema`` takes the average from there; without it
    an average that is there is left alone. Without ``optimizer`` only weights are taken, without ``random_numbers`` these begin
    anew.

    Errors: UsageError, the same on all ranks, where there is no good one, where it is of another model or optimizer, where it
    has no average for ``ema``, where the states of random numbers are of other ranks than these, or where a file of it would
    run code; never a silent start from scratch.
    """
    what = f"--load {folder}"
    path, record = _newest_good(folder)
    if ema is not None and CONTENTS[AVERAGE] not in record.contents:
        raise UsageError(
            f"--load {folder}: its checkpoint {path.name!r} has no EMA; resume without one, or load(..., ema=None) first and "
            "make EMA(engine, mesh, decay) then, to start it from the loaded weights"
        )
    if optimizer and "optimizer" not in record.contents:
        raise UsageError(
            f"--load {folder}: its checkpoint {path.name!r} has weights and no optimizer; start that anew with --no-load-optim"
        )
    random_file = _random_file_for(mesh, record, folder) if random_numbers else None
    pickles = {name: stored.size for name, stored in record.files.items() if name.endswith(".pt")}
    _on_all_ranks(what, lambda: [unpickling.check_globals(path / name) for name in _own_share(pickles)])
    state = DeepSpeedState(path, record)
    if optimizer and _deepspeed_can_load(engine, mesh, record):
        with _replace_checkpoint_engine(engine, _CheckpointEngine(engine.checkpoint_engine, path)):
            loaded, _ = engine.load_checkpoint(str(path.parent), tag=path.name)
        if loaded is None:
            raise UsageError(f"--load {folder}: DeepSpeed could not load {path.name!r}; its own message says what is missing")
    else:
        check_model(state, engine.module, mesh)
        _on_all_ranks(what, lambda: restore(engine, mesh, state, optimizer=optimizer))
        MasterWeights(engine, mesh).publish()
    if ema is not None:
        _on_all_ranks(what, lambda: ema.load(CheckpointReader(state, AVERAGE, engine.module, mesh)))
    if random_file is not None:
        _on_all_ranks(what, lambda: rng.load(path / random_file, mesh))
    elif not random_numbers:
        rng.restart(mesh, record.progress["iteration"])
    return Progress(**record.progress)


def _deepspeed_can_load(engine: Any, mesh: Mesh, record: Manifest) -> bool:
    """Whether DeepSpeed itself can load the checkpoint: what it saved at these degrees, but not all of that.

    It goes by the order of parameters in the optimizer, not by names. Collective over the pipe axis.
    """
    own = model_of(engine, mesh)
    alike = record.layout == _layout(engine, mesh) and record.precision == _precision(engine)
    bf16_pipeline = engine.bfloat16_enabled() and mesh.size("pipe") > 1 and engine.zero_optimization_stage() == 0
    return alike and not bf16_pipeline and (record.model.stages, record.model.order) == (own.stages, own.order)


def _random_file_for(mesh: Mesh, record: Manifest, folder: Path) -> str | None:
    """The file of the rank that was where this one is on the axes along which random numbers differ; None: there are none."""
    if "random numbers" not in record.contents:
        return None
    degrees = {axis: record.layout[axis] for axis in AXES}
    differing = [f"{axis} {degrees[axis]} -> {mesh.size(axis)}" for axis in rng.PARTS if degrees[axis] != mesh.size(axis)]
    if differing:
        raise UsageError(
            f"--load {folder}: the states of random numbers are of other ranks ({', '.join(differing)}) and cannot be kept; "
            "let them begin anew with --no-load-rng"
        )
    here = {axis: mesh.rank(axis) if axis in rng.PARTS else 0 for axis in AXES}
    grid = RankGrid(math.prod(degrees.values()), **degrees)
    return random_numbers_file(int(grid.ranks[tuple(here.values())]))


@torch.no_grad()
def load_weights(module: nn.Module, folder: Path, mesh: Mesh, *, ema: bool) -> Progress:
    """Fill a plain module with the weights of the latest good checkpoint in ``folder``, or with their average; no DeepSpeed.

    Good: the files of all these weights are as they were saved, and the others are there. The checkpoint may be of any degrees
    and ZeRO stage. Every rank calls it; values are cast to the module's dtypes. Returns how far the training had come.

    Errors: UsageError where there is no such checkpoint or no average in it, and for names or shapes of the whole model that
    are not the module's.
    """
    kind, content = (AVERAGE, "EMA") if ema else (WEIGHT, "weights")

    def wanted(name: str) -> bool:
        file = parse(name)
        return isinstance(file, WeightsFile) and file.kind == kind

    path, record = _newest_good(folder, wanted)
    if CONTENTS[kind] not in record.contents:
        raise UsageError(f"--load {folder}: its checkpoint {path.name!r} has no {content}; give ema={not ema} or another")
    state = DeepSpeedState(path, record)
    check_model(state, module, mesh)
    reader = CheckpointReader(state, kind, module, mesh)
    for name, parameter in module.named_parameters():
        parameter.copy_(reader.read_flat(name, 0, parameter.numel()).view_as(parameter))
    buffers, names = state.buffers(), whole_names(module)
    for name, buffer in master_weights.persistent_buffers(module).items():
        buffer.copy_(buffers[names[name]])
    return Progress(**record.progress)


class _CheckpointEngine:
    """Writes and reads DeepSpeed's files while `save` and `load` run, in place of its own; knows what this rank has written.

    Attributes:
        folder: of the checkpoint.
    """

    def __init__(self, own: Any, folder: Path):
        """``own``: DeepSpeed's."""
        self.folder = folder
        self._own = own
        self._written: list[str] = []
        self._error: OSError | UsageError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    @contextmanager
    def write_file(self, path: Path) -> Iterator[None]:
        """A block that writes a file of the checkpoint. That it could not is remembered, and raised by `finish`."""
        with self.delay_errors():
            yield
            self._written.append(path.relative_to(self.folder).as_posix())

    @contextmanager
    def delay_errors(self) -> Iterator[None]:
        """A block in which files may be written. That one could not is raised by `finish`."""
        try:
            yield
        except (OSError, RankError) as error:
            self._error = self._error or error

    def finish(self) -> list[str]:
        """The files that this rank has written, by their paths in the checkpoint. Errors: of the first that it could not."""
        if self._error is not None:
            raise self._error
        return self._written

    def save(self, state_dict: Any, path: str) -> None:
        """Write a file of DeepSpeed's; it is on the disk afterwards, and `load` will take it."""
        with self.write_file(Path(path)):
            with Path(path).open("wb") as file:
                try:
                    torch.save(state_dict, file)
                except RuntimeError as error:
                    # torch's zip writer fails at a place that does not fit; why is what the file raised before.
                    raise error.__context__ if isinstance(error.__context__, OSError) else error from None
                file.flush()
                os.fsync(file.fileno())
            unpickling.check_globals(Path(path))

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read a file of DeepSpeed's; nothing in it can run."""
        return unpickling.load(Path(path), map_location)


@contextmanager
def _replace_checkpoint_engine(engine: Any, files: _CheckpointEngine) -> Iterator[None]:
    """Let the engine write and read through ``files``, and not raise where it copies its scripts beside checkpoints."""
    own, copy = engine.checkpoint_engine, engine._copy_recovery_script

    def copy_recovery_script(folder: str) -> None:
        with files.delay_errors():
            copy(folder)

    engine.checkpoint_engine, engine._copy_recovery_script = files, copy_recovery_script
    try:
        yield
    finally:
        engine.checkpoint_engine = own
        del engine._copy_recovery_script


def _write(engine: Any, files: _CheckpointEngine, progress: Progress, mesh: Mesh, model: Model, ema: EMA | None) -> list[str]:
    """Write this rank's files; the contents beside DeepSpeed's."""
    metadata = {"iteration": str(progress.iteration), **{axis: str(mesh.size(axis)) for axis in AXES}}
    contents = ["optimizer", "random numbers"]
    path = files.folder / random_numbers_file(dist.get_rank())
    with files.write_file(path):
        rng.save(path, mesh)
    if ema is not None:
        path = files.folder / _weights_file(AVERAGE, mesh)
        with files.write_file(path):
            ema.save(path, metadata)
        contents.append(CONTENTS[AVERAGE])
    if master_weights.reason_against(engine) is None:
        weights = MasterWeights(engine, mesh)
        path = files.folder / _weights_file(WEIGHT, mesh)
        with files.write_file(path):
            weights.save(path, weights.tensors(), metadata)
        contents.append(CONTENTS[WEIGHT])
    with _replace_checkpoint_engine(engine, files), _attach_universal_info(engine.module, model):
        engine.save_checkpoint(str(files.folder.parent), tag=files.folder.name, save_latest=False)
    for path in files.folder.glob("offloaded_tensors/**/*"):  # of NVMe offload, which DeepSpeed copies there
        if path.is_file():
            with files.write_file(path):
                sync(path)
    return contents


@contextmanager
def _attach_universal_info(module: nn.Module, model: Model) -> Iterator[None]:
    """A module that has what DeepSpeed writes into checkpoints for ds_to_universal, its own if it has one."""
    name = "universal_checkpoint_info"
    if hasattr(module, name):
        yield
        return
    setattr(module, name, model.universal_checkpoint_info())
    try:
        yield
    finally:
        delattr(module, name)


def _sizes(folder: Path, names: Iterable[str]) -> dict[str, int]:
    with _explain_missing_files():
        return {name: (folder / name).stat().st_size for name in sorted(names)}


def _hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    with _explain_missing_files():
        return {name: manifest.sha256(folder / name) for name in names}


@contextmanager
def _explain_missing_files() -> Iterator[None]:
    """Reading of files that other ranks have written."""
    try:
        yield
    except FileNotFoundError as error:
        raise RankError(
            f"{error.filename}, which another rank has made, is not there for this one; give a folder on a file system that "
            "all hosts share"
        ) from error


def _own_share(sizes: Mapping[str, int]) -> list[str]:
    """This rank's part of files, given all of them with their sizes."""
    return manifest.divide(sizes, dist.get_world_size())[dist.get_rank()]


def _precision(engine: Any) -> str:
    return "bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "fp32"


def _newest_good(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> tuple[Path, Manifest]:
    """The checkpoint in ``folder`` to load, and its manifest, the same on all ranks; a warning says what is wrong with others.

    Rank 0 looks, and the ranks hash the files whose names are ``wanted`` together. Errors: UsageError where none is good.
    """
    what, records = f"--load {folder}", {}

    def read_manifest(path: Path) -> tuple[Manifest | None, list[str]]:
        try:
            record = manifest.read(path)
        except UsageError as error:
            return None, [str(error)]
        return record, list(manifest.check_sizes(path, record).values())

    def check(path: Path) -> list[str]:
        record, problems = _on_rank_0(what, lambda: read_manifest(path))
        if record is None or problems:
            return problems
        records[path] = record
        names = _own_share({name: stored.size for name, stored in record.files.items() if wanted(name)})
        of_ranks = _on_all_ranks(what, lambda: manifest.check_hashes(path, record, names))
        return [problem for of_rank in of_ranks for problem in of_rank]

    found = _on_rank_0(what, lambda: store.candidates(folder))
    path, known = store.newest_good(folder, found, check)
    if known and dist.get_rank() == 0:
        logger.warning("%s: %s; taking %s", what, "; ".join(known), path.name)
    return path, records[path]


def _on_all_ranks(what: str, work: Callable[[], _T]) -> list[_T]:
    """What ``work`` returns on each rank; where it fails on one, the same UsageError on all. Collective over all ranks."""
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, _attempt(what, work))
    for _, failure in outcomes:
        if failure is not None:
            raise UsageError(failure)
    return [answer for answer, _ in outcomes]


def _on_rank_0(what: str, work: Callable[[], _T]) -> _T:
    """What ``work`` returns on rank 0, where alone it runs; its errors come to all. Collective over all ranks."""
    outcome: list[Any] = [_attempt(what, work) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(outcome, src=0)
    answer, failure = outcome[0]
    if failure is not None:
        raise UsageError(failure)
    return answer


def _attempt(what: str, work: Callable[[], _T]) -> tuple[_T | None, str | None]:
    """What ``work`` returns, or what there is to say of its failure."""
    try:
        return work(), None
    except RankError as error:
        return None, f"{what}: rank {dist.get_rank()}: {error}"
    except UsageError as error:
        return None, str(error)
    except OSError as error:
        return None, f"{what}: rank {dist.get_rank()}: {_reason(error)}"


def _reason(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full ({error.strerror}); free space there, or keep fewer checkpoints (--keep)"
    return f"{error.filename or 'a file'} cannot be written or read ({error.strerror}); see that it can"


def _weights_file(kind: str, mesh: Mesh) -> str:
    return WeightsFile(kind, mesh.rank("tensor"), mesh.rank("pipe")).name


def _layout(engine: Any, mesh: Mesh) -> dict[str, int]:
    return {**{axis: mesh.size(axis) for axis in AXES}, "zero_stage": engine.zero_optimization_stage()}

"""Random numbers that are equal on some ranks and different on others, repeated by recompute, and kept in checkpoints."""

from __future__ import annotations

import json
import random
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_dsp.checkpoint import tensor_file
from megatron_dsp.checkpoint.tensor_file import TensorFile
from megatron_dsp.errors import UsageError
from megatron_dsp.mesh import AXES, Mesh

PARTS = ("pipe", "data", "sequence")  # the axes along which `seed` makes random numbers differ
_DEFAULT = "default"
_State = dict[str, Tensor]  # of torch's generators by device: "cpu", and on a mesh of GPUs "cuda"


class _Streams:
    """The streams of a mesh: one is in torch's default generators, the states of the others wait here.

    A stream is named after its axes, as "pipe+data". "default" is what `seed` gives the default generators.
    """

    def __init__(self, mesh: Mesh, seed: int):
        self.seed = seed
        self.current = _DEFAULT
        self.waiting: dict[str, _State] = {}
        self._device = mesh.device
        self._ranks = {axis: mesh.rank(axis) for axis in AXES}

    def enter(self, name: str) -> str:
        """Put a stream into the default generators; returns the name of the one that was there."""
        before, self.current = self.current, name
        self.waiting[before] = _default_state(self._device)
        _set_default_state(self.waiting.pop(name) if name in self.waiting else self._first_state(name), self._device)
        return before

    def _first_state(self, name: str) -> _State:
        axes = name.split("+") if name else []
        # Which axes they are takes part: on rank 0 of all axes the streams differ too.
        number = _combine_seeds(self.seed, *(1 + self._ranks[axis] if axis in axes else 0 for axis in AXES))
        state = {"cpu": torch.Generator().manual_seed(number).get_state()}
        if self._device.type == "cuda":
            state["cuda"] = torch.Generator(self._device).manual_seed(number).get_state()
        return state


_streams_by_mesh: weakref.WeakKeyDictionary[Mesh, _Streams] = weakref.WeakKeyDictionary()


def seed(mesh: Mesh, seed: int) -> None:
    """Seed torch's default generators: equal where ranks hold copies (tensor), different where they hold parts.

    Parts are the samples of the data axis, the shards of the sequence axis and the layers of the pipe axis. Call it after
    the model was made: its initial weights must be equal on all data and sequence ranks. `random_along` draws from streams
    that begin anew with it.
    """
    torch.manual_seed(_combine_seeds(seed, *(mesh.rank(axis) for axis in PARTS)))
    _streams_by_mesh[mesh] = _Streams(mesh, seed)


@contextmanager
def random_along(mesh: Mesh, *axes: str) -> Iterator[None]:
    """Torch's draws in this block differ between ranks along ``axes`` and are equal along the mesh's other axes.

    Name the axes along which ranks hold parts of what the numbers are for:

        with dsp.random_along(mesh, "pipe", "data"):  # outside the sharded region: sequence ranks hold copies
            x = dropout(x)

    Each set of axes is a stream of its own, which goes on where its last block stopped. Blocks may be nested. A block changes
    the state of torch's default generators, of the CPU and of the mesh's GPU, and puts it back; no device is waited for.

    Errors: UsageError for what is no axis, and before `seed`.
    """
    streams = _streams(mesh)
    before = streams.enter(_stream_name(axes))
    try:
        yield
    finally:
        streams.enter(before)


def repeat_random(mesh: Mesh) -> Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]:
    """A ``context_fn`` of ``torch.utils.checkpoint`` with which recompute repeats the draws of `random_along` blocks.

        y = checkpoint(block, x, use_reentrant=False, context_fn=dsp.repeat_random(mesh))

    The checkpoint itself repeats those of the default generators (``preserve_rng_state``, on by default).

    Errors: UsageError before `seed`.
    """
    streams = _streams(mesh)
    return lambda: (nullcontext(), _Repeat(streams))


class _Repeat:
    """A block, to be entered any number of times, in which the streams stand where they stood when it was made."""

    def __init__(self, streams: _Streams):
        self._streams = streams
        self._start_states = streams.current, dict(streams.waiting)

    def __enter__(self) -> None:
        self._outside_states = self._streams.current, self._streams.waiting
        name, waiting = self._start_states
        self._streams.current, self._streams.waiting = name, dict(waiting)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._streams.current, self._streams.waiting = self._outside_states


def restart(mesh: Mesh, iteration: int) -> None:
    """As `seed`, with another number for each iteration: numbers whose states were not kept do not repeat the first ones."""
    if mesh in _streams_by_mesh:
        seed(mesh, _combine_seeds(_streams_by_mesh[mesh].seed, iteration))


def save(path: Path, mesh: Mesh) -> None:
    """Write the states of this rank's random numbers: torch's, the streams of `random_along`, Python's and NumPy's.

    Errors: UsageError inside `random_along`.
    """
    streams = _streams_by_mesh.get(mesh)
    _check_outside(streams)
    states = {_DEFAULT: _default_state(mesh.device), **(streams.waiting if streams is not None else {})}
    tensors = {f"{name}/{device}": tensor for name, state in states.items() for device, tensor in state.items()}
    numpy_state: Any = np.random.get_state(legacy=False)
    numpy_state["state"]["key"] = numpy_state["state"]["key"].tolist()
    metadata = {"python": json.dumps(random.getstate()), "numpy": json.dumps(numpy_state)}
    if streams is not None:
        metadata["seed"] = str(streams.seed)
    with tensor_file.create(path, {name: (t.dtype, t.shape) for name, t in tensors.items()}, metadata) as append:
        for tensor in tensors.values():
            append(tensor)


def load(path: Path, mesh: Mesh) -> None:
    """Let this rank's random numbers go on where `save` wrote their states.

    States of a GPU are left out on the CPU, and one that was saved on the CPU has none.

    Errors: UsageError inside `random_along`; RankError where the file is damaged.
    """
    _check_outside(_streams_by_mesh.get(mesh))
    file = TensorFile(path)
    states: dict[str, _State] = {}
    for key in file.shapes:
        name, device = key.split("/")
        states.setdefault(name, {})[device] = file.read(key)
    _set_default_state(states.pop(_DEFAULT), mesh.device)
    if "seed" in file.metadata:
        streams = _streams_by_mesh[mesh] = _Streams(mesh, int(file.metadata["seed"]))
        streams.waiting = states
    version, numbers, gauss = json.loads(file.metadata["python"])
    random.setstate((version, tuple(numbers), gauss))
    numpy_state = json.loads(file.metadata["numpy"])
    numpy_state["state"]["key"] = np.array(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state(numpy_state)


def _streams(mesh: Mesh) -> _Streams:
    if mesh not in _streams_by_mesh:
        raise UsageError("random_along and repeat_random need a seed of this mesh; call dsp.seed(mesh, seed) first")
    return _streams_by_mesh[mesh]


def _stream_name(axes: tuple[str, ...]) -> str:
    unknown = [axis for axis in axes if axis not in AXES]
    if unknown:
        raise UsageError(f"random_along has no axis {', '.join(map(repr, unknown))}; a mesh has {', '.join(AXES)}")
    return "+".join(axis for axis in AXES if axis in axes)


def _combine_seeds(*values: int) -> int:
    return int(np.random.SeedSequence(values).generate_state(1, np.uint64)[0]) >> 1


def _default_state(device: torch.device) -> _State:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_default_state(state: _State, device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _check_outside(streams: _Streams | None) -> None:
    if streams is not None and streams.current != _DEFAULT:
        raise UsageError(f"a checkpoint inside random_along (stream {streams.current!r}): save and load outside of such blocks")

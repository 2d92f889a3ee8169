"""What DeepSpeed 0.19.8 has written, at any degrees and ZeRO stage, whole over all axes.

Files are of places on the pipe and tensor axes, MP = pipe rank x tensor degree + tensor rank, or of ranks of data x sequence:

| ZeRO | optimizer | fp32 weights and the optimizer's tensors |
|---|---|---|
| 0 | the user's | whole; weights with the model, a pipeline's by layer; the rest by numbers in ``mp_rank_MP_*`` |
| 0 | FP16_UnfusedOptimizer, FP16_Optimizer | whole, in the same file; of the second one flat tensor a group |
| 1, 2; 0 in a bf16 pipeline | DeepSpeedZeroOptimizer, BF16_Optimizer | equal parts of flattened groups, ``*_optim_states.pt`` |
| 3 | DeepSpeedZeroOptimizer_Stage3 | equal parts of each parameter, in the same files |

Files are mapped into memory, and opened when something of them is read. What `unpickling` does not list is not unpickled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_dsp.checkpoint import unpickling
from megatron_dsp.checkpoint.file_names import LayerFile, ModelFile, OptimizerFile, WeightsFile, parse
from megatron_dsp.checkpoint.manifest import CONTENTS, Manifest
from megatron_dsp.checkpoint.parameters import Parameter, whole_name
from megatron_dsp.checkpoint.state import AVERAGE, WEIGHT, Training
from megatron_dsp.checkpoint.tensor_file import TensorFile
from megatron_dsp.errors import RankError


class Span(NamedTuple):
    """Elements of a flattened tensor shard of a parameter: the first, and how many."""

    start: int
    size: int


class _ParameterGroup(Protocol):
    """Where an optimizer has a group of parameters."""

    names: list[str]

    def read(self, kind: str, name: str, span: Span) -> Tensor:
        """Elements of a parameter, flat."""


class DeepSpeedState:
    """A checkpoint of DeepSpeed's, whole over all axes and read one tensor at a time.

    Attributes:
        parameters: by their names in the whole model.
        layout: the degrees, and the ZeRO stage, at which it was saved.
        model: what the manifest says of it.
    """

    def __init__(self, folder: Path, manifest: Manifest):
        self._folder, self._manifest = folder, manifest
        self.layout, self.model = manifest.layout, manifest.model
        self.parameters: Mapping[str, Parameter] = self.model.parameters
        self._open_files: dict[str, Any] = {}
        self._readers = {
            (pipe, tensor): _ModelRankReader(self, pipe, tensor)
            for pipe in range(self.layout["pipe"])
            for tensor in range(self.layout["tensor"])
        }

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """Of tensors, the weights first."""
        return (WEIGHT, *self._readers[0, 0].kinds, *((AVERAGE,) if AVERAGE in self._manifest.contents else ()))

    @cached_property
    def training(self) -> Training:
        """How far it had come."""
        found = self._readers[0, 0].training(self._manifest.progress)
        # A scale of 1 is kept in other precisions too, and is none.
        return found if self._manifest.precision == "fp16" else replace(found, loss_scale=None)

    @property
    def ranks(self) -> int:
        """Those of data x sequence, over which ZeRO divides."""
        return self.layout["data"] * self.layout["sequence"]

    def read(self, kind: str, name: str) -> Tensor:
        """A whole tensor of a parameter, in fp32. Errors: RankError where a file does not have what it should."""
        parameter = self.parameters[name]
        return self.read_span(kind, name, parameter, (1, 0), Span(0, math.prod(parameter.shape))).view(parameter.shape)

    def read_span(self, kind: str, name: str, wanted: Parameter, tensor: tuple[int, int], span: Span) -> Tensor:
        """Elements of the shard that rank ``tensor[1]`` of ``tensor[0]`` has of a parameter divided as ``wanted``, in fp32.

        Only they are read where it was divided so when it was saved, else the shards that overlap with that one.
        """
        saved, (pipe, local) = self.parameters[name], self.model.locate(name)
        degree = self.layout["tensor"]
        if degree == 1 or saved.dim is None:  # one place has all of it
            reader = self._readers[pipe, 0]
            if wanted.dim is None or tensor[0] == 1:
                return reader.read(kind, local, span)
            whole = reader.read(kind, local, Span(0, math.prod(saved.shape))).view(saved.shape)
            own = wanted.take_shard(whole, *tensor)
        elif tensor[0] == degree and wanted.dim == saved.dim:
            return self._readers[pipe, tensor[1]].read(kind, local, span)
        else:
            own = self._join_shards(kind, name, wanted, tensor)
        return own.reshape(-1)[span.start : span.start + span.size]

    def _join_shards(self, kind: str, name: str, wanted: Parameter, tensor: tuple[int, int]) -> Tensor:
        saved, (pipe, local), degree = self.parameters[name], self.model.locate(name), self.layout["tensor"]
        assert saved.dim is not None  # else there are no shards
        same = wanted.dim == saved.dim
        start, stop = wanted.shard_range(*tensor) if same else (0, saved.shape[saved.dim])
        parts = []
        for rank in range(degree):
            first, last = saved.shard_range(degree, rank)
            low, high = max(first, start), min(last, stop)
            if low < high:
                shape = saved.shard_shape(degree, rank)
                shard = self._readers[pipe, rank].read(kind, local, Span(0, math.prod(shape))).view(shape)
                parts.append(shard.narrow(saved.dim, low - first, high - low))
        if not parts:
            return torch.zeros(wanted.shard_shape(*tensor))
        whole = torch.cat(parts, saved.dim)
        return whole if same else wanted.take_shard(whole, *tensor)

    def buffers(self) -> dict[str, Tensor]:
        """Persistent buffers by their names in the whole model, as tensor rank 0 had them."""
        found: dict[str, Tensor] = {}
        for pipe in range(self.layout["pipe"]):
            reader = self._readers[pipe, 0]
            found |= {whole_name(name, self.model.layers): value for name, value in reader.buffers().items()}
        return found

    def open(self, name: str) -> Any:
        """What a file of the checkpoint holds."""
        if name not in self._open_files:
            path = self._folder / name
            self._open_files[name] = TensorFile(path) if path.suffix == ".safetensors" else unpickling.load(path, mmap=True)
        return self._open_files[name]

    @cached_property
    def whole_kinds(self) -> set[str]:
        """The kinds of tensors of which there are files with whole parameters."""
        return {kind for kind, content in CONTENTS.items() if content in self._manifest.contents}

    @cached_property
    def files(self) -> dict[str, Any]:
        """Its files by their names, and what they are."""
        return {path.name: parse(path.name) for path in sorted(self._folder.iterdir())}


class _ModelRankReader:
    """The files of one place on the pipe and tensor axes."""

    def __init__(self, state: DeepSpeedState, pipe: int, tensor: int):
        self._state, self._pipe, self._tensor = state, pipe, tensor
        self._rank = pipe * state.layout["tensor"] + tensor  # DeepSpeed's rank of model parallelism
        self._stage = state.layout["zero_stage"]

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """Of the optimizer's tensors."""
        return tuple(dict.fromkeys(kind for entry in self._entries for kind, value in entry.items() if _is_tensor(kind, value)))

    def read(self, kind: str, name: str, span: Span) -> Tensor:
        if kind in self._state.whole_kinds:
            return self._state.open(WeightsFile(kind, self._tensor, self._pipe).name).read_flat(name, *span).float()
        if name in self._group_of:
            return self._group_of[name].read(kind, name, span).float()
        if kind != WEIGHT:
            return torch.zeros(span.size)  # it is not trained
        if name in self._frozen:
            return self._read_frozen(name, span).float()
        return _elements(self._weights[name], span).float()

    def buffers(self) -> dict[str, Tensor]:
        """The persistent ones, by the module's names."""
        parameters = self._state.parameters
        return {name: x for name, x in self._weights.items() if whole_name(name, self._layers) not in parameters}

    def training(self, progress: Mapping[str, int]) -> Training:
        """What the files say of the training; it is the same at all places."""
        entry = next(iter(self._entries), {})
        groups = self._inner_optimizer["param_groups"]
        step = entry.get("step", groups[0].get("step", 0))
        return Training(
            iteration=progress["iteration"],
            consumed_samples=progress["consumed_samples"],
            skipped_steps=self._model["skipped_steps"],
            step=int(step),
            lr=None if groups[0].get("lr") is None else float(groups[0]["lr"]),  # weights alone have none
            schedule=self._model["lr_scheduler"],
            loss_scale=_loss_scale(self._wrapper),
            options={name: value for name, value in groups[0].items() if name not in ("params", "lr", "step")},
        )

    @property
    def _layers(self) -> Sequence[str] | None:
        return self._state.model.layers

    @cached_property
    def _model(self) -> Any:
        return self._state.open(ModelFile(self._rank, 0 if self._stage == 3 else None).name)

    def _optimizer(self, rank: int) -> Any:
        return self._state.open(self._optimizer_files[rank])["optimizer_state_dict"]

    @cached_property
    def _optimizer_files(self) -> list[str]:
        """Of each rank of data x sequence; none where the optimizer is with the model."""
        found = {}
        for name, file in self._state.files.items():
            if isinstance(file, OptimizerFile) and file.model_rank == self._rank:
                found[file.data_rank] = name
        if found and sorted(found) != list(range(self._state.ranks)):
            raise RankError(
                f"{self._state._folder} has {len(found)} optimizer files of model parallel rank {self._rank}, and was saved by "
                f"{self._state.ranks} ranks of data x sequence; use another checkpoint"
            )
        return [found[rank] for rank in sorted(found)]

    @cached_property
    def _wrapper(self) -> Any:
        """DeepSpeed's own state around the optimizer's."""
        return self._optimizer(0) if self._optimizer_files else self._model["optimizer"]

    @cached_property
    def _inner_optimizer(self) -> Any:
        """The optimizer's own state dict; in ZeRO its first rank's."""
        return _unwrap(self._wrapper)

    @cached_property
    def _entries(self) -> list[Mapping[str, Any]]:
        return list(self._inner_optimizer["state"].values())

    @cached_property
    def _weights(self) -> Mapping[str, Tensor]:
        """The model's own weights and buffers; in ZeRO 3 the weights are empty."""
        if self._model["module"] is not None:
            return self._model["module"]
        weights: dict[str, Tensor] = {}
        layers = self._state.model.stages[self._pipe]
        for name, file in self._state.files.items():
            if isinstance(file, LayerFile) and file.tensor_rank == self._tensor and file.layer in layers:
                weights |= {f"{file.layer}.{rest}": value for rest, value in self._state.open(name).items()}
        return weights

    @cached_property
    def _frozen(self) -> Mapping[str, Any]:
        """The shapes of parameters that ZeRO 2 and 3 keep apart, as they are not trained."""
        return self._model["frozen_param_shapes"] or {} if self._stage > 1 else {}

    def _read_frozen(self, name: str, span: Span) -> Tensor:
        if self._stage < 3:
            return _elements(self._model["frozen_param_fragments"][name], span)
        files = [ModelFile(self._rank, rank) for rank in range(self._state.ranks)]
        parts = [self._state.open(file.name)["frozen_param_fragments"][name].reshape(-1) for file in files]
        return _elements(torch.cat(parts), span)

    @cached_property
    def _groups(self) -> list[_ParameterGroup]:
        order, ranks = self._state.model.order[self._pipe], self._state.ranks
        shapes = self._model["param_shapes"]
        if self._stage == 3:
            groups = [{name: math.prod(shape) for name, shape in group.items()} for group in shapes]
            return [_SplitParameters(self._optimizer, index, sizes, ranks) for index, sizes in enumerate(groups)]
        if self._optimizer_files:
            named = order if shapes is None else shapes
            groups = [{name: self._local_size(name) for name in group} for group in named]
            return [_SplitGroup(self._optimizer, index, sizes) for index, sizes in enumerate(groups)]
        wrapper = self._wrapper
        if "fp32_groups_flat" in wrapper:
            groups = [{name: self._local_size(name) for name in group} for group in order]
            return [_FlatGroup(wrapper, index, sizes) for index, sizes in enumerate(groups)]
        return [_WholeParameters(wrapper, order, self._weights)]

    def _local_size(self, name: str) -> int:
        parameter = self._state.parameters[whole_name(name, self._layers)]
        return math.prod(parameter.shard_shape(self._state.layout["tensor"], self._tensor))

    @cached_property
    def _group_of(self) -> dict[str, _ParameterGroup]:
        return {name: group for group in self._groups for name in group.names}


class _WholeParameters:
    """Each parameter has tensors of its own: the user's optimizer, or FP16_UnfusedOptimizer."""

    def __init__(self, wrapper: Any, order: Sequence[Sequence[str]], weights: Mapping[str, Tensor]):
        groups, inner = wrapper.get("fp32_groups"), _unwrap(wrapper)
        numbers = [number for group in inner["param_groups"] for number in group["params"]]
        self.names = [name for group in order for name in group]
        if len(numbers) != len(self.names):
            raise RankError(f"the optimizer has {len(numbers)} parameters, and the manifest names {len(self.names)}")
        self._state = {name: inner["state"].get(number, {}) for name, number in zip(self.names, numbers, strict=True)}
        masters = weights.values() if groups is None else (x for group in groups for x in group)
        self._weights = weights if groups is None else dict(zip(self.names, masters, strict=True))

    def read(self, kind: str, name: str, span: Span) -> Tensor:
        value = self._weights[name] if kind == WEIGHT else self._state[name].get(kind)
        return torch.zeros(span.size) if value is None else _elements(value, span)


class _FlatGroup:
    """One flat tensor for a group of parameters: FP16_Optimizer."""

    def __init__(self, wrapper: Any, index: int, sizes: Mapping[str, int]):
        self.names, self._starts = list(sizes), _starts(sizes)
        self._weights, self._state = wrapper["fp32_groups_flat"][index], _unwrap(wrapper)["state"].get(index, {})

    def read(self, kind: str, name: str, span: Span) -> Tensor:
        value = self._weights if kind == WEIGHT else self._state.get(kind)
        if value is None:
            return torch.zeros(span.size)
        return _elements(value, Span(self._starts[name] + span.start, span.size))


class _SplitGroup:
    """A flattened group in equal parts, a rank each: ZeRO 1 and 2. What pads the last part may be left out of the weights."""

    def __init__(self, optimizer: Callable[[int], Any], index: int, sizes: Mapping[str, int]):
        self.names, self._starts, self._optimizer, self._index = list(sizes), _starts(sizes), optimizer, index

    @cached_property
    def _size(self) -> int:
        """Of a part."""
        first = self._optimizer(0)
        tensors = [x for kind, x in _unwrap(first)["state"].get(self._index, {}).items() if _is_tensor(kind, x)]
        padding = first["group_paddings"][self._index]
        weights = first["single_partition_of_fp32_groups"][self._index]
        return tensors[0].numel() if tensors else weights.numel() + (padding if "zero_stage" in first else 0)

    def read(self, kind: str, name: str, span: Span) -> Tensor:
        first = self._starts[name] + span.start
        found = []
        for rank, part in _divide_span(first, span.size, self._size):
            optimizer = self._optimizer(rank)
            state = _unwrap(optimizer)["state"].get(self._index, {})
            value = optimizer["single_partition_of_fp32_groups"][self._index] if kind == WEIGHT else state.get(kind)
            found.append(torch.zeros(part.size) if value is None else _elements(value, part))
        return _join(found)


class _SplitParameters:
    """Equal parts of each parameter, a rank each: ZeRO 3. What pads the last part is never read."""

    def __init__(self, optimizer: Callable[[int], Any], index: int, sizes: Mapping[str, int], ranks: int):
        self._sizes = {name: -(-size // ranks) for name, size in sizes.items()}
        self.names, self._starts, self._optimizer, self._index = list(sizes), _starts(self._sizes), optimizer, index

    def read(self, kind: str, name: str, span: Span) -> Tensor:
        found = []
        for rank, part in _divide_span(span.start, span.size, self._sizes[name]):
            optimizer = self._optimizer(rank)
            state = _unwrap(optimizer)["state"].get(self._index, {})
            value = optimizer["fp32_flat_groups"][self._index] if kind == WEIGHT else state.get(kind)
            part = Span(self._starts[name] + part.start, part.size)
            found.append(torch.zeros(part.size) if value is None else _elements(value, part))
        return _join(found)


def _divide_span(start: int, size: int, part: int) -> Iterator[tuple[int, Span]]:
    """The parts of equal size in which ``size`` elements from ``start`` lie: their numbers, and which of their elements."""
    stop = start + size
    while start < stop:
        number, first = divmod(start, part)
        count = min(part - first, stop - start)
        yield number, Span(first, count)
        start += count


def _starts(sizes: Mapping[str, int]) -> dict[str, int]:
    starts, start = {}, 0
    for name, size in sizes.items():
        starts[name] = start
        start += size
    return starts


def _elements(x: Tensor, span: Span) -> Tensor:
    flat = x.detach().reshape(-1)
    if span.start + span.size > flat.numel():
        last = span.start + span.size
        raise RankError(f"a tensor of the checkpoint has {flat.numel()} elements instead of at least {last}; use another one")
    return flat[span.start : span.start + span.size]


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([torch.empty(0), *parts])


def _unwrap(wrapper: Any) -> Any:
    """The optimizer's own state dict in what DeepSpeed's wrapper of it saved."""
    for key in ("base_optimizer_state", "optimizer_state_dict"):
        if key in wrapper:
            return wrapper[key]
    return wrapper


def _is_tensor(kind: str, value: Any) -> bool:
    """Whether an entry of an optimizer's state has the shape of the parameter."""
    return isinstance(value, Tensor) and kind != "step"


def _loss_scale(wrapper: Any) -> dict[str, Any] | None:
    scaler = vars(wrapper["loss_scaler"]) if "loss_scaler" in wrapper else wrapper
    found = {key: scaler[key] for key in ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis") if key in scaler}
    return found or None

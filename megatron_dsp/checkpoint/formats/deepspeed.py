"""DeepSpeed's own folders, as its engines write them at any degrees and ZeRO stage, with this package's manifest.

`deepspeed_files` reads them and has a table of what is where. What is written here is what DeepSpeed 0.19.8 itself loads, and
what its tools ``zero_to_fp32`` and ``ds_to_universal`` want beside that.
"""

from __future__ import annotations

import gc
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_dsp.checkpoint import manifest, store, tensor_file
from megatron_dsp.checkpoint.deepspeed_files import DeepSpeedState
from megatron_dsp.checkpoint.file_names import RANK_FILES, STEP, LayerFile, ModelFile, OptimizerFile, WeightsFile, step_folder
from megatron_dsp.checkpoint.formats.source import (
    DEEPSPEED,
    Source,
    Target,
    depth_first,
    param_group,
    parameters_in_order,
    pipeline_model,
    require_layers,
)
from megatron_dsp.checkpoint.manifest import CONTENTS, Manifest
from megatron_dsp.checkpoint.parameters import Model, whole_name
from megatron_dsp.checkpoint.state import WEIGHT
from megatron_dsp.checkpoint.torch_file import Placeholder, TorchFile
from megatron_dsp.dtypes import PRECISIONS
from megatron_dsp.errors import UsageError

_REOPEN_AFTER = 256 * 2**20  # bytes that are read before the files, which are mapped into memory, are opened anew
_SUB_GROUP = 10**9  # elements of a rank, DeepSpeed's default for sub_group_size

logger = logging.getLogger(__name__)


def recognises(folder: Path) -> bool:
    return any(folder.glob(RANK_FILES)) or any(folder.glob(f"{STEP}*/{RANK_FILES}"))


def load(folder: Path) -> Source:
    """A checkpoint, or the newest good one in a folder of them. Errors: UsageError where there is no good one."""
    path = folder
    if (folder / manifest.NAME).exists() or any(folder.glob("*.pt")):
        problems = manifest.check(folder)
        if problems:
            raise UsageError(f"{folder} is damaged: {store.shorten(problems)}; use another checkpoint")
    else:
        path, known = store.newest_good(folder)
        if known:
            logger.warning("%s: %s; taking %s", folder, "; ".join(known), path.name)
    record = manifest.read(path)
    state = DeepSpeedState(path, record)
    mapped = 0

    def read_tensor(kind: str, name: str) -> Tensor:
        nonlocal state, mapped
        if mapped > _REOPEN_AFTER:
            state, mapped = DeepSpeedState(path, record), 0
            gc.collect()  # a state refers to itself, and its pages count as memory until it is gone
        tensor = state.read(kind, name)
        mapped += 4 * tensor.numel()
        return tensor

    buffers = {name: value.clone() for name, value in state.buffers().items()}
    source = Source(parameters_in_order(record.model), state.kinds, state.training, record.model.layers, buffers, read_tensor)
    if source.optimizer_kinds:
        return source
    return replace(source, training=replace(source.training, step=None, lr=None))  # these are an optimizer's


def save(source: Source, folder: Path, target: Target) -> None:
    """Write a folder of one checkpoint, with whole weights in safetensors beside DeepSpeed's files, as a training run has them.

    A tensor of the source is read once, and goes from there into all files that have a part of it.

    Errors: UsageError, before it writes, for what DeepSpeed or the model cannot have.
    """
    model = _model(source, target)
    training, degrees = source.training, {"pipe": target.pipe, "data": target.data, "sequence": 1, "tensor": target.tensor}
    tag = step_folder(training.iteration)
    path = store.begin(folder, tag)
    contents = [CONTENTS[kind] for kind in source.kinds if kind in CONTENTS]
    if source.optimizer_kinds or training.lr is not None:  # plain SGD has no tensors
        contents.append("optimizer")
    metadata = {"iteration": str(training.iteration), **{axis: str(degree) for axis, degree in degrees.items()}}
    conversion = _Conversion(source, model, path, target, param_group(source))
    for pipe in range(target.pipe):
        writers = [_ModelRankWriter(conversion, pipe, tensor) for tensor in range(target.tensor)]
        for kind in source.kinds:
            with ExitStack() as whole_files:
                appends = [append for writer in writers for append in writer.open_whole_file(kind, metadata, whole_files)]
                for name in writers[0].names:
                    whole = source.read(kind, whole_name(name, model.layers))
                    for writer in writers:
                        writer.append(kind, name, whole)
                    for append, writer in zip(appends, writers, strict=False):
                        append(writer.take_shard(name, whole))
                for append in appends:
                    for buffer in writers[0].narrow_buffers:
                        append(buffer)
        for writer in writers:
            writer.close()
    layout = {**degrees, "zero_stage": target.zero_stage}
    files = manifest.hash_files(path)
    record = Manifest.new(training.progress, layout, target.dtype, sorted(contents), model, files)
    store.publish(folder, tag, record)


def _model(source: Source, target: Target) -> Model:
    """The names and the order of the parameters on the target's pipe ranks. Errors: UsageError for what cannot be."""
    if target.dtype == "fp16":
        raise UsageError("--dtype fp16: folders of DeepSpeed's are written for models in fp32 and bf16; use one of these")
    if target.pipe > 1 and target.zero_stage > 1:
        raise UsageError(
            f"--target-zero-stage {target.zero_stage} with a pipeline: DeepSpeed has no gradient shards there; use stage 0 or 1"
        )
    if target.pipe > 1 and target.zero_stage == 0 and target.dtype == "bf16":
        raise UsageError(
            "--target-zero-stage 0 and --dtype bf16 with a pipeline: DeepSpeed does not load its own checkpoints of these; "
            "use stage 1"
        )
    if target.tensor > 1:
        flag = f"--target-tensor-parallel-size {target.tensor}"
        divided = {name: each.shape[each.dim] for name, each in source.parameters.items() if each.dim is not None}
        if not divided:
            raise UsageError(f"{flag}: the source does not say how the tensor axis divides parameters; give a --sharding-table")
        small = min(divided, key=lambda name: divided[name])
        if divided[small] < target.tensor:
            raise UsageError(f"{flag}: {small!r} has {divided[small]} elements along the dim that is divided; lower it")
    if target.pipe == 1:
        in_order = {name: source.parameters[name] for name in depth_first(list(source.parameters))}
        return Model(in_order, None, [[]], [[list(in_order)]])
    layers = require_layers(source, target.pipe)
    stages: Sequence[Sequence[int]] = [range(len(layers))]
    sizes = [0] * len(layers)
    for name in pipeline_model(source, stages).order[0][0]:
        shape = source.parameters[whole_name(name, layers)].shard_shape(target.tensor, 0)
        sizes[int(name.partition(".")[0])] += math.prod(shape)
    from deepspeed.runtime.utils import partition_balanced  # what PipelineModule divides layers with; its import takes seconds

    bounds = [int(bound) for bound in partition_balanced(sizes, target.pipe)]
    return pipeline_model(source, [list(range(*pair)) for pair in pairwise(bounds)])


class _Conversion(NamedTuple):
    """What is written into a folder; ``group``: the options of the optimizer."""

    source: Source
    model: Model
    path: Path
    target: Target
    group: dict[str, Any]


class _Destination(NamedTuple):
    """Where elements ``start`` to ``stop`` of a tensor rank's shard of a parameter, flat, go, with zeros after them.

    ``size``: of all that goes there.
    """

    placeholder: Placeholder
    start: int
    stop: int
    size: int


class _ModelRankWriter:
    """The files of a place on the pipe and tensor axes, while they are written.

    Attributes:
        names: of its parameters, in order.
    """

    def __init__(self, conversion: _Conversion, pipe: int, tensor: int):
        self._source, self._model, self._path, self._target, self._group = source, model, _, target, _ = conversion
        self._pipe, self._tensor = pipe, tensor
        (self.names,) = model.order[pipe]
        self._parameters = {name: source.parameters[whole_name(name, model.layers)] for name in self.names}
        self._shapes = {name: each.shard_shape(target.tensor, tensor) for name, each in self._parameters.items()}
        self._sizes = {name: math.prod(shape) for name, shape in self._shapes.items()}
        places = {name: model.locate(name) for name in source.buffers}
        self._buffers = {local: source.buffers[name] for name, (stage, local) in places.items() if stage == pipe}
        self._files: list[TorchFile] = []
        self._file_of: dict[int, TorchFile] = {}
        self._destinations: dict[tuple[str, str], list[_Destination]] = {}
        self._values: list[tuple[Placeholder, Tensor]] = []
        # ds_to_universal joins shards along dims 0 and 1 alone: told nothing it refuses, but for ZeRO 3
        far = any(parameter.dim is not None and parameter.dim > 1 for parameter in model.parameters.values())
        self._common = {} if far else {"universal_checkpoint_info": model.universal_checkpoint_info()}
        self._begin_all()

    def append(self, kind: str, name: str, whole: Tensor) -> None:
        """Write what the files have of a parameter, given all of it; in the order of ``names``."""
        destinations = self._destinations.get((kind, name), ())
        flat = self.take_shard(name, whole).reshape(-1) if destinations else whole
        for placeholder, start, stop, size in destinations:
            file = self._file_of[id(placeholder)]
            file.append(placeholder, flat[start:stop])
            file.append(placeholder, torch.zeros(size - (stop - start)))

    def take_shard(self, name: str, whole: Tensor) -> Tensor:
        """This tensor rank's shard of a parameter."""
        return self._parameters[name].take_shard(whole, self._target.tensor, self._tensor)

    def close(self) -> None:
        """Bring the files to the disk."""
        for file in self._files:
            file.close()

    @property
    def narrow_buffers(self) -> list[Tensor]:
        """Those that stand after the parameters in files of whole weights."""
        return [buffer for buffer in self._buffers.values() if buffer.dtype.itemsize <= 4]

    def open_whole_file(self, kind: str, metadata: dict[str, str], whole_files: ExitStack) -> list[Callable[[Tensor], None]]:
        """Begin the file of whole weights, or of their average; none for other kinds. Wide buffers are in it already."""
        if kind not in CONTENTS:
            return []
        wide = {name: buffer for name, buffer in self._buffers.items() if buffer.dtype.itemsize > 4}
        narrow = {name: buffer for name, buffer in self._buffers.items() if name not in wide}
        entries: dict[str, tuple[torch.dtype, Sequence[int]]] = {name: (x.dtype, x.shape) for name, x in wide.items()}
        entries |= {name: (torch.float32, shape) for name, shape in self._shapes.items()}
        entries |= {name: (buffer.dtype, buffer.shape) for name, buffer in narrow.items()}
        path = self._path / WeightsFile(kind, self._tensor, self._pipe).name
        append = whole_files.enter_context(tensor_file.create(path, entries, metadata))
        for buffer in wide.values():
            append(buffer)
        return [append]

    def _begin_all(self) -> None:
        """Begin all of DeepSpeed's files."""
        target = self._target
        model_rank = self._pipe * target.tensor + self._tensor
        if target.pipe > 1:
            for layer in self._model.stages[self._pipe]:
                self._begin(LayerFile(layer, self._tensor), self._module_content(f"{layer}."))
        for rank in range(target.data) if target.zero_stage else ():
            if target.zero_stage == 3:
                self._begin(ModelFile(model_rank, rank), self._model_content(None))
            optimizer = self._optimizer_of_stage_1_or_2(rank) if target.zero_stage < 3 else self._optimizer_of_stage_3(rank)
            content = {"optimizer_state_dict": optimizer, "ds_config": self._ds_config, "ds_version": DEEPSPEED}
            self._begin(OptimizerFile(model_rank, rank, target.dtype == "bf16"), content)
        if target.zero_stage < 3:
            whole = None if target.zero_stage else self._optimizer_of_stage_0()
            self._begin(ModelFile(model_rank), self._model_content(whole))

    def _begin(self, file_name: LayerFile | ModelFile | OptimizerFile, content: Any) -> None:
        """Begin a file; the placeholders that were added since the last one are in it."""
        file = TorchFile(self._path / file_name.name, content)
        self._files.append(file)
        for placeholder in file.placeholders:
            self._file_of[id(placeholder)] = file
        for placeholder, value in self._values:
            file.append(placeholder, value)
        self._values = []

    def _add_placeholder(self, kind: str, name: str, dtype: torch.dtype = torch.float32) -> Placeholder:
        """A parameter's tensor of a kind, as this place has it."""
        tensor = Placeholder(dtype, self._shapes[name])
        self._destinations.setdefault((kind, name), []).append(_Destination(tensor, 0, tensor.size, tensor.size))
        return tensor

    def _add_value(self, value: Tensor) -> Placeholder:
        """A tensor that is there already."""
        tensor = Placeholder(value.dtype, value.shape)
        self._values.append((tensor, value))
        return tensor

    def _module_content(self, prefix: str = "") -> OrderedDict[str, Placeholder]:
        """The state dict of the model, or of the layer whose names begin so, in the model's dtype."""
        dtype = PRECISIONS[self._target.dtype]
        content = OrderedDict()
        for name in self.names:
            if name.startswith(prefix):
                own = self._add_value(torch.empty(0, dtype=dtype)) if self._target.zero_stage == 3 else None
                content[name.removeprefix(prefix)] = own or self._add_placeholder(WEIGHT, name, dtype)
        for name, buffer in self._buffers.items():
            if name.startswith(prefix):
                content[name.removeprefix(prefix)] = self._add_value(buffer)
        return content

    @property
    def _ds_config(self) -> dict[str, Any]:
        return {"zero_optimization": {"stage": self._target.zero_stage}}

    def _model_content(self, optimizer: Any) -> dict[str, Any]:
        """What a model's file has beside the optimizer of ZeRO 0."""
        target, training = self._target, self._source.training
        sharded, partitioned = target.zero_stage > 0, target.zero_stage > 1
        content = {
            "module": self._module_content() if target.pipe == 1 else None,
            "buffer_names": list(self._buffers),
            "optimizer": optimizer,
            "param_shapes": [self._torch_shapes(names) for names in self._groups()] if sharded else None,
            "frozen_param_shapes": OrderedDict() if partitioned else None,
            "frozen_param_fragments": OrderedDict() if partitioned else None,
            "shared_params": {} if sharded else None,
            "lr_scheduler": training.schedule,
            "data_sampler": None,
            "random_ltd": None,
            "skipped_steps": training.skipped_steps,
            "global_steps": training.iteration,
            "global_samples": training.consumed_samples,
            "dp_world_size": target.data,
            "mp_world_size": target.tensor * target.pipe,
            "checkpoint_parallel_dimensions": {"pp_degree": target.pipe, "tp_degree": target.tensor},
            "ds_config": self._ds_config,
            "ds_version": DEEPSPEED,
        }
        return content | self._common

    def _torch_shapes(self, names: Sequence[str]) -> OrderedDict[str, torch.Size]:
        return OrderedDict((name, torch.Size(self._shapes[name])) for name in names)

    def _groups(self) -> list[Sequence[str]]:
        """The parameters by the long tensors that the optimizer has of them."""
        if self._target.zero_stage < 3:
            return [self.names]
        parts = {name: -(-size // self._target.data) for name, size in self._sizes.items()}
        if sum(parts.values()) <= _SUB_GROUP:
            return [self.names]
        groups, first, size = [], 0, 0
        for number, part in enumerate(parts.values(), start=1):
            size += part
            if size >= _SUB_GROUP or number == len(parts):
                groups.append(self.names[first:number])
                first, size = number, 0
        return groups

    def _optimizer_state(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The state dict of the optimizer that DeepSpeed wraps, with these tensors of its parameters."""
        step = torch.tensor(float(self._source.training.step or 0))
        state = {number: {"step": self._add_value(step), **tensors} for number, tensors in enumerate(states) if tensors}
        return {"state": state, "param_groups": [{**self._group, "params": list(range(len(states)))}]}

    def _optimizer_of_stage_0(self) -> dict[str, Any]:
        """ZeRO 0: each parameter's tensors. Of a model in bf16 the fp32 weights as well, as FP16_UnfusedOptimizer has them."""
        states = [{kind: self._add_placeholder(kind, name) for kind in self._source.optimizer_kinds} for name in self.names]
        if self._target.dtype == "fp32":
            return self._optimizer_state(states)
        weights = [self._add_placeholder(WEIGHT, name) for name in self.names]
        scale = {"dynamic_loss_scale": False, "cur_scale": 1.0, "cur_iter": self._source.training.iteration}
        return {**scale, "optimizer_state_dict": self._optimizer_state(states), "fp32_groups": [weights]}

    def _loss_scaler(self) -> dict[str, Any]:
        from deepspeed.runtime.fp16.loss_scaler import LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum

        stage = ZeroStageEnum(self._target.zero_stage)
        return {"loss_scaler": LossScaler(1.0), "dynamic_loss_scale": False, "overflow": False, "zero_stage": stage}

    def _optimizer_of_stage_1_or_2(self, rank: int) -> dict[str, Any]:
        """ZeRO 1, 2: a rank's part of all parameters, flattened one after another. The last parts end with padding."""
        from deepspeed.utils.tensor_fragment import fragment_address

        ranks, used = self._target.data, sum(self._sizes.values())
        size = -(-used // (2 * ranks)) * 2
        first, stop = rank * size, (rank + 1) * size
        padding = min(max(stop - used, 0), size)
        mapping, ranges, place = OrderedDict(), {}, 0
        for name, count in self._sizes.items():
            start, end = max(first, place), min(stop, place + count)
            if start < end:
                ranges[name] = start - place, end - place
                mapping[name] = fragment_address(numel=end - start, start=start - first)
            place += count

        def flat(kind: str, size: int, padding: int) -> Placeholder:
            tensor = Placeholder(torch.float32, (size,))
            for name in ranges if padding == 0 else {**dict.fromkeys(ranges), self.names[-1]: None}:
                start, end = ranges.get(name, (0, 0))
                fill = padding if name == self.names[-1] else 0
                self._destinations.setdefault((kind, name), []).append(_Destination(tensor, start, end, end - start + fill))
            return tensor

        state = {kind: flat(kind, size, padding) for kind in self._source.optimizer_kinds}
        return {
            **self._loss_scaler(),
            "base_optimizer_state": self._optimizer_state([state]),
            "single_partition_of_fp32_groups": [flat(WEIGHT, size - padding, 0)],
            "group_paddings": [padding],
            "param_alignment_paddings": [[0] * len(self.names)],
            "partition_count": [ranks],
            "param_slice_mappings": [mapping],
            "ds_version": DEEPSPEED,
        }

    def _optimizer_of_stage_3(self, rank: int) -> dict[str, Any]:
        """ZeRO 3: a rank's part of each parameter, one after another, each with its padding."""
        ranks = self._target.data

        def flat(kind: str, names: Sequence[str]) -> Placeholder:
            parts = {name: -(-self._sizes[name] // ranks) for name in names}
            tensor = Placeholder(torch.float32, (sum(parts.values()),))
            for name, part in parts.items():
                start, stop = (min(bound * part, self._sizes[name]) for bound in (rank, rank + 1))
                self._destinations.setdefault((kind, name), []).append(_Destination(tensor, start, stop, part))
            return tensor

        states = [{kind: flat(kind, names) for kind in self._source.optimizer_kinds} for names in self._groups()]
        return {
            **self._loss_scaler(),
            "partition_count": ranks,
            "optimizer_state_dict": self._optimizer_state(states),
            "fp32_flat_groups": [flat(WEIGHT, names) for names in self._groups()],
        }

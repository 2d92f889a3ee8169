"""Putting a checkpoint's state into a live DeepSpeed engine of any degrees, ZeRO stage and precision (DeepSpeed 0.19.8).

DeepSpeed's own loading wants the same degrees and stage. Here each rank takes its fragments of the fp32 weights and of the
optimizer's tensors out of the whole, in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dsp.checkpoint.deepspeed_files import DeepSpeedState, Span
from megatron_dsp.checkpoint.parameters import Model, parameters_of, whole_names
from megatron_dsp.checkpoint.state import AVERAGE, WEIGHT, Training
from megatron_dsp.errors import UsageError
from megatron_dsp.mesh import Mesh
from megatron_dsp.training.master_weights import MasterWeights, persistent_buffers


def model_of(engine: Any, mesh: Mesh) -> Model:
    """What a manifest says of the engine's model; complete on rank 0. Collective over the pipe axis."""
    names = whole_names(engine.module)
    own = {names[name]: parameter for name, parameter in parameters_of(engine.module).items()}
    layers = sorted({int(name.partition(".")[0]) for name in names}) if mesh.size("pipe") > 1 else []
    gathered: list[Any] = [None] * mesh.size("pipe")
    dist.all_gather_object(gathered, (own, layers, _order(engine)), group=mesh.group("pipe"))
    parts, stages, order = zip(*gathered, strict=True)
    layer_names = getattr(engine.module, "layer_names", None)
    return Model(
        parameters={name: parameter for part in parts for name, parameter in part.items()},
        layers=None if layer_names is None else list(layer_names),
        stages=list(stages),
        order=list(order),
    )


def _order(engine: Any) -> list[list[str]]:
    """The parameters in each of the optimizer's groups, in its order."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    for groups in ("fp16_groups", "bit16_groups", "bf16_groups"):
        if hasattr(engine.optimizer, groups):
            return [[names[id(parameter)] for parameter in group] for group in getattr(engine.optimizer, groups)]
    if engine.optimizer is None:
        return [list(names.values())]
    return [[names[id(parameter)] for parameter in group["params"]] for group in engine.optimizer.param_groups]


class CheckpointReader:
    """What this rank has of the tensors of one kind, as `MasterWeights.load` asks for them, by the module's names."""

    def __init__(self, state: DeepSpeedState, kind: str, module: torch.nn.Module, mesh: Mesh):
        self._state, self._kind, self._names = state, kind, whole_names(module)
        self._parameters = parameters_of(module)
        self._tensor = mesh.size("tensor"), mesh.rank("tensor")

    def read_flat(self, name: str, start: int, size: int) -> Tensor:
        """Elements of this tensor rank's shard of a parameter, flat."""
        return self._state.read_span(self._kind, self._names[name], self._parameters[name], self._tensor, Span(start, size))


def check_model(state: DeepSpeedState, module: torch.nn.Module, mesh: Mesh) -> None:
    """Errors: UsageError where the checkpoint's parameters are not the module's. Collective over the pipe axis."""
    names = whole_names(module)
    own = {names[name]: parameter.shape for name, parameter in parameters_of(module).items()}
    stages: list[Any] = [None] * mesh.size("pipe")
    dist.all_gather_object(stages, own, group=mesh.group("pipe"))
    wanted = {name: shape for stage in stages for name, shape in stage.items()}
    there = {name: parameter.shape for name, parameter in state.parameters.items()}
    differing = {
        "missing": sorted(wanted.keys() - there.keys()),
        "unexpected": sorted(there.keys() - wanted.keys()),
        "of another shape": [
            f"{name} {list(there[name])} instead of {list(shape)}"
            for name, shape in wanted.items()
            if there.get(name, shape) != shape
        ],
    }
    texts = [f"{len(names)} {kind}: {', '.join(names[:8])}" for kind, names in differing.items() if names]
    if texts:
        raise UsageError(f"the checkpoint is of another model ({'; '.join(texts)}); give the model that it was saved from")


@torch.no_grad()
def restore(engine: Any, mesh: Mesh, state: DeepSpeedState, *, optimizer: bool = True) -> None:
    """Let ``engine`` go on from ``state``; ``optimizer=False``: with its weights alone.

    Reads what this rank has of each tensor, and writes it in place. The optimizer's options other than the learning rate stay
    the engine's. Nothing is communicated, so one rank may fail alone: when none has, `MasterWeights.publish` lets the model
    compute with the weights.

    Errors: UsageError where the checkpoint's optimizer has other tensors than this one's; RankError for damaged files.
    """
    weights, module = MasterWeights(engine, mesh), engine.module
    weights.load(CheckpointReader(state, WEIGHT, module, mesh), weights.tensors(), all_of_them=True)
    buffers, names = state.buffers(), whole_names(module)
    for name, buffer in persistent_buffers(module).items():
        buffer.copy_(buffers[names[name]])
    if optimizer:
        _restore_optimizer(engine, weights, state, lambda kind: CheckpointReader(state, kind, module, mesh))
        _restore_training(engine, state.training)


def _restore_optimizer(
    engine: Any, weights: MasterWeights, state: DeepSpeedState, reader_of: Callable[[str], CheckpointReader]
) -> None:
    """Its tensors, of the shapes of the weights, and its count of steps."""
    states, keys, step = engine.basic_optimizer.state, weights.state_keys(), state.training.step
    kinds = [kind for kind in state.kinds if kind not in (WEIGHT, AVERAGE)]
    for key in keys:
        there = [kind for kind, value in states[key].items() if isinstance(value, Tensor) and kind != "step"]
        if there and sorted(there) != sorted(kinds):
            raise UsageError(
                f"the checkpoint's optimizer has {', '.join(kinds) or 'no tensors'}, and this one {', '.join(there)}; resume "
                "with the same optimizer, or with --no-load-optim"
            )
    for kind in kinds:
        tensors = [torch.zeros_like(key, dtype=torch.float32, requires_grad=False) for key in keys]
        weights.load(reader_of(kind), tensors)
        for key, value in zip(keys, tensors, strict=True):
            if kind in states[key]:
                states[key][kind].copy_(value)  # in place: DeepSpeed has links to it
            else:
                states[key][kind] = value
    if kinds and step is not None:
        for key in keys:
            own = states[key].get("step", torch.tensor(0.0))
            states[key]["step"] = torch.full_like(own, step) if isinstance(own, Tensor) else step


def _restore_training(engine: Any, training: Training) -> None:
    """Counts, the learning rate and its schedule, and fp16's loss scale."""
    engine.global_steps, engine.skipped_steps = training.iteration, training.skipped_steps
    engine.global_samples = training.consumed_samples
    groups = engine.basic_optimizer.param_groups
    rates = [training.lr] * len(groups)
    if engine.lr_scheduler is not None and training.schedule is not None:
        engine.lr_scheduler.load_state_dict(training.schedule)
        rates = engine.lr_scheduler.get_last_lr()
    for group, rate in zip(groups, rates, strict=True):
        if rate is not None:
            group["lr"] = rate
    if engine.fp16_enabled() and training.loss_scale is not None:
        scaler = getattr(engine.optimizer, "loss_scaler", None) or engine.optimizer.loss_scale_config
        for name, value in training.loss_scale.items():
            if hasattr(scaler, name):
                setattr(scaler, name, value)

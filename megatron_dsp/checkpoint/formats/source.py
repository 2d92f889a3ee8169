"""What stands between the formats: a checkpoint that is read tensor by tensor, and what its copy is to be.

Beside a format's own files there are two of this package, so that nothing is lost on the way back: ``manifest.json``, with
the parameters, how the tensor axis divides them and what layers a pipeline has, and ``training.json``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dsp.checkpoint import manifest
from megatron_dsp.checkpoint.disk import durable_file
from megatron_dsp.checkpoint.manifest import Manifest
from megatron_dsp.checkpoint.parameters import Model, Parameter, whole_name
from megatron_dsp.checkpoint.state import AVERAGE, WEIGHT, Training
from megatron_dsp.errors import UsageError
from megatron_dsp.mesh import AXES

TRAINING = "training.json"
DEEPSPEED = "0.19.8"  # the version whose files are written

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A checkpoint of any format, whole over all axes of a mesh.

    Attributes:
        parameters: by their names in the whole model.
        kinds: of tensors that there are for each parameter, `WEIGHT` first.
        training: how far it had come.
        layers: what the layers of a pipeline are in the whole model, where that is known.
        buffers: the persistent ones, by their names in the whole model.
        read: a whole tensor of a kind and a parameter, in fp32, on the CPU.
    """

    parameters: Mapping[str, Parameter]
    kinds: tuple[str, ...]
    training: Training
    layers: Sequence[str] | None
    buffers: Mapping[str, Tensor]
    read: Callable[[str, str], Tensor]

    @property
    def optimizer_kinds(self) -> tuple[str, ...]:
        """Those of the optimizer."""
        return tuple(kind for kind in self.kinds if kind not in (WEIGHT, AVERAGE))


@dataclass(frozen=True)
class Target:
    """What a checkpoint is to be written as.

    Attributes:
        tensor: the degree of the tensor axis.
        pipe: that of the pipe axis.
        data: that of data x sequence, over which ZeRO divides.
        zero_stage: 0 to 3.
        dtype: of the model's weights: fp32, bf16 or fp16. The optimizer's tensors stay fp32.
        max_shard_size: bytes that a file may have at most, where a format divides what it has into files of a size.
    """

    tensor: int = 1
    pipe: int = 1
    data: int = 1
    zero_stage: int = 1
    dtype: str = "fp32"
    max_shard_size: int = 5 * 10**9


@dataclass(frozen=True)
class Companion:
    """What this package has written beside a format's own files.

    Attributes:
        model: what the manifest says of it; None: the checkpoint is of others, and says nothing of it.
        training: how far it had come.
        kinds: of tensors that it has; empty where that is not known.
    """

    model: Model | None = None
    training: Training = field(default_factory=Training)
    kinds: tuple[str, ...] = ()

    def parameters(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Parameter]:
        """The parameters with these shapes."""
        if self.model is None:
            return {name: Parameter(tuple(shape)) for name, shape in shapes.items()}
        known = self.model.parameters
        different = sorted(name for name, parameter in known.items() if parameter.shape != tuple(shapes.get(name, ())))
        if different or shapes.keys() - known.keys():
            names = ", ".join([*different, *sorted(shapes.keys() - known.keys())][:4])
            raise UsageError(f"{manifest.NAME} has other parameters than the files beside it ({names}); use another checkpoint")
        return parameters_in_order(self.model)


def read_companion(folder: Path) -> Companion:
    """What there is beside the files of a format in ``folder``. Errors: UsageError that names the files that are damaged."""
    if not (folder / manifest.NAME).exists():
        return Companion()
    problems = manifest.check(folder)
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise UsageError(f"{folder} is damaged: {'; '.join(problems[:4])}{more}; use another checkpoint")
    record = json.loads((folder / TRAINING).read_text())
    return Companion(manifest.read(folder).model, Training(**record["training"]), tuple(record["kinds"]))


def write_companion(source: Source, folder: Path, dtype: str) -> None:
    """Write what `read_companion` reads, after all other files of ``folder``, which it lists with their hashes."""
    with durable_file(folder / TRAINING) as file:
        file.write(json.dumps({"training": asdict(source.training), "kinds": source.kinds}, indent=1).encode())
    layout = {**dict.fromkeys(AXES, 1), "zero_stage": 0}
    order = [[list(source.parameters)]]
    layers = None if source.layers is None else list(source.layers)
    model, files = Model(source.parameters, layers, [[]], order), manifest.hash_files(folder)
    manifest.write(folder, Manifest.new(source.training.progress, layout, dtype, [], model, files))


def parameters_in_order(model: Model) -> dict[str, Parameter]:
    """The parameters of a model in the order of its optimizer, which is that of the model where there is one group."""
    layers = model.layers if any(model.stages) else None
    names = [whole_name(name, layers) for stage in model.order for group in stage for name in group]
    return {name: model.parameters[name] for name in dict.fromkeys([*names, *model.parameters])}


def pipeline_model(source: Source, stages: Sequence[Sequence[int]]) -> Model:
    """The model of ``source`` in a pipeline whose ranks have these layers, and one optimizer group each.

    Parameters are in the order of the layers. Errors: UsageError where one is in none of them.
    """
    assert source.layers is not None  # it was asked for
    model = Model(source.parameters, list(source.layers), stages, [])
    order: list[list[str]] = [[] for _ in stages]
    for name in source.parameters:
        try:
            pipe, local = model.locate(name)
        except KeyError:
            raise UsageError(
                f"parameter {name!r} is in none of the pipeline's {len(source.layers)} layers ({', '.join(source.layers[:4])}, "
                '...); name them all under "layers" in a --sharding-table'
            ) from None
        order[pipe].append(local)
    by_layer = [sorted(names, key=lambda name: int(name.partition(".")[0])) for names in order]
    parameters = {name: source.parameters[name] for names in by_layer for name in (whole_name(n, source.layers) for n in names)}
    return Model(parameters, list(source.layers), stages, [[names] for names in by_layer])


def param_group(source: Source) -> dict[str, Any]:
    """The options of the optimizer's param group, for DeepSpeed's own loading, which takes all of them from a checkpoint.

    Those that the source does not say are AdamW's defaults in torch, with a warning.
    """
    training = source.training
    options: dict[str, Any] = dict(training.options or {})
    if training.options is None and set(source.optimizer_kinds) == {"exp_avg", "exp_avg_sq"}:
        options = {key: value for key, value in torch.optim.AdamW([torch.zeros(1)]).param_groups[0].items() if key != "params"}
        logger.warning(
            "the source does not say the optimizer's options: betas %s, eps %g and weight decay %g are written; a resume with "
            "megatron_dsp has its own, DeepSpeed's load_checkpoint takes these",
            *(options[key] for key in ("betas", "eps", "weight_decay")),
        )
    return {**options, "lr": training.lr or 0.0}


def require_layers(source: Source, pipe: int) -> list[str]:
    """The layers of a pipeline. Errors: UsageError where they are not known, or are fewer than its ranks."""
    flag = f"--target-pipeline-parallel-size {pipe}"
    if source.layers is None:
        raise UsageError(
            f'{flag}: the source does not say what the layers of a pipeline are; name them under "layers" in a --sharding-table'
        )
    if pipe > len(source.layers):
        raise UsageError(f"{flag}: more than the model's {len(source.layers)} layers; lower it")
    return list(source.layers)


def depth_first(names: Sequence[str]) -> list[str]:
    """Names in the order of a module that has its parts in the order in which they appear here.

    A pipeline names parameters by layers in the order in which these run; ``named_parameters()`` goes through the parts of a
    module one by one, such as lists of layers that alternate.
    """
    tree: dict[str, dict] = {}
    for name in names:
        node = tree
        for part in name.split("."):
            node = node.setdefault(part, {})

    def leaves(node: dict[str, dict], prefix: str) -> list[str]:
        return [
            leaf for part, below in node.items() for leaf in (leaves(below, f"{prefix}{part}.") if below else [prefix + part])
        ]

    return leaves(tree, "")

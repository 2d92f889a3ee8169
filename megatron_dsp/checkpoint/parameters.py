"""The parameters of a model by names and shapes that no degree of parallelism changes.

A rank has a part of a model: its tensor axis's shards of parameters, and its pipe axis's layers. Here is what the parts are
of. Layers read it from the parameters themselves: Megatron's attributes (``partition_dim``, set by `megatron_dsp.tensor`) say
how the tensor axis divides them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from megatron_dsp.errors import UsageError
from megatron_dsp.layout import shard_range


@dataclass(frozen=True)
class Parameter:
    """A parameter, or a persistent buffer, of a whole model.

    Attributes:
        shape: on all tensor ranks together.
        dim: along which the tensor axis divides it, as `shard_range` does; None: every tensor rank has all of it.
    """

    shape: tuple[int, ...]
    dim: int | None = None

    def shard_range(self, ranks: int, rank: int) -> tuple[int, int]:
        """Where the shard of tensor rank ``rank`` of ``ranks`` starts and stops along ``dim``."""
        assert self.dim is not None  # only divided parameters have shards
        return shard_range(self.shape[self.dim], ranks, rank)

    def shard_shape(self, ranks: int, rank: int) -> tuple[int, ...]:
        """The shape of what a tensor rank has."""
        if self.dim is None:
            return self.shape
        start, stop = self.shard_range(ranks, rank)
        return (*self.shape[: self.dim], stop - start, *self.shape[self.dim + 1 :])

    def take_shard(self, whole: Tensor, ranks: int, rank: int) -> Tensor:
        """What a tensor rank has of ``whole``: a view."""
        if self.dim is None:
            return whole
        start, stop = self.shard_range(ranks, rank)
        return whole.narrow(self.dim, start, stop - start)


@dataclass(frozen=True)
class Model:
    """What a checkpoint says of its model.

    Attributes:
        parameters: by their names in the whole model.
        layers: what the layers of a pipeline are in the whole model; None: names are those of the whole model already.
        stages: of each pipe rank, the numbers of its layers; one empty list where there is no pipeline.
        order: of each pipe rank, the parameters in each of the optimizer's groups in its order, by their names there.
    """

    parameters: Mapping[str, Parameter]
    layers: Sequence[str] | None
    stages: Sequence[Sequence[int]]
    order: Sequence[Sequence[Sequence[str]]]

    def locate(self, name: str) -> tuple[int, str]:
        """The pipe rank that has a parameter or buffer of the whole model, and its name there."""
        if len(self.stages) == 1 and not self.stages[0]:
            return 0, name
        layers = {layer: number for number, layer in enumerate(self.layers or ())}
        parts = name.split(".")
        for size in range(len(parts) - 1, 0, -1):
            prefix, rest = ".".join(parts[:size]), ".".join(parts[size:])
            number = layers.get(prefix) if self.layers is not None else int(prefix) if prefix.isdigit() else None
            if number is not None:
                return next(pipe for pipe, stage in enumerate(self.stages) if number in stage), f"{number}.{rest}"
        raise KeyError(name)

    def universal_checkpoint_info(self) -> dict[str, Any]:
        """What DeepSpeed's ds_to_universal wants to be told of how the tensor axis divides parameters (version 0.4 of it).

        Without it that tool joins shards along wrong dims, in silence.
        """
        divided = {self.locate(name)[1]: parameter.dim for name, parameter in self.parameters.items()}

        def patterns(dim: int | None) -> list[str]:
            return [f"{re.escape(name)}$" for name, of_name in divided.items() if of_name == dim]

        return {
            "universal_checkpoint_version": 0.4,
            "tp_replicated_parameter_patterns": patterns(None),
            "parameter_with_row_parallelism_patterns": patterns(1),  # all others are joined along dim 0
        }

    def to_json(self) -> dict[str, Any]:
        """As values that JSON knows."""
        parameters = {name: [list(parameter.shape), parameter.dim] for name, parameter in self.parameters.items()}
        return {"parameters": parameters, "layers": self.layers, "stages": self.stages, "order": self.order}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Model:
        """The reverse of `to_json`. Errors: ValueError, KeyError and TypeError for anything else."""
        parameters = {name: Parameter(tuple(shape), dim) for name, (shape, dim) in record["parameters"].items()}
        return cls(parameters, record["layers"], record["stages"], record["order"])


def parameters_of(module: nn.Module) -> dict[str, Parameter]:
    """The parameters of what this rank has of a model, by their names in ``module``; ZeRO 3 may have divided them further."""
    return {name: _parameter(value) for name, value in module.named_parameters()}


def _parameter(value: Any) -> Parameter:
    shape = list(getattr(value, "ds_shape", value.shape))
    dim = getattr(value, "partition_dim", None)
    if dim is not None:
        shape[dim] = value.partition_size
    return Parameter(tuple(shape), dim)


def whole_names(module: nn.Module) -> Mapping[str, str]:
    """The names in the whole model of the parameters and buffers of ``module``, by their names in it.

    They differ in a pipeline, which names them by the numbers of its layers. If its module has ``layer_names``, what the layers
    are in the model that is no pipeline, these are used.

    Errors: UsageError where ``layer_names`` are not as many as the layers.
    """
    layers: Sequence[str] | None = getattr(module, "layer_names", None)
    return {name: whole_name(name, layers) for name in module.state_dict(keep_vars=True)}


def whole_name(name: str, layers: Sequence[str] | None) -> str:
    """The name in the whole model of what is ``name`` in a part of it, given what the layers of a pipeline are in it."""
    if layers is None:
        return name
    number, _, rest = name.partition(".")
    if not number.isdigit() or int(number) >= len(layers):
        raise UsageError(f"parameter {name!r}: the pipeline's layer_names name {len(layers)} layers, and it is in none of them")
    return f"{layers[int(number)]}.{rest}"


def parameters_by_table(shapes: Mapping[str, tuple[int, ...]], table: Mapping[str, int]) -> dict[str, Parameter]:
    """Parameters of ``shapes``, divided along the dims that a table gives for patterns of names (``*.query.weight``: 0).

    Errors: UsageError for a pattern that matches nothing, for two that match one name, and for a dim that is not there.
    """
    found: dict[str, tuple[str, int]] = {}
    for pattern, dim in table.items():
        names = [name for name in shapes if fnmatchcase(name, pattern)]
        if not names:
            raise UsageError(f"sharding table: {pattern!r} matches no parameter; the first are {', '.join(list(shapes)[:4])}")
        for name in names:
            if name in found:
                raise UsageError(f"sharding table: {name!r} matches both {found[name][0]!r} and {pattern!r}; let one match it")
            if not 0 <= dim < len(shapes[name]):
                raise UsageError(f"sharding table: {pattern!r} gives dim {dim}, and {name!r} has {len(shapes[name])} dims")
            found[name] = pattern, dim
    return {name: Parameter(shape, found[name][1] if name in found else None) for name, shape in shapes.items()}

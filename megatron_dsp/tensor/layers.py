"""Linear layers whose weights lie in shards on the tensor axis (Megatron-LM, arXiv 1909.08053, section 3).

A tensor-parallel part of a block begins with `TensorParallel.enter`, goes through one or more column-parallel layers and what
stands between them on each rank's own channels or heads, and ends with one row-parallel layer. The activations around it are
whole on every rank, or, with ``sequence_dim`` (Megatron's ``--sequence-parallel``), in shards of that dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_dsp.errors import UsageError
from megatron_dsp.layout import shard_range, shard_sizes
from megatron_dsp.tensor.mappings import (
    copy_to_tensor,
    gather_from_sequence,
    gather_from_tensor,
    reduce_from_tensor,
    reduce_scatter_to_sequence,
    scatter_to_tensor,
)


class TensorParallel:
    """How modules are spread over a tensor group. No group, or one rank: they are ordinary modules.

    Attributes:
        group: the tensor group, or None where there is one rank.
        size: its ranks.
        sequence_dim: the dim of activations that is sharded over the group outside tensor-parallel parts; None: they are whole.
        shares_switches: whether ranks that hold the same activation switch a part of it each (`SwitchSharing`).
    """

    def __init__(
        self, group: dist.ProcessGroup | None = None, *, sequence_dim: int | None = None, shares_switches: bool = True
    ):
        self.group = group if group is not None and group.size() > 1 else None
        self.size = 1 if self.group is None else self.group.size()
        self.sequence_dim = sequence_dim if self.group is not None else None
        self.shares_switches = shares_switches and self.group is not None and self.sequence_dim is None

    def column(self, in_features: int, out_features: int) -> nn.Module:
        """A linear layer of which each rank computes its part of the outputs, from an input that has entered."""
        if self.group is None:
            linear = nn.Linear(in_features, out_features)
            _mark(linear.weight, 0, out_features, (0, out_features))
            _mark(linear.bias, 0, out_features, (0, out_features))
            return linear
        return ColumnParallelLinear(in_features, out_features, group=self.group)

    def row(self, in_features: int, out_features: int) -> nn.Module:
        """A linear layer that takes each rank's part of the inputs; its result has left the tensor-parallel part."""
        if self.group is None:
            linear = nn.Linear(in_features, out_features)
            _mark(linear.weight, 1, in_features, (0, in_features))
            return linear
        return RowParallelLinear(in_features, out_features, group=self.group, sequence_dim=self.sequence_dim)

    def sharing(self, channels: int) -> SwitchSharing | None:
        """How the switches of activations [..., channels] are shared; None: each rank switches what it has."""
        return SwitchSharing(self.group, channels) if self.group is not None and self.shares_switches else None

    def own(self, size: int, what: str) -> int:
        """Each rank's share of ``size``. Errors: UsageError where they are not equal."""
        if size % self.size:
            raise UsageError(f"{what}={size} must be a multiple of the tensor degree {self.size}; choose another degree")
        return size // self.size

    def enter(self, x: Tensor) -> Tensor:
        """``x`` as a tensor-parallel part takes it: whole, its gradient the sum of what the ranks' parts give."""
        if self.group is None:
            return x
        if self.sequence_dim is None:
            return copy_to_tensor(x, group=self.group)
        size = x.shape[self.sequence_dim] * self.size
        return gather_from_sequence(x, dim=self.sequence_dim, size=size, group=self.group)

    def part(self, x: Tensor) -> Tensor:
        """A parameter, or another tensor that all ranks hold, for use on each rank's own channels or heads."""
        return x if self.group is None else copy_to_tensor(x, group=self.group)

    def beside(self, x: Tensor) -> Tensor:
        """The same for use on activations outside tensor-parallel parts: a part only where those are sharded."""
        return x if self.sequence_dim is None else self.part(x)

    def shard(self, x: Tensor) -> Tensor:
        """From an activation that all ranks hold to how it lies outside tensor-parallel parts.

        Errors: UsageError where the shards of ``sequence_dim`` would not be equal.
        """
        if self.group is None or self.sequence_dim is None:
            return x
        size = x.shape[self.sequence_dim]
        if size % self.size:
            raise UsageError(
                f"--sequence-parallel shards dim {self.sequence_dim} over the tensor ranks: its size {size} must be a multiple "
                f"of the tensor degree {self.size}; choose other sizes or another degree, or leave the flag out"
            )
        return scatter_to_tensor(x, dim=self.sequence_dim, group=self.group)

    def whole(self, x: Tensor) -> Tensor:
        """The reverse of `shard`."""
        if self.group is None or self.sequence_dim is None:
            return x
        size = x.shape[self.sequence_dim] * self.size
        return gather_from_tensor(x, dim=self.sequence_dim, size=size, group=self.group)


class SwitchSharing:
    """Each tensor rank switches its part of the channels, and an all-gather over the tensor group completes the result.

    So each byte crosses the sequence axis once. It pays where the tensor group has faster links than the sequence group,
    as within a host.
    """

    def __init__(self, group: dist.ProcessGroup, channels: int):
        self._group, self._channels = group, channels

    def part(self, x: Tensor) -> Tensor:
        """This rank's channels of x [..., channels]: a view."""
        return scatter_to_tensor(x, dim=-1, group=self._group)

    def complete(self, moved: Tensor) -> Tensor:
        """All channels."""
        return gather_from_tensor(moved, dim=-1, size=self._channels, group=self._group)


class ColumnParallelLinear(nn.Module):
    """``y = x W^T + b`` with the rows of W and b, the output channels, sharded over the tensor group.

    The input must be whole on every rank, with a gradient that is summed (`TensorParallel.enter`); the output is this rank's
    channels. The initial weights are the shards of those that ``nn.Linear`` draws.
    """

    def __init__(self, in_features: int, out_features: int, *, group: dist.ProcessGroup, bias: bool = True):
        super().__init__()
        self.weight = _sharded((out_features, in_features), 0, group)
        self.bias = _sharded((out_features,), 0, group) if bias else None
        _reset_as_linear(self.weight, self.bias, in_features)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., this rank's channels]."""
        return F.linear(x, self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """``y = x W^T + b`` with the columns of W, the input channels, sharded over the tensor group.

    The input is this rank's channels; the output is summed over the group, whole on every rank or, with ``sequence_dim``,
    this rank's shard of that dim. The initial weights are the shards of those that ``nn.Linear`` draws.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        group: dist.ProcessGroup,
        bias: bool = True,
        sequence_dim: int | None = None,
    ):
        super().__init__()
        self.group, self.sequence_dim = group, sequence_dim
        self.weight = _sharded((out_features, in_features), 1, group)
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        _reset_as_linear(self.weight, self.bias, in_features)

    def forward(self, x: Tensor) -> Tensor:
        """[..., this rank's channels] to [..., out]."""
        y = F.linear(x, self.weight)
        if self.sequence_dim is None:
            y = reduce_from_tensor(y, group=self.group)
            return y if self.bias is None else y + self.bias
        y = reduce_scatter_to_sequence(y, dim=self.sequence_dim, group=self.group)
        return y if self.bias is None else y + copy_to_tensor(self.bias, group=self.group)


def initialise(parameter: Tensor, draw: Callable[[Tensor], object]) -> None:
    """Draw the whole of a parameter, and keep this rank's shard: a seed gives the same model at every tensor degree."""
    with torch.no_grad():
        if not hasattr(parameter, "partition_dim"):
            draw(parameter)
            return
        whole = parameter.new_empty(whole_shape(parameter))
        draw(whole)
        parameter.copy_(own_shard(whole, like=parameter))


def whole_shape(parameter: Tensor) -> list[int]:
    """The shape of which a parameter is a shard, or its own."""
    shape = list(parameter.shape)
    if hasattr(parameter, "partition_dim"):
        shape[parameter.partition_dim] = parameter.partition_size  # type: ignore[attr-defined]
    return shape


def own_shard(whole: Tensor, *, like: Tensor) -> Tensor:
    """What this rank has of a tensor, if ``like`` is its shard of a parameter of the same shape: a view."""
    if not hasattr(like, "partition_dim"):
        return whole
    start, stop = like.partition_range  # type: ignore[attr-defined]
    return whole.narrow(like.partition_dim, start, stop - start)


def _sharded(shape: tuple[int, ...], dim: int, group: dist.ProcessGroup) -> nn.Parameter:
    """This rank's shard of dim ``dim`` of a parameter, with the attributes that Megatron and DeepSpeed look for."""
    size = shape[dim]
    own = shard_sizes(size, group.size())[group.rank()]
    parameter = nn.Parameter(torch.empty([own if index == dim else other for index, other in enumerate(shape)]))
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]  # DeepSpeed counts the others once in the norm
    _mark(parameter, dim, size, shard_range(size, group.size(), group.rank()))
    return parameter


def _mark(parameter: Tensor, dim: int, size: int, part: tuple[int, int]) -> None:
    """Say how the tensor axis divides a parameter, as Megatron does; checkpoints want it on one rank too."""
    attributes = {"partition_dim": dim, "partition_stride": 1, "partition_size": size, "partition_range": part}
    for name, value in attributes.items():
        setattr(parameter, name, value)


def _reset_as_linear(weight: Tensor, bias: Tensor | None, in_features: int) -> None:
    """As ``nn.Linear`` does."""
    initialise(weight, lambda whole: nn.init.kaiming_uniform_(whole, a=math.sqrt(5)))
    if bias is not None:
        bound = 1 / math.sqrt(in_features) if in_features else 0.0
        initialise(bias, lambda whole: nn.init.uniform_(whole, -bound, bound))

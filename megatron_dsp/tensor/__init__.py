"""The tensor axis: Megatron's collectives with their own adjoints, and the linear layers that they stand around."""

from megatron_dsp.tensor.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    SwitchSharing,
    TensorParallel,
    initialise,
    own_shard,
    whole_shape,
)
from megatron_dsp.tensor.mappings import (
    copy_to_tensor,
    gather_from_sequence,
    gather_from_tensor,
    reduce_from_tensor,
    reduce_scatter_to_sequence,
    scatter_to_tensor,
)

__all__ = [
    "ColumnParallelLinear",
    "RowParallelLinear",
    "SwitchSharing",
    "TensorParallel",
    "copy_to_tensor",
    "gather_from_sequence",
    "gather_from_tensor",
    "initialise",
    "own_shard",
    "reduce_from_tensor",
    "reduce_scatter_to_sequence",
    "scatter_to_tensor",
    "whole_shape",
]

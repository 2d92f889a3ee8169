"""Dynamic Sequence Parallelism (Zhao et al., ICML 2025, arXiv 2403.10266) for Megatron-style training with DeepSpeed."""

from megatron_dsp.errors import UsageError
from megatron_dsp.initialize import initialize
from megatron_dsp.layout import Layout, shard_range, shard_sizes
from megatron_dsp.mesh import Mesh
from megatron_dsp.parallelize import (
    Boundary,
    Carried,
    Computed,
    LocalSize,
    Needs,
    Plan,
    Reduced,
    Slice,
    parallelize,
    unparallelize,
    verify,
)
from megatron_dsp.reshard import Ledger, Region, Stage, gather, ledger, mean, mean_loss, split, switch
from megatron_dsp.training.compilation import compile_stages
from megatron_dsp.training.deepspeed_engine import deepspeed_initialize
from megatron_dsp.training.graph_capture import capture
from megatron_dsp.training.rng import random_along, repeat_random, seed
from megatron_dsp.training.sampler import sampler

__all__ = [
    "Boundary",
    "Carried",
    "Computed",
    "Layout",
    "Ledger",
    "LocalSize",
    "Mesh",
    "Needs",
    "Plan",
    "Reduced",
    "Region",
    "Slice",
    "Stage",
    "UsageError",
    "capture",
    "compile_stages",
    "deepspeed_initialize",
    "gather",
    "initialize",
    "ledger",
    "mean",
    "mean_loss",
    "parallelize",
    "random_along",
    "repeat_random",
    "sampler",
    "seed",
    "shard_range",
    "shard_sizes",
    "split",
    "switch",
    "unparallelize",
    "verify",
]

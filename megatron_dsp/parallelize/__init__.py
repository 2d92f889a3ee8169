"""Dynamic Sequence Parallelism put on a model from outside, as a plan says."""

from megatron_dsp.parallelize.hooks import parallelize, unparallelize
from megatron_dsp.parallelize.model_plan import Plan
from megatron_dsp.parallelize.module_needs import Boundary, Carried, Computed, LocalSize, Needs, Reduced, Slice
from megatron_dsp.parallelize.verify import Report, verify

__all__ = [
    "Boundary",
    "Carried",
    "Computed",
    "LocalSize",
    "Needs",
    "Plan",
    "Reduced",
    "Report",
    "Slice",
    "parallelize",
    "unparallelize",
    "verify",
]

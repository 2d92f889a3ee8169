"""Dynamic Sequence Parallelism put on a model from outside, as a plan says."""

from megatron_dsp.parallelize.hooks import parallelize, unparallelize
from megatron_dsp.parallelize.plan import Boundary, Carried, LocalSize, Needs, Plan, Slice
from megatron_dsp.parallelize.verify import Report, verify

__all__ = [
    "Boundary",
    "Carried",
    "LocalSize",
    "Needs",
    "Plan",
    "Report",
    "Slice",
    "parallelize",
    "unparallelize",
    "verify",
]

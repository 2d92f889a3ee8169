"""Moving shards: the primitives and their adjoints, what carries them, their overlap with compute, and the ledger."""

from megatron_dsp.reshard.ledger import Ledger, ledger
from megatron_dsp.reshard.overlap import FixedOverlap
from megatron_dsp.reshard.primitives import all_reduce, gather, mean, mean_loss, split, switch
from megatron_dsp.reshard.region import Region, Stage
from megatron_dsp.reshard.schedule import Schedule

__all__ = [
    "FixedOverlap",
    "Ledger",
    "Region",
    "Schedule",
    "Stage",
    "all_reduce",
    "gather",
    "ledger",
    "mean",
    "mean_loss",
    "split",
    "switch",
]

"""Moving shards: the primitives and their adjoints, what carries them, their overlap with compute, and the ledger."""

from megatron_dsp.reshard.exchange import describe_transport
from megatron_dsp.reshard.labels import StageName
from megatron_dsp.reshard.ledger import Ledger, ledger
from megatron_dsp.reshard.primitives import all_reduce, gather, mean, mean_loss, split, switch
from megatron_dsp.reshard.stages.ends import WHOLE_ENDS, Activation, Ends
from megatron_dsp.reshard.stages.measured_overlap import MeasuredOverlap
from megatron_dsp.reshard.stages.overlap import FixedOverlap, Overlap, overlap_of, set_overlap
from megatron_dsp.reshard.stages.region import Region
from megatron_dsp.reshard.stages.schedule import Schedule
from megatron_dsp.reshard.stages.stage import Stage

__all__ = [
    "WHOLE_ENDS",
    "Activation",
    "Ends",
    "FixedOverlap",
    "Ledger",
    "MeasuredOverlap",
    "Overlap",
    "Region",
    "Schedule",
    "Stage",
    "StageName",
    "all_reduce",
    "describe_transport",
    "gather",
    "ledger",
    "mean",
    "mean_loss",
    "overlap_of",
    "set_overlap",
    "split",
    "switch",
]

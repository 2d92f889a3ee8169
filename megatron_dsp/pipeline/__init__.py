"""The pipe axis: models as DeepSpeed's PipelineModule, with the sequence axis inside DeepSpeed's data axis."""

from megatron_dsp.pipeline.pipelined_video_dit import PipelinedVideoDiT, topology

__all__ = ["PipelinedVideoDiT", "topology"]

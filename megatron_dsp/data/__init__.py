"""Data for training: sources of samples, and batches of them that are pure functions of positions and frames."""

from megatron_dsp.data.batches import VideoBatch, VideoBatches
from megatron_dsp.data.batches_ahead import BatchesAhead, BatchRequest
from megatron_dsp.data.clip_samples import ClipSamples
from megatron_dsp.data.clips import Clips
from megatron_dsp.data.data_error import DataError
from megatron_dsp.data.dataset_samples import DatasetSamples
from megatron_dsp.data.latent_shards import LatentShards, holds_latents
from megatron_dsp.data.samples import Samples, Shape, Subset, hold_out
from megatron_dsp.data.videos import Video, open_videos

__all__ = [
    "BatchRequest",
    "BatchesAhead",
    "ClipSamples",
    "Clips",
    "DataError",
    "DatasetSamples",
    "LatentShards",
    "Samples",
    "Shape",
    "Subset",
    "Video",
    "VideoBatch",
    "VideoBatches",
    "hold_out",
    "holds_latents",
    "open_videos",
]

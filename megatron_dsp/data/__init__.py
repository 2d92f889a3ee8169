"""Video clips for training: files to memory-mapped frames, windows over them, and batches that are pure functions."""

from megatron_dsp.data.batches import VideoBatch, VideoBatches
from megatron_dsp.data.clips import Clips
from megatron_dsp.data.frame_cache import DataError
from megatron_dsp.data.videos import Video, open_videos

__all__ = ["Clips", "DataError", "Video", "VideoBatch", "VideoBatches", "open_videos"]

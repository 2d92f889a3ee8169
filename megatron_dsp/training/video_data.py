"""Flags of the video scripts that say which model and which data, and the data that they name."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from megatron_dsp.data import (
    Clips,
    ClipSamples,
    LatentShards,
    Samples,
    VideoBatches,
    hold_out,
    holds_latents,
    open_videos,
)
from megatron_dsp.mesh import Mesh
from megatron_dsp.models.video_dit import PRESETS, VideoDiTConfig

HELD_OUT = 0.05  # of the samples, for validation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `open_data` reads."""
    group = parser.add_argument_group("model and data")
    group.add_argument("--model", choices=sorted(PRESETS), default="tiny")
    group.add_argument(
        "--full-attention-every",
        type=int,
        metavar="PAIRS",
        help="the temporal block of every so many layer pairs attends over all tokens of all frames (default: none does)",
    )
    group.add_argument(
        "--data-path",
        type=Path,
        help="folder of videos, one video, an .npy array, or a folder of latents in .safetensors and .tar shards; "
        "default: three small clips",
    )
    group.add_argument("--bad-files", choices=["skip", "refuse"], default="skip", help="what to do with files that are damaged")
    group.add_argument("--drop-probability", type=float, default=0.1, help="samples trained without their conditioning")
    group.add_argument("--clean-frame-probability", type=float, default=0.3, help="samples with their first frames given")
    group.add_argument(
        "--timestep-base-tokens",
        type=int,
        help="tokens of a sample whose diffusion times stay; those of larger samples are noisier (default: all stay)",
    )

    group = parser.add_argument_group("videos")
    group.add_argument("--num-frames", type=int, default=8, help="frames of a clip")
    group.add_argument("--img-h", type=int, default=32, help="height of a frame, pixels")
    group.add_argument("--img-w", type=int, default=48, help="width of a frame, pixels")
    group.add_argument("--clip-step", type=int, default=4, help="frames between the starts of clips")
    group.add_argument("--data-cache-path", type=Path, default=Path("data/cache"), help="folder for decoded frames")

    group = parser.add_argument_group("latents")
    group.add_argument("--latent-dims", choices=["TCHW", "CTHW"], default="TCHW", help="order of the dims of a latent")


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say with which weights a script evaluates."""
    group = parser.add_argument_group("weights")
    group.add_argument("--load", type=Path, required=True, help="folder of a --save; its latest checkpoint is taken")
    group.add_argument("--ema", action="store_true", help="the moving average of the weights (--ema-decay in training)")
    group.add_argument("--bf16", action="store_true", help="compute in bf16; default: fp32")


def model_preset(arguments: argparse.Namespace) -> VideoDiTConfig:
    """The model's sizes before the data is known, which has channels and text of its own."""
    return replace(PRESETS[arguments.model], full_attention_every=arguments.full_attention_every)


def open_data(arguments: argparse.Namespace, mesh: Mesh, batch: int) -> tuple[VideoDiTConfig, VideoBatches, VideoBatches]:
    """The model's sizes for the data that ``--data-path`` names, training batches and validation batches.

    ``batch`` is the number of samples of a step, all of one bucket.
    """
    preset = model_preset(arguments)
    with _first_rank_of_host_first(mesh):
        parts = _samples(arguments, preset)
    sizes = replace(preset, channels=parts[0].shape(0).channels, conditioning_size=parts[0].conditioning_width)
    training, validation = (
        VideoBatches(
            samples=samples,
            global_batch_size=batch,
            seed=arguments.seed + held_out,  # other noise than in training
            patch=sizes.patch,
            drop_probability=0.0 if held_out else arguments.drop_probability,
            clean_frame_probability=arguments.clean_frame_probability,
            timestep_base_tokens=arguments.timestep_base_tokens,
        )
        for held_out, samples in enumerate(parts)
    )
    return sizes, training, validation


def _samples(arguments: argparse.Namespace, preset: VideoDiTConfig) -> tuple[Samples, Samples]:
    """Those for training, and those for validation."""
    path = arguments.data_path
    if path is not None and holds_latents(path):
        latents = LatentShards(path, latent_dims=arguments.latent_dims, on_bad_file=arguments.bad_files)
        return hold_out(latents, HELD_OUT)
    videos = open_videos(
        path,
        height=arguments.img_h,
        width=arguments.img_w,
        cache=arguments.data_cache_path,
        on_bad_file=arguments.bad_files,
    )
    clips = Clips(videos, frames=arguments.num_frames, step=arguments.clip_step)
    training, validation = (
        ClipSamples(part, conditioning_tokens=4, conditioning_width=preset.conditioning_size) for part in clips.split(HELD_OUT)
    )
    return training, validation


@contextmanager
def _first_rank_of_host_first(mesh: Mesh) -> Iterator[None]:
    """On each host one rank decodes; the others then find the frames in the cache."""
    first = mesh.process.local_rank == 0
    if not first:
        logging.getLogger("megatron_dsp").setLevel(logging.ERROR)  # its warnings of bad files are the same
        dist.barrier()
    yield
    if first:
        dist.barrier()

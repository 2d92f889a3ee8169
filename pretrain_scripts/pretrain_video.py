"""Pretrain a video diffusion transformer with Dynamic Sequence Parallelism.

    deepspeed --num_gpus 2 pretrain_scripts/pretrain_video.py --deepspeed_config pretrain_scripts/ds_configs/demo.json

The same script runs under torchrun, mpirun and srun, and alone; see --help, and docs/launching.md.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch import Tensor, nn

import megatron_dsp as dsp
from megatron_dsp import launch
from megatron_dsp.config import Config
from megatron_dsp.data import Clips, VideoBatch, VideoBatches, open_videos
from megatron_dsp.models.embeddings import unpatchify
from megatron_dsp.models.video_dit import PRESETS, VideoDiT, VideoDiTConfig, parameter_count
from megatron_dsp.reshard.exchange import exchange_of
from megatron_dsp.tensor import TensorParallel
from megatron_dsp.training import arguments as flags
from megatron_dsp.training import rectified_flow
from megatron_dsp.training.log import TrainingLog
from megatron_dsp.training.loop import MicroBatch, train
from megatron_dsp.training.optimizer import adamw, kernels, warmup_cosine


def parse() -> argparse.Namespace:
    parser = flags.parser("Pretrain a video diffusion transformer with Dynamic Sequence Parallelism.")
    group = parser.add_argument_group("model and video")
    group.add_argument("--model", choices=sorted(PRESETS), default="tiny")
    group.add_argument("--num-frames", type=int, default=8, help="frames of a clip")
    group.add_argument("--img-h", type=int, default=32, help="height of a frame, pixels")
    group.add_argument("--img-w", type=int, default=48, help="width of a frame, pixels")
    group.add_argument(
        "--data-path", type=Path, help="folder of videos, one video, or an .npy array; default: three small clips"
    )
    group.add_argument("--data-cache-path", type=Path, default=Path("data/cache"), help="folder for decoded frames")
    group.add_argument(
        "--bad-files", choices=["skip", "refuse"], default="skip", help="what to do with files that do not decode"
    )
    group.add_argument("--clip-step", type=int, default=4, help="frames between the starts of clips")
    group.add_argument("--drop-probability", type=float, default=0.1, help="samples trained without their conditioning")
    group.add_argument("--clean-frame-probability", type=float, default=0.3, help="samples with their first frames given")
    group.add_argument("--samples-dir", type=Path, default=Path("samples"), help="folder for the picture at the end")
    group.add_argument("--sample-steps", type=int, default=50, help="Euler steps of sampling; 0: no picture")
    return parser.parse_args()


class VideoPretraining:
    """The workload: rectified flow on the frames of clips, each rank on its own frames."""

    def __init__(self, arguments: argparse.Namespace, model: VideoDiTConfig, mesh: dsp.Mesh, backend: str):
        self.group = mesh.group("sequence")
        self.model = model
        self.backend = backend
        self.device = mesh.device
        self.total = arguments.num_frames
        self.patch_time = model.patch[0]
        self.token_frames = -(-self.total // self.patch_time)
        start, stop = dsp.shard_range(self.token_frames, self.group.size(), self.group.rank())
        self.frames = range(start * self.patch_time, min(stop * self.patch_time, self.total))
        self.training, self.validation = (
            VideoBatches(
                clips=clips,
                seed=arguments.seed if training else arguments.seed + 1,  # other noise than in training
                patch_time=self.patch_time,
                drop_probability=arguments.drop_probability if training else 0.0,
                clean_frame_probability=arguments.clean_frame_probability,
                conditioning_tokens=4,
                conditioning_width=model.conditioning_size,
            )
            for clips, training in zip(_clips(arguments, mesh), (True, False), strict=True)
        )

    def loss(self, model: nn.Module, samples: list[int]) -> Tensor:
        return self._loss(model, self.training.batch(samples, self.frames).to(self.device))

    def validation_loss(self, model: nn.Module, samples: list[int]) -> Tensor:
        return self._loss(model, self.validation.batch(samples, self.frames).to(self.device))

    def micro_batch(self, samples: list[int], validation: bool) -> MicroBatch:
        batches = self.validation if validation else self.training
        return self._inputs_and_labels(batches.batch(samples, self.frames).to(self.device))

    def pipeline_loss(self, patches: Tensor, labels: tuple[Tensor, ...]) -> Tensor:
        """The loss of a pipeline's output tokens."""
        return self._velocity_loss(unpatchify(patches, self.model.patch, labels[0].shape), labels)

    def _loss(self, model: nn.Module, batch: VideoBatch) -> Tensor:
        inputs, labels = self._inputs_and_labels(batch)
        return self._velocity_loss(model(*inputs, group=self.group, backend=self.backend), labels)

    def _inputs_and_labels(self, batch: VideoBatch) -> MicroBatch:
        times = rectified_flow.frame_times(batch.timesteps, self.patch_time, self.frames)
        every = rectified_flow.frame_times(batch.timesteps, self.patch_time, range(self.total))
        noisy = rectified_flow.add_noise(batch.video, batch.noise, times)
        conditioning = batch.conditioning, batch.conditioning_mask, batch.conditioning_drop
        return (noisy, batch.timesteps, *conditioning), (batch.video, batch.noise, times, (every > 0).sum(dim=(0, 2, 3, 4)))

    def _velocity_loss(self, velocity: Tensor, labels: tuple[Tensor, ...]) -> Tensor:
        video, noise, times, active = labels
        return rectified_flow.velocity_loss(velocity, video, noise, times, self.total, active, self.group)

    def sample(self, model: nn.Module, samples: list[int], steps: int) -> list[Tensor]:
        """Whole clips [T, B, 3, H, W] on every rank: real, sampled, and sampled with the first token frame given."""
        batch = self.validation.batch(samples, self.frames).to(self.device)

        def velocity(x: Tensor, timesteps: Tensor) -> Tensor:
            return model(x, timesteps, batch.conditioning, batch.conditioning_mask, group=self.group, backend=self.backend)

        sampled = [
            rectified_flow.sample(
                velocity, batch.noise, batch.video, given, self.token_frames, self.patch_time, self.frames, steps
            )
            for given in (0, 1)
        ]
        return [self._whole(frames) for frames in (batch.video, *sampled)]

    def _whole(self, frames: Tensor) -> Tensor:
        """All frames, from each rank's. Token frames are what is sharded, so frames are gathered by token frame."""
        missing = -len(frames) % self.patch_time
        padded = torch.cat([frames, frames.new_zeros(missing, *frames.shape[1:])])
        tokens = padded.unflatten(0, (-1, self.patch_time)) if len(padded) else padded.unsqueeze(1)
        return dsp.gather(tokens, dim=0, size=self.token_frames, group=self.group).flatten(0, 1)[: self.total]


def _clips(arguments: argparse.Namespace, mesh: dsp.Mesh) -> tuple[Clips, Clips]:
    """Training and validation clips. On each host one rank decodes; the others then find the frames in the cache."""
    if mesh.process.local_rank != 0:
        logging.getLogger("megatron_dsp").setLevel(logging.ERROR)  # its warnings of bad files are the same
        dist.barrier()
    videos = open_videos(
        arguments.data_path,
        height=arguments.img_h,
        width=arguments.img_w,
        cache=arguments.data_cache_path,
        on_bad_file=arguments.bad_files,
    )
    if mesh.process.local_rank == 0:
        dist.barrier()
    return Clips(videos, frames=arguments.num_frames, step=arguments.clip_step).split(0.05)


def write_picture(path: Path, clips: list[Tensor], labels: list[str], scale: int = 3) -> None:
    """One row of frames for each sample and each kind of clip ([T, B, 3, H, W] in -1 .. 1), enlarged ``scale`` times."""
    T, B, _, H, W = clips[0].shape
    margin = 8 + 6 * max(map(len, labels))
    picture = Image.new("RGB", (margin + T * W * scale, B * len(clips) * H * scale), "white")
    draw = ImageDraw.Draw(picture)
    for b in range(B):
        for row, (clip, label) in enumerate(zip(clips, labels, strict=True)):
            top = (b * len(clips) + row) * H * scale
            draw.text((4, top + 4), label, fill="black")
            pixels = ((clip[:, b] + 1) * 127.5).clamp(0, 255).to("cpu", torch.uint8)
            strip = pixels.permute(2, 0, 3, 1).reshape(H, T * W, 3).contiguous()
            picture.paste(
                Image.fromarray(strip.numpy()).resize((T * W * scale, H * scale), Image.Resampling.NEAREST), (margin, top)
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def make_model(arguments: argparse.Namespace, sizes: VideoDiTConfig, mesh: dsp.Mesh, workload: VideoPretraining) -> nn.Module:
    """The model on the tensor and pipe axes of a mesh."""
    tensor = TensorParallel(
        mesh.group("tensor"),
        sequence_dim=2 if arguments.sequence_parallel else None,
        shares_switches=mesh.within_host("tensor"),
    )
    recompute = arguments.recompute_granularity == "full"
    if mesh.size("pipe") == 1:
        return VideoDiT(sizes, tensor=tensor, recompute=recompute)
    from megatron_dsp.pipeline import PipelinedVideoDiT  # imports DeepSpeed, which takes seconds

    return PipelinedVideoDiT(
        sizes,
        mesh,
        workload.pipeline_loss,
        partition=arguments.pipeline_partition_method,
        tensor=tensor,
        backend=workload.backend,
        recompute=recompute,
    )


def show_dry_run(arguments: argparse.Namespace, sizes: VideoDiTConfig, config: Config) -> None:
    """Print what the job would take, for ``--dry-run``."""
    # Rests on internals of torch, which no job should.
    from rich.console import Console

    from megatron_dsp.training import dry_run

    job = dry_run.Job(
        model=sizes,
        world_size=arguments.dry_run,
        config=config,
        frames=arguments.num_frames,
        height=arguments.img_h,
        width=arguments.img_w,
        sequence_parallel=arguments.sequence_parallel,
        recompute=arguments.recompute_granularity == "full",
        partition=arguments.pipeline_partition_method,
    )
    dry_run.show(job, dry_run.dry_run(job), Console(width=max(Console().width, 110)))  # the tables' width


def main() -> None:
    arguments = parse()
    config = flags.settings(arguments)
    sizes = replace(PRESETS[arguments.model], channels=3)
    if arguments.dry_run is not None:
        show_dry_run(arguments, sizes, config)
        return
    if config.mesh.pipe > 1 and arguments.exposed_communication_interval:
        raise dsp.UsageError("--exposed-communication-interval needs whole passes, which a pipeline has not; use pipe 1, or 0")
    mesh = dsp.initialize(config)
    rank = dist.get_rank()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls two of torch's collectives by names that torch 2.13 renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if rank == 0:
        flags.show(arguments)
        print(f"{mesh} started by {mesh.process.launcher}, on {mesh.device.type}", flush=True)

    # Initial weights are equal on all ranks; random numbers drawn later are not.
    torch.manual_seed(arguments.seed)
    backend = config.sequence_parallel.backend
    workload = VideoPretraining(arguments, sizes, mesh, backend)
    model = make_model(arguments, sizes, mesh, workload)
    dsp.seed(mesh, arguments.seed)
    train_size, micro, steps = config.batch_sizes.complete(mesh.size("data"))
    config = config.with_batch_sizes(train_size, micro, steps)

    optimizer = scheduler = None
    if "optimizer" not in config.deepspeed:
        optimizer = adamw(
            model.to(mesh.device).parameters(),
            lr=arguments.lr,
            weight_decay=arguments.weight_decay,
            betas=(arguments.adam_beta1, arguments.adam_beta2),
            eps=arguments.adam_eps,
            device=mesh.device,
        )
        scheduler = warmup_cosine(
            optimizer,
            lr=arguments.lr,
            min_lr=arguments.min_lr,
            warmup=arguments.lr_warmup_iters,
            total=arguments.lr_decay_iters or arguments.train_iters,
        )
    engine, *_ = dsp.deepspeed_initialize(model=model, optimizer=optimizer, lr_scheduler=scheduler, config=config, mesh=mesh)

    with TrainingLog(rank=rank, total=arguments.train_iters, tensorboard=arguments.tensorboard_dir) as log:
        log.message(
            f"{arguments.model}: {parameter_count(sizes):,} parameters | {len(workload.training.clips)} training clips, "
            f"{len(workload.validation.clips)} for validation | global batch size {train_size} = micro batch {micro} x "
            f"accumulation {steps} x data {mesh.size('data')}"
        )
        exchange = exchange_of(mesh.group("sequence"))
        log.message(f"switches through {exchange.transport.name}: {exchange.transport_reason}")
        log.message(f"kernels: {kernels(engine.basic_optimizer, mesh.device)}")
        progress = train(engine, workload, mesh, arguments, log)
        if mesh.size("pipe") > 1:
            log.message("no picture: sampling needs the whole model on every rank; use pipe 1 to have one")
        elif arguments.sample_steps and progress.iteration >= arguments.train_iters:  # not after a SIGTERM
            engine.eval()
            clips = workload.sample(engine, [0, 1, 2], arguments.sample_steps)
            if rank == 0:
                path = arguments.samples_dir / f"iteration_{progress.iteration:07d}.png"
                write_picture(path, clips, ["real", "from noise", "first frame given"])
                log.message(f"wrote {path}: real frames, the model's from noise, and the model's after a given first frame")


if __name__ == "__main__":
    launch.run(main)

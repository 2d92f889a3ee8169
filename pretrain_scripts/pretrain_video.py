"""Pretrain a video diffusion transformer with Dynamic Sequence Parallelism.

    deepspeed --num_gpus 2 pretrain_scripts/pretrain_video.py --deepspeed_config pretrain_scripts/ds_configs/demo.json

The same script runs under torchrun, mpirun and srun, and alone; see --help, and docs/launching.md.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import megatron_dsp as dsp
from megatron_dsp import launch
from megatron_dsp.config import Config
from megatron_dsp.models.attention_kernels import kernel_name
from megatron_dsp.models.video_dit import parameter_count
from megatron_dsp.placement import placement
from megatron_dsp.reshard import describe_transport
from megatron_dsp.training import arguments as flags
from megatron_dsp.training import sample_files, video_data
from megatron_dsp.training.ema import EMA
from megatron_dsp.training.log import TrainingLog
from megatron_dsp.training.loop import train
from megatron_dsp.training.optimizer import adamw, kernels, warmup_cosine
from megatron_dsp.training.out_of_memory import explain_out_of_memory
from megatron_dsp.training.video_diffusion import VideoDiffusion, make_model


def parse() -> argparse.Namespace:
    parser = flags.parser("Pretrain a video diffusion transformer with Dynamic Sequence Parallelism.")
    video_data.add_arguments(parser)
    group = parser.add_argument_group("samples at the end")
    group.add_argument("--samples-dir", type=Path, default=Path("samples"), help="folder for them")
    group.add_argument("--sample-steps", type=int, default=50, help="Euler steps of sampling; 0: no samples")
    return parser.parse_args()


def make_dry_run_job(arguments: argparse.Namespace, config: Config, world_size: int) -> Any:
    """The job, as a dry run takes it."""
    # Rests on internals of torch, which no job should.
    from megatron_dsp.training import dry_run

    return dry_run.Job(
        model=replace(video_data.model_preset(arguments), channels=3),
        world_size=world_size,
        config=config,
        frames=arguments.num_frames,
        height=arguments.img_h,
        width=arguments.img_w,
        sequence_parallel=arguments.sequence_parallel,
        recompute=arguments.recompute_granularity == "full",
        partition=arguments.pipeline_partition_method,
        ema=arguments.ema_decay is not None,
    )


def show_dry_run(job: Any) -> None:
    """Print what the job would take, for ``--dry-run``."""
    from rich.console import Console

    from megatron_dsp.training import dry_run

    dry_run.show(job, dry_run.dry_run(job), Console(width=max(Console().width, 110)))  # the tables' width


def make_optimizer(arguments: argparse.Namespace, model: torch.nn.Module, device: torch.device) -> tuple[Any, Any]:
    """AdamW and its schedule, where the ds_config has none of its own."""
    optimizer = adamw(
        model.to(device).parameters(),
        lr=arguments.lr,
        weight_decay=arguments.weight_decay,
        betas=(arguments.adam_beta1, arguments.adam_beta2),
        eps=arguments.adam_eps,
        device=device,
    )
    scheduler = warmup_cosine(
        optimizer,
        lr=arguments.lr,
        min_lr=arguments.min_lr,
        warmup=arguments.lr_warmup_iters,
        total=arguments.lr_decay_iters or arguments.train_iters,
    )
    return optimizer, scheduler


def main() -> None:
    arguments = parse()
    config = flags.settings(arguments)
    if arguments.dry_run is not None:
        show_dry_run(make_dry_run_job(arguments, config, arguments.dry_run))
        return
    with explain_out_of_memory(lambda: make_dry_run_job(arguments, config, dist.get_world_size())):
        pretrain(arguments, config)


def pretrain(arguments: argparse.Namespace, config: Config) -> None:
    """Train, and write samples."""
    if config.mesh.pipe > 1 and arguments.exposed_communication_interval:
        raise dsp.UsageError("--exposed-communication-interval needs whole passes, which a pipeline has not; use pipe 1, or 0")
    mesh = dsp.initialize(config)
    rank = dist.get_rank()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed calls two of torch's collectives by names that torch 2.13 renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    where = placement(mesh)
    if rank == 0:
        flags.show(arguments)
        print(f"{mesh} started by {mesh.process.launcher}, on {mesh.device.type}\n{where.table()}", flush=True)
        for warning in where.warnings():
            print(f"warning: {warning}", flush=True)

    train_size, micro, steps = config.batch_sizes.complete(mesh.size("data"))
    config = config.with_batch_sizes(train_size, micro, steps)
    sizes, training, validation = video_data.open_data(arguments, mesh, train_size)
    workload = VideoDiffusion(sizes, mesh, config.sequence_parallel.backend, training=training, validation=validation)
    # Initial weights are equal on all ranks; random numbers drawn later are not.
    torch.manual_seed(arguments.seed)
    model = make_model(
        sizes,
        mesh,
        workload,
        sequence_parallel=arguments.sequence_parallel,
        recompute=arguments.recompute_granularity == "full",
        partition=arguments.pipeline_partition_method,
    )
    dsp.seed(mesh, arguments.seed)
    own = (None, None) if "optimizer" in config.deepspeed else make_optimizer(arguments, model, mesh.device)
    engine, *_ = dsp.deepspeed_initialize(model=model, optimizer=own[0], lr_scheduler=own[1], config=config, mesh=mesh)
    ema = None if arguments.ema_decay is None else EMA(engine, mesh, arguments.ema_decay)

    with TrainingLog(rank=rank, total=arguments.train_iters, monitor=engine.monitor) as log:
        log.message(
            f"{arguments.model}: {parameter_count(sizes):,} parameters | {len(training.samples)} training samples, "
            f"{len(validation.samples)} for validation | global batch size {train_size} = micro batch {micro} x "
            f"accumulation {steps} x data {mesh.size('data')}"
        )
        log.message(f"switches through {describe_transport(mesh.group('sequence'))}")
        log.message(f"kernels: {kernels(engine.basic_optimizer, mesh.device)} | {kernel_name(mesh.device)}")
        progress = train(engine, workload, mesh, arguments, log, ema)
        if mesh.size("pipe") > 1:
            log.message("no samples: sampling needs the whole model on every rank; use pipe 1 to have them")
        elif arguments.sample_steps and progress.iteration >= arguments.train_iters:  # not after a SIGTERM
            engine.eval()
            with contextlib.nullcontext() if ema is None else ema.applied():
                positions = list(range(min(3, train_size)))  # of one bucket, as those of a step are
                clips = {
                    "real": workload.real(positions),
                    "from noise": workload.sample(engine, positions, steps=arguments.sample_steps, given=0),
                    "first frame given": workload.sample(engine, positions, steps=arguments.sample_steps, given=1),
                }
            if rank == 0:
                path = sample_files.write(arguments.samples_dir / f"iteration_{progress.iteration:07d}", clips)
                log.message(f"wrote {path}: real frames, the model's from noise, and the model's after a given first frame")


if __name__ == "__main__":
    launch.run(main)

"""Sample videos from a checkpoint of pretrain_video.py, at any degree of the sequence axis.

    torchrun --standalone --nproc_per_node 4 pretrain_scripts/sample_video.py --load runs/pretrain_video \
        --dynamic-sequence-parallel-size 4 --num-frames 32

Each rank computes its shard, so that a video may be larger than one rank could hold the activations of. Conditioning, and the
frames that are given, are those of validation samples.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist

import megatron_dsp as dsp
from megatron_dsp import launch
from megatron_dsp.training import arguments as flags
from megatron_dsp.training import sample_files, video_data
from megatron_dsp.training.monitor import peak_memory
from megatron_dsp.training.video_diffusion import VideoDiffusion, load_model


def parse() -> argparse.Namespace:
    parser = flags.parser("Sample videos from a checkpoint of pretrain_video.py.", trains=False)
    video_data.add_arguments(parser)
    video_data.add_checkpoint_arguments(parser)
    group = parser.add_argument_group("sampling")
    group.add_argument("--num-samples", type=int, default=4, help="videos to sample")
    group.add_argument("--micro-batch-size", type=int, default=1, help="videos that a data rank samples at once")
    group.add_argument("--sample-steps", type=int, default=50, help="Euler steps")
    group.add_argument("--guidance-scale", type=float, default=1.0, help="of classifier-free guidance; 1: none")
    group.add_argument("--given-frames", type=int, default=0, help="leading token frames that are given, not sampled")
    group.add_argument("--samples-dir", type=Path, default=Path("samples"), help="folder to write to")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    config = flags.settings(arguments)
    if arguments.sample_steps < 1:
        raise dsp.UsageError(f"--sample-steps {arguments.sample_steps}: must be at least 1")
    mesh = dsp.initialize(config)
    micro = arguments.micro_batch_size
    sizes, training, validation = video_data.open_data(arguments, mesh, micro)
    workload = VideoDiffusion(sizes, mesh, config.sequence_parallel.backend, training=training, validation=validation)
    model = load_model(sizes, mesh, arguments.load, ema=arguments.ema, bf16=arguments.bf16)
    for first in range(micro * mesh.rank("data"), arguments.num_samples, micro * mesh.size("data")):
        positions = list(range(first, min(first + micro, arguments.num_samples)))
        how = {"steps": arguments.sample_steps, "given": arguments.given_frames, "guidance": arguments.guidance_scale}
        clips = {"real": workload.real(positions), "sampled": workload.sample(model, positions, **how)}
        if mesh.rank("sequence") == mesh.rank("tensor") == 0:
            path = sample_files.write(arguments.samples_dir / f"sample_{first:07d}", clips)
            print(f"wrote {path}: {len(positions)} of {arguments.num_samples}", flush=True)
    peak = torch.tensor(peak_memory(mesh.device), dtype=torch.float64)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        print(f"peak memory a rank: {peak.item() / 2**20:,.0f} MiB", flush=True)


if __name__ == "__main__":
    launch.run(main)

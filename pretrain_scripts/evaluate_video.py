"""The validation loss of a checkpoint of pretrain_video.py, at any degree of the sequence axis.

    torchrun --standalone --nproc_per_node 4 pretrain_scripts/evaluate_video.py --load runs/pretrain_video \
        --dynamic-sequence-parallel-size 2
"""

from __future__ import annotations

import argparse
import statistics

import torch
import torch.distributed as dist

import megatron_dsp as dsp
from megatron_dsp import launch
from megatron_dsp.training import arguments as flags
from megatron_dsp.training import video_data
from megatron_dsp.training.video_diffusion import VideoDiffusion, load_model


def parse() -> argparse.Namespace:
    parser = flags.parser("The validation loss of a checkpoint of pretrain_video.py.", trains=False)
    video_data.add_arguments(parser)
    video_data.add_checkpoint_arguments(parser)
    group = parser.add_argument_group("evaluation")
    group.add_argument("--eval-iters", type=int, default=0, help="micro-batches of a data rank; 0: all validation samples once")
    group.add_argument("--micro-batch-size", type=int, default=1, help="samples that a data rank evaluates at once")
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    arguments = parse()
    config = flags.settings(arguments)
    mesh = dsp.initialize(config)
    micro, data = arguments.micro_batch_size, mesh.size("data")
    sizes, training, validation = video_data.open_data(arguments, mesh, micro)
    workload = VideoDiffusion(sizes, mesh, config.sequence_parallel.backend, training=training, validation=validation)
    model = load_model(sizes, mesh, arguments.load, ema=arguments.ema, bf16=arguments.bf16)
    batches = arguments.eval_iters or -(-len(validation.samples) // (micro * data))
    losses: dict[tuple[int, ...], list[float]] = {}  # of micro-batches, by (frames, height, width)
    for batch in range(batches):
        first = micro * (batch * data + mesh.rank("data"))
        positions = list(range(first, first + micro))
        loss = workload.validation_loss(model, positions)
        dist.all_reduce(loss, group=mesh.group("sequence"))
        frames, _, height, width = validation.shape(positions)
        losses.setdefault((frames, height, width), []).append(loss.item() / mesh.size("sequence"))
    of_ranks: list[dict[tuple[int, ...], list[float]]] = [{} for _ in range(data)]
    dist.all_gather_object(of_ranks, losses, group=mesh.group("data"))
    if dist.get_rank() == 0:
        every = {size: [loss for part in of_ranks for loss in part.get(size, [])] for part in of_ranks for size in part}
        for size, found in sorted(every.items()):
            print(f"loss of {len(found) * micro} samples of {' x '.join(map(str, size))}: {statistics.fmean(found):.6E}")
        count = sum(map(len, every.values()))
        print(f"validation loss of {count * micro} samples: {sum(map(sum, every.values())) / count:.6E}", flush=True)


if __name__ == "__main__":
    launch.run(main)

#!/usr/bin/env bash
# Pretrain under Slurm, one task a GPU. Adjust the five lines below, then, from the root of the repository:
#
#     sbatch pretrain_scripts/launch_slurm.sh --dynamic-sequence-parallel-size 8 --model 720m --train-iters 10000
#
#SBATCH --job-name=pretrain_video
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
# SIGTERM to all ranks 300 s before the time limit: they finish the iteration, at most one more, save, and stop.
#SBATCH --signal=TERM@300
set -eu
cd "${SLURM_SUBMIT_DIR:-.}"
CONFIG=${CONFIG:-pretrain_scripts/ds_configs/zero1_bf16.json}
SAVE=${SAVE:-runs/pretrain_video}
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}

# Submitted again, the job goes on from its last checkpoint.
if [ -f "$SAVE/latest" ]; then set -- --load "$SAVE" "$@"; fi

# Every task sees all GPUs of its host and takes the one of its local rank. Ranks are numbered host by host, whatever the
# site's default is, so that tensor and sequence groups stay within hosts.
exec srun --cpus-per-task "${SLURM_CPUS_PER_TASK:-1}" --distribution=block --kill-on-bad-exit=1 \
    python pretrain_scripts/pretrain_video.py --deepspeed_config "$CONFIG" --save "$SAVE" --save-interval 500 \
    "$@"

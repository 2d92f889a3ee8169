#!/usr/bin/env bash
# Pretrain under Open MPI's mpirun. RANKS=2, and all other flags go to pretrain_video.py:
#
#     RANKS=4 pretrain_scripts/launch_mpirun.sh --dynamic-sequence-parallel-size 4 --train-iters 1000
#
# MPIRUN_FLAGS adds mpirun's own, such as "--hostfile hosts", or "--oversubscribe" for more ranks than cores.
set -eu
cd "$(dirname "$0")/.."
RANKS=${RANKS:-2}
CONFIG=${CONFIG:-pretrain_scripts/ds_configs/demo.json}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# Ranks are not bound to a core each, so that a rank's threads can spread; -x hands variables to other hosts.
# shellcheck disable=SC2086
exec mpirun -np "$RANKS" --bind-to none -x OMP_NUM_THREADS ${MPIRUN_FLAGS:-} \
    python pretrain_scripts/pretrain_video.py --deepspeed_config "$CONFIG" "$@"

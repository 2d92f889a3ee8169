#!/usr/bin/env bash
# Pretrain under mpirun: Open MPI's, or that of MPICH and Intel MPI. RANKS=2, and all other flags go to pretrain_video.py:
#
#     RANKS=4 pretrain_scripts/launch_mpirun.sh --dynamic-sequence-parallel-size 4 --train-iters 1000
#
# MPIRUN_FLAGS adds mpirun's own: with Open MPI "--hostfile hosts --map-by ppr:8:node", with MPICH "-f hosts -ppn 8"; with Open
# MPI "--oversubscribe" for more ranks than cores.
set -eu
cd "$(dirname "$0")/.."
RANKS=${RANKS:-2}
CONFIG=${CONFIG:-pretrain_scripts/ds_configs/demo.json}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# Ranks are not bound to a core each, so that a rank's threads can spread.
case $(mpirun --version 2>&1) in
    *"Open MPI"*) flags="--bind-to none -x OMP_NUM_THREADS" ;; # -x hands variables to other hosts; the others hand on all
    *"Intel(R) MPI"*) flags="" && export I_MPI_PIN=off ;;
    *) flags="-bind-to none" ;;
esac

# shellcheck disable=SC2086
exec mpirun -np "$RANKS" $flags ${MPIRUN_FLAGS:-} \
    python pretrain_scripts/pretrain_video.py --deepspeed_config "$CONFIG" "$@"

#!/bin/bash
# Slurm: one launcher a node, each for all GPUs of its node. A preempted job queues again and continues where it saved.
# Not run: no cluster was at hand; tests/test_recipes.py runs it with stand-ins for srun, scontrol and make.
#
#     STAGE=pretrain RECIPE=1b ACCELERATE=fsdp2 sbatch --nodes=2 recipes/accelerate/slurm.sh
#
# Five minutes before the end (and at `scancel --signal=USR1 JOB`) every process gets USR1. Launchers ignore it, as the trap below has them
# do; the stage saves, leaves its mark and goes. SIGTERM does the same, but torch's launcher kills its workers 30 s after it.
#SBATCH --job-name=plumbline
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@300
export STAGE=${STAGE:-pretrain} RECIPE=${RECIPE:-1b} ACCELERATE=${ACCELERATE:-fsdp2}
mark=${PLUMBLINE_RUNS:-runs}/$RECIPE/$STAGE.partial/PREEMPTED
rm -f "$mark"  # of an earlier job: else a failure before the stage begins would queue for ever
export NUM_MACHINES=$SLURM_NNODES MAIN_PORT=$((20000 + SLURM_JOB_ID % 10000))
MAIN_ADDRESS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -1)
export MAIN_ADDRESS

srun --wait=60 bash -c 'trap "" USR1; MACHINE_RANK=$SLURM_NODEID exec make "$STAGE"'
code=$?
if [ -e "$mark" ]; then
    echo "preempted: $(cat "$mark")"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code

#!/bin/bash
# sbatch configs/slurm.sh configs/multi_gpu.yaml output_dir=runs/mine
#
# A run on several machines under SLURM, one process for each GPU. Where its time ends it goes on by
# itself: two minutes before, SLURM interrupts the processes as Ctrl-C does, these finish their step and
# save, and the job is queued again. Change the lines below to your cluster: nodes, GPUs, time,
# partition, account.
#SBATCH --job-name=xsiam
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=4
#SBATCH --time=04:00:00
#SBATCH --signal=INT@120
#SBATCH --requeue
#SBATCH --open-mode=append

# Where a process dies, the others end with an error after `trainer.timeout` seconds at most. SLURM must
# not kill them earlier: those that are interrupted do not end in the same moment.
srun --kill-on-bad-exit=0 python train.py "$@" resume=auto checkpoint.every_n_steps=200 \
    trainer.timeout=600 trainer.num_nodes="$SLURM_JOB_NUM_NODES" \
    trainer.devices="$SLURM_NTASKS_PER_NODE"
code=$?
if [ "$code" -eq 130 ]; then  # interrupted, and saved
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"

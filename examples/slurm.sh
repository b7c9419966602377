#!/bin/bash
# Train on 4 machines with 8 GPUs each: sbatch examples/slurm.sh
# Stopped 5 minutes before the time limit, the run saves a checkpoint, is queued again and resumes.
#SBATCH --nodes 4 --ntasks-per-node 8 --gpus-per-node 8 --time 4:00:00
#SBATCH --signal USR1@300 --requeue --open-mode append
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) MASTER_PORT=29500
srun --kill-on-bad-exit=1 bash -c '
  export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
  exec python -m rrhf_fast.train --config run.yaml --output_dir out --data_parallel_replicate 4 \
    --save_steps 200 --save_total_limit 2 --resume_from_checkpoint latest'
[ $? -eq 75 ] && scontrol requeue "$SLURM_JOB_ID"

#!/bin/bash
# Train on 4 machines with 8 GPUs each: sbatch examples/slurm.sh
# Stopped 5 minutes before the time limit, the run saves a checkpoint, is queued again and resumes;
# so it does after the loss of a machine or a crash, unless it was started 3 times before.
#SBATCH --nodes 4 --ntasks-per-node 8 --gpus-per-node 8 --time 4:00:00
#SBATCH --signal USR1@300 --requeue --open-mode append
# When a rank has ended, the others get 30 seconds: killed at once, they would hide its exit code.
srun --kill-on-bad-exit=0 --wait=30 python -m rrhf_fast.train --config run.yaml --output_dir out \
  --data_parallel_replicate 4 --save_steps 200 --save_total_limit 2 --resume_from_checkpoint latest
code=$?
# 75: stopped by the signal. Above 128: ranks were killed.
if [ $code -eq 75 ] || { [ $code -gt 128 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 3 ]; }; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $code

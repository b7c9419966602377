#!/bin/bash
# Train on 4 machines with 8 GPUs each: sbatch examples/slurm.sh
# Stopped 5 minutes before the time limit, the run saves a checkpoint, is queued again and resumes;
# so it does after the failure of a machine.
#SBATCH --nodes 4 --ntasks-per-node 8 --gpus-per-node 8 --time 4:00:00
#SBATCH --signal USR1@300 --requeue --open-mode append
# When a rank has ended, the others get 30 seconds: killed at once, they would hide its exit code.
srun --kill-on-bad-exit=0 --wait=30 python -m rrhf_fast.train --config run.yaml --output_dir out \
  --data_parallel_replicate 4 --save_steps 200 --save_total_limit 2 --resume_from_checkpoint latest
code=$?
[ $code -eq 75 ] && scontrol requeue "$SLURM_JOB_ID"  # 75: stopped by the signal
exit $code

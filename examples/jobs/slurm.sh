#!/usr/bin/env bash
# sbatch examples/jobs/slurm.sh: one process on each machine, with all of its GPUs; the run folder is on a shared disk.
#SBATCH --job-name=monarchrt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append

# processes, their numbers and the address of the first one come from srun; a job that is started again goes on
folder=${1:-/shared/runs/monarch}
resume=$([ -d "$folder/checkpoints" ] && echo --resume)

srun --kill-on-bad-exit=1 monarchrt train \
    --latents /shared/latents --init-from /shared/Wan2.1-T2V-1.3B --preset wan2.1-t2v-1.3b --precision bf16 \
    --tile 3 30 52 --batch 16 --steps 2000 --mesh data=2,fsdp=8 --folder "$folder" $resume

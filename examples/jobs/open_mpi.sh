#!/usr/bin/env bash
# bash examples/jobs/open_mpi.sh node1 node2: one process on each machine, with all of its GPUs.
set -euo pipefail
first=$1
hosts=$(IFS=,; echo "$*")

# Open MPI 5 does not say where process 0 runs: it is on the first machine, and the port must be free there
mpirun --host "$hosts" --map-by ppr:1:node --bind-to none monarchrt train \
    --coordinator "$first:4567" \
    --latents /shared/latents --init-from /shared/Wan2.1-T2V-1.3B --preset wan2.1-t2v-1.3b --precision bf16 \
    --tile 3 30 52 --batch 16 --steps 2000 --mesh data=2,fsdp=8 --folder /shared/runs/monarch

#!/usr/bin/env bash
# bash examples/jobs/by_hand.sh CLIP FOLDER: two processes on this machine, two devices each; without a GPU, CPU devices.
set -euo pipefail
clip=$1 folder=$2
network=(--overrides num_layers=1 dim=192 num_heads=2 ffn_dim=96)
data=(--frames 3 --height 16 --width 32 --patch 4 --gap 1 --held-out 0.3)

run() {  # on several machines, the same command on each, with the first one's address and a number of its own
    monarchrt train --video "$clip" "${network[@]}" "${data[@]}" --batch 2 --steps 6 --folder "$folder" \
        --mesh fsdp=2,heads=2 --coordinator localhost:4567 --processes 2 --process "$1"
}

if [ -e /dev/nvidiactl ]; then  # by hand, nobody says which GPUs are whose
    CUDA_VISIBLE_DEVICES=2,3 run 1 &
    other=$!
    CUDA_VISIBLE_DEVICES=0,1 run 0
else
    export JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=2
    run 1 &
    other=$!
    run 0
fi
wait "$other"

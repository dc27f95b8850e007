#!/bin/sh
# The shipped `pocket` weights and the figures of docs/results.md, from nothing.
# Two GPUs of 40 GB or more. Seconds are of training alone; compiling and rendering come on top.
set -e
RUNS=${RUNS:-runs_out}
CODEC_SECONDS=${CODEC_SECONDS:-205}
SECONDS_EACH=${SECONDS_EACH:-300}

torchrun --nproc-per-node 2 -m decmem train codec --preset pocket --rate 1.25 \
    --seconds "$CODEC_SECONDS" --int8 --out "$RUNS/codec"
CODEC="$RUNS/codec/pocket-codec.safetensors"

# The model and its control, the sliding window alone, get the same seconds of one GPU each.
CUDA_VISIBLE_DEVICES=0 decmem train memory --preset pocket --codec "$CODEC" \
    --seconds "$SECONDS_EACH" --int8 --out "$RUNS/memory" &
CUDA_VISIBLE_DEVICES=1 decmem train memory --preset pocket --codec "$CODEC" --memory window \
    --seconds "$SECONDS_EACH" --int8 --out "$RUNS/window"
wait

decmem eval --preset pocket --episodes 64 --device cuda --weights "$RUNS/memory/pocket.safetensors" \
    --codec-weights "$CODEC" --window-weights "$RUNS/window/pocket.safetensors" --out "$RUNS/eval"

#!/bin/sh
# The shipped `pocket` weights and the figures of docs/results.md, from nothing.
# Two GPUs of 40 GB or more for the codec, one for the rest. Seconds are of training alone; compiling
# and rendering come on top.
#
# The shipped weights differ in four things: their codec was trained on blockworld/1, the first stage
# stopped after 1,475 of its 1,600 seconds, only the last two stages met pasts that the model painted
# (the third a quarter of its steps, of one generation), and only in the last did walks stand still.
set -e
RUNS=${RUNS:-runs_out}
CODEC_SECONDS=${CODEC_SECONDS:-205}
FIRST_SECONDS=${FIRST_SECONDS:-1600}
SECOND_SECONDS=${SECOND_SECONDS:-190}
THIRD_SECONDS=${THIRD_SECONDS:-1470}
LAST_SECONDS=${LAST_SECONDS:-450}
WINDOW_SECONDS=${WINDOW_SECONDS:-80}

torchrun --nproc-per-node 2 -m decmem train codec --preset pocket --rate 1.25 \
    --seconds "$CODEC_SECONDS" --int8 --out "$RUNS/codec"
CODEC="$RUNS/codec/pocket-codec.safetensors"

decmem train memory --preset pocket --codec "$CODEC" --walks 4096 \
    --seconds "$FIRST_SECONDS" --int8 --out "$RUNS/first"
FIRST="$RUNS/first/pocket-00001-of-00002.safetensors"

decmem train memory --preset pocket --codec "$CODEC" --walks 2048 --from "$FIRST" --rate 0.2 \
    --seconds "$SECOND_SECONDS" --seed 1 --int8 --out "$RUNS/second"
SECOND="$RUNS/second/pocket-00001-of-00002.safetensors"

decmem train memory --preset pocket --codec "$CODEC" --walks 6144 --from "$SECOND" --rate 0.5 \
    --seconds "$THIRD_SECONDS" --seed 2 --int8 --out "$RUNS/third"
THIRD="$RUNS/third/pocket-00001-of-00002.safetensors"

decmem train memory --preset pocket --codec "$CODEC" --walks 4608 --from "$THIRD" --rate 0.35 \
    --seconds "$LAST_SECONDS" --seed 4 --int8 --out "$RUNS/memory"
LAST="$RUNS/memory/pocket-00001-of-00002.safetensors"

# The control, the sliding window alone, starts from the same weights: it had their seconds too.
decmem train memory --preset pocket --codec "$CODEC" --walks 2048 --from "$LAST" --rate 0.3 --memory window \
    --seconds "$WINDOW_SECONDS" --seed 3 --int8 --out "$RUNS/window"

decmem eval --preset pocket --episodes 64 --device cuda \
    --weights "$LAST" --codec-weights "$CODEC" \
    --window-weights "$RUNS/window/pocket-00001-of-00002.safetensors" --out "$RUNS/eval"

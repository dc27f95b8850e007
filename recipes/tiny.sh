#!/bin/sh
# The shipped `tiny` weights, which tests and the smallest machines use: half an hour of one CPU core.
set -e
RUNS=${RUNS:-runs_out}
decmem train codec --preset tiny --walks 256 --batch 8 --seconds 600 --out "$RUNS/tiny-codec"
decmem train memory --preset tiny --codec "$RUNS/tiny-codec/tiny-codec.safetensors" \
    --walks 512 --seconds 1200 --int8 --out "$RUNS/tiny"

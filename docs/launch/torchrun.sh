#!/usr/bin/env bash
# A training run by torchrun, on one machine or on several. On each of them, from the same directory:
#
#     docs/launch/torchrun.sh                  begins it
#     docs/launch/torchrun.sh --resume         goes on with it; arguments are those of `dgpo-fast train`
#
# Change the values behind the dashes, or set the variables: NODES=2 FIRST=node-0 docs/launch/torchrun.sh
set -euo pipefail

RECIPE=${RECIPE:-sd35m-geneval}   # a name that `dgpo-fast recipes` lists, or a YAML file
OUT=${OUT:-runs/geneval}          # where every machine sees the same files
NODES=${NODES:-1}                 # machines
GPUS=${GPUS:-8}                   # of each machine
FIRST=${FIRST:-localhost}         # the machine where the others meet
PORT=${PORT:-29400}               # a free one there
RUN_ID=${RUN_ID:-$OUT}            # the same on all machines, and no other run's

# Threads of a rank's CPU, where the optimizer is offloaded, say: torchrun would set 1.
cores=$(($(nproc) / GPUS))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > 0 ? cores : 1))}

# How long a stopped run may save before torchrun kills it: by itself it would wait 30 s.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}

exec python -m torch.distributed.run \
    --nnodes="$NODES" --nproc-per-node="$GPUS" \
    --rdzv-backend=c10d --rdzv-endpoint="$FIRST:$PORT" --rdzv-id="$RUN_ID" --max-restarts=0 \
    -m dgpo_fast train "$RECIPE" --out "$OUT" "$@"

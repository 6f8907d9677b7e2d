#!/usr/bin/env bash
# A training run by DeepSpeed's launcher, which starts it on all machines of the hostfile, through pdsh and an ssh that
# asks for no password. On the first of them:
#
#     docs/launch/deepspeed.sh                  begins it
#     docs/launch/deepspeed.sh --resume         goes on with it; arguments are those of `dgpo-fast train`
#
# A remote shell reads the arguments once more: what brackets and quotes are needed for belongs into a recipe's file.
# Of the environment only PYTHON*, NCCL* and UCX* reach the other machines, and what ~/.deepspeed_env sets, a line
# NAME=VALUE each. Change the values behind the dashes, or set the variables.
set -euo pipefail

RECIPE=${RECIPE:-sd35m-geneval}                      # a name that `dgpo-fast recipes` lists, or a YAML file
OUT=${OUT:-runs/geneval}                             # where every machine sees the same files
HOSTFILE=${HOSTFILE:-$(dirname "$0")/hostfile}       # of two machines or more
PORT=${PORT:-29500}                                  # a free one on the first machine
FIRST=${FIRST:-$(awk '!/^#/ && NF { print $1; exit }' "$HOSTFILE")}   # how the others reach it

exec deepspeed --hostfile "$HOSTFILE" --master_addr "$FIRST" --master_port "$PORT" \
    --module dgpo_fast train "$RECIPE" --out "$OUT" "$@"

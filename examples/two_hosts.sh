#!/bin/bash
# One run on two hosts (or more), started by hand: the same line on every host.
#
#   HOSTS=2 FIRST=hostname-of-one ./two_hosts.sh imagenet_spngd_32k --data.path /data/imagenet --out /shared/runs/first
#   HOSTS=2 FIRST=hostname-of-one ./two_hosts.sh own_script.py --out /shared/runs/own
#
# The first word is a recipe of `natgrad train`, or a file that ends with .py: a script of your own, which goes on from its last
# checkpoint by itself (own_script.py does).
#
# FIRST is the host on which the ranks meet. /shared is a folder that all hosts see: results and checkpoints go there; the
# data may lie elsewhere on each host. torchrun starts one rank a GPU (or RANKS a host), and starts all of them again,
# from the last checkpoint, when one dies. A host that is lost must be started again by the same line, or by a scheduler; with
# HOSTS=1:2 the run goes on meanwhile on the host that is left (FIRST must be).
set -euo pipefail
: "${HOSTS:=2}" "${FIRST:?name the host where ranks meet}" "${PORT:=29500}" "${RESTARTS:=3}" "${RUN:=natgrad}"
: "${RANKS:=$(python -c 'import torch; print(torch.cuda.device_count() or 1)')}"

# Each attempt gets a store of its own, also when hosts come and go (torchrun keeps one for all attempts otherwise).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# Seconds from a TERM until ranks are killed: they end their step and write a checkpoint first (torchrun's own: 30).
: "${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:=150}"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT

case "${1:?name a recipe or a script}" in
*.py) program=("$@") ;;
*) program=(-m natgrad_lab train "$@" --auto-resume) ;;
esac

exec torchrun \
    --nnodes "$HOSTS" \
    --nproc-per-node "$RANKS" \
    --max-restarts "$RESTARTS" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$FIRST:$PORT" \
    --rdzv-id "$RUN" \
    "${program[@]}"

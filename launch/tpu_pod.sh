#!/usr/bin/env bash
# A TPU pod slice with one command on every host, by gcloud:
#
#     ZONE=us-east5-a launch/tpu_pod.sh NAME EXPERIMENT --set layout=fsdp=64 --run-dir /mnt/shared/7b
#
# NAME is a slice that exists, for one: gcloud compute tpus queued-resources create NAME
# --node-id NAME --zone ZONE --accelerator-type v5p-128 --runtime-version v2-alpha-tpuv5 --spot
# On every host there must be this repository in ~/internlm2_jax, installed with '.[tpu]' into
# .venv, and one shared folder (Filestore, or a bucket mounted by gcsfuse) for data and runs. The
# processes find one another by the pod's metadata. The same command goes on with a run, on this
# slice or on one of another size.
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: ZONE=... $0 NAME EXPERIMENT [options]" >&2; exit 2; }
name=$1
shift
command="cd ~/internlm2_jax && PATH=\$PWD/.venv/bin:\$PATH launch/restart.sh internlm2 train"
for argument in "$@"; do
    command+=" $(printf '%q' "$argument")"
done
exec gcloud compute tpus tpu-vm ssh "$name" --zone "${ZONE:?set ZONE}" --worker all \
    --command "$command"

#!/usr/bin/env bash
# TPU slices of a GKE cluster, by xpk (pip install xpk):
#
#     CLUSTER=my-cluster ZONE=us-east5-a IMAGE=my-image TPU_TYPE=v5p-128 SLICES=1 \
#         launch/tpu_xpk.sh NAME EXPERIMENT --set layout=fsdp=64 --run-dir /mnt/shared/7b
#
# IMAGE has this repository installed with '.[tpu]' and is the working folder; STORAGE, if set, is
# an xpk storage (Filestore or a bucket) mounted into every host. Of several slices the layout's
# `data` must be a multiple. A preempted or failed slice starts the workload again, which goes on
# from its last checkpoint.
set -euo pipefail
[ $# -ge 2 ] || { echo "usage: CLUSTER=... ZONE=... IMAGE=... TPU_TYPE=... $0 NAME EXPERIMENT [options]" >&2; exit 2; }
name=$1
shift
command="internlm2 train"
for argument in "$@"; do
    command+=" $(printf '%q' "$argument")"
done
exec xpk workload create --workload "$name" --command "$command" \
    --cluster "${CLUSTER:?set CLUSTER}" --zone "${ZONE:?set ZONE}" \
    --docker-image "${IMAGE:?set IMAGE}" \
    --tpu-type "${TPU_TYPE:?set TPU_TYPE}" --num-slices "${SLICES:-1}" \
    --max-restarts 1000 --restart-on-exit-codes 75 ${STORAGE:+--storage "$STORAGE"}

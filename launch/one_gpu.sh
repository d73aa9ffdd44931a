#!/usr/bin/env bash
# One GPU (or one CPU):  launch/one_gpu.sh EXPERIMENT [options of `internlm2 train`]
#
#     launch/one_gpu.sh experiments/pretraining/internlm2_1_8b.py --set layout= --run-dir runs/small
#
# Needs: pip install -e '.[gpu]'. An empty layout is one device.
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: $0 EXPERIMENT [options]" >&2; exit 2; }
exec "$(dirname "$0")/restart.sh" internlm2 train "$@"

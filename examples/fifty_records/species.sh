#!/usr/bin/env bash
# usage: species.sh RECORDS IMAGERY ENCODER OUT [more options of the training]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
records=$1 imagery=$2 encoder=$3 out=$4
shift 4
mkdir -p "$out"

speciesmap observations "$records" --out "$out/observations.parquet"
speciesmap chips "$out/observations.parquet" --imagery "$imagery" --window-px 32 --out "$out/chips"
speciesmap train "$here/frozen.yaml" --set "init=$encoder" --set "data.dataset=$out/chips" \
    --set "data.imagery=$imagery" --out "$out/model" "$@"
speciesmap predict "$out/model" --imagery "$imagery" --out "$out/maps"

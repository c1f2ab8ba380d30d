#!/usr/bin/env bash
# usage: map.sh RECORDS IMAGERY OUT [more options of both trainings, such as --set optim.epochs=2]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
records=$1 imagery=$2 out=$3
shift 3
mkdir -p "$out"

speciesmap observations "$records" --out "$out/observations.parquet" --uncertainty-max-m 250
speciesmap chips "$out/observations.parquet" --imagery "$imagery" --window-px 32 --out "$out/chips"
speciesmap train "$here/encoder.yaml" --set "data.imagery=$imagery" --out "$out/encoder" "$@"
speciesmap train "$here/species.yaml" --set "init=$out/encoder" --set "data.dataset=$out/chips" \
    --set "data.imagery=$imagery" --out "$out/model" "$@"
speciesmap predict "$out/model" --imagery "$imagery" --qgis-project --out "$out/maps"

#!/usr/bin/env bash
# bash run.sh [OPTIONS of python -m benchmarks.gpu]: in a folder that python -m benchmarks.gpu.pack has filled, on a machine
# without a network. Results go to $OUT, or to ./out.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "${OUT:=out}"
out=$(cd "$OUT" && pwd)
export PYTHONPATH="$here/project" PYTHONUNBUFFERED=1
if compgen -G "$here/wheels/*.whl" > /dev/null; then
    site=$(mktemp -d)
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$here"/wheels/*.whl
    PYTHONPATH="$site:$PYTHONPATH"
fi
cd "$here/project"
python3 -m benchmarks.gpu --out "$out/gpu.json" "$@" 2> >(tee "$out/progress.txt" >&2) | tee "$out/gpu.txt"

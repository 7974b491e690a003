#!/usr/bin/env bash
# Compares Concord's learning with Python's torch, transformers and adapters. `make interop` calls it.
#
#   CONCORD_MINILM=...  folder of the MiniLM-L6 backbone (make sets it)
#   CONCORD_CACHE=...   where the venv is kept, about 3 GB (default: ~/.cache/concord)
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
cargo=${CARGO:-cargo}
: "${CONCORD_MINILM:?must name the folder of the MiniLM-L6 backbone; make interop fetches it and sets this}"

python=$("$here/venv.sh")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

printf '\n--- the committed fixtures, recomputed with transformers\n'
"$python" "$here/make_fixtures.py" --check

printf '\n--- MiniLM with adapters in every layer: Concord against transformers\n'
"$python" "$here/minilm.py" "$CONCORD_MINILM" "$work/minilm.safetensors"
(cd "$root" && "$cargo" run --quiet --locked -p concord-learning --example interop -- "$CONCORD_MINILM" "$work/minilm.safetensors")

printf '\n--- exports of personal models, loaded with adapters\n'
"$python" "$here/adapterhub.py" "${CARGO_TARGET_DIR:-$root/target}/debug/concord-client" "$CONCORD_MINILM"

printf '\ninterop: all checks passed\n'

#!/usr/bin/env bash
# Compares Concord's learning with Python's torch, transformers, adapters and diffusers. `make interop` calls it.
#
#   CONCORD_MINILM=...  folder of the MiniLM-L6 backbone (make sets it)
#   CONCORD_EFFICIENTNET=...  folder of EfficientNet-Lite0 (make sets it)
#   CONCORD_CACHE=...   where the venvs are kept, about 5 GB each (default: ~/.cache/concord)
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
cargo=${CARGO:-cargo}
: "${CONCORD_MINILM:?must name the folder of the MiniLM-L6 backbone; make interop fetches it and sets this}"
: "${CONCORD_EFFICIENTNET:?must name the folder of EfficientNet-Lite0; make interop fetches it and sets this}"

python=$("$here/venv.sh")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

printf '\n--- the committed fixtures, recomputed with transformers\n'
"$python" "$here/make_fixtures.py" --check

printf '\n--- MiniLM with adapters in every layer: Concord against transformers\n'
for position in ffn attention; do
  printf 'position %s\n' "$position"
  "$python" "$here/minilm.py" "$CONCORD_MINILM" "$work/minilm.safetensors" --position "$position"
  (cd "$root" && "$cargo" run --quiet --locked -p concord-learning --example interop -- "$CONCORD_MINILM" "$work/minilm.safetensors")
done

printf '\n--- EfficientNet-Lite0: the committed results, recomputed with torch\n'
"$python" "$here/efficientnet.py" "$CONCORD_EFFICIENTNET/model.safetensors" --check

printf '\n--- exports of personal models, loaded with adapters\n'
"$python" "$here/adapterhub.py" "${CARGO_TARGET_DIR:-$root/target}/debug/concord-client" "$CONCORD_MINILM"

# In a venv of its own: diffusers wants a newer transformers than adapters does.
CARGO=$cargo "$here/diffusion.sh"

printf '\ninterop: all checks passed\n'

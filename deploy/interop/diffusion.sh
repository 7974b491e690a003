#!/usr/bin/env bash
# Compares Concord's text-to-image engine with Python's diffusers: the committed fixtures, and adapters and models that Concord writes.
#
#   diffusion.sh            compare
#   diffusion.sh --bench    how fast both are, and how much memory they take; builds with --release
#   CONCORD_CACHE=...       where the venv is kept, about 5 GB (default: ~/.cache/concord)
# `make interop` calls it after the checks of the backbones.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
cargo=${CARGO:-cargo}
cache=${CONCORD_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/concord}
venv=$cache/venv-diffusion
stamp=$venv/requirements.sha256
wanted=$(sha256sum "$here/requirements-diffusion.txt" | cut -d ' ' -f 1)

say() { printf 'interop: %s\n' "$*" >&2; }

mkdir -p "$cache"
if command -v flock >/dev/null; then # two runs at once make it only once
  exec 9>"$cache/venv-diffusion.lock"
  flock 9
fi
if [[ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]]; then
  say "making the Python venv with torch and diffusers (about 5 GB, once) in $venv"
  # The stamp is written last: without it the venv counts as not made. What is half made goes. The system's pip fills it, as in venv.sh.
  trap 'rm -rf "$venv"' EXIT
  python3 -m venv --clear --without-pip "$venv" || { say "error: python3 cannot make a venv in $venv"; exit 1; }
  mkdir "$venv/tmp"
  TMPDIR=$venv/tmp python3 -m pip --python "$venv/bin/python" install --quiet --disable-pip-version-check --no-cache-dir \
    --require-hashes --requirement "$here/requirements-diffusion.txt" >&2 ||
    { say "error: pip could not install the packages; nothing is kept. Check the network and pip's index, then run this again"; exit 1; }
  rm -rf "$venv/tmp"
  printf '%s\n' "$wanted" >"$stamp"
  trap - EXIT
fi
exec 9>&-

export HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore PYTHONDONTWRITEBYTECODE=1
profile=debug options=()
if [[ "${1:-}" == --bench ]]; then
  profile=release options=(--release)
fi
(cd "$root" && "$cargo" build --quiet --locked "${options[@]}" -p concord-learning --example diffusion)
examples=${CARGO_TARGET_DIR:-$root/target}/$profile/examples
if [[ "${1:-}" == --bench ]]; then
  exec "$venv/bin/python" "$here/diffusion.py" "$examples/diffusion" --bench
fi

printf '\n--- the committed fixtures, recomputed with diffusers\n'
"$venv/bin/python" "$here/diffusion_fixtures.py" --check

printf '\n--- adapters and fused models of Concord, loaded with diffusers\n'
(cd "$root" && "$cargo" build --quiet --locked -p concord-artaug-worker --example job_lora)
"$venv/bin/python" "$here/diffusion.py" "$examples/diffusion" "$examples/job_lora"

printf '\ninterop: all text-to-image checks passed\n'

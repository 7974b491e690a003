#!/usr/bin/env bash
# Makes the Python venv of the interop checks once, outside the checkout, and prints the path of its python.
# Anew when requirements.txt changes. CONCORD_CACHE=... moves it (default: ~/.cache/concord).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${CONCORD_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/concord}
venv=$cache/venv-interop
stamp=$venv/requirements.sha256
wanted=$(sha256sum "$here/requirements.txt" | cut -d ' ' -f 1)

say() { printf 'interop: %s\n' "$*" >&2; }

mkdir -p "$cache"
if command -v flock >/dev/null; then # two runs at once make it only once
  exec 9>"$cache/venv-interop.lock"
  flock 9
fi
if [[ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]]; then
  say "making the Python venv with torch, transformers and adapters (about 5 GB, once) in $venv"
  # The stamp is written last: without it the venv counts as not made. What is half made goes.
  trap 'rm -rf "$venv"' EXIT
  # Without its own pip: Debian's python3 can make a venv, but lacks what installs pip into one. The system's pip works for it.
  python3 -m venv --clear --without-pip "$venv" || { say "error: python3 cannot make a venv in $venv"; exit 1; }
  # pip unpacks in its temporary folder first: keep that off a small /tmp.
  mkdir "$venv/tmp"
  TMPDIR=$venv/tmp python3 -m pip --python "$venv/bin/python" install --quiet --disable-pip-version-check --no-cache-dir \
    --require-hashes --requirement "$here/requirements.txt" >&2 ||
    { say "error: pip could not install the packages; nothing is kept. Check the network and pip's index, then run this again"; exit 1; }
  rm -rf "$venv/tmp"
  printf '%s\n' "$wanted" >"$stamp"
  trap - EXIT
fi
printf '%s\n' "$venv/bin/python"

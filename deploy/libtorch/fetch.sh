#!/usr/bin/env bash
# Puts a CPU libtorch 2.13.0, the version that tch 0.26 wants, into the cache and points
# deploy/libtorch/current at it. Needs bash and Python 3 with pip, nothing else.
#
#   deploy/libtorch/fetch.sh          fetch once; a second run does nothing
#   LIBTORCH=/opt/libtorch ...        a set LIBTORCH wins: nothing is fetched
#   CONCORD_CACHE=/big/disk ...       where the folder goes (default: ~/.cache/concord)
#
# The x86_64 Linux wheel of torch is the CUDA build. Its libtorch_cpu.so works alone, given the two small
# libraries that it names as NEEDED (libcudart and libcupti); the gigabytes of CUDA kernels are left out.
# Every wheel is pinned by sha256, unpacked in a temporary folder beside the target, and renamed at the end:
# the target folder exists only complete.
set -euo pipefail

readonly version=2.13.0
# requirement | platform tag of the wheel | sha256 | members to take: path in the wheel -> path in the folder
readonly wheels=(
  "torch==2.13.0|manylinux_2_28_x86_64|796633c4cdf0fe2cdced72d8f88f22e73dbcfce83132763162f6d4bff13b820b|torch/include/->include/ torch/lib/libtorch_cpu.so->lib/ torch/lib/libc10.so->lib/ torch/lib/libgomp.so.1->lib/"
  "nvidia-cuda-runtime==13.0.96|manylinux_2_17_x86_64|7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548|nvidia/cu13/lib/libcudart.so.13->lib/"
  "nvidia-cuda-cupti==13.0.85|manylinux_2_25_x86_64|4eb01c08e859bf924d222250d2e8f8b8ff6d3db4721288cf35d14252a4d933c8|nvidia/cu13/lib/libcupti.so.13->lib/"
)

say() { printf 'libtorch: %s\n' "$*"; }
die() { printf 'libtorch: error: %s\n' "$*" >&2; exit 1; }

if [[ -n "${LIBTORCH:-}" ]]; then
  say "LIBTORCH is set to $LIBTORCH; using that, nothing to fetch"
  [[ -e "$LIBTORCH/lib/libtorch.so" || -n "${LIBTORCH_LIB:-}" ]] ||
    say "note: $LIBTORCH/lib/libtorch.so does not exist, so the build will fail; correct LIBTORCH or unset it"
  exit 0
fi

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${CONCORD_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/concord}
mkdir -p "$cache" || die "cannot make the cache folder $cache; set CONCORD_CACHE to a folder that can be written"
cache=$(cd "$cache" && pwd)
target=$cache/libtorch-$version

# Points deploy/libtorch/current, which .cargo/config.toml names, at the finished folder.
link_current() {
  [[ "$(readlink "$here/current" 2>/dev/null)" == "$target" ]] && return
  ln -s "$target" "$here/current.$$"
  mv -fT "$here/current.$$" "$here/current"
}

if [[ -d "$target" ]]; then
  link_current
  say "already there: $target"
  exit 0
fi

machine="$(uname -s) $(uname -m)"
[[ "$machine" == "Linux x86_64" ]] ||
  die "no pinned download for $machine; install libtorch $version yourself and set LIBTORCH to its folder"
command -v python3 >/dev/null || die "python3 is missing; install Python 3 with pip"
python3 -m pip --version >/dev/null 2>&1 || die "python3 has no pip; install it (on Debian: apt-get install python3-pip)"

if command -v flock >/dev/null; then # two builds at once fetch only once
  exec 9>"$cache/libtorch.lock"
  flock 9
  if [[ -d "$target" ]]; then link_current; say "already there: $target"; exit 0; fi
  rm -rf "$target".partial.* # of a killed run; the lock says it is dead
fi

temp=$(mktemp -d "$cache/libtorch-$version.partial.XXXXXX")
trap 'rm -rf "$temp"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
mkdir "$temp/wheel" "$temp/tmp" "$temp/out"

say "fetching libtorch $version (about 540 MB to download, 490 MB on disk) into $target"
started=$SECONDS
for row in "${wheels[@]}"; do
  IFS='|' read -r requirement platform sha256 members <<<"$row"
  step=$SECONDS
  # pip's own temporary files go beside the target too: /tmp may be small. No pip cache: the wheel is deleted below.
  TMPDIR=$temp/tmp python3 -m pip download --quiet --disable-pip-version-check --no-cache-dir \
    --no-deps --only-binary=:all: --python-version 3.12 --implementation cp --abi cp312 --abi none \
    --platform "$platform" --dest "$temp/wheel" "$requirement" ||
    die "pip could not download $requirement; nothing was kept. Check the network and pip's index settings, then run this again"
  python3 - "$requirement" "$sha256" "$temp/wheel" "$temp/out" "$members" <<'PYTHON' || die "nothing was kept; run this again"
import hashlib, os, shutil, sys, zipfile
requirement, expected, folder, out, members = sys.argv[1:]
found = os.listdir(folder)
if len(found) != 1:
    sys.exit(f"libtorch: error: expected one wheel of {requirement}, found {sorted(found)}")
path = os.path.join(folder, found[0])
digest = hashlib.sha256()
with open(path, "rb") as wheel:
    while block := wheel.read(1 << 20):
        digest.update(block)
if digest.hexdigest() != expected:
    sys.exit(f"libtorch: error: {found[0]} is not the pinned file: sha256 {digest.hexdigest()}, expected {expected}")
with zipfile.ZipFile(path) as archive:
    for member in members.split():
        source, place = member.split("->")
        names = [n for n in archive.namelist() if n.startswith(source) and not n.endswith("/")]
        if not names:
            sys.exit(f"libtorch: error: {found[0]} holds no {source}")
        for name in names:
            tail = name[len(source):] if source.endswith("/") else os.path.basename(name)
            goal = os.path.join(out, place, tail)
            os.makedirs(os.path.dirname(goal), exist_ok=True)
            with archive.open(name) as reader, open(goal, "wb") as writer:
                shutil.copyfileobj(reader, writer, 1 << 20)
os.remove(path)
PYTHON
  say "$requirement: $((SECONDS - step)) s"
done

# torch-sys asks the linker for -ltorch; the real libtorch.so would pull in the CUDA half. This GNU ld script satisfies it.
echo 'INPUT(libtorch_cpu.so)' >"$temp/out/lib/libtorch.so"
ln -s libgomp.so.1 "$temp/out/lib/libgomp.so"
echo "$version" >"$temp/out/build-version"
chmod -R u+rwX,go+rX "$temp/out"

mv -T "$temp/out" "$target" || die "cannot rename $temp/out to $target"
link_current
say "ready in $((SECONDS - started)) s: $target"

#!/usr/bin/env bash
# Checks the units without installing anything: `systemd-analyze verify` must have nothing to say, the exposure that
# `systemd-analyze security` computes must stay under the bound below, and the sysusers and tmpfiles entries must apply
# to an empty root. Works where systemd is not running.
set -euo pipefail

# Highest exposure allowed, times ten (the tool's own unit for --threshold).
readonly bound=12
readonly units=(concord-server concord-client concord-artaug concord-server-with-worker)

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
command -v systemd-analyze >/dev/null || { echo "systemd: systemd-analyze is missing; install systemd" >&2; exit 1; }
version=$(systemd-analyze --version | awk 'NR == 1 { print $2 }')

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
mkdir -p "$root/bin" "$root/units"
for unit in "${units[@]}"; do
  # The programs are not installed here, so their paths point to stand-ins for `verify`.
  program=${unit%-with-worker}
  ln -sf "$(type -P true)" "$root/bin/$program"
  sed "s|/usr/bin/$program|$root/bin/$program|g" "$here/$program.service" >"$root/units/$unit.service"
  if [[ "$unit" == *-with-worker ]]; then
    mkdir -p "$root/units/$unit.service.d"
    sed "s|/usr/bin/|$root/bin/|g" "$here/worker.conf" >"$root/units/$unit.service.d/worker.conf"
  fi
  if ((${version%%[^0-9]*} >= 254)); then
    mkdir -p "$root/units/$unit.service.d"
    cp "$here/backoff.conf" "$root/units/$unit.service.d/"
  fi
done

files=("${units[@]/%/.service}")
files=("${files[@]/#/$root/units/}")
complaints=$(SYSTEMD_UNIT_PATH="$root/units:" systemd-analyze verify --man=no \
  "${files[@]}" 2>&1) || {
  printf 'systemd: verify failed:\n%s\n' "$complaints" >&2
  exit 1
}
if grep -q concord <<<"$complaints"; then # a warning about ours; those about the host's own units are not our concern
  printf 'systemd: verify complains:\n%s\n' "$complaints" >&2
  exit 1
fi
echo "systemd: verify (version $version): nothing to complain about"

for unit in "${units[@]}"; do
  report=$(systemd-analyze security --offline=true --no-pager --threshold="$bound" "$root/units/$unit.service" 2>&1) || {
    printf 'systemd: %s is more exposed than allowed (%s):\n%s\n' "$unit" "$bound" "$report" >&2
    exit 1
  }
  if [[ "${1:-}" == --details ]]; then printf '%s\n' "$report"; fi
  printf 'systemd: %s: exposure %s\n' "$unit" "$(awk '/Overall exposure/ { print $(NF - 2), $(NF - 1) }' <<<"$report")"
done

if command -v systemd-sysusers >/dev/null && command -v systemd-tmpfiles >/dev/null; then
  mkdir -p "$root/empty/etc"
  for user in concord-client concord-artaug; do
    systemd-sysusers --root="$root/empty" "$here/$user.sysusers" >/dev/null 2>&1
    grep -q "^$user:" "$root/empty/etc/passwd" || { echo "systemd: sysusers made no user $user" >&2; exit 1; }
  done
  printf 'root:x:0:0::/root:/bin/sh\n' >>"$root/empty/etc/passwd"
  printf 'root:x:0:\n' >>"$root/empty/etc/group"
  systemd-tmpfiles --root="$root/empty" --create "$here/concord.tmpfiles"
  mode=$(stat -c %a "$root/empty/etc/concord/pki")
  [[ "$mode" == 700 ]] || { echo "systemd: /etc/concord/pki has mode $mode, not 700" >&2; exit 1; }
  echo "systemd: sysusers and tmpfiles entries apply"
fi

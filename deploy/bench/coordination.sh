#!/usr/bin/env bash
# What a round costs when training is taken out: N silos that answer at once, over mutual TLS, for four cases and both
# durabilities of the spool. Prints a table, and the lines of JSON that it comes from.
#
#   deploy/bench/coordination.sh          ours (needs `make release`)
#   CONCORD_PEERS=DIR ...                 and Flower and NVIDIA FLARE beside it. DIR holds run_flower.sh and run_nvflare.sh
#                                         (default: ../shared/bench beside the checkout, if scripts and environments are there),
#   FLOWER_VENV=... NVFLARE_VENV=...      and these are the virtual environments they run in (default: DIR/venv-flower, ...)
#   ROUNDS=7                              timed rounds of ours; the peers get 3
#   CASES="2x28 10x28 ..."                silos x MB; 28 stands for 7,000,000 and 3.6 for 900,000 parameters
#
# Quote wall times only from a machine where nothing else runs; processor seconds repeat even on a busy one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

rounds=${ROUNDS:-7}
read -ra cases <<<"${CASES:-2x28 10x28 10x3.6 50x3.6}"
target=${CARGO_TARGET_DIR:-target}/release
loadgen=$target/concord-loadgen
for program in "$loadgen" "$target/concord-server"; do
  [[ -x $program ]] || { echo "bench: $program is not built; run \`make release\`" >&2; exit 1; }
done

results=$(mktemp)
trap 'rm -f "$results"' EXIT

# run LABEL COMMAND...: adds the command's last line, which is JSON, to the results.
run() {
  local label=$1 line
  shift
  printf 'bench: %s\n' "$label" >&2
  line=$("$@" | tail -n 1) || { echo "bench: $label failed: $line" >&2; return 1; }
  printf '%s\n' "$line"
  printf '%s\n' "$line" >>"$results"
}

# there DIR: whether the peers' scripts and their virtual environments are there.
there() {
  [[ -x $1/run_flower.sh && -x $1/run_nvflare.sh ]] &&
    [[ -x ${FLOWER_VENV:-$1/venv-flower}/bin/python && -x ${NVFLARE_VENV:-$1/venv-nvflare}/bin/python ]]
}

peers=${CONCORD_PEERS:-}
if [[ -n $peers ]]; then
  there "$peers" || { echo "bench: CONCORD_PEERS=$peers lacks run_flower.sh, run_nvflare.sh or a virtual environment; see docs/benchmarks.md" >&2; exit 1; }
elif there "$PWD/../shared/bench"; then
  peers=$(cd ../shared/bench && pwd)
else
  echo "bench: the peers are not measured, and the table has ours alone; docs/benchmarks.md says how to add them" >&2
fi

for case in "${cases[@]}"; do
  silos=${case%x*} megabytes=${case#*x}
  parameters=$(python3 -c "import sys; print(round(float(sys.argv[1]) * 250000))" "$megabytes")
  run "concord $case MB, durability process" "$loadgen" "$silos" "$parameters" "$rounds" --durability process
  run "concord $case MB, durability power" "$loadgen" "$silos" "$parameters" "$rounds" --durability power
  if [[ -n $peers ]]; then
    VENV=${FLOWER_VENV:-$peers/venv-flower} VARIANT=grpc SEC=tls \
      run "flower $case MB, gRPC and TLS" "$peers/run_flower.sh" "$silos" "$parameters" 3
    VENV=${NVFLARE_VENV:-$peers/venv-nvflare} \
      run "nvflare $case MB, gRPC and mTLS" "$peers/run_nvflare.sh" "$silos" "$parameters" 3
  fi
done

python3 deploy/bench/table.py <"$results"

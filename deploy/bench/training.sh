#!/usr/bin/env bash
# A training step of the client against the same step in Python (torch and transformers), and an epoch with what only the
# client does: the frozen prefix cache and bucketing by length. Same backbone, adapters, batches and threads.
#
#   deploy/bench/training.sh          needs `make release data` and, for Python, the venv of `make interop`
#   THREADS="1 2" ROWS=512            threads of libtorch; rows of an epoch
#
# Equal work: consecutive rows in batches padded to the longest, nothing cached, adapters in every layer, all terms of the loss.
# Usual work: as in a silo, bucketed and cached, against the same Python as before; adapters in the top third of the layers.
# Rows are those of three of the demo's tasks.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

: "${CONCORD_MINILM:?must name the folder of the MiniLM-L6 backbone; make bench sets it}"
rows=${ROWS:-512}
read -ra threads <<<"${THREADS:-1 2}"
python=$(deploy/interop/venv.sh)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cargo=${CARGO:-cargo}
"$cargo" build --quiet --release --locked -p concord-learning --example training_speed
ours=${CARGO_TARGET_DIR:-target}/release/examples/training_speed

python3 deploy/demo/tasks.py --out "$work/tasks" --tasks spam,movie-polarity,gloss-pair --train "$rows" >&2

# measure NAME WHO COMMAND...: adds a line of JSON with two more fields to the results.
measure() {
  local name=$1 who=$2 line
  shift 2
  printf 'bench: %s: %s\n' "$name" "$who" >&2
  line=$("$@" | tail -n 1)
  printf '%s\n' "$line" >&2
  printf '{"name": "%s", "who": "%s", "result": %s}\n' "$name" "$who" "$line" >>"$work/results"
}
both() { # both NAME KIND_OF_WORK FLAGS...
  local name=$1 kind=$2
  shift 2
  measure "$name" concord "$ours" --work "$kind" --backbone "$CONCORD_MINILM" "$@"
  measure "$name" python "$python" deploy/interop/bench_training.py --backbone "$CONCORD_MINILM" "$@"
}

for count in "${threads[@]}"; do
  for task in spam movie-polarity gloss-pair; do
    common=(--data "$work/tasks/$task/train.csv" --rows "$rows" --mu 1 --alpha 0.01 --threads "$count")
    both "$task, equal work, $count thread(s)" equal --layers all "${common[@]}"
    both "$task, usual work, $count thread(s)" usual --layers 4,5 "${common[@]}"
  done
done

python3 - "$work/results" <<'PYTHON'
import json, sys
rows = [json.loads(line) for line in open(sys.argv[1])]
print("\n| an epoch of | Python | concord | concord, first epoch | Python / concord |\n|---|---|---|---|---|")
for name in dict.fromkeys(row["name"] for row in rows):
    ours, theirs = (next(row["result"] for row in rows if (row["name"], row["who"]) == (name, who)) for who in ("concord", "python"))
    assert (ours["rows"], ours["steps"], ours["layers"]) == (theirs["rows"], theirs["steps"], theirs["layers"]), name
    cell = lambda seconds: f"{seconds:.2f} s"
    print(f"| {name} | {cell(theirs['seconds_per_epoch'])} | {cell(ours['seconds_per_epoch'])} | {cell(ours['first_epoch_seconds'])} "
          f"| {theirs['seconds_per_epoch'] / ours['seconds_per_epoch']:.2f} |")
PYTHON

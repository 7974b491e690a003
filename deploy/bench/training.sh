#!/usr/bin/env bash
# A training step of the client against the same step in Python (torch and transformers), and an epoch with what only the
# client does: the frozen prefix cache and bucketing by length. Same backbone, adapters, batches and threads.
#
#   deploy/bench/training.sh          needs `make release data` and, for Python, the venv of `make interop`
#   THREADS="1 2" ROWS=512            threads of libtorch; rows of an epoch
#
# Equal work: every row has more tokens than the limit, so that both sides compute exactly rows x limit tokens, adapters in
# every layer, all terms of the loss. Epoch: real rows of three of the demo's tasks, adapters in the top third of the layers.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

: "${CONCORD_MINILM:?must name the folder of the MiniLM-L6 backbone; make bench sets it}"
rows=${ROWS:-512}
read -ra threads <<<"${THREADS:-1 2}"
python=$(deploy/interop/venv.sh)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cargo=${CARGO:-cargo}
"$cargo" build --quiet --release --locked -p concord-client --example bench_training
ours=${CARGO_TARGET_DIR:-target}/release/examples/bench_training

python3 deploy/demo/tasks.py --out "$work/tasks" --tasks spam,movie-polarity,gloss-pair --train "$rows" >&2
# Rows that are all longer than the limit: each is several reviews in a row.
python3 - "$work/tasks/movie-polarity/train.csv" "$work/long.csv" <<'PYTHON'
import csv, sys
with open(sys.argv[1], encoding="utf-8", newline="") as stream:
    rows = list(csv.DictReader(stream))
with open(sys.argv[2], "w", encoding="utf-8", newline="") as stream:
    out = csv.writer(stream)
    out.writerow(["text", "label"])
    for number, row in enumerate(rows):
        out.writerow([" ".join(rows[(number + k) % len(rows)]["text"] for k in range(12)), row["label"]])
PYTHON

# measure NAME WHO COMMAND...: adds a line of JSON with two more fields to the results.
measure() {
  local name=$1 who=$2 line
  shift 2
  printf 'bench: %s: %s\n' "$name" "$who" >&2
  line=$("$@" | tail -n 1)
  printf '%s\n' "$line" >&2
  printf '{"name": "%s", "who": "%s", "result": %s}\n' "$name" "$who" "$line" >>"$work/results"
}
both() { # both NAME FLAGS_OF_OURS FLAGS...
  local name=$1 extra=$2
  shift 2
  # shellcheck disable=SC2086 # none or one flag
  measure "$name" concord "$ours" --backbone "$CONCORD_MINILM" "$@" $extra
  measure "$name" python "$python" deploy/interop/bench_training.py --backbone "$CONCORD_MINILM" "$@"
}

for count in "${threads[@]}"; do
  both "step, equal work, $count thread(s)" "" --data "$work/long.csv" --rows "$rows" --max-length 64 \
    --layers all --mu 1 --alpha 0.01 --threads "$count"
  for task in spam movie-polarity gloss-pair; do
    both "epoch, cache and bucketing, $task, $count thread(s)" --cache --data "$work/tasks/$task/train.csv" --rows "$rows" \
      --max-length 128 --layers 4,5 --mu 1 --alpha 0.01 --threads "$count"
  done
done

python3 - "$work/results" <<'PYTHON'
import json, sys
rows = [json.loads(line) for line in open(sys.argv[1])]
print("\n| | Python | concord | concord, first epoch | Python / concord |\n|---|---|---|---|---|")
for name in dict.fromkeys(row["name"] for row in rows):
    ours, theirs = (next(row["result"] for row in rows if (row["name"], row["who"]) == (name, who)) for who in ("concord", "python"))
    assert ours["rows"] == theirs["rows"] and ours["layers"] == theirs["layers"], name
    cell = lambda seconds: f"{seconds:.2f} s"
    print(f"| {name} | {cell(theirs['seconds_per_epoch'])} | {cell(ours['seconds_per_epoch'])} | {cell(ours['seconds_first_epoch'])} "
          f"| {theirs['seconds_per_epoch'] / ours['seconds_per_epoch']:.2f} |")
PYTHON

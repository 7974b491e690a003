#!/usr/bin/env bash
# A training step of the client against the same step in Python (torch and transformers), and an epoch with what only the
# client does: the frozen prefix cache and bucketing by length. Same backbone, adapters, rows and threads.
#
#   deploy/bench/training.sh              needs libtorch and the demo's data (`make libtorch data`); makes the venv of `make interop`
#   ROWS=192 EPOCHS=2 REPEATS=3           rows of an epoch; epochs of a run, of which the fastest counts; runs, of which the median counts
#   TASKS="spam movie-polarity"           of the demo's: long texts (most are cut at 128 tokens) and short ones
#   LAYERS="4,5 all" THREADS=1            layers with adapters; threads of libtorch, each number in turn
#
# Equal work: consecutive rows in batches of 32, padded to the longest of each, nothing cached, all terms of FedMCP's loss. Both
# sides are checked to train on as many tokens, padding counted. Cached and bucketed: as in a silo, against the same Python.
# The three programs run in turn, REPEATS times over. About twelve minutes by a run that was stopped after nine, when everything is built.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

cache=${CONCORD_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/concord}
backbone=${CONCORD_MINILM:-$cache/backbones/all-minilm-l6-v2}
[[ -d $backbone ]] || { printf 'bench: error: there is no backbone in %s; run `make data`\n' "$backbone" >&2; exit 1; }
rows=${ROWS:-192} epochs=${EPOCHS:-2} repeats=${REPEATS:-3}
read -ra tasks <<<"${TASKS:-spam movie-polarity}"
read -ra places <<<"${LAYERS:-4,5 all}"
read -ra threads <<<"${THREADS:-1}"
python=$(deploy/interop/venv.sh)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

printf 'bench: building the example training_speed\n' >&2
"${CARGO:-cargo}" build --quiet --release --locked -p concord-learning --example training_speed
ours=${CARGO_TARGET_DIR:-target}/release/examples/training_speed

# The epoch's rows are the first of the file.
python3 deploy/demo/tasks.py --out "$work/tasks" --tasks "$(IFS=,; printf '%s' "${tasks[*]}")" --train "$rows" >&2

# measure WHO TASK LAYERS THREADS COMMAND...: adds the last line of the output, an object of JSON, to the results.
measure() {
  local who=$1 task=$2 layers=$3 count=$4 line
  shift 4
  line=$("$@" --backbone "$backbone" --data "$work/tasks/$task/train.csv" --rows "$rows" --epochs "$epochs" \
    --mu 1 --alpha 0.01 --layers "$layers" --threads "$count" | tail -n 1)
  printf 'bench: %s, layers %s, %s thread(s), %s: %s\n' "$task" "$layers" "$count" "$who" "$line" >&2
  printf '{"who": "%s", "case": ["%s", "%s", "%s"], "result": %s}\n' "$who" "$task" "$layers" "$count" "$line" >>"$work/results"
}

for ((repeat = 0; repeat < repeats; repeat++)); do
  for count in "${threads[@]}"; do
    for task in "${tasks[@]}"; do
      for layers in "${places[@]}"; do
        measure python "$task" "$layers" "$count" "$python" deploy/interop/bench_training.py
        measure equal "$task" "$layers" "$count" "$ours" --work equal
        measure usual "$task" "$layers" "$count" "$ours" --work usual
      done
    done
  done
done

printf '\nload average at the end: %s\n' "$(cut -d ' ' -f 1-3 /proc/loadavg)"
python3 - "$work/results" <<'PYTHON'
import json
import sys
from statistics import median

results = {}
with open(sys.argv[1], encoding="utf-8") as lines:
    for line in map(json.loads, lines):
        results.setdefault(tuple(line["case"]), {}).setdefault(line["who"], []).append(line["result"])

print("Examples a second (median of the runs), how many times Python's, and peak memory (the largest of the runs)\n")
print("| task | adapters in layers | threads | Python | equal work | cached and bucketed | first epoch, which fills the cache | Python | equal work | cached |")
print("|---|---|---|---|---|---|---|---|---|---|")
for (task, layers, threads), sides in results.items():
    python, equal, usual = (sides[who] for who in ("python", "equal", "usual"))
    for one in (*equal, *usual):
        assert (one["rows"], one["layers"]) == (python[0]["rows"], python[0]["layers"]), "the sides did not train on the same rows and layers"
    for one in equal:
        assert (one["steps"], one["padded_tokens"]) == (python[0]["steps"], python[0]["padded_tokens"]), "the work was not equal"
    base = median(one["examples_per_second"] for one in python)

    def speed(values):
        value = median(values)
        return f"{value:.1f} ({value / base:.2f}x)"

    def memory(side):
        return f"{max(one['peak_rss_mb'] for one in side):.0f} MB"

    cells = [
        task,
        layers,
        threads,
        f"{base:.1f}",
        speed(one["examples_per_second"] for one in equal),
        speed(one["examples_per_second"] for one in usual),
        speed(one["rows"] / one["first_epoch_seconds"] for one in usual),
        *map(memory, (python, equal, usual)),
    ]
    print("| " + " | ".join(cells) + " |")
PYTHON

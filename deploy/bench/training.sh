#!/usr/bin/env bash
# A training step of the client against the same step in Python (torch and transformers), and an epoch with what only the
# client does: the frozen prefix cache and bucketing by length. Same backbone, adapters, rows and threads.
#
#   deploy/bench/training.sh              needs libtorch and the demo's data (`make libtorch data`); makes the venv of `make interop`
#   ROWS=256 EPOCHS=2 REPEATS=3           rows of an epoch; epochs of a run, of which the fastest counts; runs, of which the median counts
#   TASKS="spam movie-polarity"           of the demo's: long texts (most are cut at 128 tokens) and short ones
#   LAYERS="4,5 all" THREADS=1            layers with adapters; threads of libtorch, each number in turn
#   CACHE=                                memory for the cache, such as "256 MiB"; what a silo has by default if it is empty
#
# Equal work: consecutive rows in batches of 32, padded to the longest of each, nothing cached, all terms of FedMCP's loss. Both
# sides are checked to train on as many tokens, padding counted. Cached and bucketed: as in a silo, against the same Python, with what
# does not fit in the cache's memory in a folder (below target/bench, removed at the end), as the client's unit has it, and without one:
# then the rest is computed anew in every epoch. Of 256 long rows, which take 100 MB, memory alone holds two thirds.
# The four programs run in turn, REPEATS times over. About a quarter of an hour, by the speed of earlier runs, when everything is built.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

cache=${CONCORD_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/concord}
backbone=${CONCORD_MINILM:-$cache/backbones/all-minilm-l6-v2}
[[ -d $backbone ]] || { printf 'bench: error: there is no backbone in %s; run `make data`\n' "$backbone" >&2; exit 1; }
rows=${ROWS:-256} epochs=${EPOCHS:-2} repeats=${REPEATS:-3}
read -ra tasks <<<"${TASKS:-spam movie-polarity}"
read -ra places <<<"${LAYERS:-4,5 all}"
read -ra threads <<<"${THREADS:-1}"
python=$(deploy/interop/venv.sh)
target=${CARGO_TARGET_DIR:-target}
mkdir -p "$target/bench"
# Below the target folder and not in /tmp, which may be memory.
work=$(mktemp -d "$target/bench/training-XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir "$work/cache"

printf 'bench: building the example training_speed\n' >&2
"${CARGO:-cargo}" build --quiet --release --locked -p concord-learning --example training_speed
ours=$target/release/examples/training_speed

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
        measure folder "$task" "$layers" "$count" "$ours" --work usual --cache "${CACHE:-}" --cache-folder "$work/cache"
        measure memory "$task" "$layers" "$count" "$ours" --work usual --cache "${CACHE:-}"
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


def table(title, columns, row):
    print(f"\n{title}\n")
    print(f"| task | adapters in layers | threads | {' | '.join(columns)} |")
    print("|---" * (3 + len(columns)) + "|")
    for case, sides in results.items():
        print(f"| {' | '.join([*case, *row(sides)])} |")


def speeds(sides):
    base = median(one["examples_per_second"] for one in sides["python"])

    def against(values):
        value = median(values)
        return f"{value:.1f} ({value / base:.2f}x)"

    later = [against(one["examples_per_second"] for one in sides[who]) for who in ("equal", "folder", "memory")]
    return [f"{base:.1f}", *later, against(one["rows"] / one["first_epoch_seconds"] for one in sides["folder"])]


def memories(sides):
    return [f"{max(one['peak_rss_mb'] for one in sides[who]):.0f} MB" for who in ("python", "equal", "folder", "memory")]


def origins(sides):
    return ["{}, {}, {}".format(*sides[who][0]["rows_of_last_epoch"]) for who in ("folder", "memory")]


for sides in results.values():
    first = sides["python"][0]
    for one in (*sides["equal"], *sides["folder"], *sides["memory"]):
        assert (one["rows"], one["layers"]) == (first["rows"], first["layers"]), "the sides did not train on the same rows and layers"
    for one in sides["equal"]:
        assert (one["steps"], one["padded_tokens"]) == (first["steps"], first["padded_tokens"]), "the work was not equal"

cached = ["cached in memory and folder", "cached in memory alone"]
table(
    "Examples a second (median of the runs), and how many times Python's",
    ["Python", "equal work", *cached, "first epoch, which fills memory and folder"],
    speeds,
)
table("Peak memory of the process (the largest of the runs)", ["Python", "equal work", *cached], memories)
table("Rows of an epoch from memory, from disk, computed", cached, origins)
PYTHON

#!/usr/bin/env python3
"""Runs the experiment of docs/experiments.md: selection on validation rows, then every arm with every seed, then the verdict.

    run.py [--quick | --scopes | --mu] [--out DIR] [--publish]

writes `<out>/results.json`, `<out>/results.md` and plots. `--publish` also puts them into docs/experiments.md and
docs/experiments/. `--scopes` compares layers and rounds instead, `--mu` strengths of the contrastive term, both on validation
rows. What an interrupted run has finished is used again; delete the folder to begin anew.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parent.parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE.parent / "demo"))

import page  # noqa: E402
from arms import ARMS, COMPARISONS, Comparison  # noqa: E402
from fetch import cache_folder  # noqa: E402
from runs import BACKBONE, FULL, QUICK, Bench, Run  # noqa: E402

TASKS = ("spam", "tweet-sentiment", "movie-polarity", "plot-vs-review", "supersense", "amazon-sentiment")


def validation_score(result: dict) -> float:
    """Mean over silos of the best personal model's validation accuracy."""
    return fmean(silo["best_validation"]["accuracy"] for silo in result["silos"])


def select(bench: Bench) -> dict[str, dict]:
    """Chooses each arm's setting on validation rows."""
    seed = bench.sizes.selection_seed
    bench.tasks(seed, TASKS)
    runs = [Run(arm.name, setting, seed) for arm in ARMS if len(arm.grid) > 1 for setting in arm.grid]
    results = bench.run_all(runs, "selection")
    chosen: dict[str, dict] = {}
    for arm in ARMS:
        scores = [
            {"setting": index, "label": run.setting.label(), "validation": validation_score(results[run])}
            for index, run in enumerate(Run(arm.name, setting, seed) for setting in arm.grid)
            if run in results
        ]
        best = max(scores, key=lambda row: (row["validation"], -row["setting"]), default={"setting": 0})
        chosen[arm.name] = {"setting": best["setting"], "grid": scores}
    return chosen


def measure(bench: Bench, chosen: dict[str, dict]) -> list[dict]:
    """Every arm with its setting and every seed."""
    for seed in bench.sizes.seeds:
        bench.tasks(seed, TASKS)
    runs = [
        Run(arm.name, arm.grid[chosen[arm.name]["setting"]], seed) for seed in bench.sizes.seeds for arm in ARMS
    ]
    results = bench.run_all(runs, "measured")
    rows = []
    for run in runs:
        result = results[run]
        for silo in result["silos"]:
            rows.append(
                {
                    "arm": run.arm,
                    "seed": run.seed,
                    "task": silo["silo_id"],
                    "majority": silo["majority"],
                    "best": silo["best_test"],
                    "last": silo["last_test"],
                    "validation": [
                        [entry["round"], entry["metrics"]["accuracy"]]
                        for entry in result["metrics"]
                        if entry["silo_id"] == silo["silo_id"] and entry["point"] == "after_aggregation"
                    ],
                    "similarities": [
                        [entry["round"], entry["metrics"].get("cka_pull"), entry["metrics"].get("cka_push")]
                        for entry in result["metrics"]
                        if entry["silo_id"] == silo["silo_id"] and entry["point"] == "training"
                    ],
                }
            )
    return rows


def compare(bench: Bench, comparison: Comparison) -> list[dict[str, float]]:
    """Every case of a comparison with the selection's seed: validation scores by arm."""
    seed = bench.sizes.selection_seed
    bench.tasks(seed, TASKS)
    cases = [{arm: Run(arm, setting, seed) for arm, setting in by_arm.items()} for _, by_arm in comparison.cases]
    # Local may be the same in several cases: it is run once.
    runs = list(dict.fromkeys(run for by_arm in cases for run in by_arm.values()))
    results = bench.run_all(runs, comparison.name)
    return [{arm: validation_score(results[run]) for arm, run in by_arm.items()} for by_arm in cases]


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--quick", action="store_true", help="the same path in minutes; says nothing about the claim")
    for one in COMPARISONS:
        text = f"compares {one.what}, on validation rows"
        kind.add_argument(f"--{one.name}", dest="comparison", action="store_const", const=one, help=text)
    parser.add_argument("--out", type=Path, help="folder for runs and results (default: target/experiment)")
    parser.add_argument("--publish", action="store_true", help="put the results into docs/")
    options = parser.parse_args()
    if options.quick and options.publish:
        parser.error("a quick run is not published")
    target = Path(os.environ.get("CARGO_TARGET_DIR") or CHECKOUT / "target")
    program = target / "release" / "concord-client"
    if not program.exists():
        print(f"{program} is missing; run `make experiment`", file=sys.stderr)
        return 1
    out = options.out or CHECKOUT / "target" / ("experiment-quick" if options.quick else "experiment")
    out.mkdir(parents=True, exist_ok=True)
    bench = Bench(program, cache_folder() / "backbones" / BACKBONE, out, QUICK if options.quick else FULL)
    try:
        if comparison := options.comparison:
            table = page.comparison_table(comparison, compare(bench, comparison))
            (out / f"{comparison.name}.md").write_text(table, encoding="utf-8")
            if options.publish:
                page.publish_comparison(comparison, table, CHECKOUT / "docs")
            print(table)
            return 0
        chosen = select(bench)
        rows = measure(bench, chosen)
    except (RuntimeError, subprocess.CalledProcessError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    results = {"sizes": vars(bench.sizes), "chosen": chosen, "rows": rows, "quick": options.quick}
    (out / "results.json").write_text(json.dumps(results, indent=1))
    report = page.write(results, out)
    if options.publish:
        page.publish(results, CHECKOUT / "docs")
    print(report)
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Runs the ArtAug demo on several seeds and says whether the differential step helped; `make artaug-seeds` calls it.

The seeds are independent runs: other prompts, images and weights of the LoRAs. Of each, the last iteration that was evaluated with
all arms counts; a seed that stops before it has one counts with no gain of the enhanced model and of the plain LoRA: its result is the base.
The rule was written before the first run and stands in docs/artaug.md. A seed that has run is not run again as long as its folder is
there, and its job, base model and worker program are the same.

    seeds.py [--out target/artaug-seeds] [--programs target/release] [--seeds 1,2,3,4,5]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Mapping, Optional, Sequence

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import demo  # noqa: E402

# Two-sided 95 % quantiles of Student's t with 1, 2, ... degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def win_rate(arm: Mapping[str, Any]) -> float:
    """Share of the held-out prompts on which the arm beats the base; half of the ties count."""
    wins = arm["wins"]
    return (wins["wins"] + wins["ties"] / 2) / (wins["wins"] + wins["ties"] + wins["losses"])


def counted(metrics: str) -> dict[str, Any]:
    """Of a metrics.jsonl the last iteration with all arms; of one without any the last, with the base's figures for both models that are trained."""
    rows = [json.loads(row) for row in metrics.splitlines()]
    for row in reversed(rows):
        # One that the time ran out for has no plain LoRA beside its enhanced model.
        if all(arm in row["arms"] for arm, _ in demo.ARMS):
            return row
    arms = rows[-1]["arms"]
    untrained = {arm: arms["base"] for arm, _ in demo.ARMS}
    return {**rows[-1], "iteration": 0, "arms": {**untrained, "rewriting": arms.get("rewriting", arms["base"])}}


def mean_and_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and Student's 95 % interval of independent values; ValueError for fewer than two or more than ten."""
    if not 2 <= len(values) <= len(STUDENT) + 1:
        raise ValueError(f"an interval needs 2 to {len(STUDENT) + 1} seeds, not {len(values)}")
    mean = fmean(values)
    reach = STUDENT[len(values) - 2] * stdev(values) / math.sqrt(len(values))
    return mean, mean - reach, mean + reach


def verdict(name: str, low: float, high: float) -> str:
    """What the rule says of an interval of (enhanced - control)."""
    if low > 0.0:
        return f"the enhanced model is better than {name}"
    if high < 0.0:
        return f"the enhanced model is worse than {name}"
    return f"no difference to {name} is shown"


def table(by_seed: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """Gain and win rate of every arm by seed, their means, and the paired differences."""
    arms = [(arm, title) for arm, title in demo.ARMS if arm != "base"]
    lines = ["seed  iteration  " + "  ".join(f"{title:>24}" for _, title in arms)]
    lines.append("─" * len(lines[0]))
    for seed, last in sorted(by_seed.items()):
        cells = (f"{last['arms'][arm]['gain']['mean']:+.3f}, {100 * win_rate(last['arms'][arm]):.0f} %" for arm, _ in arms)
        lines.append(f"{seed:>4}  {last['iteration']:>9}  " + "  ".join(f"{cell:>24}" for cell in cells))
    gains = {arm: [last["arms"][arm]["gain"]["mean"] for _, last in sorted(by_seed.items())] for arm, _ in arms}
    rates = {arm: [win_rate(last["arms"][arm]) for _, last in sorted(by_seed.items())] for arm, _ in arms}
    cells = (f"{fmean(gains[arm]):+.3f}, {100 * fmean(rates[arm]):.0f} %" for arm, _ in arms)
    lines.append("mean             " + "  ".join(f"{cell:>24}" for cell in cells))
    for arm, title in arms:
        if arm == "enhanced":
            continue
        mean, low, high = mean_and_interval([ours - theirs for ours, theirs in zip(gains["enhanced"], gains[arm])])
        lines.append(f"gain of enhanced less that of {title}: {mean:+.3f} ({low:+.3f} to {high:+.3f}): {verdict(title, low, high)}")
    return lines


def fingerprint(settings: demo.Settings, programs: Path) -> str:
    """The job, and SHA-256 of what its figures depend on besides: the files of base and image-text model, and the worker program."""
    files = [path for folder in ("base", "image-text") for path in sorted((HERE / folder).rglob("*")) if path.is_file()]
    lines = (f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}" for path in [*files, programs / "concord-artaug"])
    return "\n".join([demo.job_spec(settings), *lines, ""])


def run_seed(settings: demo.Settings, programs: Path, out: Path) -> dict[str, Any]:
    """What counts of one seed, run if it has not been."""
    mark, metrics = out / "run.txt", out / "results" / "metrics.jsonl"
    wanted = fingerprint(settings, programs)
    if not (mark.is_file() and mark.read_text(encoding="utf-8") == wanted and metrics.is_file()):
        print(f"seed {settings.seed}", flush=True)
        mark.unlink(missing_ok=True)
        code = demo.main(["--out", str(out), "--programs", str(programs), "--seed", str(settings.seed)])
        if code != 0:
            raise SystemExit(code)
        mark.write_text(wanted, encoding="utf-8")
    return counted(metrics.read_text(encoding="utf-8"))


def main(arguments: Optional[list[str]] = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Run the ArtAug demo on several seeds and compare its arms.")
    parser.add_argument("--out", type=Path, default=demo.CHECKOUT / "target" / "artaug-seeds", metavar="DIR", help="default: target/artaug-seeds")
    parser.add_argument("--programs", type=Path, default=demo.cli.program_folder(demo.CHECKOUT), metavar="DIR", help="default: target/release")
    parser.add_argument("--seeds", default="1,2,3,4,5", metavar="LIST", help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        seeds = sorted({int(seed) for seed in options.seeds.split(",")})
    except ValueError:
        parser.error(f"--seeds: {options.seeds!r} is not a list of whole numbers such as 1,2,3")
    if not 2 <= len(seeds) <= len(STUDENT) + 1 or seeds[0] < 0:
        parser.error(f"--seeds: 2 to {len(STUDENT) + 1} different seeds, none below 0")
    if not (options.programs / "concord-artaug").is_file():
        print(f"artaug-seeds: error: {options.programs / 'concord-artaug'} is not built; run `make artaug-seeds`", file=sys.stderr)
        return 1
    by_seed = {seed: run_seed(demo.Settings(seed=seed), options.programs, options.out / f"seed-{seed}") for seed in seeds}
    print("\n".join(table(by_seed)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

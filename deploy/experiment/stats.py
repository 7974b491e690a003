"""The arithmetic of the verdict: paired differences, bootstrap intervals, and the rule of docs/experiments.md."""

from __future__ import annotations

import random
from statistics import fmean
from typing import Mapping, Sequence

CLAIM_POINTS = 1.5
DRAWS = 10_000


def paired_differences(ours: Mapping[tuple[str, int], float], theirs: Mapping[tuple[str, int], float]) -> dict[str, list[float]]:
    """Differences in points, by task, one for each seed. Both maps are keyed by (task, seed) and must have the same keys."""
    if ours.keys() != theirs.keys():
        raise ValueError(f"not paired: {sorted(ours.keys() ^ theirs.keys())}")
    by_task: dict[str, list[float]] = {}
    for (task, seed) in sorted(ours):
        by_task.setdefault(task, []).append(100.0 * (ours[task, seed] - theirs[task, seed]))
    return by_task


def mean_of(by_task: Mapping[str, Sequence[float]]) -> float:
    """Mean over tasks of the mean over seeds."""
    return fmean(fmean(values) for values in by_task.values())


def bootstrap_interval(by_task: Mapping[str, Sequence[float]], seed: int = 0, draws: int = DRAWS) -> tuple[float, float]:
    """95 % percentile interval of the mean; resamples tasks and, within a task, seeds."""
    rng = random.Random(seed)
    groups = [list(values) for _, values in sorted(by_task.items())]
    means = sorted(
        fmean(fmean(rng.choices(group, k=len(group))) for group in rng.choices(groups, k=len(groups))) for _ in range(draws)
    )
    return means[int(0.025 * draws)], means[min(int(0.975 * draws), draws - 1)]


def verdict(mean: float, low: float, high: float) -> str:
    """The row of the verdict table that applies."""
    if low > 0.0:
        if mean >= CLAIM_POINTS:
            return "the claim holds here"
        return "better than the best baseline, by less than claimed"
    if high < 0.0:
        return "worse than the best baseline"
    return "no difference shown"

"""Turns an experiment's results into Markdown and plots."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import fmean

import stats
import svg
from arms import ARMS, Comparison

ADMISSION = 0.02
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
OURS, ABLATION, ALONE = "fedmcp", "fedmcp-mu0", "local"


class Results:
    """Results with the look-ups that the page needs."""

    def __init__(self, results: dict) -> None:
        self.raw = results
        self.rows = results["rows"]
        self.all_tasks = sorted({row["task"] for row in self.rows})
        self.majority = {task: fmean(row["majority"] for row in self.rows if row["task"] == task) for task in self.all_tasks}
        self.tasks = [
            task for task in self.all_tasks if self.mean("local", task) >= self.majority[task] + ADMISSION
        ]

    def cells(self, arm: str, model: str = "best", metric: str = "accuracy") -> dict[tuple[str, int], float]:
        """A metric of an arm by (task, seed), admitted tasks only."""
        return {
            (row["task"], row["seed"]): row[model][metric]
            for row in self.rows
            if row["arm"] == arm and row["task"] in self.tasks
        }

    def mean(self, arm: str, task: str, model: str = "best", metric: str = "accuracy") -> float:
        """Mean over seeds."""
        return fmean(row[model][metric] for row in self.rows if row["arm"] == arm and row["task"] == task)

    def score(self, arm: str, model: str = "best", metric: str = "accuracy") -> float:
        """Mean over admitted tasks and seeds."""
        return fmean(self.cells(arm, model, metric).values())

    def best_baseline(self) -> str:
        """The baseline with the highest score on the test split."""
        return max((arm.name for arm in ARMS if arm.baseline), key=self.score)

    def compared(self, other: str) -> tuple[dict[str, list[float]], float, float, float]:
        """FedMCP against another arm: differences by task, their mean and its interval."""
        by_task = stats.paired_differences(self.cells(OURS), self.cells(other))
        low, high = stats.bootstrap_interval(by_task)
        return by_task, stats.mean_of(by_task), low, high


def title(arm: str) -> str:
    """An arm's title."""
    return next(entry.title for entry in ARMS if entry.name == arm)


def percent(value: float) -> str:
    """0.853 as "85.3"."""
    return f"{100 * value:.1f}"


def score_table(results: Results) -> str:
    """Accuracy per arm and task."""
    head = ["arm", *results.all_tasks, "mean", "last round", "macro-F1", "MCC"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    lines.append(
        f"| majority class | {' | '.join(percent(results.majority[task]) for task in results.all_tasks)} | "
        f"{percent(fmean(results.majority[task] for task in results.tasks))} | | | |"
    )
    for arm in ARMS:
        cells = [percent(results.mean(arm.name, task)) for task in results.all_tasks]
        cells += [percent(results.score(arm.name)), percent(results.score(arm.name, "last"))]
        cells += [percent(results.score(arm.name, "best", metric)) for metric in ("macro_f1", "mcc")]
        lines.append(f"| {arm.title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def selection_table(results: Results) -> str:
    """What the grids gave, on validation rows."""
    lines = ["| arm | setting | validation accuracy | chosen |", "|---|---|---|---|"]
    for arm in ARMS:
        chosen = results.raw["chosen"][arm.name]
        for entry in chosen["grid"]:
            mark = "yes" if entry["setting"] == chosen["setting"] else ""
            lines.append(f"| {arm.title} | {entry['label']} | {percent(entry['validation'])} | {mark} |")
    return "\n".join(lines)


def verdict_lines(results: Results) -> str:
    """The comparisons and the rule's answer."""
    lines = ["| FedMCP against | mean difference | 95 % interval | verdict |", "|---|---|---|---|"]
    best = results.best_baseline()
    for arm in ARMS:
        if arm.name == OURS:
            continue
        _, mean, low, high = results.compared(arm.name)
        rule = ""
        if arm.name == best:
            rule = f"**{stats.verdict(mean, low, high)}**"
        elif arm.name == ABLATION:
            answer = stats.verdict(mean, low, high)
            rule = answer.replace("the claim holds here", "better by 1.5 points or more").replace("the best baseline", "without the term")
        name = f"{arm.title} (best baseline)" if arm.name == best else arm.title
        lines.append(f"| {name} | {mean:+.2f} | {low:+.2f} to {high:+.2f} | {rule} |")
    return "\n".join(lines)


def similarity_line(results: Results) -> str:
    """What the contrastive term saw."""
    first, last = defaultdict(list), defaultdict(list)
    for row in results.rows:
        if row["arm"] != OURS or not row["similarities"]:
            continue
        for into, entry in ((first, row["similarities"][0]), (last, row["similarities"][-1])):
            into["pull"].append(entry[1])
            into["push"].append(entry[2])
    if not first["pull"]:
        return ""
    return (
        f"Similarities that the contrastive term saw (mean over silos and seeds): s+ {fmean(first['pull']):.2f} and "
        f"s- {fmean(first['push']):.2f} in the first round, s+ {fmean(last['pull']):.2f} and s- {fmean(last['push']):.2f} in the last."
    )


def plots(results: Results) -> dict[str, str]:
    """SVG files by name."""
    rows = []
    for arm in ARMS:
        if arm.name == OURS:
            continue
        _, mean, low, high = results.compared(arm.name)
        colour = "c0" if arm.baseline else "c2"
        rows.append(svg.DotRow(arm.title, (svg.Mark(mean / 100, low / 100, high / 100, colour),), note=f"{mean:+.2f}"))
    files = {
        "differences.svg": svg.dot_plot(
            rows,
            title="FedMCP minus the other, points of accuracy",
            x_label="difference in points, with 95 % interval",
            reference=svg.Reference("no difference", 0.0),
        )
    }
    colours = {"local": "plain", "fedavg": "c1", ABLATION: "c2", OURS: "c0"}
    for task in results.all_tasks:
        series = []
        for arm, colour in colours.items():
            by_round = defaultdict(list)
            for row in results.rows:
                if row["arm"] == arm and row["task"] == task:
                    for number, accuracy in row["validation"]:
                        by_round[number].append(accuracy)
            xs = sorted(by_round)
            if xs:
                series.append(svg.Series(title(arm).split(",")[0] if arm != ABLATION else "mu = 0", xs, [fmean(by_round[x]) for x in xs], colour=colour))
        if series:
            files[f"{task}.svg"] = svg.line_plot(series, title=task, subtitle="validation accuracy, mean over seeds")
    return files


def markdown(results: Results, pictures: str) -> str:
    """The results as Markdown; `pictures` is the path of the plots' folder as seen from the page."""
    sizes = results.raw["sizes"]
    dropped = [task for task in results.all_tasks if task not in results.tasks]
    parts = []
    if results.raw["quick"]:
        parts.append("**A quick run: it shows that the path works and says nothing about the claim.**")
    parts += [
        f"{sizes['train']} training, {sizes['validation']} validation and at most {sizes['test']} test rows a silo, "
        f"{sizes['rounds']} rounds, seeds {', '.join(map(str, sizes['seeds']))}; selection with seed {sizes['selection_seed']}.",
        f"Not admitted: {', '.join(dropped)}." if dropped else "All tasks were admitted.",
        "### Verdict",
        verdict_lines(results),
        f"![FedMCP minus each other arm, with intervals]({pictures}differences.svg)",
        "### Accuracy on the test split, mean over seeds, in percent",
        score_table(results),
        similarity_line(results),
        "### By round",
        "\n".join(f"![{task}: validation accuracy by round]({pictures}{task}.svg)" for task in results.all_tasks),
        "### Selection, on validation rows",
        selection_table(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def write_plots(results: Results, folder: Path) -> None:
    """Writes the plots as files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, plot in plots(results).items():
        (folder / name).write_text(svg.standalone(plot), encoding="utf-8")


def write(raw: dict, out: Path) -> str:
    """Writes `results.md` and the plots into a folder; returns the verdict's table."""
    results = Results(raw)
    write_plots(results, out)
    (out / "results.md").write_text(markdown(results, ""), encoding="utf-8")
    return verdict_lines(results)


def comparison_table(comparison: Comparison, scores: list[dict[str, float]]) -> str:
    """Validation accuracy of a comparison's cases by arm, in percent, as Markdown."""
    arms = list(scores[0])
    head = [*comparison.columns, *(title(arm).removesuffix(", bottleneck doubled") for arm in arms), "FedMCP minus Local"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for (case, _), by_arm in zip(comparison.cases, scores, strict=True):
        cells = [*case, *(percent(by_arm[arm]) for arm in arms), f"{100 * (by_arm[OURS] - by_arm[ALONE]):+.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def replace_between(page: Path, begin: str, end: str, body: str) -> None:
    """Puts `body` between two marks of a page."""
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{begin}\n\n{body}\n{end}{after}", encoding="utf-8")


def publish(raw: dict, docs: Path) -> None:
    """Puts the results between the marks of docs/experiments.md."""
    results = Results(raw)
    write_plots(results, docs / "experiments")
    replace_between(docs / "experiments.md", BEGIN, END, markdown(results, "experiments/"))


def publish_comparison(comparison: Comparison, table: str, docs: Path) -> None:
    """Puts a comparison's table between its marks of docs/experiments.md."""
    begin, end = (f"<!-- {comparison.name}: {mark} -->" for mark in ("begin", "end"))
    replace_between(docs / "experiments.md", begin, end, table)

#!/usr/bin/env python3
"""Turns the fetched sources into plain CSV files with fixed splits, one folder a task.

    tasks.py [--out DIR] [--tasks spam,supersense] [--train N] [--validation N] [--test N] [--seed S] [--cache DIR]

writes `<out>/<task>/{train,validation,test}.csv` with the columns `text,label` (or `text_a,text_b,label` for a pair
task; the label of a regression task is a float) and `<out>/tasks.json`, which says of each task:

    name, title          its folder, and a line of English
    kind                 "single" or "pair"
    problem              "classification" or "regression"
    classes              sorted labels; empty for regression
    rows                 rows written: {"train": n, "validation": n, "test": n}
    available            rows there were to choose from, the same way
    majority             share of the most common class in the test split; null for regression
    majority_validation  the same for the validation split
    licence, package     of the source
    files                sha256 of the three files

and at the top `seed` and `made_from`, a digest of everything the files depend on: these scripts, the pinned sources
and the options. A second run with the same digest and untouched files does nothing.

Which split a row belongs to depends on its source and its group (thread, movie, document, word) alone, never on
`--seed` or on the task: two tasks made from one source do not leak into each other. `--seed` and the three numbers
choose which rows of a split are written; 0 writes all. Every class has at least one training row.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import shutil
import signal
import sys
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterable, Iterator, Mapping, Optional

import sources
from fetch import RESOURCES, cache_folder, file_sha256
from sources import Row, stable_hash

SPLITS = ("train", "validation", "test")
# Upper bounds of the hash, in hundredths: 60 % of the groups train, 15 % validate, 25 % test.
BOUNDS = (60, 75, 100)


class TaskError(Exception):
    """A task that cannot be made; the text says why."""


@dataclass(frozen=True)
class Task:
    """What is fixed about a task. `source` names a resource of fetch.py."""

    name: str
    title: str
    source: str
    licence: str
    read: Callable[[Path], Iterator[Row]]
    kind: str = "single"
    problem: str = "classification"

    @property
    def columns(self) -> tuple[str, ...]:
        """The header of the CSV files."""
        return ("text", "label") if self.kind == "single" else ("text_a", "text_b", "label")


WORDNET = "WordNet licence (free, with notice)"
MOVIES = "Apache-2.0 package; review snippets for research use"
TASKS = (
    Task("spam", "E-mail: spam or ham", "spam", "PDDL-1.0 and CC0-1.0", sources.spam),
    Task("tweet-sentiment", "Tweets: sentiment, 3 classes", "vader", "MIT", sources.tweet_sentiment),
    Task("movie-polarity", "Movie reviews: fresh or rotten", "movies", MOVIES, sources.movie_polarity),
    Task("plot-vs-review", "Sentences: plot or review", "movies", MOVIES, sources.plot_vs_review),
    Task("supersense", "Noun definitions: 26 supersenses", "wordnet", WORDNET, sources.supersense),
    Task("gloss-pair", "Example and definition: same sense?", "wordnet", WORDNET, sources.gloss_pair, kind="pair"),
    Task("amazon-sentiment", "Product reviews: sentiment, 3 classes", "vader", "MIT", sources.amazon_sentiment),
    Task("nyt-sentiment", "Editorials: sentiment, 3 classes", "vader", "MIT", sources.nyt_sentiment),
    Task("tweet-rating", "Tweets: mean human rating", "vader", "MIT", sources.tweet_rating, problem="regression"),
)


def split_of(source: str, group: str) -> str:
    """The split of all rows of `group`."""
    place = stable_hash("split", source, group) % 100
    return next(split for split, bound in zip(SPLITS, BOUNDS) if place < bound)


def without_duplicates(rows: Iterable[Row], ratings: bool = False) -> list[Row]:
    """Keeps the first row of each key and drops empty texts.

    Where one key comes with several labels all its rows go, as nobody knows the right one; but `ratings` of the same
    text may differ, and the first one stays.
    """
    first: dict[str, Row] = {}
    labels: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        if all(row.texts):
            first.setdefault(row.key, row)
            labels[row.key].add(row.label)
    return [row for key, row in first.items() if ratings or len(labels[key]) == 1]


def splits_of(task: Task, rows: Iterable[Row]) -> dict[str, list[Row]]:
    """De-duplicated rows by split. No text of a pair's first column stands in two splits either."""
    splits: dict[str, list[Row]] = {split: [] for split in SPLITS}
    home: dict[str, str] = {}
    for row in without_duplicates(rows, ratings=task.problem == "regression"):
        split = split_of(task.source, row.group)
        if home.setdefault(sources.text_key(row.texts[0]), split) == split:
            splits[split].append(row)
    return splits


def sample(task: Task, rows: list[Row], count: int, seed: int, every_class: bool) -> list[Row]:
    """`count` rows (0: all) in an order that the seed fixes, with one of each class first if `every_class`."""
    ordered = sorted(rows, key=lambda row: (stable_hash("sample", str(seed), task.name, row.id), row.id))
    if count == 0 or count >= len(ordered):
        return ordered
    if not every_class:
        return ordered[:count]
    firsts: dict[str, Row] = {}
    for row in ordered:
        firsts.setdefault(row.label, row)
    if len(firsts) > count:
        raise TaskError(f"{task.name}: {count} training rows cannot hold its {len(firsts)} classes; ask for more")
    chosen = {row.id for row in firsts.values()}
    for row in ordered:
        if len(chosen) == count:
            break
        chosen.add(row.id)
    return [row for row in ordered if row.id in chosen]


def majority_share(rows: list[Row]) -> float:
    """The share of the most common label: the accuracy of always answering with it."""
    return round(Counter(row.label for row in rows).most_common(1)[0][1] / len(rows), 6)


def _package(task: Task) -> str:
    return str(next(resource for resource in RESOURCES if resource.name == task.source).packages[0])


def make_task(task: Task, rows: Iterable[Row], out: Path, counts: Mapping[str, int], seed: int) -> dict[str, object]:
    """Writes the folder of one task, whole or not at all, and returns its entry for tasks.json."""
    classification = task.problem == "classification"
    available = splits_of(task, rows)
    chosen = {
        split: sample(task, available[split], counts[split], seed, classification and split == "train")
        for split in SPLITS
    }
    for split in SPLITS:
        if not chosen[split]:
            raise TaskError(f"{task.name}: no rows for {split}")
    classes = sorted({row.label for row in chosen["train"]}) if classification else []
    unseen = {row.label for split in SPLITS for row in chosen[split]} - set(classes) if classification else set()
    if unseen:
        raise TaskError(f"{task.name}: no training row has the label {', '.join(sorted(unseen))}")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{task.name}.", dir=out) as temporary:
        made = Path(temporary) / task.name
        made.mkdir()
        for split in SPLITS:
            with open(made / f"{split}.csv", "w", encoding="utf-8", newline="") as stream:
                writer = csv.writer(stream, lineterminator="\n")
                writer.writerow(task.columns)
                writer.writerows((*row.texts, row.label) for row in chosen[split])
        files = {split: file_sha256(made / f"{split}.csv") for split in SPLITS}
        target = out / task.name
        if target.exists():
            target.rename(Path(temporary) / "replaced")
        made.rename(target)
    return {
        "name": task.name,
        "title": task.title,
        "kind": task.kind,
        "problem": task.problem,
        "classes": classes,
        "rows": {split: len(chosen[split]) for split in SPLITS},
        "available": {split: len(available[split]) for split in SPLITS},
        "majority": majority_share(chosen["test"]) if classification else None,
        "majority_validation": majority_share(chosen["validation"]) if classification else None,
        "licence": task.licence,
        "package": _package(task),
        "files": files,
    }


def digest_of(names: list[str], counts: Mapping[str, int], seed: int) -> str:
    """A digest of everything that the files of these tasks depend on."""
    here = Path(__file__).resolve().parent
    parts = [file_sha256(here / script) for script in ("tasks.py", "sources.py")]
    parts += [digest for resource in RESOURCES for digest in resource.files.values()]
    parts.append(json.dumps([sorted(names), dict(counts), seed], sort_keys=True))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def already_made(out: Path, digest: str) -> Optional[list[dict[str, object]]]:
    """The entries of `<out>/tasks.json` if it has this digest and every file is as it was written."""
    try:
        written = json.loads((out / "tasks.json").read_text(encoding="utf-8"))
        if written["made_from"] != digest:
            return None
        for entry in written["tasks"]:
            for split, expected in entry["files"].items():
                if file_sha256(out / entry["name"] / f"{split}.csv") != expected:
                    return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return written["tasks"]


def make_tasks(names: list[str], cache: Path, out: Path, counts: Mapping[str, int], seed: int) -> list[dict[str, object]]:
    """Makes the named tasks and `<out>/tasks.json`, unless they stand there already; says a line on each."""
    digest = digest_of(names, counts, seed)
    entries = already_made(out, digest)
    if entries is not None:
        print(f"tasks: {len(entries)} tasks already there: {out}", flush=True)
        return entries
    (out / "tasks.json").unlink(missing_ok=True)  # until all files are new, none is vouched for
    folders = {resource.name: cache / resource.folder for resource in RESOURCES}
    entries = []
    for task in TASKS:
        if task.name not in names:
            continue
        folder = folders[task.source]
        if not folder.is_dir():
            raise TaskError(f"{task.name}: {folder} is missing; run fetch.py first")
        entry = make_task(task, task.read(folder), out, counts, seed)
        rows = " ".join(f"{split} {count}" for split, count in entry["rows"].items())
        share = "" if entry["majority"] is None else f", majority class {entry['majority']:.3f}"
        print(f"tasks: {task.name}: {rows}{share}", flush=True)
        entries.append(entry)
    text = json.dumps({"seed": seed, "made_from": digest, "tasks": entries}, indent=2, ensure_ascii=False) + "\n"
    partial = out / ".tasks.json.partial"
    partial.write_text(text, encoding="utf-8")
    partial.replace(out / "tasks.json")
    return entries


def main(arguments: Optional[list[str]] = None) -> int:
    """Command line; returns the exit code."""
    names = [task.name for task in TASKS]
    parser = argparse.ArgumentParser(description="Turn the fetched sources into CSV files with fixed splits.")
    parser.add_argument("--out", metavar="DIR", default="target/demo/tasks", help="default: %(default)s")
    parser.add_argument("--tasks", metavar="NAMES", help=f"comma-separated part of: {','.join(names)}")
    parser.add_argument("--train", type=int, default=1000, metavar="N", help="training rows, 0 for all (%(default)s)")
    parser.add_argument("--validation", type=int, default=250, metavar="N", help="validation rows (%(default)s)")
    parser.add_argument("--test", type=int, default=1000, metavar="N", help="test rows (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="which rows are sampled (%(default)s)")
    parser.add_argument("--cache", metavar="DIR", help="cache folder (default: $CONCORD_CACHE or ~/.cache/concord)")
    options = parser.parse_args(arguments)
    wanted = options.tasks.split(",") if options.tasks else names
    unknown = sorted(set(wanted) - set(names))
    if unknown:
        parser.error(f"unknown task: {', '.join(unknown)}; known: {', '.join(names)}")
    counts = {"train": options.train, "validation": options.validation, "test": options.test}
    if min(counts.values()) < 0:
        parser.error("a number of rows cannot be negative")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        make_tasks(wanted, cache_folder(options.cache), Path(options.out), counts, options.seed)
    except (TaskError, OSError) as error:
        print(f"tasks: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("tasks: stopped; nothing half-made was left", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

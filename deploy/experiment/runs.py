"""One measured run: a specification, `concord-client simulate`, and what came out. Runs are kept, so that an interrupted
experiment goes on where it was; one of another program or of other rows is run again."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Iterable, Mapping

from arms import BOTTLENECK, Setting
from fetch import file_sha256

HERE = Path(__file__).resolve().parent
BACKBONE = "all-minilm-l6-v2"
# Most runs of one process: enough to pay for the frozen layers, few enough to lose little when interrupted.
BATCH = 5
# Memory for what lies below the adapters, of all silos of a process together: enough for all rows. It changes no result.
CACHE = "1 GiB"


@dataclass(frozen=True)
class Sizes:
    """How much is run."""

    train: int
    validation: int
    test: int
    rounds: int
    seeds: tuple[int, ...]
    selection_seed: int
    jobs: int


FULL = Sizes(train=384, validation=150, test=400, rounds=6, seeds=(1, 2, 3), selection_seed=100, jobs=2)
QUICK = Sizes(train=64, validation=50, test=100, rounds=2, seeds=(1,), selection_seed=100, jobs=2)


@dataclass(frozen=True)
class Run:
    """An arm's setting with a seed."""

    arm: str
    setting: Setting
    seed: int

    def name(self) -> str:
        """A file name."""
        label = "".join(c if c.isalnum() or c in ".-" else "-" for c in self.setting.label())
        return f"{self.arm}--{label}--seed-{self.seed}"

    def __hash__(self) -> int:
        return hash(self.name())


def toml_value(value: object) -> str:
    """A value as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(toml_value(item) for item in value)}]"
    return json.dumps(value)


def specification(run: Run, sizes: Sizes) -> str:
    """The job of a run."""
    tables: list[tuple[str, Mapping[str, object]]] = [
        (
            "",
            {
                "kind": "federated-training",
                "name": run.arm,
                "task": "experiment",
                "seed": run.seed,
            },
        ),
        ("backbone", {"name": BACKBONE, "hidden": 384, "layers": 6}),
        ("adapter", {"bottleneck": BOTTLENECK, "layers": (4, 5), **run.setting.adapter}),
        ("head", {**run.setting.head}),
        ("algorithm", run.setting.algorithm),
        ("training", {"batch_size": 16, "learning_rate": 1e-3, "head_learning_rate": 1e-3, "max_length": 64}),
        ("rounds", {"count": sizes.rounds, "min_silos": 2, "weighting": "uniform", **run.setting.rounds}),
    ]
    lines = []
    for header, values in tables:
        if header:
            lines.append(f"\n[{header}]")
        lines += [f"{key} = {toml_value(value)}" for key, value in values.items()]
    return "\n".join(lines) + "\n"


class Bench:
    """Where runs happen."""

    def __init__(self, program: Path, backbone: Path, folder: Path, sizes: Sizes) -> None:
        self.program, self.backbone, self.folder, self.sizes = program, backbone, folder, sizes

    def tasks(self, seed: int, names: Iterable[str]) -> Path:
        """The tasks' rows for a seed."""
        out = self.folder / f"tasks-{seed}"
        command = [sys.executable, str(HERE.parent / "demo" / "tasks.py"), "--out", str(out), "--seed", str(seed)]
        command += ["--tasks", ",".join(names)]
        for split in ("train", "validation", "test"):
            command += [f"--{split}", str(getattr(self.sizes, split))]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return out

    def fingerprint(self, seed: int) -> str:
        """What the runs of a seed depend on besides their specifications: the program, the rows, and how much is run."""
        folder, rows = self.folder / f"tasks-{seed}", hashlib.sha256()
        for path in sorted(folder.rglob("*.csv")):
            rows.update(f"{file_sha256(path)}  {path.relative_to(folder)}\n".encode())
        parts = {"program": file_sha256(self.program), "rows": rows.hexdigest(), "sizes": asdict(self.sizes)}
        return json.dumps(parts) + "\n"

    def kept(self, run: Run, fingerprint: str) -> dict | None:
        """What an earlier, equal run has left."""
        result = self.folder / f"{run.name()}.json"
        equal = {"toml": specification(run, self.sizes), "fingerprint": fingerprint}
        for kind, text in equal.items():
            beside = self.folder / f"{run.name()}.{kind}"
            if not beside.exists() or beside.read_text() != text:
                return None
        return json.loads(result.read_text()) if result.exists() else None

    def run(self, runs: list[Run]) -> list[dict]:
        """Runs several with the same seed in one process, which computes the frozen layers only once."""
        name, fingerprint = runs[0].name(), self.fingerprint(runs[0].seed)
        unfinished = self.folder / f"{name}.unfinished"
        command = [str(self.program), "simulate", "--silos", str(self.folder / f"tasks-{runs[0].seed}")]
        command += ["--backbone", f"{BACKBONE}={self.backbone}", "--threads", "1", "--cache", CACHE]
        command += ["--out", str(unfinished)]
        for run in runs:
            job = self.folder / f"{run.name()}.toml"
            (self.folder / f"{run.name()}.json").unlink(missing_ok=True)
            job.write_text(specification(run, self.sizes))
            command += ["--job", str(job)]
        log = self.folder / f"{name}.log"
        with log.open("wb") as out:
            done = subprocess.run(command, stdout=out, stderr=out, check=False)
        if done.returncode != 0:
            tail = log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"{' '.join(command)} failed ({done.returncode}):\n{tail}")
        reports = json.loads(unfinished.read_text())
        unfinished.unlink()
        reports = reports if isinstance(reports, list) else [reports]
        for run, report in zip(runs, reports, strict=True):
            # First: a result stands beside no other run's fingerprint, wherever this is interrupted.
            (self.folder / f"{run.name()}.fingerprint").write_text(fingerprint)
            (self.folder / f"{run.name()}.json").write_text(json.dumps(report))
        return reports

    def run_all(self, runs: list[Run], what: str) -> dict[Run, dict]:
        """All runs, a few processes at a time; says how far it is."""
        now = {seed: self.fingerprint(seed) for seed in {run.seed for run in runs}}
        results = {run: result for run in runs if (result := self.kept(run, now[run.seed])) is not None}
        left = [run for run in runs if run not in results]
        batches = []
        for seed in sorted({run.seed for run in left}):
            alike = [run for run in left if run.seed == seed]
            size = min(BATCH, -(-len(alike) // self.sizes.jobs))
            batches += [alike[start : start + size] for start in range(0, len(alike), size)]
        started, before = time.monotonic(), len(results)
        with ThreadPoolExecutor(self.sizes.jobs) as pool:
            futures = {pool.submit(self.run, batch): batch for batch in batches}
            try:
                for future in as_completed(futures):
                    results.update(zip(futures[future], future.result(), strict=True))
                    pace = (time.monotonic() - started) / (len(results) - before)
                    minutes = pace * (len(runs) - len(results)) / 60
                    print(f"{what}: {len(results)} of {len(runs)} runs, about {minutes:.0f} min left", flush=True)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return results

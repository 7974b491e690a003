#!/usr/bin/env python3
"""Runs a whole ArtAug job on this machine and shows the result; `make artaug-demo` calls it once everything is built.

One `concord-server`, which starts a `concord-artaug` worker of its own, over mutual TLS on loopback with certificates
made on the spot. The embedded base model (deploy/artaug/base) improves itself for three iterations with the advice of the
embedded advisor, and is judged on held-out prompts beside two control arms. Writes gallery, LoRA files and metrics below
`target/artaug-demo/results`, stops every process and exits 0. Ctrl-C stops everything.

    demo.py [--out target/artaug-demo] [--programs target/release] [--iterations N] [--pairs N] [--held-out N] [--seed S]
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping, Optional, Sequence

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]
# In front: this folder has a fetch.py of its own.
sys.path.insert(0, str(HERE.parent / "demo"))

import cli  # noqa: E402
from fetch import cache_folder  # noqa: E402
from procs import Processes, ProcessError, free_ports, interrupt  # noqa: E402
from progress import bar, clock, cut  # noqa: E402
from run import is_ready, prepare_work  # noqa: E402

# Seconds.
READY_WITHIN = 60.0
JOB_WITHIN = 3600.0
POLL_EVERY = 1.0


class DemoError(Exception):
    """The demo cannot go on; the text says why and where to look."""


@dataclass(frozen=True)
class Settings:
    """What the demo's job asks for."""

    iterations: int = 3
    pairs: int = 240
    held_out: int = 200
    seed: int = 0
    threads: int = 2


class Commands(cli.Commands):
    """Command lines and configuration files of a server and its worker, whose files live in `work`."""

    def __init__(self, programs: Path, work: Path, cache: Path, port: int, operations_port: int) -> None:
        super().__init__(programs, work, port, operations_port)
        self.worker = str(programs / "concord-artaug")
        self.cache = cache

    def missing(self) -> list[str]:
        """The programs that are not built."""
        return [path for path in (self.server, self.worker, self.operator) if not os.access(path, os.X_OK)]

    def server_config(self) -> str:
        """The server's configuration: as for a federation, and the worker that it starts."""
        workers = {"program": self.worker, "config": self.work / "worker.toml"}
        return super().server_config() + "\n" + cli.toml([("workers", workers)])

    def worker_config(self, prompts: Path, settings: Settings) -> str:
        """The worker's configuration."""
        backbones = self.cache / "backbones"
        return cli.toml(
            [
                ("", {"federation": cli.FEDERATION, "state_dir": self.work / "worker"}),
                ("server", {"address": f"localhost:{self.port}", "max_backoff": "2s"}),
                ("tls", self._tls("worker", "local")),
                ("allowed", {"model_folders": [HERE], "prompt_folders": [prompts]}),
                ("data", {"icons": self.cache / "sources" / "icons"}),
                (
                    "data.image_text",
                    {
                        "vision": backbones / "efficientnet-lite0" / "model.safetensors",
                        "text": backbones / "all-minilm-l6-v2",
                        "projections": HERE / "image-text" / "projections.safetensors",
                    },
                ),
                ("limits", {"threads": settings.threads}),
            ]
        )

    def prompts(self, held_out: bool, count: int, seed: int) -> list[str]:
        """Writes plain prompts to standard output: those from which pairs are made, or those that are only evaluated."""
        command = [self.worker, "base-prompts", "--count", str(count), "--seed", str(seed)]
        return command + (["--held-out"] if held_out else [])

    def fetch(self, job: str, folder: Path) -> list[str]:
        """Fetches everything that the job has produced."""
        return self._operator("artaug", "fetch", job, str(folder))


@dataclass(frozen=True)
class JobView:
    """A job as the operator's command shows it."""

    state: str
    reason: str
    progress: Mapping[str, Any]


def parse_job(text: str) -> JobView:
    """What `concord job show --json` prints of an ArtAug job."""
    job = json.loads(text)["job"]
    return JobView(str(job["state"]), str(job.get("reason") or ""), job.get("artaug") or {})


def line(job: JobView, elapsed: float, width: int) -> str:
    """One line on a job under way."""
    progress = job.progress
    if not progress:
        return cut(f"waiting for the worker   {clock(elapsed)}", width)
    done, total = int(progress["done"]), int(progress["total"])
    text = f"iteration {progress['iteration']} of {progress['iterations']}   {progress['stage']:<13} {bar(done, total, 30)}"
    text += f"  {done}/{total}" if total else f"  {done}"
    remaining = progress.get("remaining_seconds")
    if remaining is not None:
        text += f"   about {clock(float(remaining))} left"
    return cut(f"{text}   {clock(elapsed)}", width)


ARMS = (
    ("base", "base model"),
    ("rewriting", "prompt rewriting alone"),
    ("plain-lora", "plain LoRA on X'"),
    ("enhanced", "enhanced (differential)"),
)


def table(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """The iterations of metrics.jsonl as lines of text."""
    lines = ["iteration  model                     score   gain over base (95 %)       win rate  ties  alignment  diversity  nearest X'"]
    lines.append("─" * len(lines[0]))

    def number(value: Optional[float], text: str) -> str:
        return "–" if value is None else format(value, text)

    for summary in summaries:
        for arm, title in ARMS:
            found = summary["arms"].get(arm)
            if found is None:
                continue
            gain, wins = found["gain"], found["wins"]
            count = wins["wins"] + wins["ties"] + wins["losses"]
            rate = f"{100 * (wins['wins'] + wins['ties'] / 2) / count:.0f} %" if count and arm != "base" else ""
            ties = "" if arm == "base" else str(wins["ties"])
            nearest = found.get("nearest")
            near = "" if nearest is None else f"{nearest['arm']:.3f} (base {nearest['base']:.3f}; {100 * nearest['near']:.0f} % near)"
            span = "" if arm == "base" else f"{gain['mean']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})"
            lines.append(
                f"{summary['iteration']:>9}  {title:<24}  {found['score']:+.3f}  {span:<26}  {rate:>8}  {ties:>4}"
                f"  {number(found.get('alignment'), '.3f'):>9}  {number(found.get('diversity'), '.3f'):>9}  {near}"
            )
        raw = summary.get("raw_gain")
        if raw is not None:
            lines.append(f"           interaction before the filter {raw['mean']:+.3f} ({raw['low']:+.3f} to {raw['high']:+.3f}), {summary['kept']} pairs kept")
    return lines


def job_spec(settings: Settings) -> str:
    """The demo's job."""
    return cli.toml(
        [
            ("", {"kind": "artaug", "name": "artaug-demo", "seed": settings.seed}),
            ("model", {"folder": "base"}),
            ("prompts", {"file": "training.txt"}),
            ("held_out", {"file": "held-out.txt"}),
            # What is measured is advised: the base's pictures nearly all lie below the threshold for subjects, and one piece of advice for all says nothing.
            ("advisor", {"kind": "rules", "max_regions": 2, "subject_below": -1.0}),
            (
                "scorers",
                {
                    "judge": "statistics",
                    "guard": "alignment",
                },
            ),
            ("[[scorers.filter]]", {"kind": "photometry", "least_gain": 0.0}),
            ("[[scorers.filter]]", {"kind": "colour", "least_gain": -0.1}),
            ("[[scorers.filter]]", {"kind": "alignment", "least_gain": -0.05}),
            ("[[scorers.evaluation]]", {"kind": "statistics"}),
            (
                "counts",
                {
                    "iterations": settings.iterations,
                    "pairs": settings.pairs,
                    # A tenth is trained on at most, and a thirtieth at least.
                    "kept": max(1, settings.pairs // 10),
                    "least_kept": max(1, settings.pairs // 30),
                    "held_out": settings.held_out,
                },
            ),
            # Without guidance: whoever learns from guided pictures and is guided again is guided twice, which would speak for the plain LoRA.
            ("sampler", {"kind": "euler", "steps": 10, "guidance": 1.0, "region_strength": 1.0, "batch": 16}),
            ("lora", {"rank": 8, "targets": "all-linear", "learning_rate": 1e-3, "first_steps": 240, "second_steps": 120, "checkpoint_every": 50, "reduced_rank": 8}),
            ("limits", {"time": "1h", "disk": "2 GiB", "threads": settings.threads}),
            ("output", {"fused": True}),
        ]
    )


class Demo:
    """One run."""

    def __init__(self, commands: Commands, processes: Processes, settings: Settings) -> None:
        self.commands = commands
        self.processes = processes
        self.settings = settings
        self.live = sys.stdout.isatty()
        self.shown = ""

    def run(self, results: Path) -> list[dict[str, Any]]:
        """From certificates to the fetched results; gives the iterations' summaries."""
        work, run = self.commands.work, self.processes.run
        run("pki", self.commands.pki_init())
        for role, name in (("server", "server"), ("operator", "demo"), ("worker", "local")):
            run("pki", self.commands.pki_issue(role, name))
        prompts = work / "prompts"
        prompts.mkdir()
        for held_out, count in ((False, self.settings.pairs * self.settings.iterations), (True, self.settings.held_out)):
            text = run("prompts", self.commands.prompts(held_out, count, self.settings.seed))
            (prompts / ("held-out.txt" if held_out else "training.txt")).write_text(text, encoding="utf-8")
        (work / "worker.toml").write_text(self.commands.worker_config(prompts, self.settings), encoding="utf-8")
        server_config, spec = work / "server.toml", work / "job.toml"
        server_config.write_text(self.commands.server_config(), encoding="utf-8")
        spec.write_text(job_spec(self.settings), encoding="utf-8")

        self.processes.start("server", self.commands.run_server(server_config))
        self._wait_ready()
        self._say(f"the server is up, mutual TLS on port {self.commands.port}; it starts the worker when the job comes")
        job_id = cli.parse_submitted(run("submit", self.commands.submit(spec)))
        self._follow(job_id)
        run("fetch", self.commands.fetch(job_id, results), timeout=300)
        text = (results / "metrics.jsonl").read_text(encoding="utf-8")
        return [json.loads(row) for row in text.splitlines()]

    def _follow(self, job_id: str) -> None:
        started = time.monotonic()
        while True:
            self.processes.check()
            job = parse_job(self.processes.run("show", self.commands.show(job_id)))
            elapsed = time.monotonic() - started
            self._show(job, elapsed)
            if job.state in cli.ENDED:
                self._say("")
                if job.state != "succeeded":
                    raise DemoError(f"the job {job.state}: {job.reason}")
                return
            if elapsed > JOB_WITHIN:
                raise DemoError(f"the job has not ended within {JOB_WITHIN:.0f} s")
            time.sleep(POLL_EVERY)

    def _show(self, job: JobView, elapsed: float) -> None:
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            sys.stdout.write(f"\r\x1b[K{line(job, elapsed, width)}")
            sys.stdout.flush()
            return
        headline = f"{job.progress.get('iteration')} {job.progress.get('stage')}"
        if headline != self.shown:
            self.shown = headline
            print(line(job, elapsed, 120), flush=True)

    def _say(self, text: str) -> None:
        print(text, flush=True)

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + READY_WITHIN
        while not is_ready(self.commands.ready_address()):
            self.processes.check()
            if time.monotonic() > deadline:
                raise DemoError(f"the server is not ready after {READY_WITHIN:.0f} s; its log is {self.processes.log_path('server')}")
            time.sleep(0.1)


def main(arguments: Optional[list[str]] = None) -> int:
    """Command line; returns the exit code."""
    defaults = Settings()
    parser = argparse.ArgumentParser(description="Run a whole ArtAug job on this machine.")
    parser.add_argument("--out", type=Path, default=CHECKOUT / "target" / "artaug-demo", metavar="DIR", help="default: target/artaug-demo")
    parser.add_argument("--programs", type=Path, default=cli.program_folder(CHECKOUT), metavar="DIR", help="default: target/release")
    for name in ("iterations", "pairs", "held_out", "seed"):
        flag, default = f"--{name.replace('_', '-')}", getattr(defaults, name)
        parser.add_argument(flag, type=int, default=default, metavar="N", help="default: %(default)s")
    options = parser.parse_args(arguments)
    if min(options.iterations, options.pairs) < 1 or options.held_out < 2:
        parser.error("--iterations and --pairs must be at least 1, --held-out at least 2")
    settings = Settings(iterations=options.iterations, pairs=options.pairs, held_out=options.held_out, seed=options.seed)
    # SIGTERM and a closed terminal unwind the same way as Ctrl-C.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    out = options.out.absolute()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with open(out / "lock", "w", encoding="ascii") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DemoError(f"another demo is running in {out}") from None
            return _run(options.programs.absolute(), settings, out)
    except KeyboardInterrupt:
        print("\nartaug-demo: stopped; no process was left running", file=sys.stderr)
        return 130
    except (DemoError, ProcessError, OSError, ValueError, KeyError) as error:
        what = f"unexpected answer: {type(error).__name__}: {error}" if isinstance(error, (ValueError, KeyError)) else error
        print(f"\nartaug-demo: error: {what}", file=sys.stderr)
        if (out / "logs").is_dir():
            print(f"artaug-demo: logs: {out / 'logs'}", file=sys.stderr)
        return 1


def _run(programs: Path, settings: Settings, out: Path) -> int:
    logs, results = out / "logs", out / "results"
    for folder in (logs, results):
        if folder.exists():
            shutil.rmtree(folder)
    commands = Commands(programs, prepare_work(out), cache_folder(), *free_ports(2))
    missing = commands.missing()
    if missing:
        raise DemoError(f"not built: {', '.join(missing)}; run `make artaug-demo`, or build with `cargo build --release`")
    with Processes(logs) as processes:
        summaries = Demo(commands, processes, settings).run(results)
    print("\n".join(table(summaries)))
    print(f"\n{results / 'gallery.html'}\n{results / 'MODEL_CARD.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Runs a whole federation on this machine and shows the result; `make demo` calls it once everything is built.

One `concord-server` and six `concord-client` daemons, each a process of its own, over mutual TLS on loopback with
certificates made on the spot; one silo for each real task. A FedMCP job runs for several rounds; then Local is trained
for comparison. Writes `report.json` and `report.html`, stops every process and exits 0. Ctrl-C stops everything.

    run.py [--out target/demo] [--programs target/release] [--rounds N] [--train N] [--seed S]
"""

from __future__ import annotations

import argparse
import datetime
import fcntl
import http.client
import json
import shutil
import signal
import sys
import time
from pathlib import Path
from types import MappingProxyType
from typing import Any, Callable, Mapping, Optional, Sequence

import fetch
import progress
import report
import tasks
from cli import (
    Commands,
    Doing,
    JobView,
    Settings,
    Silo,
    SiloView,
    allocator,
    metric_of,
    parse_job,
    parse_simulated,
    parse_status,
    parse_submitted,
    program_folder,
    rounds_simulated,
)
from procs import Processes, ProcessError, free_ports, interrupt, maps_library
from progress import Screen, SiloLine

CHECKOUT = Path(__file__).resolve().parents[2]
DEMO_TASKS = ("spam", "tweet-sentiment", "movie-polarity", "plot-vs-review", "supersense", "gloss-pair")
# Seconds.
READY_WITHIN = 60.0
LAST_METRICS_WITHIN = 120.0
JOB_WITHIN = 600.0
POLL_EVERY = 0.5


class DemoError(Exception):
    """The demo cannot go on; the text says why and where to look."""


def metric_name(task: Mapping[str, Any]) -> str:
    """The metric that a task is judged by."""
    return "spearman" if task["problem"] == "regression" else "accuracy"


def silo_lines(job: JobView, silos: Sequence[Silo], doing: Mapping[str, Doing] = MappingProxyType({})) -> list[SiloLine]:
    """The bars for what a job looks like now; `doing` is what the silos' daemons say of themselves."""
    lines = []
    for silo in silos:
        view, own = job.silos.get(silo.name, SiloView()), doing.get(silo.name)
        name = metric_name(silo.task)
        history = tuple(metric_of(view, number, "after_aggregation", name) for number in range(1, job.rounds + 1))
        known = [value for value in history if value is not None]
        if (job.rounds, "last_test") in view.metrics:
            state = "done"
        elif job.ended:
            state = "testing" if job.state == "succeeded" else job.state
        elif view.working:
            state = own.word if own else "training"
        elif view.outcome in ("rejected", "discarded", "declined"):
            state = view.outcome
        else:
            state = "waiting"
        shown = history[: len(history) - next((n for n, v in enumerate(reversed(history)) if v is not None), len(history))]
        # The server counts a round once its contribution is accepted; until then the daemon knows better.
        part = own.step / own.steps if own and own.steps and own.round == view.accepted + 1 and not job.ended else 0.0
        newest = known[-1] if known else None
        lines.append(SiloLine(str(silo.task["title"]), view.accepted, job.rounds, state, name, newest, shown, part))
    return lines


def local_lines(done: Mapping[str, int], silos: Sequence[Silo], rounds: int, over: bool) -> list[SiloLine]:
    """The bars for Local: the epochs that each silo has trained alone."""
    lines = []
    for silo in silos:
        count = done.get(silo.name, 0)
        state = "done" if over else "testing" if count == rounds else "training"
        lines.append(SiloLine(str(silo.task["title"]), count, rounds, state))
    return lines


def headline(job: JobView) -> str:
    """One line on a job."""
    if job.state == "succeeded":
        return f"all {job.rounds} rounds are published; the silos test their models"
    if job.ended:
        return f"the job {job.state}: {job.reason}"
    return f"round {job.round} of {job.rounds}" if job.round else "waiting for the first round"


def all_tested(job: JobView, silos: Sequence[Silo]) -> bool:
    """Whether every silo has reported its test after the last round."""
    return all(silo.name in job.silos and (job.rounds, "last_test") in job.silos[silo.name].metrics for silo in silos)


def make_report(
    job: JobView,
    silos: Sequence[Silo],
    local: Mapping[str, SiloView],
    facts: Mapping[str, Any],
    settings: Settings,
) -> dict[str, Any]:
    """The report.json of a finished job; `facts` holds what was measured around it (see `Demo.run`)."""
    entries = []
    for silo in silos:
        view, alone = job.silos[silo.name], local.get(silo.name)
        name = metric_name(silo.task)
        rounds = range(1, job.rounds + 1)
        entries.append(
            {
                "name": silo.name,
                "task": silo.task["name"],
                "title": silo.task["title"],
                "metric": name,
                "train_rows": silo.task["rows"]["train"],
                "test_rows": silo.task["rows"]["test"],
                "majority": silo.task["majority"],
                "majority_validation": silo.task["majority_validation"],
                "local": metric_of(alone, job.rounds, "last_test", name),
                "final": metric_of(view, job.rounds, "last_test", name),
                "rounds": [metric_of(view, number, "after_aggregation", name) for number in rounds],
                "local_rounds": [metric_of(alone, number, "after_training", name) for number in rounds],
                "bytes_up": view.bytes_up,
                "bytes_down": view.bytes_down,
                "seconds": _seconds(view),
                "peak_rss_bytes": facts["peaks"].get(silo.name),
            }
        )
    return {
        "schema": report.SCHEMA,
        "job": {
            "id": job.id,
            "name": "demo",
            "algorithm": "fedmcp",
            "backbone": "all-MiniLM-L6-v2",
            "rounds": job.rounds,
            "seed": settings.seed,
            "adapter_bytes": adapter_bytes(job),
            "facts": [
                ["adapters", f"bottleneck {settings.bottleneck} in layers {', '.join(map(str, settings.layers))}"],
                ["mu", str(settings.mu)],
                ["batch, learning rate", f"{settings.batch_size}, {settings.learning_rate}"],
                ["aggregation", "uniform mean over the silos"],
            ],
            "started": facts["started"],
            "seconds": facts["seconds"],
        },
        "silos": entries,
        "server": {"peak_rss_bytes": facts["peaks"]["server"], "libtorch_mapped": facts["libtorch_mapped"]},
    }


def adapter_bytes(job: JobView) -> int:
    """The size of the global adapter, which a silo sends once for each contribution; one that was not counted has been sent too."""
    return min(view.bytes_up // view.accepted for view in job.silos.values() if view.accepted)


def _seconds(view: SiloView) -> Optional[float]:
    """The time that a silo spent on its rounds, as it reported."""
    spent = [metrics["seconds"] for metrics in view.metrics.values() if "seconds" in metrics]
    return sum(spent) if spent else None


def is_ready(address: tuple[str, int, str]) -> bool:
    """Whether the server answers 200."""
    host, port, path = address
    connection = http.client.HTTPConnection(host, port, timeout=2)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


class Demo:
    """One run. `commands` is what cli.py offers; tests put programs of their own behind it."""

    def __init__(self, commands: Commands, processes: Processes, screen: Screen, silos: Sequence[Silo], settings: Settings) -> None:
        self.commands = commands
        self.processes = processes
        self.screen = screen
        self.silos = silos
        self.settings = settings
        self.peaks: dict[str, int] = {}

    def run(self, task_folder: Path, backbone: Path) -> dict[str, Any]:
        """The whole federation from certificates to the report."""
        work, run = self.commands.work, self.processes.run
        run("pki", self.commands.pki_init())
        run("pki", self.commands.pki_issue("server", "server"))
        run("pki", self.commands.pki_issue("operator", "demo"))
        for silo in self.silos:
            run("pki", self.commands.pki_issue("silo", silo.name))

        server_config = _written(work / "server.toml", self.commands.server_config())
        configs = {
            silo.name: _written(work / f"silo-{silo.name}.toml", self.commands.client_config(silo, task_folder, backbone))
            for silo in self.silos
        }
        spec = _written(work / "job.toml", self.commands.job_spec(self.silos, self.settings))
        local_spec = _written(work / "local.toml", self.commands.job_spec(self.silos, self.settings, local=True))

        started, clock = datetime.datetime.now(datetime.timezone.utc), time.monotonic()
        server = self.processes.start("server", self.commands.run_server(server_config), allocator("concord-server"))
        self._wait("the server is not ready", READY_WITHIN, lambda: is_ready(self.commands.ready_address()))
        for name, config in configs.items():
            self.processes.start(name, self.commands.run_client(config), allocator("concord-client"))
        self.screen.say(f"one server and {len(configs)} silo daemons are up, mutual TLS on port {self.commands.port}")

        job_id = parse_submitted(run("submit", self.commands.submit(spec)))
        job = self._follow(job_id, clock)
        seconds = time.monotonic() - clock
        mapped = maps_library(server, "libtorch")
        peaks = {name: self.processes.peak(name) for name in ("server", *configs)}
        self.processes.stop_all()

        local = self._local(local_spec, configs)
        facts = {
            "started": started.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "seconds": round(seconds, 1),
            "libtorch_mapped": mapped,
            "peaks": peaks,
        }
        return make_report(job, self.silos, local, facts, self.settings)

    def _local(self, spec: Path, configs: Mapping[str, Path]) -> dict[str, SiloView]:
        """Trains each silo alone; they have nothing to wait for, so two processes take half of them each."""
        self.screen.say("the daemons are stopped; for comparison, each silo trains alone")
        names, clock = list(configs), time.monotonic()
        halves = {f"local-{number + 1}": names[number::2] for number in range(2) if names[number::2]}
        outputs = {name: self.commands.work / f"{name}.json" for name in halves}
        for name, silos in halves.items():
            self.processes.start(name, self.commands.simulate(spec, {silo: configs[silo] for silo in silos}, outputs[name]))
        while True:
            over = [self.processes.finished(name) for name in halves]
            done: dict[str, int] = {}
            for name in halves:
                done.update(rounds_simulated(self.processes.log_path(name).read_text(encoding="utf-8", errors="replace")))
            lines = local_lines(done, self.silos, self.settings.rounds, all(over))
            self.screen.show("Local: each silo alone", time.monotonic() - clock, lines)
            if all(over):
                self.screen.keep()
                views: dict[str, SiloView] = {}
                for path in outputs.values():
                    views.update(parse_simulated(path.read_text(encoding="utf-8")))
                return views
            if time.monotonic() - clock > JOB_WITHIN:
                raise DemoError(f"Local has not ended within {JOB_WITHIN:.0f} s")
            time.sleep(POLL_EVERY)

    def _follow(self, job_id: str, clock: float) -> JobView:
        """Shows the job until every silo has tested its last model."""
        deadline = time.monotonic() + JOB_WITHIN
        ended_at: Optional[float] = None
        while True:
            self.processes.check()
            job = parse_job(self.processes.run("show", self.commands.show(job_id)))
            self.screen.show(headline(job), time.monotonic() - clock, silo_lines(job, self.silos, self._doing()))
            if job.ended and job.state != "succeeded":
                raise DemoError(f"the job {job.state}: {job.reason}")
            if job.ended and all_tested(job, self.silos):
                self.screen.keep()
                return job
            if job.ended and ended_at is None:
                ended_at = time.monotonic()
            if ended_at is not None and time.monotonic() - ended_at > LAST_METRICS_WITHIN:
                late = [s.name for s in self.silos if (job.rounds, "last_test") not in job.silos[s.name].metrics]
                raise DemoError(f"no test result from {', '.join(late)} within {LAST_METRICS_WITHIN:.0f} s of the last round")
            if time.monotonic() > deadline:
                raise DemoError(f"the job has not ended within {JOB_WITHIN:.0f} s (round {job.round} of {job.rounds})")
            time.sleep(POLL_EVERY)

    def _doing(self) -> dict[str, Doing]:
        """What the daemons say of themselves; one that has not written anything yet is left out."""
        found = {}
        for silo in self.silos:
            try:
                doing = parse_status(self.commands.status_file(silo.name).read_text(encoding="utf-8"))
            except FileNotFoundError:
                continue
            if doing is not None:
                found[silo.name] = doing
        return found

    def _wait(self, complaint: str, within: float, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + within
        while not reached():
            self.processes.check()
            if time.monotonic() > deadline:
                raise DemoError(f"{complaint} after {within:.0f} s; its log is {self.processes.log_path('server')}")
            time.sleep(0.1)


def _written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def prepare_work(out: Path) -> Path:
    """An empty folder for keys, state and configuration; what an earlier run left there goes."""
    work = out / "work"
    if work.exists():
        shutil.rmtree(work)
    work.mkdir(parents=True, mode=0o700)
    return work


def main(arguments: Optional[list[str]] = None) -> int:
    """Command line; returns the exit code."""
    defaults = Settings()
    parser = argparse.ArgumentParser(description="Run a federation of six silos on this machine.")
    parser.add_argument("--out", type=Path, default=CHECKOUT / "target" / "demo", metavar="DIR", help="default: target/demo")
    parser.add_argument("--programs", type=Path, default=program_folder(CHECKOUT), metavar="DIR", help="default: target/release")
    parser.add_argument("--rounds", type=int, default=defaults.rounds, metavar="N", help="default: %(default)s")
    parser.add_argument("--train", type=int, default=512, metavar="N", help="training rows a silo (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=defaults.seed, metavar="S", help="default: %(default)s")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.train < 1:
        parser.error("--rounds and --train must be at least 1")
    settings = Settings(rounds=options.rounds, seed=options.seed)

    # SIGTERM and a closed terminal unwind the same way as Ctrl-C.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    screen = Screen(sys.stdout)
    out = options.out.absolute()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with open(out / "lock", "w", encoding="ascii") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DemoError(f"another demo is running in {out}") from None
            return _run(options, settings, out, screen)
    except KeyboardInterrupt:
        screen.keep()
        print("\ndemo: stopped; no process was left running", file=sys.stderr)
        return 130
    except (DemoError, ProcessError, fetch.FetchError, tasks.TaskError, report.ReportError, OSError, ValueError, KeyError) as error:
        screen.keep()
        what = f"unexpected answer: {type(error).__name__}: {error}" if isinstance(error, (ValueError, KeyError)) else error
        print(f"demo: error: {what}", file=sys.stderr)
        if (out / "logs").is_dir():
            print(f"demo: logs: {out / 'logs'}", file=sys.stderr)
        return 1


def _run(options: argparse.Namespace, settings: Settings, out: Path, screen: Screen) -> int:
    logs = out / "logs"
    if logs.exists():
        shutil.rmtree(logs)
    commands = Commands(options.programs.absolute(), prepare_work(out), *free_ports(2))
    missing = commands.missing()
    if missing:
        raise DemoError(f"not built: {', '.join(missing)}; run `make demo`, or build with `cargo build --release`")
    cache = fetch.cache_folder()
    for resource in fetch.RESOURCES:
        fetch.fetch(resource, cache, say=screen.say)
    backbone = cache / next(resource.folder for resource in fetch.RESOURCES if resource.name == "backbone")
    counts = {"train": options.train, "validation": 200, "test": 500}
    made = tasks.make_tasks(list(DEMO_TASKS), cache, out / "tasks", counts, options.seed)
    silos = [Silo(str(entry["name"]), entry) for entry in made]

    with Processes(logs) as processes:
        finished = Demo(commands, processes, screen, silos, settings).run(out / "tasks", backbone)

    json_path, html_path = out / "report.json", out / "report.html"
    json_path.write_text(json.dumps(finished, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    report.write(finished, html_path)
    screen.say("")
    for line in progress.table(finished):
        screen.say(line)
    screen.say(f"\n{json_path}\n{html_path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

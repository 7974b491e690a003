#!/usr/bin/env bash
# Peak memory of a silo's daemon at the job's defaults: adapters in all six layers of MiniLM, batches of 32, e-mails of which most are
# cut at 128 tokens, two rounds and the tests after them. Three runs with the settings of glibc's allocator that the client's unit
# has, and three without them, in turn.
#
#   deploy/bench/memory.sh                needs the programs and the demo's data (`make release data`)
#   RUNS=3 ROUNDS=2                       runs of each kind; rounds of the job
#   ROWS=256                              training rows; a quarter as many validation rows, and as many test rows
#
# Each run is a federation of its own on loopback, one server and one silo with files below target/bench, and is gone at its end, at
# the latest after ten minutes. The daemon is given a folder for its cache, as the unit does. The figures are the kernel's (VmHWM, and
# the processor time), read before the daemon is stopped. Six runs take about five minutes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

PYTHONDONTWRITEBYTECODE=1 exec python3 - <<'PYTHON'
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, "deploy/demo")

import fetch
import tasks
from cli import Commands, Settings, Silo, allocator, parse_job, parse_submitted, program_folder
from procs import Processes, ProcessError, free_ports, interrupt
from run import is_ready

RUNS, ROUNDS, ROWS = (int(os.environ.get(name, default)) for name, default in (("RUNS", 3), ("ROUNDS", 2), ("ROWS", 256)))
WITHIN = 600.0
SETTINGS = Settings(rounds=ROUNDS, layers=(), batch_size=32, max_length=128)


def written(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def processor_seconds(pid):
    # The name, in brackets, may hold anything; user and system time are the 14th and 15th field.
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measured(commands, silo, task_folder, backbone, environment):
    """Peak memory in MB and processor seconds of a daemon that has done a job to its end."""
    work, deadline = commands.work, time.monotonic() + WITHIN
    with Processes(work / "logs") as processes:

        def wait(what, reached):
            while not reached():
                processes.check()
                if time.monotonic() > deadline:
                    raise ProcessError(f"{what} took more than {WITHIN:.0f} s")
                time.sleep(0.5)

        def tested():
            job = parse_job(processes.run("show", commands.show(job_id)))
            if job.state in ("failed", "cancelled"):
                raise ProcessError(f"the job {job.state}: {job.reason}")
            view = job.silos.get(silo.name)
            return view is not None and any(point == "final_test" for _, point in view.metrics)

        for certificate in (
            commands.pki_init(),
            commands.pki_issue("server", "server"),
            commands.pki_issue("operator", "demo"),
            commands.pki_issue("silo", silo.name),
        ):
            processes.run("pki", certificate)
        server = written(work / "server.toml", commands.server_config())
        client = written(work / "client.toml", commands.client_config(silo, task_folder, backbone))
        job = written(work / "job.toml", commands.job_spec([silo], SETTINGS))
        processes.start("server", commands.run_server(server), allocator("concord-server"))
        wait("the start of the server", lambda: is_ready(commands.ready_address()))
        processes.start("daemon", commands.run_client(client), environment)
        job_id = parse_submitted(processes.run("submit", commands.submit(job)))
        wait("the job", tested)
        return processes.peak("daemon") / 1e6, processor_seconds(processes.pid("daemon"))


def main():
    programs, cache = program_folder(Path.cwd()).absolute(), fetch.cache_folder()
    missing = Commands(programs, Path(), 0, 0).missing()
    if missing:
        raise ProcessError(f"not built: {', '.join(missing)}; run `make release`")
    for resource in fetch.RESOURCES:
        fetch.fetch(resource, cache, say=lambda line: print(line, file=sys.stderr))
    backbone = cache / next(resource.folder for resource in fetch.RESOURCES if resource.name == "backbone")
    below = programs.parent / "bench"
    below.mkdir(parents=True, exist_ok=True)
    unit = allocator("concord-client")
    kinds = {" ".join(f"{name}={value}" for name, value in unit.items()): unit, "glibc's own": {}}
    results = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory(prefix="memory-", dir=below) as folder:
        counts = {"train": ROWS, "validation": ROWS // 4, "test": ROWS}
        made = tasks.make_tasks(["spam"], cache, Path(folder) / "tasks", counts, 0)
        silo = Silo("spam", made[0])
        for number in range(RUNS):
            for kind, environment in kinds.items():
                work = Path(tempfile.mkdtemp(dir=folder))
                commands = Commands(programs, work, *free_ports(2))
                results[kind].append(measured(commands, silo, Path(folder) / "tasks", backbone, environment))
                print("bench: run {}, {}: {:.1f} MB, {:.1f} s".format(number + 1, kind, *results[kind][-1]), file=sys.stderr)
    print("| allocator's settings | peak memory of each run, MB | largest | processor seconds |\n|---|---|---|---|")
    for kind, runs in results.items():
        peaks, seconds = ([f"{value:{form}}" for value in column] for column, form in zip(zip(*runs), (".0f", ".1f")))
        print(f"| {kind} | {', '.join(peaks)} | {max(peak for peak, _ in runs):.0f} | {', '.join(seconds)} |")


# What the caller's environment says to the allocator would be measured too.
for name in [name for name in os.environ if name.startswith("MALLOC_")]:
    del os.environ[name]
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, interrupt)
try:
    main()
except KeyboardInterrupt:
    print("\nbench: stopped; no process was left running", file=sys.stderr)
    sys.exit(130)
except (ProcessError, fetch.FetchError, tasks.TaskError, OSError) as error:
    print(f"bench: error: {error}", file=sys.stderr)
    sys.exit(1)
PYTHON

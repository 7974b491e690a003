"""Stand-ins for the three programs, so that the orchestrator is tested without building anything.

As a script it plays one program: it writes its process id into the work folder and behaves as `FAKE` (a JSON object in
the environment) says. As a module it gives `FakeCommands`, which puts these stand-ins behind the demo.
"""

import json
import os
import signal
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import context  # noqa: F401
from cli import Commands

ROUNDS = 3
SCRIPT = str(Path(__file__).resolve())


class FakeCommands(Commands):
    """The real configuration files, but command lines of this script."""

    def _fake(self, program, *words):
        return [sys.executable, SCRIPT, program, str(self.work), *words]

    def missing(self):
        return []

    def pki_init(self):
        return self._fake("pki", "init")

    def pki_issue(self, role, name):
        return self._fake("pki", role, name)

    def run_server(self, config):
        return self._fake("server", str(self.operations_port))

    def run_client(self, config):
        return self._fake("client", config.stem[len("silo-") :])

    def submit(self, spec):
        return self._fake("submit", str(spec))

    def show(self, job):
        return self._fake("show", job)

    def simulate(self, spec, configs, out):
        return self._fake("simulate", str(out), *configs)


def wait_for_term(stubborn=False):
    def leave(*_):
        if not stubborn:
            sys.exit(0)

    signal.signal(signal.SIGTERM, leave)
    while True:
        time.sleep(0.02)


class Ready(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/readyz" else 404)
        self.end_headers()

    def log_message(self, *_):
        pass


def reports(silos, point, upto, base):
    return [
        {"silo_id": silo, "round": number, "point": point, "metrics": {"accuracy": base + number / 100, "seconds": 1.5}}
        for silo in silos
        for number in range(1, upto + 1)
    ]


def show(work, fate):
    silos = [line.split('"')[1] for line in (work / "silos").read_text().splitlines()]
    calls = work / "calls"
    call = len(calls.read_text()) if calls.exists() else 0
    calls.write_text("x" * (call + 1))
    done = min(call, ROUNDS)
    state = "RUNNING" if call <= ROUNDS else "SUCCEEDED"
    if fate.get("job") == "fails" and call > 1:
        state = "FAILED"
    if fate.get("job") == "hangs":
        done, state = 1, "RUNNING"
    metrics = reports(silos, "METRIC_POINT_AFTER_AGGREGATION", done, 0.7)
    if call > ROUNDS + 1:
        last = reports(silos, "METRIC_POINT_LAST_TEST", ROUNDS, 0.8)
        metrics += [found for found in last if found["round"] == ROUNDS]
    job = {"job_id": "job-1", "state": f"JOB_STATE_{state}", "round": min(done + 1, ROUNDS), "rounds": ROUNDS}
    job["reason"] = "too few silos" if state == "FAILED" else ""
    progress = [
        {"silo_id": silo, "outcome": "OUTCOME_UNSPECIFIED", "working": done < ROUNDS, "bytes_up": 100 * done, "bytes_down": 90 * done, "accepted": done}
        for silo in silos
    ]
    print(json.dumps({"job": job, "spec_toml": "", "silos": progress, "metrics": metrics}))


def main():
    program, work, words = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    fate = json.loads(os.environ.get("FAKE", "{}"))
    with open(work / "pids", "a") as pids:
        pids.write(f"{os.getpid()}\n")
    if program == "server":
        server = HTTPServer(("127.0.0.1", int(words[0])), Ready)
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
        server.serve_forever()
    elif program == "client":
        print(f"daemon {words[0]}", flush=True)
        if fate.get("dies") == words[0]:
            sys.exit("cannot read the backbone")
        wait_for_term(stubborn=fate.get("stubborn") == words[0])
    elif program == "submit":
        spec = Path(words[0]).read_text()
        names = next(line for line in spec.splitlines() if line.startswith("silos")).split("[")[1].rstrip("]")
        (work / "silos").write_text("\n".join(part.strip() for part in names.split(",")))
        print(json.dumps({"job": {"job_id": "job-1"}, "existed": False}))
    elif program == "show":
        show(work, fate)
    elif program == "simulate":
        if fate.get("local") == "fails":
            sys.exit("cannot read the rows")
        if fate.get("local") == "hangs":
            wait_for_term()
        out, silos = Path(words[0]), words[1:]
        for silo in silos:
            print(f"2025-01-31T12:00:00Z  INFO x: round done silo.id={silo} round={ROUNDS} rounds={ROUNDS}")
        metrics = reports(silos, "after_training", ROUNDS, 0.6)
        metrics += [found for found in reports(silos, "last_test", ROUNDS, 0.7) if found["round"] == ROUNDS]
        out.write_text(json.dumps({"state": "succeeded", "reason": "", "metrics": metrics}))


if __name__ == "__main__":
    main()

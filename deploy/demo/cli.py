"""The one place that knows the programs' flags, their configuration keys and the JSON they print.

`Commands` builds command lines and configuration files; `parse_*` turn the JSON of `concord --json` and of
`concord-client simulate` into the small types below, which is all that run.py sees.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Mapping, Optional, Sequence

FEDERATION = "demo"
# The task name in the job; every silo maps it to its own data.
TASK = "demo"
BACKBONE = "all-minilm-l6-v2"

ENDED = ("succeeded", "failed", "cancelled")


@dataclass(frozen=True)
class Settings:
    """What the demo's job asks for."""

    rounds: int = 6
    bottleneck: int = 16
    layers: tuple[int, ...] = (4, 5)
    batch_size: int = 16
    learning_rate: float = 1e-3
    max_length: int = 64
    mu: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Silo:
    """One silo: its name in the federation and its entry in tasks.json."""

    name: str
    task: Mapping[str, Any]


@dataclass
class SiloView:
    """A silo's part in a job so far. `metrics`: by (round, point), point as in the protocol: "after_aggregation", ..."""

    accepted: int = 0
    working: bool = False
    outcome: str = ""
    reason: str = ""
    bytes_up: int = 0
    bytes_down: int = 0
    metrics: dict[tuple[int, str], dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Doing:
    """What a silo's daemon says of itself: a word such as "training", the round, and the steps done and to do in it."""

    word: str
    round: int
    step: int = 0
    steps: int = 0


@dataclass
class JobView:
    """A job as the operator's command shows it. `state` is one word in small letters."""

    id: str
    state: str
    round: int
    rounds: int
    reason: str = ""
    silos: dict[str, SiloView] = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        """Whether it will not change any more."""
        return self.state in ENDED


def toml_value(value: object) -> str:
    """A TOML value; text as a basic string, which JSON's escapes are part of."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(toml_value, value))}]"
    # DEL is the one control character that JSON leaves as it is and TOML does not allow.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def toml(tables: Sequence[tuple[str, Mapping[str, object]]]) -> str:
    """TOML text: (header, keys) in order; "" for the top level, "[[name]]" for an entry of an array of tables."""
    blocks = []
    for header, keys in tables:
        lines = [header if header.startswith("[[") else f"[{header}]"] if header else []
        lines += [f"{key} = {toml_value(value)}" for key, value in keys.items() if value is not None]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def program_folder(checkout: Path) -> Path:
    """Where `cargo build --release` puts the programs."""
    return Path(os.environ.get("CARGO_TARGET_DIR") or checkout / "target") / "release"


def allocator(unit: str) -> dict[str, str]:
    """The settings of glibc's allocator that a systemd unit has."""
    text = (Path(__file__).resolve().parent.parent / "systemd" / f"{unit}.service").read_text(encoding="utf-8")
    pairs = (line.removeprefix("Environment=").split("=", 1) for line in text.splitlines() if line.startswith("Environment=MALLOC_"))
    return dict(pairs)


class Commands:
    """Command lines and configuration files of a federation whose files live in `work`."""

    def __init__(self, programs: Path, work: Path, port: int, operations_port: int) -> None:
        self.server = str(programs / "concord-server")
        self.client = str(programs / "concord-client")
        self.operator = str(programs / "concord")
        self.work = work
        self.pki = work / "pki"
        self.port = port
        self.operations_port = operations_port

    def missing(self) -> list[str]:
        """The programs that are not built."""
        return [path for path in (self.server, self.client, self.operator) if not os.access(path, os.X_OK)]

    # Certificates.

    def pki_init(self) -> list[str]:
        """Makes the CA."""
        return [self.server, "pki", "init", "--folder", str(self.pki), "--federation", FEDERATION]

    def pki_issue(self, role: str, name: str) -> list[str]:
        """Makes a certificate and its key."""
        command = [self.server, "pki", "issue", "--folder", str(self.pki), "--role", role, "--name", name]
        return command + (["--host", "localhost", "--host", "127.0.0.1"] if role == "server" else [])

    def _tls(self, role: str, name: str) -> dict[str, object]:
        return {
            "certificate": self.pki / f"{role}-{name}.crt",
            "key": self.pki / f"{role}-{name}.key",
            "ca": self.pki / "ca.crt",
        }

    # Configuration files.

    def server_config(self) -> str:
        """The server's configuration."""
        return toml(
            [
                ("", {"federation": FEDERATION, "state_dir": self.work / "server"}),
                ("listen", {"address": f"127.0.0.1:{self.port}"}),
                ("ops", {"address": f"127.0.0.1:{self.operations_port}"}),
                ("tls", self._tls("server", "server")),
            ]
        )

    def client_config(self, silo: Silo, tasks: Path, backbone: Path) -> str:
        """A silo's configuration."""
        folder = tasks / str(silo.task["name"])
        pair = silo.task["kind"] == "pair"
        return toml(
            [
                ("server", {"address": f"localhost:{self.port}", "poll_interval": "1s", "max_backoff": "2s"}),
                ("tls", self._tls("silo", silo.name)),
                ("state", {"folder": self.work / f"silo-{silo.name}"}),
                ("torch", {"threads": 1}),
                ("cache", {"folder": self.work}),
                ("[[backbone]]", {"name": BACKBONE, "path": backbone}),
                (
                    "[[task]]",
                    {
                        "name": TASK,
                        "kind": silo.task["kind"],
                        "problem": silo.task["problem"],
                        "format": "csv",
                        "columns.text": "text_a" if pair else "text",
                        "columns.text_b": "text_b" if pair else None,
                        "columns.label": "label",
                        **{split: folder / f"{split}.csv" for split in ("train", "validation", "test")},
                    },
                ),
            ]
        )

    def job_spec(self, silos: Sequence[Silo], settings: Settings, local: bool = False) -> str:
        """The job, or Local with as many trainable parameters: one adapter of twice the bottleneck."""
        algorithm = {"name": "local"} if local else {"name": "fedmcp", "mu": settings.mu}
        return toml(
            [
                (
                    "",
                    {
                        "kind": "federated-training",
                        "name": "demo-local" if local else "demo",
                        "task": TASK,
                        # Local's silos are spread over several processes; each takes those that it has.
                        "silos": [] if local else [silo.name for silo in silos],
                        "seed": settings.seed,
                    },
                ),
                ("backbone", {"name": BACKBONE, "hidden": 384, "layers": 6}),
                (
                    "adapter",
                    {"bottleneck": settings.bottleneck * (2 if local else 1), "layers": settings.layers},
                ),
                ("algorithm", algorithm),
                (
                    "training",
                    {
                        "batch_size": settings.batch_size,
                        "learning_rate": settings.learning_rate,
                        "head_learning_rate": settings.learning_rate,
                        "max_length": settings.max_length,
                    },
                ),
                ("rounds", {"count": settings.rounds, "min_silos": 1 if local else len(silos), "weighting": "uniform", "max_time": "5m"}),
            ]
        )

    # Programs.

    def run_server(self, config: Path) -> list[str]:
        """The server."""
        return [self.server, "run", "--config", str(config)]

    def run_client(self, config: Path) -> list[str]:
        """A silo's daemon."""
        return [self.client, "run", "--config", str(config)]

    def ready_address(self) -> tuple[str, int, str]:
        """Host, port and path that answer 200 when the server is ready."""
        return "127.0.0.1", self.operations_port, "/readyz"

    def status_file(self, silo: str) -> Path:
        """What a silo's daemon says of itself, renewed about once a second; only the silo's own machine has it."""
        return self.work / f"silo-{silo}" / "status.json"

    def _operator(self, *words: str) -> list[str]:
        files = self._tls("operator", "demo")
        command = [self.operator, "--server", f"localhost:{self.port}"]
        for flag in ("ca", "certificate", "key"):
            command += [f"--{flag}", str(files[flag])]
        return command + ["--json", *words]

    def submit(self, spec: Path) -> list[str]:
        """Submits the job."""
        return self._operator("job", "submit", str(spec))

    def show(self, job: str) -> list[str]:
        """Shows the job."""
        return self._operator("job", "show", job)

    def simulate(self, spec: Path, configs: Mapping[str, Path], out: Path) -> list[str]:
        """Runs a job over the silos' own configurations in one process, in memory; the result goes to a file."""
        command = [self.client, "simulate", "--job", str(spec), "--out", str(out), "--log", "info"]
        for name, config in configs.items():
            command += ["--silo", f"{name}={config}"]
        return command


def _word(text: object) -> str:
    """JOB_STATE_SUCCEEDED, Succeeded or succeeded as "succeeded"; AFTER_AGGREGATION as "after_aggregation"."""
    word = str(text or "").lower().replace("-", "_")
    for prefix in ("job_state_", "outcome_", "metric_point_"):
        word = word[len(prefix) :] if word.startswith(prefix) else word
    return "" if word == "unspecified" else word


def _metrics(found: object) -> dict[str, float]:
    """Metrics written as {name: value} or as [{"name": …, "value": …}]."""
    pairs = found.items() if isinstance(found, dict) else ((m["name"], m["value"]) for m in found or ())
    return {str(name): float(value) for name, value in pairs}


def parse_submitted(text: str) -> str:
    """The id of the job that `concord job submit --json` made."""
    answer = json.loads(text)
    return str(answer.get("job", answer)["job_id"])


def parse_job(text: str) -> JobView:
    """What `concord job show --json` prints."""
    answer = json.loads(text)
    job = answer["job"]
    view = JobView(
        id=str(job["job_id"]),
        state=_word(job["state"]),
        round=int(job.get("round") or 0),
        rounds=int(job["rounds"]),
        reason=str(job.get("reason") or ""),
    )
    for silo in answer.get("silos", []):
        view.silos[str(silo["silo_id"])] = SiloView(
            accepted=int(silo.get("accepted") or 0),
            working=bool(silo.get("working")),
            outcome=_word(silo.get("outcome")),
            reason=str(silo.get("reason") or ""),
            bytes_up=int(silo.get("bytes_up") or 0),
            bytes_down=int(silo.get("bytes_down") or 0),
        )
    add_metrics(view.silos, answer.get("metrics", []))
    return view


def add_metrics(silos: dict[str, SiloView], reports: Sequence[Mapping[str, Any]]) -> None:
    """Sorts metric reports to their silos."""
    for found in reports:
        silo = silos.setdefault(str(found["silo_id"]), SiloView())
        silo.metrics[int(found["round"]), _word(found["point"])] = _metrics(found["metrics"])


def parse_status(text: str) -> Optional[Doing]:
    """What a daemon's status file says it is doing; None for nothing."""
    work = json.loads(text)["work"]
    return None if work is None else Doing(str(work["doing"]), int(work["round"]), int(work["step"]), int(work["steps"]))


def parse_simulated(text: str) -> dict[str, SiloView]:
    """What `concord-client simulate --out` writes: metric reports by silo."""
    answer = json.loads(text)
    if answer["state"] != "succeeded":
        raise ValueError(f"the simulated job {answer['state']}: {answer['reason']}")
    silos: dict[str, SiloView] = {}
    add_metrics(silos, answer["metrics"])
    return silos


def rounds_simulated(log: str) -> dict[str, int]:
    """The rounds that each silo of a simulation has ended, by its log."""
    found = re.findall(r'round done silo\.id="?([^\s"]+)"? round=(\d+)', log)
    return {silo: int(number) for silo, number in found}


def metric_of(view: Optional[SiloView], round_number: int, point: str, name: str) -> Optional[float]:
    """One metric of a silo, None if it was not reported."""
    return None if view is None else view.metrics.get((round_number, point), {}).get(name)

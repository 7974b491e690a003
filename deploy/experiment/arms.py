"""The arms of the experiment and the grids that their settings are chosen from, on validation rows only."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Setting:
    """One point of a grid: values that go into the job's specification, by table."""

    algorithm: dict
    adapter: dict = field(default_factory=dict)
    head: dict = field(default_factory=dict)
    rounds: dict = field(default_factory=dict)

    def label(self) -> str:
        """A short text for tables, without the algorithm's name."""
        values = {**self.algorithm, **self.adapter, **{f"rounds {key}": value for key, value in self.rounds.items()}}
        parts = [f"{key} {value}" for key, value in values.items() if key != "name"]
        return ", ".join(parts) or "no settings"


@dataclass(frozen=True)
class Arm:
    """A way to train, and the settings it may be given."""

    name: str
    title: str
    grid: tuple[Setting, ...]
    baseline: bool = True


BOTTLENECK = 16
SHARED_CLASSES = 26


# Every variant is tried with the contrastive term and without it, so that the ablation is chosen as freely as the method.
VARIANTS: tuple[tuple[dict, dict], ...] = (
    ({}, {}),
    ({}, {"private_start": "near-global"}),
    ({}, {"combine": "mean"}),
    ({}, {"private_start": "near-global", "combine": "mean"}),
    ({}, {"combine": "gate"}),
    ({"regulariser": "global-loss", "alpha": 0.5}, {}),
)


def _fedmcp(mu: float, algorithm: dict | None = None, adapter: dict | None = None) -> Setting:
    return Setting({"name": "fedmcp", "mu": mu, **(algorithm or {})}, adapter or {})


ARMS: tuple[Arm, ...] = (
    Arm("local", "Local, bottleneck doubled", (Setting({"name": "local"}, {"bottleneck": 2 * BOTTLENECK}),)),
    Arm(
        "fedavg-shared",
        "FedAvg, shared head",
        (Setting({"name": "fedavg"}, head={"sharing": "shared", "classes": SHARED_CLASSES}),),
    ),
    Arm("fedavg", "FedAvg, private heads", (Setting({"name": "fedavg"}),)),
    Arm("fedprox", "FedProx", tuple(Setting({"name": "fedprox", "mu": mu}) for mu in (0.01, 0.1))),
    Arm("moon", "MOON", tuple(Setting({"name": "moon", "mu": mu}) for mu in (0.1, 1.0))),
    Arm("ditto", "Ditto", tuple(Setting({"name": "ditto", "lambda": value}) for value in (0.03, 0.1))),
    Arm(
        "fedmcp-mu0",
        "FedMCP, mu = 0",
        tuple(_fedmcp(0.0, algorithm, adapter) for algorithm, adapter in VARIANTS),
        baseline=False,
    ),
    Arm(
        "fedmcp",
        "FedMCP",
        (
            *(_fedmcp(1.0, algorithm, adapter) for algorithm, adapter in VARIANTS),
            _fedmcp(4.0),
            _fedmcp(1.0, {"tau": 0.1}, {"private_start": "near-global"}),
            _fedmcp(1.0, {"alpha": 1.0}),
            _fedmcp(1.0, {"regulariser": "global-loss", "alpha": 0.5}, {"private_start": "near-global"}),
        ),
        baseline=False,
    ),
)


# FedMCP and its ablation as the selection of the published run chose them, for the comparisons beside the experiment.
SELECTED = {"name": "fedmcp", "mu": 1.0, "alpha": 1.0}
SELECTED_ABLATION = {"name": "fedmcp", "mu": 0.0}
LOCAL = ARMS[0].grid[0]

# What all arms have in common and the grids leave as it is: which layers carry adapters, and the rounds. The first is the experiment's.
SCOPES: tuple[tuple[tuple[int, ...], int], ...] = (
    ((4, 5), 6),
    ((4, 5), 12),
    ((2, 3, 4, 5), 6),
    ((0, 1, 2, 3, 4, 5), 6),
)

# Strengths of the contrastive term: without it, between 0 and 1 where the grid has none, and the selected one.
STRENGTHS: tuple[float, ...] = (0.0, 0.03, 0.1, 0.3, SELECTED["mu"])


@dataclass(frozen=True)
class Comparison:
    """Settings that are compared beside the experiment, on validation rows with the selection's seed. `cases` holds, for each line of the
    table, what stands in its first columns and a setting by arm."""

    name: str
    what: str
    columns: tuple[str, ...]
    cases: tuple[tuple[tuple[str, ...], dict[str, Setting]], ...]


def scoped(layers: tuple[int, ...], rounds: int) -> dict[str, Setting]:
    """Local, FedMCP as selection chose it, and its ablation, in a scope; by arm."""
    common = {"layers": layers}
    count = {"count": rounds}
    return {
        "local": Setting(LOCAL.algorithm, {**LOCAL.adapter, **common}, rounds=count),
        "fedmcp-mu0": Setting(SELECTED_ABLATION, common, rounds=count),
        "fedmcp": Setting(SELECTED, common, rounds=count),
    }


def with_strength(mu: float) -> dict[str, Setting]:
    """Local, and FedMCP as selection chose it but for mu; by arm."""
    return {"local": LOCAL, "fedmcp": Setting({**SELECTED, "mu": mu})}


COMPARISONS: tuple[Comparison, ...] = (
    Comparison(
        "scopes",
        "layers and rounds",
        ("adapters in layers (from 0)", "rounds"),
        tuple(((", ".join(map(str, layers)), str(rounds)), scoped(layers, rounds)) for layers, rounds in SCOPES),
    ),
    Comparison("mu", "strengths of the contrastive term", ("mu",), tuple(((str(mu),), with_strength(mu)) for mu in STRENGTHS)),
)

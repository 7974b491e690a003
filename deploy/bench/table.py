#!/usr/bin/env python3
"""Turns the lines of JSON that coordination.sh collects (standard input) into a table in Markdown."""

from __future__ import annotations

import json
import sys

COLUMNS = (
    ("concord, process", lambda row: row["framework"] == "concord" and row["variant"] == "process"),
    ("concord, power", lambda row: row["framework"] == "concord" and row["variant"] == "power"),
    ("Flower", lambda row: row["framework"] == "flower"),
    ("FLARE", lambda row: row["framework"] == "nvflare"),
)


def cell(row: dict | None) -> str:
    """Wall seconds a round, processor seconds of the server, its peak memory."""
    if row is None:
        return "–"
    if not row.get("ok"):
        return "failed"
    return f"{row['wall_s']:.2f} s, {row['server_cpu_s']:.2f} s, {row['server_peak_rss_mb']:.0f} MB"


def table(rows: list[dict]) -> str:
    """One line for each case, one column for each framework that was measured, and how many times slower the faster peer is."""
    cases: dict[tuple[int, float], dict[str, dict]] = {}
    for row in rows:
        found = cases.setdefault((row["N"], row["model_mb"]), {})
        for name, belongs in COLUMNS:
            if belongs(row):
                found[name] = row
    names = [name for name, _ in COLUMNS if any(name in found for found in cases.values())]
    peers = [name for name in ("Flower", "FLARE") if name in names]
    header = ["silos × MB", *names, *(["faster peer / ours"] if peers else [])]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for (silos, megabytes), found in cases.items():
        cells = [f"{silos} × {megabytes:g}", *(cell(found.get(name)) for name in names)]
        if peers:
            times = [found[name]["wall_s"] for name in peers if found.get(name, {}).get("ok")]
            ours = [found[name]["wall_s"] for name in names[:2] if name in found]
            cells.append(", ".join(f"{min(times) / wall:.1f}" for wall in ours) if times else "–")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    rows = [json.loads(line) for line in sys.stdin if line.strip()]
    print("\nWall seconds of a round (median), processor seconds of the server in it, peak memory of the server:\n")
    print(table(rows))
    return 0 if rows and all(row.get("ok") for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

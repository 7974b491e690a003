#!/usr/bin/env python3
"""Turns the demo's `report.json` into a self-contained `report.html`: no script, nothing loaded from elsewhere.

    report.py target/demo/report.json [report.html]

The JSON, all sizes in bytes and all times in seconds:

    {
      "schema": 1,
      "job": {
        "id": "…", "name": "demo", "algorithm": "fedmcp",
        "backbone": "all-MiniLM-L6-v2", "rounds": 5, "seed": 0,
        "adapter_bytes": 304512,            size of the global adapter, the only thing that travels
        "facts": [["bottleneck", "16"], …], further settings to list, in order
        "started": "2025-01-31T12:00:00Z", "seconds": 181.3
      },
      "silos": [{
        "name": "hospital-1", "task": "spam", "title": "E-mail: spam or ham",
        "metric": "accuracy",               accuracy | macro_f1 | mcc | spearman
        "train_rows": 1000, "test_rows": 1000,

        on the test rows:
        "majority": 0.744,                  accuracy of always the most common class; null for regression and other metrics
        "local": 0.951,                     Local: trained alone, as many parameters; null if it was not run
        "final": 0.966,                     the federation's model after the last round

        on the validation rows:
        "rounds": [0.93, 0.95, …],          the federation's model after round 1, 2, …; null where a round was missed
        "local_rounds": [0.91, …],          Local after as many epochs; may be left out
        "majority_validation": 0.751,       may be left out

        "bytes_up": 1522560, "bytes_down": 1522560, "seconds": 140.2,
        "peak_rss_bytes": 412000000         of the silo's daemon; may be left out
      }, …],
      "server": {"peak_rss_bytes": 31457280, "libtorch_mapped": false}
    }
"""

from __future__ import annotations

import argparse
import html
import json
import sys
from pathlib import Path
from typing import Any, Optional

import svg
from svg import DotRow, Mark, Reference, Series

SCHEMA = 1
METRICS = {"accuracy": "accuracy", "macro_f1": "macro-F1", "mcc": "MCC", "spearman": "Spearman"}
JOB_KEYS = {"id": str, "name": str, "algorithm": str, "backbone": str, "rounds": int, "seconds": (int, float)}
SILO_KEYS = {
    "name": str,
    "task": str,
    "title": str,
    "metric": str,
    "final": (int, float),
    "rounds": list,
    "bytes_up": int,
    "bytes_down": int,
}


class ReportError(Exception):
    """A report.json that does not follow the schema; the text names the key."""


def check(report: Any) -> dict[str, Any]:
    """The report itself if it follows the schema above."""
    if not isinstance(report, dict) or report.get("schema") != SCHEMA:
        raise ReportError(f"schema: expected {SCHEMA}, got {report.get('schema') if isinstance(report, dict) else report!r}")
    _keys(report.get("job"), JOB_KEYS, "job")
    silos = report.get("silos")
    if not isinstance(silos, list) or not silos:
        raise ReportError("silos: expected a list of at least one")
    for index, silo in enumerate(silos):
        _keys(silo, SILO_KEYS, f"silos[{index}]")
        if silo["metric"] not in METRICS:
            raise ReportError(f"silos[{index}].metric: {silo['metric']!r} is none of {', '.join(METRICS)}")
        if all(value is None for value in silo["rounds"]):
            raise ReportError(f"silos[{index}].rounds: no round has a value")
    _keys(report.get("server"), {"peak_rss_bytes": int}, "server")
    return report


def _keys(part: Any, keys: dict[str, Any], where: str) -> None:
    if not isinstance(part, dict):
        raise ReportError(f"{where}: missing")
    for key, kind in keys.items():
        if not isinstance(part.get(key), kind):
            raise ReportError(f"{where}.{key}: missing or of the wrong kind: {part.get(key)!r}")


def metric_text(silo: dict[str, Any], value: Optional[float]) -> str:
    """A metric for people: shares in per cent, correlations as they are; a dash for nothing."""
    if value is None:
        return "–"
    return svg.percent(value) if silo["metric"] in ("accuracy", "macro_f1") else f"{value:.3f}"


def gain_of(silo: dict[str, Any]) -> Optional[float]:
    """Points (hundredths) that the federation's model is better than Local on the test rows."""
    local = silo.get("local")
    return None if local is None else (silo["final"] - local) * 100


def signed(points: Optional[float]) -> str:
    """A difference with its sign, a true minus; a dash for nothing."""
    if points is None:
        return "–"
    return f"{points:+.1f}".replace("-", "\u2212")


def bytes_text(count: float) -> str:
    """A size in decimal units."""
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def seconds_text(seconds: float) -> str:
    """A duration: seconds below two minutes, else minutes and seconds."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    return f"{whole} s" if whole < 120 else f"{whole // 60} min {whole % 60:02d} s"


def count_word(count: int) -> str:
    """A small number as a capitalised word, a large one in figures."""
    words = "One Two Three Four Five Six Seven Eight Nine Ten Eleven Twelve".split()
    return words[count - 1] if 1 <= count <= len(words) else str(count)


def mean(values: list[float]) -> Optional[float]:
    """The mean; None of nothing."""
    return sum(values) / len(values) if values else None


PAGE_STYLE = """
:root { color-scheme: light dark; --ink:#1f2733; --muted:#6b7480; --line:#e3e6ea; --paper:#ffffff; --ground:#f6f7f9; --good:#2d7a4b; --bad:#a4502f; }
@media (prefers-color-scheme: dark) { :root { --ink:#e3e8ee; --muted:#97a1ad; --line:#2a313a; --paper:#171c22; --ground:#101419; --good:#7cc596; --bad:#e09a78; } }
* { box-sizing:border-box; }
body { margin:0; background:var(--ground); color:var(--ink); font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif; }
main { max-width:1080px; margin:0 auto; padding:48px 28px 72px; }
h1 { font-size:29px; line-height:1.2; font-weight:650; letter-spacing:-.015em; margin:0 0 8px; }
h2 { font-size:17px; font-weight:650; letter-spacing:-.005em; margin:44px 0 4px; }
p { margin:6px 0 12px; max-width:72ch; }
.lead { color:var(--muted); font-size:16px; margin:0 0 28px; }
.note { color:var(--muted); font-size:13.5px; margin:2px 0 16px; max-width:none; }
.tiles { display:grid; grid-template-columns:repeat(auto-fit,minmax(150px,1fr)); gap:1px; background:var(--line); border:1px solid var(--line); border-radius:12px; overflow:hidden; }
.tile { background:var(--paper); padding:16px 18px 14px; }
.tile b { display:block; font-size:23px; font-weight:620; letter-spacing:-.015em; font-variant-numeric:tabular-nums; }
.tile span { color:var(--muted); font-size:12.5px; line-height:1.35; display:block; }
.card { background:var(--paper); border:1px solid var(--line); border-radius:12px; padding:20px 22px; overflow-x:auto; }
.overview svg.plot { min-width:680px; }
.multiples { display:grid; grid-template-columns:repeat(auto-fill,minmax(310px,1fr)); gap:14px; }
.multiples .card { padding:16px 16px 12px; }
table { border-collapse:collapse; width:100%; font-variant-numeric:tabular-nums; font-size:14px; }
th { text-align:right; font-weight:550; color:var(--muted); font-size:12.5px; padding:2px 0 8px 18px; border-bottom:1px solid var(--line); vertical-align:bottom; white-space:nowrap; }
td { text-align:right; padding:9px 0 9px 18px; border-bottom:1px solid var(--line); white-space:nowrap; }
th:first-child, td:first-child { text-align:left; padding-left:0; white-space:normal; min-width:170px; }
tbody tr:last-child td { border-bottom:0; }
tfoot td { border-top:1px solid var(--line); border-bottom:0; color:var(--muted); }
td small { display:block; color:var(--muted); font-size:12px; }
td.main { font-weight:650; }
.up { color:var(--good); } .down { color:var(--bad); }
dl { display:grid; grid-template-columns:max-content 1fr; gap:4px 22px; margin:6px 0; font-size:14px; }
dt { color:var(--muted); } dd { margin:0; overflow-wrap:anywhere; }
footer { color:var(--muted); font-size:13px; margin-top:44px; }
@media print { body { background:none; } .card, .tiles { break-inside:avoid; } main { padding:0; } }
"""


def _tile(value: str, words: str) -> str:
    return f'<div class="tile"><b>{html.escape(value)}</b><span>{html.escape(words)}</span></div>'


def _tiles(report: dict[str, Any], name: str) -> str:
    silos = report["silos"]
    gains = [gain for gain in map(gain_of, silos) if gain is not None]
    better = sum(gain > 0 for gain in gains)
    sent = sum(silo["bytes_up"] for silo in silos)
    received = sum(silo["bytes_down"] for silo in silos)
    tiles = []
    if gains:
        tiles.append(_tile(signed(mean(gains)), f"points that {name} gains over Local, on average"))
        tiles.append(_tile(f"{better} of {len(gains)}", "silos better than alone"))
    tiles.append(_tile(bytes_text(sent), "left the silos, all global-adapter tensors"))
    tiles.append(_tile(bytes_text(received), "came into the silos"))
    tiles.append(_tile(bytes_text(report["server"]["peak_rss_bytes"]), "server memory at its peak"))
    tiles.append(_tile(seconds_text(report["job"]["seconds"]), f"for {report['job']['rounds']} rounds"))
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _overview(silos: list[dict[str, Any]], name: str) -> str:
    rows = []
    for silo in silos:
        marks = []
        if silo.get("majority") is not None:
            marks.append(Mark(silo["majority"], colour="plain", hollow=True))
        if silo.get("local") is not None:
            marks.append(Mark(silo["local"], colour="c1"))
        marks.append(Mark(silo["final"], colour="c0"))
        gain = gain_of(silo)
        rows.append(DotRow(silo["title"], marks, signed(gain) if gain is not None else "", spanned=True))
    legend = [("Majority class", Mark(0, colour="plain", hollow=True)), ("Local", Mark(0, colour="c1")), (name, Mark(0))]
    top = max(mark.value for row in rows for mark in row.marks)
    lowest = min(mark.value for row in rows for mark in row.marks)
    plot = svg.dot_plot(rows, legend=legend, x_range=(min(0.0, lowest), max(1.0, top)), width=1010, row_height=34)
    return f'<div class="card overview">{plot}</div>'


def _multiples(silos: list[dict[str, Any]], name: str) -> str:
    cards = []
    for silo in silos:
        references = []
        if silo.get("majority_validation") is not None:
            references.append(Reference("Majority", silo["majority_validation"], "plain", "dotted"))
        series = [Series(name, list(range(1, len(silo["rounds"]) + 1)), silo["rounds"])]
        if any(value is not None for value in silo.get("local_rounds", [])):
            local = silo["local_rounds"]
            series.insert(0, Series("Local", list(range(1, len(local) + 1)), local, colour="c1"))
        plot = svg.line_plot(
            series,
            title=silo["title"],
            subtitle=f"{silo['name']} · {METRICS[silo['metric']]}",
            references=references,
            show=lambda value, silo=silo: metric_text(silo, value),
            width=326,
            height=232,
        )
        cards.append(f'<div class="card">{plot}</div>')
    return f'<div class="multiples">{"".join(cards)}</div>'


def _cell(text: str, classes: str = "") -> str:
    return f'<td class="{classes}">{text}</td>' if classes else f"<td>{text}</td>"


def _table(silos: list[dict[str, Any]], name: str) -> str:
    heads = ("Silo", "Metric", "Rows to train / test", "Majority", "Local", html.escape(name), "Gain", "Sent", "Received", "Time")
    body = []
    for silo in silos:
        gain = gain_of(silo)
        trend = "" if gain is None or abs(gain) < 0.05 else "up" if gain > 0 else "down"
        rows = f"{silo['train_rows']:,} / {silo['test_rows']:,}" if "train_rows" in silo and "test_rows" in silo else "–"
        cells = [
            _cell(f"{html.escape(silo['title'])}<small>{html.escape(silo['name'])}</small>"),
            _cell(METRICS[silo["metric"]]),
            _cell(rows),
            _cell(metric_text(silo, silo.get("majority"))),
            _cell(metric_text(silo, silo.get("local"))),
            _cell(metric_text(silo, silo["final"]), "main"),
            _cell(signed(gain), trend),
            _cell(bytes_text(silo["bytes_up"])),
            _cell(bytes_text(silo["bytes_down"])),
            _cell(seconds_text(silo["seconds"]) if silo.get("seconds") is not None else "–"),
        ]
        body.append(f"<tr>{''.join(cells)}</tr>")
    gains = [gain for gain in map(gain_of, silos) if gain is not None]
    foot = [_cell("All silos")] + [_cell("")] * 5 + [_cell(signed(mean(gains)))]
    foot += [_cell(bytes_text(sum(silo[key] for silo in silos))) for key in ("bytes_up", "bytes_down")] + [_cell("")]
    return (
        f'<div class="card"><table><thead><tr>{"".join(f"<th>{head}</th>" for head in heads)}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody><tfoot><tr>{''.join(foot)}</tr></tfoot></table></div>"
    )


def _facts(report: dict[str, Any]) -> str:
    job, server = report["job"], report["server"]
    facts = [("job", f"{job['name']} ({job['id']})"), ("algorithm", job["algorithm"]), ("backbone", job["backbone"])]
    facts += [("rounds", str(job["rounds"]))]
    if "adapter_bytes" in job:
        facts.append(("global adapter", bytes_text(job["adapter_bytes"])))
    if "seed" in job:
        facts.append(("seed", str(job["seed"])))
    facts += [(str(key), str(value)) for key, value in job.get("facts", [])]
    memory = [silo["peak_rss_bytes"] for silo in report["silos"] if silo.get("peak_rss_bytes")]
    if memory:
        facts.append(("largest silo daemon", f"{bytes_text(max(memory))} at its peak"))
    if "libtorch_mapped" in server:
        facts.append(("libtorch in the server", "mapped" if server["libtorch_mapped"] else "not mapped"))
    if "started" in job:
        facts.append(("started", job["started"]))
    rows = "".join(f"<dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd>" for key, value in facts)
    return f'<div class="card"><dl>{rows}</dl></div>'


def _test_rows(silos: list[dict[str, Any]]) -> str:
    counts = sorted({silo["test_rows"] for silo in silos if "test_rows" in silo})
    if not counts:
        return ""
    return f" on {counts[0]:,} test rows" if len(counts) == 1 else f" on {counts[0]:,} to {counts[-1]:,} test rows"


def render(report: Any) -> str:
    """The page for a report that follows the schema; raises ReportError if it does not."""
    checked = check(report)
    silos, job = checked["silos"], checked["job"]
    name = {"fedmcp": "FedMCP", "fedavg": "FedAvg", "fedprox": "FedProx", "moon": "MOON", "ditto": "Ditto", "fedrep": "FedRep"}.get(
        job["algorithm"], job["algorithm"]
    )
    name_html = html.escape(name)
    heading = f"{count_word(len(silos))} silo{'' if len(silos) == 1 else 's'}, one shared adapter"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Concord: {html.escape(job["name"])}</title>
<style>{PAGE_STYLE}{svg.STYLE}</style>
</head>
<body>
<main>
<h1>{heading}</h1>
<p class="lead">Each silo fine-tuned {html.escape(job["backbone"])} on a task and data of its own. What they shared, over mutual
TLS, was one small adapter; data, private adapters and heads stayed at home.</p>
{_tiles(checked, name)}

<h2>With and without the federation</h2>
<p class="note">On the test rows, after the last round; the figure on the right is the gain over Local, in points.</p>
{_overview(silos, name)}

<h2>Round by round</h2>
<p class="note">On the validation rows, after each aggregation. Every panel has a scale of its own.</p>
{_multiples(silos, name)}

<h2>The figures</h2>
<p class="note">On the test rows; accuracy and macro-F1 in per cent. Sent and received: adapter payload over all rounds.</p>
{_table(silos, name)}

<h2>How to read this</h2>
<p><b>Majority</b> answers with the most common class of the test rows: what a model that learned nothing reaches.
<b>Local</b> is the same backbone trained by the silo alone, with as many trainable parameters.
<b>{name_html}</b> is the silo's personal model: global adapter, private adapter and head. It is scored with the global
adapter as it came back from the server.</p>
<p>The plots show validation rows, the table test rows, which were looked at once, at the end.</p>
<p>One run with one seed{_test_rows(silos)}: differences below one or two points are noise. What the method is
worth over several seeds and against other methods stands in <code>docs/experiments.md</code>.</p>

<h2>The run</h2>
{_facts(checked)}
<footer>Written by Concord's demo. This page loads nothing and runs no script.</footer>
</main>
</body>
</html>
"""


def write(report: Any, path: Path) -> None:
    """Renders `report` to `path`, whole or not at all."""
    page = render(report)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)


def main(arguments: Optional[list[str]] = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Turn the demo's report.json into a self-contained page.")
    parser.add_argument("json", type=Path, help="the report to read")
    parser.add_argument("html", type=Path, nargs="?", help="the page to write (default: beside it)")
    options = parser.parse_args(arguments)
    goal = options.html or options.json.with_suffix(".html")
    try:
        write(json.loads(options.json.read_text(encoding="utf-8")), goal)
    except (ReportError, OSError, ValueError) as error:
        print(f"report: error: {options.json}: {error}", file=sys.stderr)
        return 1
    print(f"report: {goal}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

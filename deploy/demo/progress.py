"""What the demo shows while it runs: a headline, one bar a silo, and at the end a table. Pure text, then one small writer."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import IO, Any, Optional, Sequence

import report


@dataclass(frozen=True)
class SiloLine:
    """One silo's bar. `state`: a word such as "training"; `value`: its newest metric, None before the first; `part`: how
    much of the round after `done` is done, from 0 to 1."""

    title: str
    done: int
    total: int
    state: str
    metric: str = "accuracy"
    value: Optional[float] = None
    history: tuple[Optional[float], ...] = ()
    part: float = 0.0


def bar(done: float, total: int, width: int) -> str:
    """A bar of `width` cells, full for `done` of `total`."""
    full = 0 if total <= 0 else max(0, min(width, round(width * done / total)))
    return "█" * full + "░" * (width - full)


def spark(values: Sequence[Optional[float]]) -> str:
    """A sparkline of the values between their own least and most; a space where there is none."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    low, span = min(known), (max(known) - min(known)) or 1.0
    return "".join(" " if v is None else "▁▂▃▄▅▆▇█"[min(7, int((v - low) / span * 7.999))] for v in values)


def clock(seconds: float) -> str:
    """Elapsed time as 3:07."""
    whole = int(seconds)
    return f"{whole // 60}:{whole % 60:02d}"


def cut(text: str, width: int) -> str:
    """The text, shortened with an ellipsis if it is wider."""
    return text if len(text) <= width else text[: max(0, width - 1)] + "…"


def frame(headline: str, elapsed: float, silos: Sequence[SiloLine], width: int = 100) -> list[str]:
    """The lines of one moment, none wider than `width`."""
    label = min(36, max((len(silo.title) for silo in silos), default=0))
    cells = max(8, min(30, width - label - 47))
    lines = [cut(f"{headline}   {clock(elapsed)}", width), ""]
    for silo in silos:
        value = ""
        if silo.value is not None:
            shown = report.metric_text({"metric": silo.metric}, silo.value)
            value = f"{report.METRICS[silo.metric]} {shown}  {spark(silo.history)}"
        count = f"{silo.done}/{silo.total}"
        line = f"  {cut(silo.title, label):<{label}}  {bar(silo.done + silo.part, silo.total, cells)}  {count:>5}  {silo.state:<11} {value}"
        lines.append(cut(line.rstrip(), width))
    return lines


def table(finished: dict[str, Any]) -> list[str]:
    """The result of a report.json as lines of text."""
    heads = ["silo", "metric", "majority", "local", "federated", "gain", "sent", "received", "time"]
    rows = []
    for silo in finished["silos"]:
        rows.append(
            [
                silo["title"],
                report.METRICS[silo["metric"]],
                report.metric_text(silo, silo.get("majority")),
                report.metric_text(silo, silo.get("local")),
                report.metric_text(silo, silo["final"]),
                report.signed(report.gain_of(silo)),
                report.bytes_text(silo["bytes_up"]),
                report.bytes_text(silo["bytes_down"]),
                report.seconds_text(silo["seconds"]) if silo.get("seconds") is not None else "–",
            ]
        )
    widths = [max(len(row[column]) for row in [heads, *rows]) for column in range(len(heads))]

    def line(cells: Sequence[str]) -> str:
        left = f"{cells[0]:<{widths[0]}}  {cells[1]:<{widths[1]}}"
        return left + "".join(f"  {cell:>{width}}" for cell, width in zip(cells[2:], widths[2:]))

    ruled = line(heads)
    lines = [ruled, "─" * len(ruled), *map(line, rows)]
    gains = [gain for gain in map(report.gain_of, finished["silos"]) if gain is not None]
    lines.append("")
    if gains:
        lines.append(f"mean gain over Local: {report.signed(report.mean(gains))} points (one seed: read it as a demonstration)")
    server = finished["server"]
    mapped = {True: ", libtorch mapped", False: ", no libtorch mapped"}.get(server.get("libtorch_mapped"), "")
    lines.append(f"server memory at its peak: {report.bytes_text(server['peak_rss_bytes'])}{mapped}")
    daemons = [silo["peak_rss_bytes"] for silo in finished["silos"] if silo.get("peak_rss_bytes")]
    if daemons:
        lines.append(f"largest silo daemon at its peak: {report.bytes_text(max(daemons))}")
    return lines


class Screen:
    """Shows frames: drawn over one another on a terminal; elsewhere one for each headline, and the last one."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._live = stream.isatty()
        self._drawn = 0
        self._headline: Optional[str] = None
        self._unseen: list[str] = []

    def say(self, text: str) -> None:
        """A line that stays."""
        self._clear()
        print(text, file=self._stream, flush=True)

    def show(self, headline: str, elapsed: float, silos: Sequence[SiloLine]) -> None:
        """The newest frame."""
        lines = frame(headline, elapsed, silos, shutil.get_terminal_size().columns - 1 if self._live else 100)
        if self._live:
            self._clear()
            print("\n".join(lines), file=self._stream, flush=True)
            self._drawn = len(lines)
        elif headline != self._headline:
            self._headline, self._unseen = headline, []
            print("\n".join(lines), file=self._stream, flush=True)
        else:
            self._unseen = lines

    def _clear(self) -> None:
        if self._drawn:
            # Up to the first line of the last frame, then erase to the end of the screen.
            self._stream.write(f"\x1b[{self._drawn}F\x1b[J")
            self._drawn = 0

    def keep(self) -> None:
        """Leaves the last frame on the screen."""
        self._drawn = 0
        if self._unseen:
            print("\n".join(self._unseen), file=self._stream, flush=True)
            self._unseen = []

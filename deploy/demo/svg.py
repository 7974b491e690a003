"""Small plots as SVG text: lines with confidence bands, and dots with whiskers. Standard library only.

A plot is a string that holds one `<svg>` element. Put it into an HTML page that contains `STYLE` (report.py does), or
pass it through `standalone` to write a file of its own, which also looks right as an image in a Markdown page. Colours
come from CSS classes, so both follow the reader's light or dark setting. Nothing refers to anything outside.

    plot = line_plot([Series("FedMCP", [1, 2, 3], [.71, .74, .76], low=[...], high=[...])], title="Spam")
    pathlib.Path("spam.svg").write_text(standalone(plot))
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Callable, Optional, Sequence
from xml.sax.saxutils import escape, quoteattr

Number = Optional[float]

# Colours `c0`.. are series in order; `ref0` (dotted) and `ref1` (dashed) are reference lines.
STYLE = """
svg.plot { --ink:#1f2733; --muted:#6b7480; --grid:#e7eaee; --axis:#c3c9d1; --paper:#ffffff;
  --c0:#1f6f8b; --c1:#c4792b; --c2:#6a5aa8; --c3:#4c8a55; --c4:#b4506b; --c5:#7c6f5a; --c6:#3d6fb6; --c7:#8a8f2f; --plain:#98a1ac;
  font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif; font-size:11px;
  font-variant-numeric:tabular-nums; display:block; max-width:100%; height:auto; }
@media (prefers-color-scheme: dark) { svg.plot { --ink:#e3e8ee; --muted:#97a1ad; --grid:#2a313a; --axis:#454e59; --paper:#171c22;
  --c0:#63b4d0; --c1:#e0a561; --c2:#a79bdc; --c3:#86c08e; --c4:#de8aa2; --c5:#b5a88f; --c6:#86aee6; --c7:#c3c76a; --plain:#7d8792; } }
svg.plot text { fill:var(--muted); }
svg.plot .title { fill:var(--ink); font-size:13px; font-weight:600; }
svg.plot .strong { fill:var(--ink); font-weight:600; }
svg.plot .row { fill:var(--ink); font-size:12px; }
svg.plot .grid { stroke:var(--grid); stroke-width:1; }
svg.plot .axis { stroke:var(--axis); stroke-width:1; }
svg.plot .line { fill:none; stroke:currentColor; stroke-width:2; stroke-linejoin:round; stroke-linecap:round; }
svg.plot .band { fill:currentColor; opacity:.14; stroke:none; }
svg.plot .dot { fill:currentColor; stroke:var(--paper); stroke-width:1.5; }
svg.plot .ring { fill:var(--paper); stroke:currentColor; stroke-width:1.75; }
svg.plot .whisker { stroke:currentColor; stroke-width:1.5; stroke-linecap:round; }
svg.plot .span { stroke:var(--grid); stroke-width:5; stroke-linecap:round; }
svg.plot .ref { stroke:currentColor; stroke-width:1.25; }
svg.plot .ref.dotted { stroke-dasharray:1 4; stroke-linecap:round; }
svg.plot .ref.dashed { stroke-dasharray:6 4; }
svg.plot .label { fill:currentColor; }
svg.plot .c0 { color:var(--c0); } svg.plot .c1 { color:var(--c1); } svg.plot .c2 { color:var(--c2); }
svg.plot .c3 { color:var(--c3); } svg.plot .c4 { color:var(--c4); } svg.plot .c5 { color:var(--c5); }
svg.plot .c6 { color:var(--c6); } svg.plot .c7 { color:var(--c7); } svg.plot .plain { color:var(--plain); }
"""


def percent(value: float) -> str:
    """0.853 as "85.3"."""
    return f"{value * 100:.1f}".replace("-", "\u2212")


def plain_number(value: float) -> str:
    """A number with as many digits as it needs, at most three after the point."""
    return f"{value:.3f}".rstrip("0").rstrip(".").replace("-", "\u2212")


@dataclass(frozen=True)
class Series:
    """One line: `ys` over `xs`, None where nothing was measured; `low` and `high` bound a band (a confidence interval)."""

    name: str
    xs: Sequence[float]
    ys: Sequence[Number]
    low: Sequence[Number] = ()
    high: Sequence[Number] = ()
    colour: str = "c0"


@dataclass(frozen=True)
class Reference:
    """A horizontal line of a line plot, or the vertical one of a dot plot: a value to compare with."""

    name: str
    value: float
    colour: str = "plain"
    dash: str = "dotted"


@dataclass(frozen=True)
class Mark:
    """One dot of a row, with the ends of its whisker if it has one. `hollow` draws a ring."""

    value: float
    low: Number = None
    high: Number = None
    colour: str = "c0"
    hollow: bool = False


@dataclass(frozen=True)
class DotRow:
    """A labelled row of a dot plot. `note` is written at its right end; `spanned` joins its outermost dots."""

    label: str
    marks: Sequence[Mark] = field(default_factory=tuple)
    note: str = ""
    spanned: bool = False


def nice_ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten apart) that enclose the range; roughly `about` steps."""
    if not (math.isfinite(low) and math.isfinite(high)) or high < low:
        raise ValueError(f"no range: {low} to {high}")
    if high - low < 1e-9:
        pad = max(abs(low) * 0.05, 0.01)
        low, high = low - pad, high + pad
    rough = (high - low) / max(about, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def spread(places: Sequence[float], gap: float, top: float, bottom: float) -> list[float]:
    """Moves label positions apart until neighbours are `gap` apart, in their order and within top..bottom if they fit."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    moved = [min(max(places[index], top), bottom) for index in order]
    for _ in range(60):
        for one in range(len(moved) - 1):
            lack = gap - (moved[one + 1] - moved[one])
            if lack > 1e-9:
                moved[one] -= lack / 2
                moved[one + 1] += lack / 2
        if moved and moved[0] < top:
            moved = [place + top - moved[0] for place in moved] if moved[-1] + top - moved[0] <= bottom else moved
        if moved and moved[-1] > bottom:
            moved = [place - (moved[-1] - bottom) for place in moved]
    result = [0.0] * len(places)
    for index, place in zip(order, moved):
        result[index] = place
    return result


def tick_texts(ticks: Sequence[float], show: Callable[[float], str]) -> list[str]:
    """The labels of an axis, without a ".0" that all of them carry."""
    texts = [show(tick) for tick in ticks]
    while all("." in text and text[-1] in "0." for text in texts):
        texts = [text[:-1] for text in texts]
    return texts


def text_width(text: str, size: float = 11) -> float:
    """A rough upper estimate of the width of a text in a system font, in pixels."""
    return sum(0.34 if c in "ijl.,:;'|! " else 0.95 if c in "mwMW%@" else 0.72 if c.isupper() else 0.63 for c in text) * size


def standalone(plot: str) -> str:
    """The plot as a complete SVG file with its style inside."""
    start = plot.index(">") + 1
    return f'{plot[:start]}<style>{STYLE}</style>{plot[start:]}\n'


def _text(x: float, y: float, words: str, classes: str = "", anchor: str = "start") -> str:
    named = f' class="{classes}"' if classes else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{named} text-anchor="{anchor}">{escape(words)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, classes: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{classes}"/>'


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" role="img" aria-label={quoteattr(label)} '
        f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}">{"".join(parts)}</svg>'
    )


def _runs(xs: Sequence[float], ys: Sequence[Number]) -> list[list[tuple[float, float]]]:
    """The stretches of a line between gaps."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(xs, ys):
        if y is None:
            runs.append([])
        else:
            runs[-1].append((x, y))
    return [run for run in runs if run]


def line_plot(
    series: Sequence[Series],
    *,
    title: str = "",
    subtitle: str = "",
    x_label: str = "round",
    references: Sequence[Reference] = (),
    show: Callable[[float], str] = percent,
    y_range: Optional[tuple[float, float]] = None,
    width: float = 320,
    height: float = 210,
) -> str:
    """Lines over a common x axis, every line and reference labelled with name and last value at the right edge."""
    values = [v for s in series for line in (s.ys, s.low, s.high) for v in line if v is not None]
    values += [reference.value for reference in references]
    xs = sorted({x for s in series for x in s.xs})
    if not values or not xs:
        raise ValueError(f"{title or 'a plot'}: nothing to draw")
    low, high = y_range or (min(values), max(values))
    if y_range is None:  # room below the lowest line, but no negative axis for shares
        low = max(low - 0.06 * (high - low), min(low, 0.0))
    ticks = nice_ticks(low, high)
    named_ticks = tick_texts(ticks, show)
    bottom_value, top_value = ticks[0], ticks[-1]

    labels = [(s.name, next(y for y in reversed(s.ys) if y is not None), s.colour, True) for s in series if _runs(s.xs, s.ys)]
    labels += [(reference.name, reference.value, reference.colour, False) for reference in references]
    right = 10 + max(text_width(f"{name} {show(value)}", 12 if strong else 11) for name, value, _, strong in labels)
    left = 10 + max(map(text_width, named_ticks))
    top = 18 + (18 if title else 0) + (15 if subtitle else 0)
    bottom = height - 34
    span = (xs[-1] - xs[0]) or 1.0
    inner = width - left - right - 12

    def place_x(x: float) -> float:
        return left + 6 + (inner * (x - xs[0]) / span if xs[-1] > xs[0] else inner / 2)

    def place_y(y: float) -> float:
        return bottom - (bottom - top) * (y - bottom_value) / (top_value - bottom_value)

    parts: list[str] = []
    if title:
        parts.append(_text(0, 14, title, "title"))
    if subtitle:
        parts.append(_text(0, 31, subtitle))
    for tick, named in zip(ticks, named_ticks):
        parts.append(_line(left, place_y(tick), width - right, place_y(tick), "grid"))
        parts.append(_text(left - 6, place_y(tick) + 3.5, named, "", "end"))
    # Whole numbers on the x axis, thinned so that they do not touch; the last one always stands.
    every = max(1, math.ceil(len(xs) * (text_width(plain_number(xs[-1])) + 8) / max(inner, 1)))
    for index, x in enumerate(xs):
        if (len(xs) - 1 - index) % every == 0:
            parts.append(_text(place_x(x), bottom + 16, plain_number(x), "", "middle"))
    parts.append(_text((left + width - right) / 2, height - 3, x_label, "", "middle"))
    parts.append(_line(left, bottom, width - right, bottom, "axis"))

    for reference in references:
        y = place_y(reference.value)
        parts.append(f'<g class="{reference.colour}">{_line(left, y, width - right, y, f"ref {reference.dash}")}</g>')
    for s in series:
        drawn = []
        if s.low and s.high:
            kept = [(x, l, h) for x, l, h in zip(s.xs, s.low, s.high) if l is not None and h is not None]
            outline = [(x, h) for x, _, h in kept] + [(x, l) for x, l, _ in reversed(kept)]
            if len(kept) > 1:
                points = " ".join(f"{place_x(x):.1f},{place_y(y):.1f}" for x, y in outline)
                drawn.append(f'<polygon points="{points}" class="band"/>')
        runs = _runs(s.xs, s.ys)
        for run in runs:
            points = " ".join(f"{place_x(x):.1f},{place_y(y):.1f}" for x, y in run)
            if len(run) > 1:
                drawn.append(f'<polyline points="{points}" class="line"/>')
            for x, y in run:
                radius = 4.25 if (x, y) == runs[-1][-1] else 3.25
                told = f"{s.name}, {x_label} {plain_number(x)}: {show(y)}"
                drawn.append(
                    f'<circle cx="{place_x(x):.1f}" cy="{place_y(y):.1f}" r="{radius}" class="dot"><title>{escape(told)}</title></circle>'
                )
        parts.append(f'<g class="{s.colour}">{"".join(drawn)}</g>')

    places = spread([place_y(value) + 3.5 for _, value, _, _ in labels], 13, top, bottom + 3.5)
    for (name, value, colour, strong), y in zip(labels, places):
        weight = ' font-weight="600"' if strong else ""
        parts.append(f'<g class="{colour}"{weight}>{_text(width - right + 8, y, f"{name} {show(value)}", "label")}</g>')
    return _svg(width, height, title or ", ".join(s.name for s in series), parts)


def dot_plot(
    rows: Sequence[DotRow],
    *,
    title: str = "",
    x_label: str = "",
    reference: Optional[Reference] = None,
    legend: Sequence[tuple[str, Mark]] = (),
    show: Callable[[float], str] = percent,
    x_range: Optional[tuple[float, float]] = None,
    width: float = 680,
    row_height: float = 30,
) -> str:
    """Labelled rows of dots with whiskers over one x axis; `legend` names the kinds of dots (their values are not used)."""
    values = [v for row in rows for mark in row.marks for v in (mark.value, mark.low, mark.high) if v is not None]
    values += [reference.value] if reference else []
    if not values:
        raise ValueError(f"{title or 'a plot'}: nothing to draw")
    ticks = nice_ticks(*(x_range or (min(values), max(values))), about=6)
    left = 16 + max(text_width(row.label, 12) for row in rows)
    notes = max(text_width(row.note, 12) for row in rows)
    right = 12 + (notes + 12 if notes else 0)
    top = (24 if title else 4) + (24 if legend else 0) + 4
    bottom = top + row_height * len(rows)
    height = bottom + 20 + (18 if x_label else 0)

    def place(value: float) -> float:
        return left + (width - left - right) * (value - ticks[0]) / (ticks[-1] - ticks[0])

    def drawn(mark: Mark, x: float, y: float) -> str:
        kind = "ring" if mark.hollow else "dot"
        return f'<g class="{mark.colour}"><circle cx="{x:.1f}" cy="{y:.1f}" r="5" class="{kind}"/></g>'

    parts: list[str] = [_text(0, 14, title, "title")] if title else []
    x = left
    for name, mark in legend:
        y = 36 if title else 14
        parts.append(drawn(mark, x + 5, y))
        parts.append(_text(x + 15, y + 3.5, name))
        x += 34 + text_width(name)
    for tick, named in zip(ticks, tick_texts(ticks, show)):
        parts.append(_line(place(tick), top, place(tick), bottom, "grid"))
        parts.append(_text(place(tick), bottom + 15, named, "", "middle"))
    if reference:
        where = place(reference.value)
        parts.append(f'<g class="{reference.colour}">{_line(where, top, where, bottom, f"ref {reference.dash}")}</g>')
    for index, row in enumerate(rows):
        y = top + row_height * (index + 0.5)
        parts.append(_text(0, y + 4, row.label, "row"))
        if row.spanned and len(row.marks) > 1:
            ends = [place(mark.value) for mark in row.marks]
            parts.append(_line(min(ends), y, max(ends), y, "span"))
        for mark in row.marks:
            if mark.low is not None and mark.high is not None:
                whisker = _line(place(mark.low), y, place(mark.high), y, "whisker")
                ends = "".join(_line(place(v), y - 4, place(v), y + 4, "whisker") for v in (mark.low, mark.high))
                parts.append(f'<g class="{mark.colour}">{whisker}{ends}</g>')
        parts += [drawn(mark, place(mark.value), y) for mark in row.marks]
        if row.note:
            parts.append(_text(width, y + 4, row.note, "strong", "end"))
    if x_label:
        parts.append(_text((left + width - right) / 2, height - 4, x_label, "", "middle"))
    return _svg(width, height, title or x_label or "dot plot", parts)

"""A run's result as one HTML page that needs nothing else: tables, and plots as inline SVG."""

import html
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Final

WIDTH, HEIGHT, LEFT, BOTTOM = 720, 220, 60, 30
COLOURS: Final = ("#1b6ca8", "#c0392b", "#27ae60", "#8e44ad", "#d68910", "#566573")
STATES: Final = ("creating", "starting", "ready", "ending", "ended", "failed")
MIB: Final = 1 << 20
Points = Sequence[tuple[float, float]]

_STYLE: Final = (
    "body{font:15px sans-serif;max-width:46em;margin:2em auto;color:#222}"
    "table{border-collapse:collapse}td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #ddd}"
    "th:first-child,td:first-child{text-align:left}svg{width:100%}"
)


def page(result: Mapping[str, Any]) -> str:
    """The page of what ``Run.result`` gave."""
    scenario = result["scenario"]
    title = html.escape(f"{scenario['vms']} VMs, {scenario['vmm']}")
    samples: list[Mapping[str, Any]] = result["samples"]
    states = {state: [(row["seconds"], row[state]) for row in samples] for state in STATES}
    processors = {
        "manager": [(row["seconds"], row["manager_cpu"]) for row in samples],
        "VMMs": _rates([(row["seconds"], row["vmm_cpu_seconds"]) for row in samples]),
    }
    memory = {
        "manager": [(row["seconds"], row["manager_rss"] / MIB) for row in samples],
        "VMMs": [(row["seconds"], row["vmm_rss"] / MIB) for row in samples],
    }
    curves = {
        name.replace("_", " "): [(1000 * seconds, share) for seconds, share in curve]
        for name, curve in result["curves"].items()
        if curve
    }
    parts = [
        f"<h1>{title}</h1>",
        _facts(result),
        _latency_table(result["latency_seconds"]),
        plot("VMs by state", "s", states),
        plot("Latencies: share of all that took at most so long", "ms", curves),
        plot("Processors", "s", processors),
        plot("Resident memory, MiB", "s", memory),
        f"<h2>Scenario</h2>{_table(['', ''], [[name, value] for name, value in scenario.items()])}",
    ]
    return (
        f'<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style>{''.join(parts)}</html>\n"
    )


def _facts(result: Mapping[str, Any]) -> str:
    names = (
        *("seconds", "vms", "peak_ready", "failed", "events_published", "events_lost"),
        *("manager_rss_bytes_per_vm", "manager_cpu_fraction_idle", "manager_descriptors_peak"),
    )
    return _table(["", ""], [[name.replace("_", " "), _short(result[name])] for name in names])


def _latency_table(latencies: Mapping[str, Mapping[str, Any]]) -> str:
    columns = ("count", "p50", "p90", "p99", "p999", "max")
    rows = [
        [
            name.replace("_", " "),
            *(_short(value[column], 1 if column == "count" else 1000) for column in columns),
        ]
        for name, value in latencies.items()
    ]
    return "<h2>Latencies, ms</h2>" + _table(["", *columns], rows)


def _short(value: float | None, factor: float = 1) -> str:
    return "-" if value is None else f"{value * factor:,.4g}" if isinstance(value, float) else str(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    cells = "".join(f"<th>{html.escape(text)}</th>" for text in head)
    lines = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{cells}</tr>{lines}</table>"


def _rates(totals: Points) -> Points:
    """What grows, as how fast it grows."""
    return [
        (now, max(high - low, 0) / (now - then))
        for (then, low), (now, high) in pairwise(totals)
        if now > then
    ]


def plot(title: str, unit: str, series: Mapping[str, Points]) -> str:
    """A plot of lines."""
    points = [point for line in series.values() for point in line]
    if not points:
        return ""
    right, top = max(x for x, _ in points) or 1, max(y for _, y in points) or 1

    def place(x: float, y: float) -> str:
        across = LEFT + (WIDTH - LEFT) * x / right
        return f"{across:.1f},{(HEIGHT - BOTTOM) * (1 - y / top) + 5:.1f}"

    lines = "".join(
        f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" '
        f'points="{" ".join(place(x, y) for x, y in line)}"/>'
        for colour, line in zip(COLOURS, series.values(), strict=False)
    )
    legend = "".join(
        f'<text x="{LEFT + 10 + 110 * number}" y="{HEIGHT}" fill="{colour}">{html.escape(name)}</text>'
        for number, (colour, name) in enumerate(zip(COLOURS, series, strict=False))
    )
    axes = (
        f'<text x="{LEFT - 5}" y="15" text-anchor="end">{top:,.4g}</text>'
        f'<text x="{LEFT - 5}" y="{HEIGHT - BOTTOM + 5}" text-anchor="end">0</text>'
        f'<text x="{WIDTH}" y="{HEIGHT - 12}" text-anchor="end">{right:,.4g} {unit}</text>'
        f'<path d="M{LEFT} 5V{HEIGHT - BOTTOM + 5}H{WIDTH}" fill="none" stroke="#888"/>'
    )
    return (
        f'<h2>{html.escape(title)}</h2><svg viewBox="0 0 {WIDTH} {HEIGHT + 8}" font-size="12" '
        f'font-family="sans-serif">{axes}{lines}{legend}</svg>'
    )

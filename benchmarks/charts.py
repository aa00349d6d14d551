"""Charts of results, as PNG and SVG for documents and as one HTML page that opens from disk."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter

from benchmarks.cases import MODES
from benchmarks.peers import PEERS
from benchmarks.results import Row, arithmetic

# Colours that are told apart by all (Okabe and Ito, "Color Universal Design", 2008).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


@dataclass
class Line:
    label: str
    x: list[Any]
    y: list[float]
    low: list[float] | None = None
    high: list[float] | None = None
    dashed: bool = False
    colour: str = COLOURS[0]


@dataclass
class Panel:
    title: str
    lines: list[Line]


@dataclass
class Chart:
    """A grid of panels over one x and one y: rows are modes, columns are cells."""

    name: str
    title: str
    x_title: str
    y_title: str
    panels: list[list[Panel]]
    numbers: bool  # whether x is a number, on a logarithmic axis
    even: float | None = None  # where to draw the line that both sides meet at
    percent: bool = False


def _order(row: Row) -> tuple[Any, ...]:
    return (row["layout"], row["layers"], row["T"] > 1, row["B"], row["H"], row["T"])


def _label(row: Row) -> str:
    parts = [f"{row['T']}×{row['B']}×{row['H']}"]
    if row["layers"] > 1:
        parts.append(f"{row['layers']}L")
    if row["directions"] > 1:
        parts.append("bi")
    if row["layout"] != "dense":
        parts.append(row["layout"])
    return ", ".join(parts)


def _grid(rows: Sequence[Row], lines: Callable[[list[Row]], list[Line]]) -> list[list[Panel]]:
    cells = sorted({row["cell"] for row in rows})
    modes = [mode for mode in MODES if any(row["mode"] == mode for row in rows)]
    return [
        [
            Panel(f"{cell.upper()} {mode}", lines([row for row in rows if row["cell"] == cell and row["mode"] == mode]))
            for cell in cells
        ]
        for mode in modes
    ]


def _per_peer(rows: list[Row]) -> list[Line]:
    found = []
    for peer in sorted({row["peer"] for row in rows}, key=_rank):
        own = sorted((row for row in rows if row["peer"] == peer), key=_order)
        found.append(
            Line(
                peer,
                [_label(row) for row in own],
                [row["ratio"] for row in own],
                [row["ratio_p20"] for row in own],
                [row["ratio_p80"] for row in own],
                colour=COLOURS[_rank(peer) % len(COLOURS)],
            )
        )
    return found


def _rank(peer: str) -> int:
    """A peer has its place and its colour in every panel."""
    return list(PEERS).index(peer)


def _share(rows: list[Row]) -> list[Line]:
    own = sorted({_label(row): row for row in rows if row["floor_us"]}.values(), key=_order)
    return [Line("share", [_label(row) for row in own], [row["floor_us"] / row["time_us"] for row in own])]


def _per_step(rows: list[Row]) -> list[Line]:
    found = []
    own = [row for row in rows if row["layout"] == "dense" and row["layers"] * row["directions"] == 1 and row["T"] > 1]
    for colour, batch in zip(COLOURS, sorted({row["B"] for row in own}), strict=False):
        sizes = sorted({row["H"]: row for row in own if row["B"] == batch}.values(), key=lambda row: row["H"])
        if len(sizes) < 2:
            continue
        x = [row["H"] for row in sizes]
        for label, column, dashed in (("rnnkern", "time_us", False), ("torch.nn", "peer_time_us", True)):
            y = [row[column] / row["T"] for row in sizes]
            found.append(Line(f"{label}, B={batch}", x, y, dashed=dashed, colour=colour))
    return found


def charts(rows: Sequence[Row]) -> Iterator[Chart]:
    """All charts of one machine's rows."""
    rows = [row for row in rows if row["capture"] == ""]
    for dtype in sorted({arithmetic(row) for row in rows}, reverse=True):
        of = [row for row in rows if arithmetic(row) == dtype]
        sizes = "T × B × H"
        peers = _grid(of, _per_peer)
        yield Chart(f"speedup-{dtype}", f"Time of each peer over rnnkern's, {dtype}: above 1 rnnkern is faster", sizes,
                    "peer's time / rnnkern's", peers, numbers=False, even=1.0)  # fmt: skip
        torchs = [row for row in of if row["peer"] == "torch.nn"]
        if any(row["floor_us"] for row in torchs):
            yield Chart(f"floor-{dtype}", f"Share of the hardware's limit that rnnkern reaches, {dtype}", sizes,
                        "limit / time", _grid(torchs, _share), numbers=False, percent=True)  # fmt: skip
        yield Chart(f"step-{dtype}", f"Time per step, {dtype}", "H", "µs per step", _grid(torchs, _per_step),
                    numbers=True)  # fmt: skip


def draw(chart: Chart, folder: Path) -> Iterator[Path]:
    """PNG and SVG."""
    rows, columns = len(chart.panels), max(map(len, chart.panels))
    figure, axes = plt.subplots(
        rows, columns, figsize=(5.2 * columns, (4.2 if chart.numbers else 4.8) * rows), sharex=True, sharey="row",
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for axis_row, panel_row in zip(axes, chart.panels, strict=True):
        for axis, panel in zip(axis_row, panel_row, strict=True):
            _draw_panel(axis, panel, chart)
        axis_row[0].set_ylabel(chart.y_title)
    for axis in axes[-1]:
        axis.set_xlabel(chart.x_title)
    labels = {
        label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    if len(labels) > 1:
        columns = len(labels) // 2 if chart.numbers else min(6, len(labels))  # rnnkern over torch.nn
        figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=columns, frameon=False)
    figure.suptitle(chart.title)
    for ending in ("png", "svg"):
        path = folder / f"{chart.name}.{ending}"
        figure.savefig(path, dpi=110)
        yield path
    plt.close(figure)


def _draw_panel(axis: Any, panel: Panel, chart: Chart) -> None:
    axis.set_title(panel.title, fontsize=11)
    axis.grid(True, axis="y", alpha=0.3)
    if chart.even is not None:
        axis.axhline(chart.even, color="black", linewidth=1)
    for line in panel.lines:
        if chart.percent:
            axis.bar(line.x, line.y, color=line.colour, width=0.7)
        elif line.low is not None and line.high is not None:
            reach = [[y - low for y, low in zip(line.y, line.low, strict=True)],
                     [high - y for y, high in zip(line.y, line.high, strict=True)]]  # fmt: skip
            reach = [[max(0.0, value) for value in side] for side in reach]
            axis.errorbar(line.x, line.y, reach, fmt="o", markersize=4, capsize=2, color=line.colour, label=line.label)
        else:
            style = "--" if line.dashed else "-"
            axis.plot(line.x, line.y, style, marker="o", markersize=3, color=line.colour, label=line.label)
    if chart.percent:
        axis.set_ylim(0, 1.05)
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    else:
        axis.set_yscale("log", base=10 if chart.numbers else 2)
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if chart.numbers:
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axis.tick_params(axis="x", rotation=90, labelsize=8)


def interactive(chart: Chart) -> Any:
    """The same chart for a browser, with values under the pointer."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    rows, columns = len(chart.panels), max(map(len, chart.panels))
    titles = [panel.title for row in chart.panels for panel in row]
    figure = make_subplots(rows, columns, subplot_titles=titles, shared_yaxes=True, vertical_spacing=0.2)
    seen: set[str] = set()
    for r, row in enumerate(chart.panels, 1):
        for c, panel in enumerate(row, 1):
            for line in panel.lines:
                common = {"x": line.x, "y": line.y, "name": line.label, "legendgroup": line.label}
                common["showlegend"] = line.label not in seen and len(panel.lines) > 1
                seen.add(line.label)
                if chart.percent:
                    trace: Any = go.Bar(**common, marker_color=line.colour)
                else:
                    spread = None
                    if line.low is not None and line.high is not None:
                        up = [high - y for y, high in zip(line.y, line.high, strict=True)]
                        down = [y - low for y, low in zip(line.y, line.low, strict=True)]
                        spread = {"array": up, "arrayminus": down, "symmetric": False}
                    style = {"color": line.colour, "dash": "dash" if line.dashed else "solid"}
                    mode = "lines+markers" if chart.numbers else "markers"
                    trace = go.Scatter(**common, mode=mode, error_y=spread, line=style)
                figure.add_trace(trace, r, c)
            if chart.even is not None and panel.lines:
                figure.add_hline(chart.even, line_width=1, row=r, col=c)
        figure.update_yaxes(title_text=chart.y_title, row=r, col=1)
    if chart.percent:
        figure.update_yaxes(tickformat=".0%", range=[0, 1.05])
    else:
        figure.update_yaxes(type="log")
    figure.update_xaxes(type="log" if chart.numbers else "category")
    if chart.numbers:
        figure.update_xaxes(tickvals=[2**power for power in range(6, 13)])
    figure.update_xaxes(title_text=chart.x_title, row=rows)
    figure.update_layout(title=chart.title, height=420 * rows, template="plotly_white", margin={"t": 90})
    return figure


def page(rows: Sequence[Row], found: Sequence[Chart]) -> str:
    """One machine's part of the HTML page."""
    first = rows[0]
    where = ", ".join(part for part in (first["cpu"], first["gpu"]) if part)
    dates = sorted({row["date"][:10] for row in rows})
    parts = [f"<h1>{html.escape(where)}</h1>"]
    parts.append(
        f"<p>Measured {html.escape(' to '.join(dict.fromkeys((dates[0], dates[-1]))))}, torch "
        f"{html.escape(first['torch'])}, {first['threads']} threads. Ratios are the median of interleaved rounds, bars "
        "reach from the 20th to the 80th percentile. The input size equals H.</p>"
    )
    parts += [interactive(chart).to_html(full_html=False, include_plotlyjs=False) for chart in found]
    columns = ("cell", "case", "mode", "dtype", "precision", "capture", "peer", "peer_algorithm", "backend", "time_us",
               "peer_time_us", "ratio", "ratio_p20", "ratio_p80", "floor_us", "date")  # fmt: skip
    parts.append("<details><summary>Every row</summary><table><thead><tr>")
    parts.append("".join(f"<th>{column}</th>" for column in columns) + "</tr></thead><tbody>")
    for row in sorted(rows, key=lambda row: (row["cell"], *map(str, _order(row)), row["mode"], row["dtype"])):
        texts = ["" if row[column] is None else html.escape(str(row[column])) for column in columns]
        slower = ' class="slower"' if row["ratio"] < 1 else ""
        parts.append(f"<tr{slower}>" + "".join(f"<td>{text}</td>" for text in texts) + "</tr>")
    return "\n".join(parts) + "</tbody></table></details>"


STYLE = """
body { font-family: system-ui, sans-serif; margin: 2em auto; max-width: 1500px; color: #222 }
table { border-collapse: collapse; font-size: 12px } td, th { padding: 2px 8px; text-align: right }
tr:nth-child(even) { background: #f4f4f4 } tr.slower { color: #b00 } summary { cursor: pointer; margin: 1em 0 }
"""


def write(rows: Sequence[Row], folder: Path) -> Iterator[Path]:
    """Every chart of every machine, then the page, for which alone plotly is needed."""
    machines = list(dict.fromkeys(row["machine"] for row in rows))
    of = {machine: [row for row in rows if row["machine"] == machine] for machine in machines}
    drawn = {machine: list(charts(own)) for machine, own in of.items()}
    for machine, found in drawn.items():
        inner = folder if len(machines) == 1 else folder / machine
        inner.mkdir(parents=True, exist_ok=True)
        for chart in found:
            yield from draw(chart, inner)

    from plotly.offline import get_plotlyjs

    head = f"<title>rnnkern against its peers</title><style>{STYLE}</style><script>{get_plotlyjs()}</script>"
    body = "\n".join(page(of[machine], found) for machine, found in drawn.items())
    path = folder / "index.html"
    path.write_text(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{head}</head><body>{body}</body></html>',
        encoding="utf-8",
    )
    yield path

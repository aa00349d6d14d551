"""What the demo shows when both trainings are done: the table and the chart."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rnnkern.demo import Run


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """The 20 %, 50 % and 80 % points."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[1], cuts[4], cuts[7]


def rate(run: Run, characters: int) -> float:
    """Characters per second of a whole training step (of so many characters), at the median step."""
    return characters / statistics.median(run.seconds)


def speed_ups(theirs: Run, ours: Run) -> list[float]:
    """Of each step, whose two halves ran one right after the other."""
    return [a / b for a, b in zip(theirs.seconds, ours.seconds, strict=True)]


def table(theirs: Run, ours: Run, characters: int, bound: float, exchanged: float) -> str:
    """Both trainings side by side. `bound`: how far the losses may lie apart; `exchanged`: how far they do with
    our trained weights in torch's module."""
    low, middle, high = quantiles(speed_ups(theirs, ours))
    apart = abs(theirs.held[-1] - ours.held[-1])
    wide = max(len(theirs.name), len(ours.name)) + 2
    rows = [
        ("", theirs.name, ours.name, ""),
        (
            "held-out loss",
            f"{theirs.held[-1]:.5f}",
            f"{ours.held[-1]:.5f}",
            f"nats per character, {apart:.1e} apart (allowed {bound:.1e})",
        ),
        (
            "training",
            f"{rate(theirs, characters):,.0f}",
            f"{rate(ours, characters):,.0f}",
            f"characters/s, {middle:.2f} times as fast (middle 60 % of the steps: {low:.2f} to {high:.2f})",
        ),
        (
            "generating, T=1",
            f"{theirs.generated:,.0f}",
            f"{ours.generated:,.0f}",
            f"characters/s, {ours.generated / theirs.generated:.2f} times as fast",
        ),
    ]
    lines = [f"{left:15}{first:>{wide}}{second:>{wide}}  {about}".rstrip() for left, first, second, about in rows]
    lines.append(f"With {ours.name}'s trained weights in {theirs.name} the held-out loss moves by {exchanged:.1e}.")
    return "\n".join(lines)


def draw(theirs: Run, ours: Run, characters: int, checks: list[int], title: str, out: Path) -> None:
    """The chart: losses of both over the steps, and their throughput."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    torch_color, our_color, grey = "#f2a65a", "#1f4e79", "#666666"
    figure = Figure(figsize=(11, 4.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    loss, speed = figure.subplots(1, 2, width_ratios=(2.1, 1))
    steps = range(1, len(theirs.losses) + 1)
    for run, color, width in ((theirs, torch_color, 4.5), (ours, our_color, 1.2)):
        loss.plot(steps, smooth(run.losses), color=color, linewidth=width, label=f"{run.name}, training")
    loss.plot(checks, theirs.held, "o", color=torch_color, markersize=10, label=f"{theirs.name}, held out")
    loss.plot(checks, ours.held, "o", color=our_color, markersize=4, label=f"{ours.name}, held out")
    loss.set(xlabel="training step", ylabel="loss (nats per character)", xlim=(0, len(theirs.losses) * 1.02))
    apart = abs(theirs.held[-1] - ours.held[-1])
    loss.set_title(f"Same numbers: held-out losses {apart:.0e} apart at the end", fontsize=11, loc="left")
    loss.legend(frameon=False)

    rates = [rate(run, characters) / 1000 for run in (theirs, ours)]
    bars = speed.bar([theirs.name, ours.name], rates, color=[torch_color, our_color], width=0.6)
    speed.bar_label(bars, labels=[f"{value:,.1f}" for value in rates], padding=3)
    ratio = statistics.median(speed_ups(theirs, ours))
    speed.set_title(f"Throughput: {ratio:.2f} times", fontsize=11, loc="left")
    speed.set(ylabel="training throughput (1000 characters/s)", ylim=(0, max(rates) * 1.15))
    for axes in (loss, speed):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
        axes.set_axisbelow(True)
    figure.suptitle(title, fontsize=10, color=grey, x=0.01, ha="left")
    figure.savefig(out)


def smooth(losses: list[float]) -> list[float]:
    """A running mean that starts at the first value, for the eye."""
    out, mean = [], losses[0]
    for value in losses:
        mean += 0.1 * (value - mean)
        out.append(mean)
    return out

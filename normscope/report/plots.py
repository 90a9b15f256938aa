"""Pictures of the lab, drawn from their records."""

from __future__ import annotations

from typing import TYPE_CHECKING

from normscope.records import Picture, Plot, Series
from normscope.report.figures import GRID, INK, MUTED, Panel, new_figure, panel, svg_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["as_file", "draw", "figure"]

# Okabe and Ito, without their yellow, which is too pale for lines.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#5b6570")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
WIDTH, HEIGHT = 4.6, 3.4


def draw(picture: Picture, name: str) -> Panel:
    """For a page, whose light or dark colours it takes; the name keeps it apart from other pictures there."""
    return panel(figure(picture), picture.caption, f"{name}-")


def as_file(picture: Picture) -> str:
    """An SVG file."""
    return svg_file(figure(picture))


def figure(picture: Picture) -> Figure:
    """The plots side by side, for files of any kind."""
    made = new_figure(WIDTH * len(picture.plots), HEIGHT)
    row = made.subplots(1, len(picture.plots), squeeze=False)[0]
    for axes, plot in zip(row, picture.plots, strict=True):
        _draw(axes, plot)
    return made


def _draw(axes: Axes, plot: Plot) -> None:
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelcolor=INK, labelsize=8.5)
    sets = sum(series.kind == "bars" for series in plot.series)
    done = 0
    for series in plot.series:
        _series(axes, series, done, sets)
        done += series.kind == "bars"
    for what, level in plot.levels:
        axes.axhline(level, color=MUTED, linewidth=0.9, linestyle=":")
        axes.annotate(what, (0.99, level), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8,
                      color=MUTED)  # fmt: skip
    if plot.x_log:
        _log_x(axes, plot)
    if plot.y_log:
        axes.set_yscale("log")
    if plot.ticks:
        slanted = max(map(len, plot.ticks)) * len(plot.ticks) > 50
        axes.set_xticks(
            range(len(plot.ticks)), plot.ticks, rotation=25 if slanted else 0, ha="right" if slanted else "center"
        )
        axes.set_xlim(-0.5, len(plot.ticks) - 0.5)
    if plot.y_limits is not None:
        axes.set_ylim(*plot.y_limits)
    axes.set_title(plot.title, color=INK, fontsize=10.5, weight="bold", loc="left")
    axes.set_xlabel(plot.x, color=INK, fontsize=9.5)
    axes.set_ylabel(plot.y, color=INK, fontsize=9.5)
    if sets > 1:
        axes.margins(y=0.3)  # bars fill the plot: the legend needs room above them
    if any(series.name for series in plot.series):
        axes.legend(fontsize=8, frameon=False, labelcolor=INK)


def _log_x(axes: Axes, plot: Plot) -> None:
    """A logarithmic axis, with the places themselves as ticks where they are few whole numbers."""
    from matplotlib.ticker import NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    places = sorted({x for series in plot.series for x in series.x})
    if len(places) <= 8 and all(x == int(x) for x in places):
        axes.set_xticks(places, [f"{x:g}" for x in places])
        axes.set_xticks([], minor=True)


def _series(axes: Axes, series: Series, place: int, sets: int) -> None:
    colour = PALETTE[series.colour % len(PALETTE)]
    name = series.name or None
    if series.kind == "line":
        axes.plot(series.x, series.y, color=colour, label=name, linewidth=1.8)
    elif series.kind == "dashes":
        axes.plot(series.x, series.y, color=colour, label=name, linewidth=1.3, linestyle=(0, (4, 2)))
    elif series.kind == "band":
        axes.fill_between(series.x, series.low, series.high, color=colour, alpha=0.16, linewidth=0, label=name)
    elif series.kind == "bars":
        width = 0.8 / sets
        axes.bar([x - 0.4 + width * (place + 0.5) for x in series.x], series.y, width * 0.9, color=colour, label=name)
    else:
        marker = MARKERS[series.colour % len(MARKERS)]
        axes.plot(series.x, series.y, marker, color=colour, label=name, markersize=5)
        if series.low:
            # One line per interval, not vlines: the legend keeps clear of lines only.
            axes.plot((series.x, series.x), (series.low, series.high), color=colour, linewidth=1.2)

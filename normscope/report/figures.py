"""Figures drawn from records with matplotlib's object interface: no display, no global state.

Matplotlib is imported when a figure is drawn, not before. Colours are those of Okabe and Ito, which colour-blind
readers tell apart; line styles say the same once more.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normscope.errors import DependencyError
from normscope.records import Figure1

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, FigureBase, SubFigure
    from matplotlib.transforms import Transform

__all__ = [
    "GRID",
    "INK",
    "MUTED",
    "Panel",
    "draw_figure1",
    "figure1_panels",
    "new_figure",
    "panel",
    "require_matplotlib",
    "save_figure1",
    "svg_file",
]

INK, MUTED, GRID, WITH_BN, WITHOUT_BN = "#1b1f24", "#5b6570", "#dde1e6", "#0072b2", "#d55e00"

# In a page the same picture follows the page's light or dark colours.
CSS_COLOURS = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    WITH_BN: "var(--with-bn)",
    WITHOUT_BN: "var(--without-bn)",
}

NAMES = {True: "with BN", False: "without BN"}
COLOURS = {True: WITH_BN, False: WITHOUT_BN}
DASHES = {True: "-", False: (0, (4, 1.5))}


@dataclass(frozen=True, slots=True)
class Panel:
    """One part of a figure for a page: what it shows in words, and an SVG element that takes the page's colours."""

    caption: str
    svg: str


def require_matplotlib() -> None:
    """Import matplotlib.

    Raises:
        DependencyError: it is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise DependencyError(
            "figures need matplotlib, which is not installed", cure="pip install 'normscope[lab]'"
        ) from error


def draw_figure1(record: Figure1) -> Figure:
    """The whole figure: accuracy at every learning rate on the left, percentiles of a typical unit on the right."""
    rates = record.rates
    figure = new_figure(2.55 * len(rates) + 5.2, 5.6)
    grid = figure.add_gridspec(1, 2, width_ratios=(2.55 * len(rates) + 0.6, 4.6), wspace=0.04)
    left, right = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    _heading(left, "a", f"Test accuracy on {record.data.title}")
    for index, axes in enumerate(_row_of_axes(left, len(rates))):
        _draw_accuracy(axes, record, rates[index], first=index == 0)
    _heading(right, "b, c", f"Input of a typical last hidden unit, learning rate {record.shown_rate:g}")
    for index, axes in enumerate(right.subplots(2, 1, sharex=True, sharey=True)):
        _draw_bands(axes, record, normalized=bool(index), last=bool(index))
    return figure


def save_figure1(record: Figure1, folder: Path) -> tuple[Path, Path]:
    """Write `figure1.png` and `figure1.svg` into an existing folder."""
    figure = draw_figure1(record)
    png, svg = folder / "figure1.png", folder / "figure1.svg"
    figure.savefig(png, dpi=160, facecolor="white", metadata={"Software": None})
    figure.set_layout_engine("none")  # the layout found for the first file holds for the second
    svg.write_text(_svg(figure, text_as_paths=True), encoding="utf-8")
    return png, svg


def figure1_panels(record: Figure1) -> tuple[Panel, ...]:
    """The figure in parts that a page can reflow: one per learning rate, then the two of the percentiles."""
    panels: list[Panel] = []
    for rate in record.rates:
        figure = new_figure(3.5, 3.1)
        _draw_accuracy(figure.subplots(), record, rate, first=True)
        ends = ", ".join(f"{_percent(record.run(rate, normalized=n).final.value)} {NAMES[n]}" for n in (True, False))
        panels.append(panel(figure, f"Test accuracy at learning rate {rate:g}: at the end {ends}.", f"a{len(panels)}-"))
    for normalized in (False, True):
        figure = new_figure(3.5, 2.7)
        axes = figure.subplots()
        _draw_bands(axes, record, normalized=normalized, last=True)
        bands = record.run(record.shown_rate, normalized=normalized).bands
        caption = (
            f"15th, 50th and 85th percentile of the input of unit {bands.unit} of the last hidden layer, "
            f"{NAMES[normalized]}, learning rate {record.shown_rate:g}."
        )
        panels.append(panel(figure, caption, f"b{len(panels)}-"))
    return tuple(panels)


def _draw_accuracy(axes: Axes, record: Figure1, rate: float, *, first: bool) -> None:
    _frame(axes)
    end = 0
    for row, normalized in enumerate((True, False)):
        run = record.run(rate, normalized=normalized)
        colour, dashes = COLOURS[normalized], DASHES[normalized]
        percent = [100 * value for value in run.accuracy.values]
        axes.plot(run.accuracy.steps, percent, color=colour, linestyle=dashes, linewidth=1.9, zorder=3 - row)
        # The legend stands above the axes, where no curve can run through it, and tells the final value.
        place = _above(axes, 27 - 14 * row)
        axes.plot((0, 0.13), (1, 1), transform=place, color=colour, linestyle=dashes, clip_on=False)
        label = f"{NAMES[normalized]}  {_percent(run.final.value)}"
        axes.text(0.16, 1, label, transform=place, color=colour, fontsize=9.5, va="center")
        end = max(end, run.accuracy.steps[-1])
    axes.text(0, 1, f"learning rate {rate:g}", transform=_above(axes, 39), color=INK, fontsize=10.5, weight="bold")
    chance = 100 / record.data.classes
    axes.axhline(chance, color=MUTED, linewidth=0.8, linestyle=":")
    if first:
        axes.text(end, chance - 3, "chance", color=MUTED, fontsize=8.5, ha="right", va="top")
        axes.set_ylabel("test accuracy [%]", color=INK)
    axes.set_xlim(0, end)
    axes.set_ylim(0, 100)
    axes.set_xlabel("training steps", color=INK)


def _draw_bands(axes: Axes, record: Figure1, *, normalized: bool, last: bool) -> None:
    _frame(axes)
    bands = record.run(record.shown_rate, normalized=normalized).bands
    colour = COLOURS[normalized]
    axes.fill_between(bands.steps, bands.low, bands.high, color=colour, alpha=0.18, linewidth=0)
    for values, width in ((bands.low, 0.9), (bands.middle, 1.9), (bands.high, 0.9)):
        axes.plot(bands.steps, values, color=colour, linewidth=width)
    axes.set_title(NAMES[normalized], color=colour, fontsize=10.5, weight="bold", loc="left")
    both = [record.run(record.shown_rate, normalized=n).bands for n in (False, True)]
    low, high = _limits([value for b in both for value in (*b.low, *b.high)])
    axes.set_ylim(low, high)
    axes.set_xlim(0, bands.steps[-1])
    ends = _spread([bands.low[-1], bands.middle[-1], bands.high[-1]], gap=0.075 * (high - low))
    for percentile, end in zip(bands.percentiles, ends, strict=True):
        axes.annotate(
            f"{percentile:g}th", (1, end), xycoords=("axes fraction", "data"), xytext=(4, 0),
            textcoords="offset points", color=colour, fontsize=8.5, va="center", annotation_clip=False,
        )  # fmt: skip
    axes.set_ylabel("input of the sigmoid", color=INK)
    if last:
        axes.set_xlabel("training steps", color=INK)


def _row_of_axes(part: SubFigure, count: int) -> list[Axes]:
    return list(part.subplots(1, count, sharey=True, squeeze=False, gridspec_kw={"wspace": 0.08})[0])


def _above(axes: Axes, points: float) -> Transform:
    """The axes' own coordinates, moved up by some points."""
    from matplotlib.transforms import ScaledTranslation

    return axes.transAxes + ScaledTranslation(0, points / 72, axes.figure.dpi_scale_trans)


def _frame(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelcolor=INK, labelsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(3, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Axis limits around the finite values."""
    finite = [value for value in values if abs(value) < float("inf")]  # drops NaN too
    low, high = min(finite, default=-1.0), max(finite, default=1.0)
    margin = 0.06 * (high - low) or 1.0
    return low - margin, high + margin


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights moved up and down around the middle one until neighbours are at least `gap` apart."""
    low, middle, high = heights
    return [min(low, middle - gap), middle, max(high, middle + gap)]


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _heading(part: FigureBase, letter: str, text: str) -> None:
    part.suptitle(f"{letter}   {text}", x=0.01, ha="left", color=INK, fontsize=11)


def panel(figure: Figure, caption: str, prefix: str) -> Panel:
    """The figure for a page; `prefix` keeps its identifiers apart from those of other figures there."""
    svg = _svg(figure, text_as_paths=False)
    for fixed, variable in CSS_COLOURS.items():
        svg = svg.replace(fixed, variable)
    # All pictures of a page share one space of identifiers.
    for reference in ('id="', 'href="#', "url(#"):
        svg = svg.replace(reference, reference + prefix)
    start = svg.index("<svg ")  # what stands before it is legal in a file only
    return Panel(caption, svg[start:])


def svg_file(figure: Figure) -> str:
    """The figure as an SVG file."""
    return _svg(figure, text_as_paths=True)


def _svg(figure: Figure, *, text_as_paths: bool) -> str:
    import matplotlib as mpl

    # Without a salt of ours matplotlib draws one, and identifiers change with every run.
    options: Any = {"svg.fonttype": "path" if text_as_paths else "none", "svg.hashsalt": "normscope"}
    buffer = io.StringIO()
    with mpl.rc_context(options):
        figure.savefig(buffer, format="svg", transparent=not text_as_paths, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()

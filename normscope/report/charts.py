"""Small charts as tables: a label, a bar and the number in words, so that nothing is told by shape or colour alone.

Here values become positions between 0 and 100; the templates draw them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from normscope.records import CheckRecord, Finding, Interval, NormRow, Patient
from normscope.report import words

__all__ = ["Bar", "Chart", "chart_of", "cost_bar", "patient_chart", "shares_chart", "states_chart"]

# Rows that a reader takes in; the table of all normalizers has the rest.
MOST_ROWS = 12
# The doctor looks for the few layers that explain nearly all.
MOST_SHARES = 8
# Of the cost; where no layer carries more, a chart of shares tells nothing.
LEAST_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class Bar:
    """One row: a bar from `start` to `end` and its interval, in percent of the width; None where there is no number."""

    label: str
    text: str
    start: float
    end: float | None
    low: float | None = None
    high: float | None = None
    alarm: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """Rows over one scale.

    Attributes:
        caption: What is shown, in words.
        head: The headings of label and number.
        bars: The rows, in groups of one column each.
        mark: Where the threshold lies, in percent of the width, and what it is.
    """

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[Bar, ...], ...]
    marks: tuple[tuple[float, str] | None, ...]
    left_out: int = 0


@dataclass(frozen=True, slots=True)
class _Column:
    """A number of a normalizer: how it is called, read, and from where on it is too large (or, below, too small)."""

    head: str
    get: Callable[[NormRow], float | None]
    threshold: str
    below: bool = False


_DRIFT = (
    _Column("δ", lambda row: row.delta, "drift_mean"),
    _Column("ρ", lambda row: row.rho, "drift_var"),
)
DRIFT_CAPTION = (
    "Running statistics against the data's, median over the channels: "
    "δ = |running mean − data mean| / σ, ρ = |ln(running variance / data variance)|"
)
# What the figure of a rule shows; every other rule about layers shows the drift.
_FIGURES: dict[str, tuple[str, tuple[_Column, ...]]] = {
    "NRM301": (
        "Values per statistic and batch",
        (_Column("values per statistic", lambda row: row.values, "values_warning", below=True),),
    ),
    "NRM302": (
        "Noise that batches of this size bring into the output, as a share of its energy",
        (_Column("energy of the noise", lambda row: row.noise, "noise_warning"),),
    ),
    "NRM304": (
        "Design effect: by how much the loader's grouping inflates the variance of batch means",
        (_Column("design effect", lambda row: row.design_effect, "design_warning"),),
    ),
}
_DRIFTING = ("NRM101", "NRM102", "NRM103", "NRM104", "NRM106", "NRM108", "NRM113", "NRM203", "NRM205", "NRM602")


def chart_of(record: CheckRecord, finding: Finding) -> Chart | None:
    """The figure of a finding: the number that its rule is about, layer by layer; None for rules about other things."""
    if finding.code in _FIGURES:
        caption, columns = _FIGURES[finding.code]
    elif finding.code in _DRIFTING:
        caption, columns = DRIFT_CAPTION, _DRIFT
    else:
        return None
    rows = [row for row in record.layers if any(_known(column.get(row)) for column in columns)]
    flagged = set(finding.layers)
    if not flagged & {row.name for row in rows}:
        return None
    shown = rows if len(rows) <= MOST_ROWS else _worst([row for row in rows if row.name in flagged], columns)
    thresholds = {t.name: t.value for t in record.thresholds}
    bars, marks = [], []
    for column in columns:
        limit = thresholds.get(column.threshold)
        top = _top([column.get(row) for row in shown], limit)
        bars.append([_row_bar(row, column.get(row), top, row.name in flagged) for row in shown])
        sense = "at least" if column.below else "at most"
        marks.append(None if limit is None else (_place(limit, top), f"{sense} {words.number(limit)} is healthy"))
    return Chart(
        caption,
        ("normalizer", *(column.head for column in columns)),
        tuple(zip(*bars, strict=True)),
        tuple(marks),
        len(rows) - len(shown),
    )


def _worst(rows: Sequence[NormRow], columns: Sequence[_Column]) -> list[NormRow]:
    """The rows whose first number is worst, in the order of the model."""
    first = columns[0]

    def badness(row: NormRow) -> float:
        value = first.get(row)
        known = -math.inf if value is None or math.isnan(value) else -value if first.below else value
        return -known

    worst = {row.name for row in sorted(rows, key=badness)[:MOST_ROWS]}
    return [row for row in rows if row.name in worst]


def _row_bar(row: NormRow, value: float | None, top: float, flagged: bool) -> Bar:
    text = "–" if value is None else words.number(value)
    return Bar(words.layer(row.name), text, 0.0, None if value is None else _place(value, top), alarm=flagged)


def shares_chart(record: CheckRecord, finding: Finding) -> Chart | None:
    """How much of the cost each layer carries."""
    rows = [row for row in record.layers if row.explains is not None and row.name in finding.layers]
    if max((row.explains or 0.0 for row in rows), default=0.0) < LEAST_SHARE:
        return None
    rows.sort(key=lambda row: -(row.explains or 0.0))
    top = max(1.0, *(row.explains or 0.0 for row in rows))
    bars = [
        (
            Bar(
                row.name,
                words.percent(row.explains or 0.0),
                0.0,
                _place(max(0.0, row.explains or 0.0), top),
                alarm=True,
            ),
        )
        for row in rows[:MOST_SHARES]
    ]
    worse = " (below 0: it makes things worse)" if any((row.explains or 0.0) < 0 for row in rows) else ""
    return Chart(
        "Share of the cost that a layer carries: the mean of what goes away when it alone is recalibrated "
        f"and of what stays when all but it are{worse}",
        ("normalizer", "share of the cost"),
        tuple(bars),
        (None,),
        len(rows) - len(bars),
    )


def states_chart(record: CheckRecord, metric: bool) -> Chart | None:
    """The states that the decision table compares, each with its interval."""
    found = [(s.state, s.metric if metric else s.loss) for s in record.scores]
    known = [(state, i) for state, i in found if i is not None and math.isfinite(i.value)]
    if not known:
        return None
    low = min(0.0, *(i.value for _, i in known))
    top = max(_finite(i.high, i.value) for _, i in known)
    percent = metric and (words.is_percent(record.cost) or any(words.is_percent(i) for _, i in known))
    top = 1.0 if percent else top
    name = words.metric_name(record) if metric else "loss"
    better = "higher is better" if metric else "lower is better"
    bars = tuple((_state_bar(state, i, low, top, percent),) for state, i in known)
    return Chart(f"{name.capitalize()} ({better}) with its interval", ("state", name), bars, (None,))


def _state_bar(state: str, i: Interval, low: float, top: float, percent: bool) -> Bar:
    def place(value: float) -> float:
        return _place(value - low, top - low)

    text = words.level(i, percent)
    return Bar(state, text, place(0.0), place(i.value), place(i.low), place(i.high))


def cost_bar(cost: Interval) -> Bar:
    """A cost on a scale around zero."""
    reach = max(abs(_finite(v, cost.value)) for v in (cost.low, cost.value, cost.high)) or 1.0
    low = -reach if cost.low < 0 else 0.0

    def place(value: float) -> float:
        return _place(_finite(value, reach) - low, (reach - low) * 1.05)

    text, felt = words.interval(cost), cost.low > 0
    return Bar("", text, place(0.0), place(cost.value), place(cost.low), place(cost.high), alarm=felt)


def patient_chart(patient: Patient) -> Chart:
    """Accuracy before it was broken, broken, and repaired."""
    states = (("before it was broken", patient.trained), ("broken", patient.ill), ("repaired", patient.cured))
    bars = tuple((_state_bar(name, i, 0.0, 1.0, percent=True),) for name, i in states)
    return Chart(
        "Accuracy in evaluation, with its 95% interval, on test samples that neither check nor fix saw",
        ("state", "accuracy"),
        bars,
        (None,),
    )


def _known(value: float | None) -> bool:
    return value is not None and not math.isnan(value)


def _finite(value: float, otherwise: float) -> float:
    return value if math.isfinite(value) else otherwise


def _top(values: Sequence[float | None], limit: float | None) -> float:
    known = [v for v in values if v is not None and math.isfinite(v)]
    return max([*known, 2 * (limit or 0.0)], default=0.0) or 1.0


def _place(value: float, top: float) -> float:
    if math.isnan(value):
        return 0.0
    return round(100 * min(1.0, max(0.0, value / top)) if top > 0 else 0.0, 2)

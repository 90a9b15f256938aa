"""Frozen records: the only thing that reports read, and their JSON, which loses nothing.

Records hold numbers, text and other records in tuples. `to_json` writes strict JSON (no NaN literal, which most other
readers refuse): a float that is not finite becomes the string "NaN", "Infinity" or "-Infinity", and `from_json` turns
it back by looking at the field's type.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

__all__ = [
    "Agreement",
    "Bands",
    "Curve",
    "DataCard",
    "Figure1",
    "Interval",
    "Machine",
    "Statement",
    "TrainingRun",
    "from_json",
    "to_json",
]

R = TypeVar("R")

Agreement = Literal["agrees", "contradicts", "open"]

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass(frozen=True, slots=True)
class Interval:
    """A measured value with the interval that should hold the true one."""

    value: float
    low: float
    high: float
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Curve:
    """Values against training steps, both of the same length."""

    steps: tuple[int, ...]
    values: tuple[float, ...]

    def first_reaching(self, target: float) -> int | None:
        """The first step at which the value is at least `target`, or None."""
        return next((s for s, v in zip(self.steps, self.values, strict=True) if v >= target), None)


@dataclass(frozen=True, slots=True)
class Bands:
    """Three percentiles, over a fixed set of samples, of one unit's input against training steps."""

    unit: int
    percentiles: tuple[float, float, float]
    steps: tuple[int, ...]
    low: tuple[float, ...]
    middle: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """One network trained once.

    `drift` holds, per unit of the last hidden layer, how far the median of its input travelled (maximum − minimum over
    training); `bands` shows the unit whose drift is the median of them.
    """

    normalized: bool
    learning_rate: float
    accuracy: Curve
    final: Interval
    bands: Bands
    drift: tuple[float, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Statement:
    """A published claim, what was measured about it, and whether the two agree.

    `open` means that this measurement cannot tell.
    """

    claim: str
    outcome: str
    verdict: Agreement


@dataclass(frozen=True, slots=True)
class DataCard:
    """What a reader must know about a data set: sizes, origin and licence."""

    name: str
    title: str
    train: int
    test: int
    shape: tuple[int, ...]
    classes: int
    source: str
    licence: str


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine and the software that produced a record."""

    cpu: str
    cores: int
    system: str
    python: str
    versions: tuple[tuple[str, str], ...]

    @classmethod
    def measure(cls, packages: tuple[str, ...] = ("normscope", "torch", "numpy")) -> Machine:
        """Describe this machine: the cores that this process may use, versions without importing anything."""
        affinity = getattr(os, "sched_getaffinity", None)
        return cls(
            cpu=_cpu_model(),
            cores=len(affinity(0)) if affinity else os.cpu_count() or 1,
            system=f"{platform.system()} {platform.machine()}",
            python=platform.python_version(),
            versions=tuple((name, _version(name)) for name in packages),
        )


@dataclass(frozen=True, slots=True)
class Figure1:
    """The record of `normscope demo`: figure 1 of the Batch Normalization paper, measured here."""

    title: str
    data: DataCard
    settings: tuple[tuple[str, str], ...]
    differences: tuple[str, ...]
    runs: tuple[TrainingRun, ...]
    shown_rate: float
    target: float
    statements: tuple[Statement, ...]
    caveat: str
    command: str
    seed: int
    started: str
    seconds: float
    machine: Machine

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates of the runs, ascending."""
        return tuple(sorted({run.learning_rate for run in self.runs}))

    def run(self, rate: float, *, normalized: bool) -> TrainingRun:
        """The run at one learning rate, with or without Batch Normalization."""
        return next(run for run in self.runs if run.learning_rate == rate and run.normalized == normalized)


def to_json(record: object) -> str:
    """The record as strict JSON, one indented object whose `record` names its class."""
    if not dataclasses.is_dataclass(record) or isinstance(record, type):
        raise TypeError(f"{record!r} is not a record")
    body = {"record": type(record).__name__, **_encode(record)}
    return json.dumps(body, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def from_json(kind: type[R], text: str) -> R:
    """The record of class `kind` written by `to_json`.

    Raises:
        ValueError: the text is no JSON, names another record, or a field is missing, unknown or of the wrong type.
    """
    body = json.loads(text)
    if not isinstance(body, dict) or body.pop("record", None) != kind.__name__:
        raise ValueError(f"this JSON does not hold a {kind.__name__}")
    return typing.cast(R, _decode(kind, body, kind.__name__))


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"records hold numbers, text, tuples and records, not {type(value).__name__}")


def _decode(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _decode_record(typing.cast(type, kind), value, where)
    if origin is tuple:
        return _decode_tuple(arguments, value, where)
    # T | None, the only union in records; with a Literal it is of the older kind.
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _decode(arguments[0], value, where)
    if origin is Literal and value in arguments:
        return value
    if kind is float and isinstance(value, str) and value in _NOT_FINITE:
        return _NOT_FINITE[value]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and type(value) is kind:
        return value
    raise ValueError(f"{where}: expected {kind}, got {value!r}")


def _decode_record(kind: type, value: Any, where: str) -> Any:
    hints = typing.get_type_hints(kind)
    # A field that came later has a default, so that older records can still be read.
    needed = {field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING}
    if not isinstance(value, dict) or not needed <= set(value) <= set(hints):
        found = sorted(value) if isinstance(value, dict) else repr(value)
        raise ValueError(f"{where}: expected the fields {sorted(hints)}, got {found}")
    return kind(**{name: _decode(hints[name], item, f"{where}.{name}") for name, item in value.items()})


def _decode_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{where}: expected a list, got {value!r}")
    kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
    if len(kinds) != len(value):
        raise ValueError(f"{where}: expected {len(kinds)} items, got {len(value)}")
    return tuple(_decode(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True)))


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "unknown"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


# --- the doctor's records -----------------------------------------------------------------------------------------

Severity = Literal["E", "W", "I"]
Status = Literal[
    "fail", "warn", "info", "pass", "not-applicable", "needs-input", "could-not-check", "intentional"
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fact:
    """One piece of evidence: a number, or text where `value` is None."""

    name: str
    value: float | None
    text: str = ""


@dataclass(frozen=True, slots=True)
class Remedy:
    """What can be done about a finding.

    Attributes:
        code: Its short name, e.g. "recal".
        safety: S0 keeps the function exactly, S1 changes statistics or flags but no weight, S2 changes behaviour, S3 is
            an edit of the user's own code.
        text: What it does.
        command: The command that applies it, or for S3 the patch.
    """

    code: str
    safety: Literal["S0", "S1", "S2", "S3"]
    text: str
    command: str


@dataclass(frozen=True, slots=True)
class Finding:
    """A trouble: which rule, where, what was seen, what it costs and what to do.

    Attributes:
        cost: What the trouble costs on samples that took no part in finding it; None where that was not measured.
        explained_by: The code of the finding that causes this one, "" for a cause of its own.
        explains: The share of the whole cost that goes away when these layers are recalibrated together, as far as it
            was measured: a set of only some of them may stand in for all.
    """

    code: str
    name: str
    severity: Severity
    layers: tuple[str, ...]
    message: str
    facts: tuple[Fact, ...]
    cost: Interval | None
    remedies: tuple[Remedy, ...]
    explained_by: str = ""
    explains: float | None = None

    @property
    def evidence(self) -> dict[str, float | str]:
        """The facts by name."""
        return {fact.name: fact.text if fact.value is None else fact.value for fact in self.facts}

    @property
    def fingerprints(self) -> set[tuple[str, str]]:
        """What the finding is known by from one run to the next: code and module."""
        return {(self.code, name) for name in (self.layers or ("",))}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a rule says, passes included; a rule that did not run has not passed."""

    code: str
    name: str
    status: Status
    reason: str
    layers: tuple[str, ...] = ()
    facts: tuple[Fact, ...] = ()
    cost: Interval | None = None

    @property
    def evidence(self) -> dict[str, float | str]:
        """The facts by name."""
        return {fact.name: fact.text if fact.value is None else fact.value for fact in self.facts}


@dataclass(frozen=True, slots=True)
class NormRow:
    """One normalizer of the checked model.

    Attributes:
        mode: "train", "eval" or "frozen", as the model was handed over.
        calls: How often one forward calls it.
        values: Values per statistic and batch; None where it was not reached.
        delta: Median over the channels of |running mean − data mean| / σ.
        rho: Median over the channels of |ln(running variance / data variance)|.
        drifted: Share of channels beyond the thresholds of NRM103.
        noise: Energy of the noise that this batch size brings into the output.
        design_effect: By how much the loader's grouping inflates the variance of batch means.
        explains: Share of the measured cost that this layer carries: the mean of what goes away when it alone is
            recalibrated and of what stays when all but it are.
        codes: The findings about it.
    """

    name: str
    kind: str
    mode: str
    calls: int
    values: float | None
    delta: float | None
    rho: float | None
    drifted: float | None
    noise: float | None
    design_effect: float | None
    explains: float | None
    codes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ChannelStatistics:
    """Running statistics beside the data's, channel by channel.

    Attributes:
        layer: The normalizer.
        total: How many channels it has. Where not all are listed, those that are lie evenly among all of them in the
            order of their drift.
        running_mean: As stored.
        running_var: As stored, plus ε.
        data_mean: Of the data of split A.
        data_var: The same, plus ε.
    """

    layer: str
    total: int
    running_mean: tuple[float, ...]
    running_var: tuple[float, ...]
    data_mean: tuple[float, ...]
    data_var: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Score:
    """The model in one state: as it is, on batch statistics, recalibrated.

    Attributes:
        state: "eval", "batch statistics", "recalibrated (population)", …
        metric: Mean with its interval, its unit "share" where all values lie in [0, 1]; None without a metric.
        loss: The same for the loss.
        samples: How many samples of split B it was measured on.
    """

    state: str
    metric: Interval | None
    loss: Interval | None
    samples: int


@dataclass(frozen=True, slots=True)
class PassCost:
    """One pass over cached batches."""

    name: str
    batches: int
    samples: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Threshold:
    """A threshold that was used, and why it lies there."""

    name: str
    value: float
    reason: str


@dataclass(frozen=True, slots=True)
class CheckRecord:
    """The record of one check: everything that the terminal, the page and the JSON show.

    Attributes:
        model: The class of the model.
        norms: How many normalizers it has by kind.
        splits: Samples in A (diagnose), B (verify) and C (confirm).
        batches_read: Batches taken from the loader; `batches_used` of them were kept.
        batches_used: Batches that took part in the passes.
        noise_floor: Largest relative difference of two evaluations of the same batch; None where it was not measured.
        scores: The states that the decision table compares.
        reading: What the decision table says about them.
        before: Fingerprint of the model before the check.
        restored: Whether it was the same afterwards; a record is only written if so.
        settings: The arguments, as text.
        notes: What a reader must know, e.g. that samples were left out.
        channels: Of the normalizers that drift most, the statistics of single channels.
    """

    model: str
    norms: tuple[tuple[str, int], ...]
    samples: int
    splits: tuple[int, int, int]
    batches_read: int
    batches_used: int
    seconds: float
    budget: float
    seed: int
    device: str
    noise_floor: float | None
    scores: tuple[Score, ...]
    reading: str
    cost: Interval | None
    findings: tuple[Finding, ...]
    verdicts: tuple[Verdict, ...]
    layers: tuple[NormRow, ...]
    passes: tuple[PassCost, ...]
    thresholds: tuple[Threshold, ...]
    settings: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    before: str
    restored: bool
    machine: Machine
    channels: tuple[ChannelStatistics, ...] = ()


@dataclass(frozen=True, slots=True)
class Treatment:
    """One remedy that was tried: what it changed and what it gained on split B."""

    rule: str
    remedy: Remedy
    layers: tuple[str, ...]
    gain: Interval | None
    outcome: str


@dataclass(frozen=True, slots=True)
class FixRecord:
    """The record of `fix`.

    Attributes:
        applied: Remedies that are in the model now.
        skipped: Those that are not, each with the reason in `outcome`.
        before: The score on split B before; None without metric and loss.
        after: The same with the remedies.
        gain: The paired gain on split C, which took no part in choosing.
        confirmed: Whether the gain's interval on C lies above zero, or, for what keeps the function, whether C shows
            no loss.
    """

    applied: tuple[Treatment, ...]
    skipped: tuple[Treatment, ...]
    before: Interval | None
    after: Interval | None
    gain: Interval | None
    confirmed: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class Gone:
    """A finding of an earlier run that a later one does not have.

    Attributes:
        status: What the rule says in the later run, or "not run". Only "pass" means that it is over.
        reason: Why.
    """

    finding: Finding
    status: str
    reason: str

    @property
    def over(self) -> bool:
        """Whether the rule ran again and found nothing."""
        return self.status == "pass"


@dataclass(frozen=True, slots=True)
class Changed:
    """A finding of two runs that is not the same in both.

    Attributes:
        changes: What differs, in words.
        worse: Whether it is more severe, in further layers, or costs more by intervals that do not overlap.
    """

    before: Finding
    after: Finding
    changes: tuple[str, ...]
    worse: bool


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is otherwise in the second run; "" where a run does not have it."""

    name: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class ScorePair:
    """A metric or a loss of the model as it is, in two runs."""

    name: str
    before: Interval | None
    after: Interval | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """The record of `diff`: an earlier check against a later one.

    Attributes:
        model: The class of the model in both.
        cost: What the trouble costs in both.
        gone: Findings of the first run only.
        same: Findings that did not change.
        unchecked: Rules that passed in one run and could not be checked, or did not run, in the other.
        layers: Normalizers that appeared, vanished, or are of another kind or in another mode.
        circumstances: What else differs: data, settings, thresholds, versions. It may be why findings do.
    """

    model: tuple[str, str]
    scores: tuple[ScorePair, ...]
    cost: tuple[Interval | None, Interval | None]
    new: tuple[Finding, ...]
    gone: tuple[Gone, ...]
    changed: tuple[Changed, ...]
    same: tuple[Finding, ...]
    unchecked: tuple[Difference, ...]
    layers: tuple[Difference, ...]
    circumstances: tuple[Difference, ...]

    @property
    def worse(self) -> tuple[Finding, ...]:
        """What is new, or worse than before."""
        return (*self.new, *(change.after for change in self.changed if change.worse))


__all__ += [
    "Changed",
    "ChannelStatistics",
    "CheckRecord",
    "Comparison",
    "Difference",
    "Fact",
    "Finding",
    "FixRecord",
    "Gone",
    "NormRow",
    "PassCost",
    "Remedy",
    "Score",
    "ScorePair",
    "Severity",
    "Status",
    "Threshold",
    "Treatment",
    "Verdict",
]


# --- the second half of the demo ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Patient:
    """A model broken on purpose the way people break theirs, and what the doctor made of it.

    Attributes:
        name: What was done wrong, in a few words.
        story: The same in sentences.
        ill: Accuracy in evaluation on samples that neither check nor fix saw, before.
        cured: The same after the fix.
        trained: The same of the model whose weights these are, before it was broken.
    """

    name: str
    story: str
    trained: Interval
    ill: Interval
    cured: Interval
    check: CheckRecord
    fix: FixRecord

    @property
    def title(self) -> str:
        """The name with a capital."""
        return f"{self.name[:1].upper()}{self.name[1:]}"


@dataclass(frozen=True, slots=True)
class Clinic:
    """The record of the second half of `normscope demo`: models that go wrong, diagnosed and repaired."""

    data: DataCard
    settings: tuple[tuple[str, str], ...]
    patients: tuple[Patient, ...]
    lessons: tuple[str, ...]
    seed: int
    seconds: float


__all__ += ["Clinic", "Patient"]


# --- the bench ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Timing:
    """The time of one alternative per call, median over the rounds, in seconds."""

    name: str
    time: Interval


@dataclass(frozen=True, slots=True)
class NormSpeed:
    """One normalizer with a ReLU on one tensor: forward + backward, and forward alone.

    Attributes:
        name: Family, sizes, dtype and layout, e.g. "GN 8x256x32x32 bf16 cl".
        part: "suite", or "sweep" over sizes.
        params: The dtype of weight and bias.
        size: Bytes of x.
        passes: How often the plan reads or writes the whole of x, forward and backward.
        kernel: What ran.
        timings: Every alternative, in the order of the first round.
        share: Ideal floor / ours, forward + backward.
        eager_share: Ideal floor / eager torch.
        speedup: Eager torch / ours.
        eval_share: clone / ours, forward in evaluation without gradient.
        eval_speedup: Eager torch / ours, the same.
        compiled: torch.compile / ours, forward + backward; None where it was not measured.
        error: The largest error of ours against float64, as a share of the tolerance.
        rounds: How many were kept.
        dropped: How many were disturbed and are not among them.
        calm: Whether those kept were undisturbed; otherwise the figures mean nothing.
    """

    name: str
    family: str
    part: Literal["suite", "sweep"]
    pattern: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    params: str
    size: int
    passes: tuple[int, int]
    kernel: str
    timings: tuple[Timing, ...]
    share: Interval
    eager_share: Interval
    speedup: Interval
    eval_share: Interval
    eval_speedup: Interval
    compiled: Interval | None
    error: float
    rounds: int
    dropped: int
    calm: bool

    @property
    def plan_share(self) -> Interval:
        """The plan's floor / ours: the ideal floor, times what the plan must move over 5 units."""
        more = sum(self.passes) / 5
        return Interval(more * self.share.value, more * self.share.low, more * self.share.high)

    @property
    def rate(self) -> float:
        """Bytes per second, counting the 5 units of the ideal floor."""
        return 5 * self.size / self.time("ours")

    def time(self, name: str) -> float:
        """The median of one alternative, in seconds."""
        return next(timing.time.value for timing in self.timings if timing.name == name)


@dataclass(frozen=True, slots=True)
class ModelMemory:
    """Bytes of one training step, beyond parameters and input.

    Attributes:
        saved: What the forward keeps for the backward.
        peak: The most that was held at once, gradients included.
    """

    name: str
    saved: int
    peak: int


@dataclass(frozen=True, slots=True)
class ModelSpeed:
    """An architecture as it is ("torch"), accelerated, and bare: without normalizers and activations.

    Attributes:
        changed: How many modules `accelerate` changed.
        fused: The activations that normalizers took up.
        timings: Of a training step and of an evaluation.
        step: The step, as it is / accelerated.
        step_share: What accelerating gains, as a share of what leaving out normalizers and activations gains; None
            where leaving them out gains nothing.
        evaluation: As step, in evaluation mode.
        evaluation_share: As step_share.
        memory: Of the three models.
        calm: As for a case.
    """

    name: str
    layout: str
    shape: tuple[int, ...]
    parameters: int
    changed: int
    fused: tuple[str, ...]
    timings: tuple[Timing, ...]
    step: Interval
    step_share: Interval | None
    evaluation: Interval
    evaluation_share: Interval | None
    memory: tuple[ModelMemory, ...]
    rounds: int
    dropped: int
    calm: bool


@dataclass(frozen=True, slots=True)
class Target:
    """What the bench is to show: a goal for one number, and what was measured.

    `open` means that the cases it is about were not measured, or on a busy machine, or that no goal is set.
    """

    text: str
    goal: float | None
    measured: Interval | None
    verdict: Literal["met", "missed", "open"]
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """The record of `normscope bench`.

    Attributes:
        kernels: The usable backends, a line each.
        notes: What was left out, and why.
    """

    cases: tuple[NormSpeed, ...]
    models: tuple[ModelSpeed, ...]
    targets: tuple[Target, ...]
    notes: tuple[str, ...]
    device: str
    threads: int
    kernels: tuple[str, ...]
    command: str
    started: str
    seconds: float
    machine: Machine


__all__ += ["Benchmark", "ModelMemory", "ModelSpeed", "NormSpeed", "Target", "Timing"]


# --- the lab ------------------------------------------------------------------------------------------------------

# EXACT: an identity, checked to the precision of the arithmetic. CONDITIONAL: true in one named regime and false in
# another. UNDECIDED: measured, and the interval spans the threshold. RECORD: not measurable here, cited instead.
LabVerdict = Literal["EXACT", "CONFIRMED", "REFUTED", "CONDITIONAL", "UNDECIDED", "RECORD", "open"]


@dataclass(frozen=True, slots=True)
class Series:
    """Numbers of one arm in a plot.

    Attributes:
        kind: "dashes" is a line of theory, "band" lies between `low` and `high`, "bars" stand at x.
        name: The legend; "" for none.
        low: Lower ends, of a band or of intervals around y; () for none.
        high: Upper ends.
        colour: Which of the palette; series that belong together share one.
    """

    kind: Literal["line", "points", "dashes", "band", "bars"]
    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    colour: int = 0


@dataclass(frozen=True, slots=True)
class Plot:
    """One pair of axes.

    Attributes:
        ticks: Names for x = 0, 1, 2, …; () for numbers.
        levels: Horizontal lines that mean something: what they are, and where.
        y_limits: Of the axis, where plots are to be compared.
    """

    title: str
    x: str
    y: str
    series: tuple[Series, ...]
    x_log: bool = False
    y_log: bool = False
    ticks: tuple[str, ...] = ()
    levels: tuple[tuple[str, float], ...] = ()
    y_limits: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure: plots side by side, and what they show in words."""

    caption: str
    plots: tuple[Plot, ...]


@dataclass(frozen=True, slots=True)
class Cell:
    """A number of a table, and whether it is the best of its row, or cannot be told from the best."""

    value: Interval
    mark: Literal["best", "not separable", ""] = ""


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a table, in one unit; a cell is None where nothing was measured.

    Attributes:
        digits: After the point.
    """

    name: str
    unit: str
    digits: int
    cells: tuple[Cell | None, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """Numbers in rows and columns, and what they are in words."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Registration:
    """What was fixed before the first run, and its fingerprint.

    Attributes:
        statement: The claim in one sentence.
        source: Who made it, where.
        claims: The ids of the claims that the experiment is about.
        thresholds: Every number that a verdict depends on, by name.
        cuts: What a smaller profile leaves out, in this order.
    """

    name: str
    title: str
    statement: str
    source: str
    claims: tuple[str, ...]
    confirms: str
    refutes: str
    thresholds: tuple[tuple[str, float], ...]
    design: str
    cuts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Judgement:
    """What one experiment says about some claims.

    Attributes:
        claims: Their ids.
        question: What was asked, in few words.
        effect: The measured size with its interval; None where there is none.
        outcome: What was measured, in a sentence with numbers.
        validity: On which data, model and budget.
        seeds: How many runs are behind it; 0 for an identity.
        tests: How many tests were made for it.
    """

    claims: tuple[str, ...]
    question: str
    verdict: LabVerdict
    effect: Interval | None
    outcome: str
    validity: str
    seeds: int = 0
    tests: int = 0


@dataclass(frozen=True, slots=True)
class Experiment:
    """One experiment as it was run and judged.

    Attributes:
        runs: How many runs are behind it, `planned` how many belong to the profile.
        seconds: Of computing, all runs together.
        commits: Of the code that ran.
        note: What a reader should know of these runs besides the verdicts; "" for nothing.
    """

    registration: Registration
    digest: str
    profile: str
    seeds: tuple[int, ...]
    runs: int
    planned: int
    judgements: tuple[Judgement, ...]
    picture: Picture | None
    seconds: float
    machines: tuple[Machine, ...]
    commits: tuple[str, ...]
    command: str
    note: str = ""
    tables: tuple[Table, ...] = ()


@dataclass(frozen=True, slots=True)
class Claim:
    """One line of the ledger.

    Attributes:
        experiments: The experiments that are to decide it; empty for a claim on record.
        undone: Those of them that have not been run.
        judgements: What the others said, with the name of the experiment.
        record: What is known about a claim on record.
    """

    id: str
    text: str
    source: str
    verdict: LabVerdict
    experiments: tuple[str, ...]
    undone: tuple[str, ...]
    judgements: tuple[tuple[str, Judgement], ...]
    record: str = ""


@dataclass(frozen=True, slots=True)
class Contradiction:
    """Two claims that cannot both hold, and what decided between them, or why that is open.

    Attributes:
        experiments: Those that are to decide, `undone` those of them that have not been run.
        judgements: What the others said about the claims, with the name of the experiment and the claims' ids.
    """

    code: str
    text: str
    experiments: tuple[str, ...]
    undone: tuple[str, ...]
    verdict: Literal["decided", "in part", "open"]
    judgements: tuple[tuple[str, tuple[str, ...], Judgement], ...]


@dataclass(frozen=True, slots=True)
class Correction:
    """An error of fact.

    Attributes:
        claims: The ids of the claims that say so.
        said: What they say.
        fact: What is so.
        source: Who reports it; "" where the experiment named in the fact shows it, or anybody can see it.
    """

    code: str
    claims: tuple[str, ...]
    said: str
    fact: str
    source: str


@dataclass(frozen=True, slots=True)
class Point:
    """One sentence behind an advice, and what it rests on.

    Attributes:
        text: As the verdict has it: what was found, or what is not known.
        stance: Towards the advice; "note" is neither for nor against it.
        judgement: None where the experiment has not been run.
    """

    text: str
    stance: Literal["for", "against", "note", "unknown"]
    experiment: str
    judgement: Judgement | None


@dataclass(frozen=True, slots=True)
class Advice:
    """What to do in a situation.

    Attributes:
        call: Lines of Python that do it.
        cost: What it costs.
        published: What others measured at full size; "" for nothing.
    """

    situation: str
    use: str
    call: tuple[str, ...]
    cost: str
    published: str
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class Ledger:
    """All claims with their verdicts.

    Attributes:
        sources: What the keys of the claims' sources stand for.
        advice: For whoever has a model and no time to read the claims.
    """

    claims: tuple[Claim, ...]
    experiments: tuple[Experiment, ...]
    contradictions: tuple[Contradiction, ...]
    sources: tuple[tuple[str, str], ...]
    corrections: tuple[Correction, ...] = ()
    advice: tuple[Advice, ...] = ()

    @property
    def tests(self) -> int:
        """How many tests were made in all."""
        return sum(j.tests for e in self.experiments for j in e.judgements)

    @property
    def partial(self) -> int:
        """How many claims have a verdict while some of their experiments are open."""
        return sum(bool(claim.judgements and claim.undone) for claim in self.claims)

    def count(self, verdict: LabVerdict) -> int:
        """How many claims have a verdict."""
        return sum(claim.verdict == verdict for claim in self.claims)

    def minutes(self, claim: Claim) -> float:
        """Of computing, in all experiments that say something about a claim."""
        names = {name for name, _ in claim.judgements}
        return sum(e.seconds for e in self.experiments if e.registration.name in names) / 60


__all__ += [
    "Advice",
    "Cell",
    "Claim",
    "Contradiction",
    "Correction",
    "Experiment",
    "Judgement",
    "LabVerdict",
    "Ledger",
    "Picture",
    "Plot",
    "Point",
    "Registration",
    "Row",
    "Series",
    "Table",
]


# --- the self-test of the doctor ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Trial:
    """One size of a defect, put into the copy and checked.

    Attributes:
        severity: Of the alarm that saw it; None where it was not seen.
        codes: The rules at work: those that raised what the untouched copy did not.
        cost: What the defect costs on samples that took no part in finding it; None where that was not measured.
    """

    size: float
    severity: Severity | None
    codes: tuple[str, ...]
    cost: Interval | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """How small a defect the doctor sees in this model, with these data.

    Attributes:
        unit: Of the sizes; "" for a defect that is there or not.
        layers: Where it was put.
        status: "no-cost": at its largest size no alarm, and no cost that could be shown; "masked": the untouched copy
            raises the same alarm there, so that nothing can be told.
        seen: The smallest size that was seen; None where none was.
        missed: The largest that was tried below it and not seen; None where none was.
        reason: Of any status but "seen".
    """

    defect: str
    text: str
    rules: tuple[str, ...]
    unit: str
    layers: tuple[str, ...]
    status: Literal["seen", "no-cost", "not-seen", "masked", "not-applicable", "not-tried"]
    seen: Trial | None
    missed: Trial | None
    trials: tuple[Trial, ...]
    reason: str = ""


@dataclass(frozen=True, slots=True)
class SelfTest:
    """The record of `normscope selftest`: which known defects the doctor sees in a copy of the user's model.

    Attributes:
        control: What the untouched copy raises.
        checks: How many checks were made, the control's included, and `per_check` what one took, in the median.
        samples: In the batches that were kept.
        settled: Whether every search for a smallest size came to its end.
        before: Fingerprint of the user's model, which was the same afterwards.
    """

    model: str
    norms: tuple[tuple[str, int], ...]
    layer: str
    samples: int
    control: tuple[Finding, ...]
    sensitivities: tuple[Sensitivity, ...]
    checks: int
    per_check: float
    seconds: float
    budget: float
    settled: bool
    device: str
    settings: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    before: str
    machine: Machine


__all__ += ["SelfTest", "Sensitivity", "Trial"]

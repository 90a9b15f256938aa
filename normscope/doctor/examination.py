"""`check`: one examination from loader to report, which leaves the model bit for bit as it was."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import is_lazy

from normscope.doctor import gates, judge
from normscope.doctor.cache import generators, read
from normscope.doctor.fix import Ward, level
from normscope.doctor.guard import bring_back
from normscope.doctor.measurements import Array, Layer, Measurements
from normscope.doctor.patches import Source, patched
from normscope.doctor.patient import Patient
from normscope.doctor.probe import FOLDING, Callables, Probe
from normscope.doctor.progress import Progress, Tell
from normscope.doctor.report import Report
from normscope.doctor.rules import RULES, Judgement, Rule
from normscope.doctor.thresholds import DEFAULTS, Thresholds
from normscope.errors import ArgumentError, NormscopeError
from normscope.records import ChannelStatistics, CheckRecord, Finding, Machine, NormRow, Score
from normscope.surgery import Snapshot, state_hash

__all__ = ["StateNotRestoredError", "check", "check_arguments", "rule_pages", "unharmed"]

# Share of the budget after which reading the loader ends.
READING = 0.15
SEED = 0
# What the record keeps for figures of single channels: more would weigh more than all the rest.
MOST_DRAWN, MOST_CHANNELS = 6, 64


class StateNotRestoredError(NormscopeError, RuntimeError):
    """NRM904: the doctor left the model otherwise than it found it; its findings are void."""

    exit_code = 3  # of the command line


def check(
    model: Module,
    loader: Iterable[Any],
    *,
    forward: Callable[[Module, Any], Any] | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    metric: Callable[[Any, Any], Any] | None = None,
    optimizer: Any = None,
    train_step: Callable[[Module, Any, Any], Any] | None = None,
    evaluate: Callable[[Module], Any] | None = None,
    predict: Callable[[Module, Any], Any] | None = None,
    roundtrip: Callable[[Module], Module] | None = None,
    reference: Module | None = None,
    deployment: Iterable[Any] | None = None,
    intent: Iterable[str] = (),
    select: Iterable[str] | str | None = None,
    ignore: Iterable[str] | str | None = None,
    module_ignores: Mapping[str, Iterable[str]] | None = None,
    thresholds: Thresholds = DEFAULTS,
    budget: float = 60,
    device: str | torch.device | None = None,
    progress: Tell | None = None,
) -> Report:
    """Find normalization trouble, its layers, its cost and its cure. The model is bit for bit the same afterwards.

    The loader is read once into a bounded cache, which is dealt out to three splits: A diagnoses, B verifies, C
    confirms a fix. Hand over the model in the mode in which it is used: rules about training and freezing look at it.

    Args:
        model: The model.
        loader: An iterable of batches: a DataLoader, a generator, a list.
        forward: `forward(model, batch)`; by default the model gets the first element of the batch, or a dictionary's
            entries by name.
        loss: `loss(output, batch)`, one number per sample.
        metric: `metric(output, batch)`, higher is better, one number per sample or one per batch. Without loss and
            metric, class scores with whole-number labels are scored by cross entropy and accuracy, which a note says.
        optimizer: For train_step; a copy is used.
        train_step: `train_step(model, batch, optimizer)`, run three times on a copy.
        evaluate: `evaluate(model)`; whether it changes the model is looked at.
        predict: `predict(model, inputs)`, the path used in production.
        roundtrip: `roundtrip(model)`, your save and load; its buffers are compared.
        reference: Another model: the one that this one averages or follows, its follower, or it before a change.
        deployment: Another loader: the data on which the model is used, or the same samples as they are evaluated.
        intent: Declared intentions, e.g. "gan-batchstats-test": alarms about them become "intentional".
        select: Codes or their beginnings, e.g. "NRM2"; all by default.
        ignore: The same, left out.
        module_ignores: By pattern of module paths, the codes that do not count there: {"encoder.*": ["NRM202"]}. What
            no alarm needed is noted, of these as of `ignore` and `intent`.
        thresholds: By which the rules judge; `configure` reads them from a pyproject.toml.
        budget: Seconds; fewer samples are taken where it is short.
        device: Where to run; by default where the model is.
        progress: `progress(done, total, what)`, called after every batch of every pass; the total grows where a search
            for layers begins, and is 0 before it is known.

    Raises:
        ArgumentError: An argument is of the wrong kind, or the model cannot run on the loader's batches.
        DataError: The loader is empty or raises before its first batch.
        StateNotRestoredError: The model could not be brought back.

    Example:
        >>> import torch, normscope as ns
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)).eval()
        >>> ns.check(model, [torch.randn(8, 4) for _ in range(6)])["NRM101"].status
        'pass'
    """
    start = time.monotonic()
    user = Callables(forward, loss, metric, optimizer, train_step, evaluate, predict, roundtrip, reference, deployment)
    check_arguments(model, user, budget)
    run, declared = judge.chosen(select, ignore), judge.check_intents(intent)
    place = None if device is None else torch.device(device)
    judge.spare([], module_ignores or {})  # bad codes are refused before anything runs
    with generators(deployment), unharmed(model, reference, loader) as (before, home):
        patient = Patient(model, forward, loss, metric, _device(model, place), progress=Progress(progress))
        patient.progress.at("reading the loader")
        cache = read(loader, budget * READING)
        if place is not None:
            model.to(place)
        asked = () if select is None else run
        prices = frozenset(rule.code for rule in asked if rule.code.startswith(("NRM8", FOLDING)))
        probe = Probe(patient, home, user, cache, thresholds, SEED, start, budget, declared, prices)
        measured = probe.run()
    judged = judge.verdicts_of(measured, run, declared, thresholds)
    judged, unused = judge.spare(judged, module_ignores or {})
    probe.notes += [*unused, *judge.unneeded(judged, measured, ignore, declared, thresholds)]
    record = _record(probe, measured, judged, before, declared, start)
    ward = Ward(model, probe.splits, patient, reference, measured.best_estimator, thresholds, SEED)
    return Report(record, measured, ward)


def rule_pages() -> dict[str, str]:
    """The page of every rule, by code."""
    return {code: f"{code} {RULES[code].name}\n\n{RULES[code].page}" for code in sorted(RULES)}


@contextlib.contextmanager
def unharmed(model: Module, reference: Module | None, loader: Iterable[Any]) -> Iterator[tuple[str, Snapshot]]:
    """Bring everything back whatever happens, and prove it (NRM904)."""
    others = [] if reference is None or reference is model else [reference]
    before = state_hash(model, rng=True)
    others_before = [state_hash(other) for other in others]
    home, homes = Snapshot(model), [Snapshot(other, rng=False) for other in others]
    with generators(loader):
        try:
            yield before, home
        finally:
            bring_back(*homes, home)
    changed = state_hash(model, rng=True) != before
    if changed or [state_hash(other) for other in others] != others_before:
        raise StateNotRestoredError(
            "NRM904: the model is not bit for bit what it was before the check",
            cure="this is a bug of normscope: please report it; load the model again before using it",
        )


def check_arguments(model: Any, user: Callables, budget: float) -> None:
    """Refuse what cannot be examined, before anything runs."""
    if not isinstance(model, Module):
        raise ArgumentError(
            f"the model must be a torch.nn.Module, but it is a {type(model).__name__}", cure="build it first"
        )
    tensors = [*model.parameters(), *model.buffers()]
    if any(is_lazy(tensor) for tensor in tensors):
        raise ArgumentError("the model has lazy parameters that are not initialized", cure="run one forward first")
    if any(tensor.device.type == "meta" for tensor in tensors):
        raise ArgumentError("the model lies on the meta device, without values", cure="load it with its weights first")
    for field in dataclasses.fields(user):
        value = getattr(user, field.name)
        if field.name not in ("optimizer", "reference", "deployment") and value is not None and not callable(value):
            raise ArgumentError(
                f"{field.name} must be callable, but it is a {type(value).__name__}", cure="pass a function"
            )
    if user.reference is not None and not isinstance(user.reference, Module):
        raise ArgumentError("reference must be a torch.nn.Module", cure="pass the other model, not its state_dict")
    if user.train_step is None and not isinstance(user.optimizer, (torch.optim.Optimizer, type(None))):
        raise ArgumentError(
            f"without train_step the optimizer's groups are looked at, but it is a {type(user.optimizer).__name__}",
            cure="pass a torch.optim.Optimizer, or train_step, too",
        )
    if not budget > 0:
        raise ArgumentError(f"budget must be positive, but got {budget}", cure="seconds; 60 by default")


def _device(model: Module, device: torch.device | None) -> torch.device | None:
    if device is not None:
        return device
    return next((t.device for t in (*model.parameters(), *model.buffers())), None)


# --- the record -------------------------------------------------------------------------------------------------------


def _record(
    probe: Probe,
    m: Measurements,
    judged: list[tuple[Rule, Judgement]],
    before: str,
    intent: tuple[str, ...],
    start: float,
) -> CheckRecord:
    functions = {f.name: getattr(probe.user, f.name) for f in dataclasses.fields(probe.user)}
    findings = patched(judge.findings_of(judged, m), Source(probe.patient.model, functions, m))
    causes = {f.code: f.explained_by for f in findings}
    patient = probe.patient
    kinds = sorted({layer.kind for layer in m.layers})
    return CheckRecord(
        model=type(patient.model).__name__,
        norms=tuple((kind, sum(layer.kind == kind for layer in m.layers)) for kind in kinds),
        samples=sum(probe.splits.samples),
        splits=probe.splits.samples,
        batches_read=m.loader.read,
        batches_used=sum(m.batches),
        seconds=time.monotonic() - start,
        budget=float(probe.budget),
        seed=probe.seed,
        device=str(patient.device or "cpu"),
        noise_floor=m.repeat,
        scores=tuple(_score(name, m) for name in m.outcomes),
        reading=gates.reading(m.outcomes, m.chance, probe.thresholds),
        cost=m.recalibrated.cost,
        findings=findings,
        verdicts=tuple(judge.verdict(rule, j, causes.get(rule.code, "")) for rule, j in judged),
        layers=tuple(_row(layer, m, findings) for layer in m.layers),
        passes=tuple(patient.passes),
        thresholds=probe.thresholds.table(),
        settings=_settings(probe, intent),
        notes=_notes(probe, m),
        before=before,
        restored=True,
        machine=Machine.measure(),
        channels=_channels(m),
    )


def _score(name: str, m: Measurements) -> Score:
    outcome = m.outcomes[name]
    metric = None if outcome.metric is None else level(outcome)
    return Score(name, metric, level(dataclasses.replace(outcome, metric=None)), outcome.samples)


def _row(layer: Layer, m: Measurements, findings: tuple[Finding, ...]) -> NormRow:
    drift, own, design = m.drift.get(layer.name), m.own.get(layer.name), m.design.get(layer.name)
    sites = [site for site in m.sites if site.layer == layer.name]
    return NormRow(
        name=layer.name,
        kind=layer.kind,
        mode="frozen" if layer.held else "train" if layer.training else "eval",
        calls=len(sites),
        values=sites[0].values if sites else None,
        delta=None if drift is None else _short(gates.median_size(drift.delta)),
        rho=None if drift is None else _short(gates.median_size(drift.rho)),
        drifted=None if drift is None else _short(drift.share),
        noise=None if own is None or len(own.means) < 3 else _short(gates.noise_energy(own, layer.eps)),
        design_effect=None if design is None else _short(design[0]),
        explains=None if layer.name not in m.shares else _short(m.shares[layer.name]),
        codes=tuple(f.code for f in findings if layer.name in f.layers),
    )


def _short(value: float) -> float:
    """Five digits, as many as were measured: with all of them, a page of 200 normalizers would be a sixth larger."""
    return float(f"{value:.5g}")


def _channels(m: Measurements) -> tuple[ChannelStatistics, ...]:
    """Channel by channel the normalizers that drift most."""
    layers = [layer for layer in m.layers if layer.name in m.drift and layer.name in m.own]
    layers.sort(key=lambda layer: (-m.drift[layer.name].share, -gates.median_size(m.drift[layer.name].delta)))
    return tuple(_statistics(layer, m) for layer in layers[:MOST_DRAWN])


def _statistics(layer: Layer, m: Measurements) -> ChannelStatistics:
    drift, own = m.drift[layer.name], m.own[layer.name]
    order = np.argsort(np.abs(drift.delta) + np.abs(drift.rho))
    ranks = np.unique(np.linspace(0, len(order) - 1, min(len(order), MOST_CHANNELS)).astype(int))

    def listed(values: Array | None) -> tuple[float, ...]:
        return () if values is None else tuple(_short(v) for v in values[order[ranks]])

    running_var = None if layer.var is None else layer.var + layer.eps
    return ChannelStatistics(
        layer=layer.name,
        total=len(order),
        running_mean=listed(layer.mean),
        running_var=listed(running_var),
        data_mean=listed(own.mean),
        data_var=listed(own.var + layer.eps),
    )


def _settings(probe: Probe, intent: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    given = [f.name for f in dataclasses.fields(probe.user) if getattr(probe.user, f.name) is not None]
    scored = probe.patient.inferred or ", ".join(n for n in ("loss", "metric") if n in given) or "nothing"
    return (("scored by", scored), ("passed", ", ".join(given) or "nothing"), ("intent", ", ".join(intent) or "none"))


def _notes(probe: Probe, m: Measurements) -> tuple[str, ...]:
    notes = [*probe.cache.notes, *probe.notes]
    if not m.layers:
        notes.append("the model has no normalizers that are known here")
    if probe.patient.inferred:
        notes.append(f"scored by {probe.patient.inferred}; pass loss= or metric= for others")
    if m.score_problem:
        notes.append(f"no cost could be measured: {m.score_problem}")
    if m.batch_problem:
        notes.append(f"batch statistics could not be used: {m.batch_problem}")
    return tuple(notes)

"""The passes, in order and within the budget: from a patient to measurements."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module
from torch.nn import functional as F

from normscope.doctor import gates
from normscope.doctor.attribution import Coalitions, search
from normscope.doctor.cache import Batch, Cache, Splits, few_of, read, regroup, split, thin
from normscope.doctor.costs import costs_of
from normscope.doctor.leak import LEAK, leak
from normscope.doctor.measurements import Effect, Layer, Measurements, Moments, Outcome, Reference, Site
from normscope.doctor.patient import Patient, Statistics
from normscope.doctor.ranks import compare_ranks, devices_of
from normscope.doctor.scan import (
    Tracer,
    average_without_buffers,
    constant_is_finite,
    difference,
    exported,
    fed_frozen,
    infinite_weights,
    layers_of,
    raw_tensors_of,
)
from normscope.doctor.suspects import Suspects, folded_ranges, linear_before
from normscope.doctor.thresholds import Thresholds
from normscope.doctor.user import bare, dependence, evaluate_once, optimized, reference_facts, round_trip, take_steps
from normscope.errors import ArgumentError
from normscope.nn.collective import alone
from normscope.surgery import Snapshot, feed, switch

__all__ = ["Callables", "Probe", "statistics_of"]

# Forwards per batch of each split: two with hooks in A, four in B.
COST_PER_TRIPLE = 7.0
# Forwards of a few samples before the plan is made: two for the repeat noise, some fourteen of all sorts behind them.
FEW_PASSES = 16
# Shares of the budget: what planning may promise, what questions to a few samples may take, and where the search for
# layers must have ended.
PLANNED = 0.6
QUESTIONS = 0.2
ATTRIBUTION_ENDS = 0.85
CANDIDATES = 8
ATTRIBUTION_BATCHES = 8
ATTRIBUTION_SAMPLES = 256
SMALL = 2
SECOND_LOADER = 0.1
FEWEST_CUT = 8
HALVES = ("float16", "bfloat16")
FOLDING = "NRM702"


@dataclass(frozen=True, slots=True)
class Callables:
    """What the user passed besides model and loader."""

    forward: Callable[[Module, Any], Any] | None = None
    loss: Callable[[Any, Any], Any] | None = None
    metric: Callable[[Any, Any], Any] | None = None
    optimizer: Any = None
    train_step: Callable[[Module, Any, Any], Any] | None = None
    evaluate: Callable[[Module], Any] | None = None
    predict: Callable[[Module, Any], Any] | None = None
    roundtrip: Callable[[Module], Module] | None = None
    reference: Module | None = None
    deployment: Iterable[Any] | None = None


def statistics_of(moments: dict[str, Moments], estimator: str) -> Statistics:
    """Running statistics as an estimator makes them from the moments of a pass on batch statistics."""
    made = {}
    for name, m in moments.items():
        total = m.sizes.sum()
        var = m.var * total / max(total - 1, 1) if estimator == "population" else m.mean_of_vars
        mean = m.mean if estimator == "population" else m.means.mean(axis=0)
        made[name] = (torch.from_numpy(np.asarray(mean)), torch.from_numpy(np.asarray(var)))
    return made


@dataclass(slots=True)
class Probe:
    """One examination.

    Attributes:
        patient: The model.
        home: The model as it was handed over.
        user: The user's callables.
        cache: The batches.
        thresholds: Of the gates.
        seed: Of all random draws.
        start: When the examination began.
        budget: Seconds for all of it.
        declared: Intents and uses.
        prices: Rules that ask for times.
        notes: What a reader must know.
        pace: Seconds of a forward, per sample.
    """

    patient: Patient
    home: Snapshot
    user: Callables
    cache: Cache
    thresholds: Thresholds
    seed: int
    start: float
    budget: float
    declared: tuple[str, ...] = ()
    prices: frozenset[str] = frozenset()
    splits: Splits = field(init=False)
    pace: float = 0.0
    notes: list[str] = field(default_factory=list)
    found: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.splits = split(self.cache.batches, self.seed)

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.budget - (time.monotonic() - self.start)

    def run(self) -> Measurements:
        """All passes; the caller brings the model back."""
        found = self.found
        # Ranks need not take as many passes as each other, and one that checks alone would wait for the rest.
        with alone():
            self._passes()
        self._costs()
        found["batches"] = (len(self.splits.a), len(self.splits.b), len(self.splits.c))
        found["traced_size"] = self.cache.batches[0].size
        found["batch_size"] = max((batch.size for batch in self.cache.batches), default=0)
        return Measurements(**found)

    def _passes(self) -> None:
        """All but the times, every rank by itself."""
        found, model = self.found, self.patient.model
        found["layers"] = layers_of(model, self.home)
        found["training"] = bool(model.training)
        found["learns"] = any(p.requires_grad for p in model.parameters())
        found["average"] = average_without_buffers(model)
        found["infinite_weights"] = infinite_weights(model)
        found["loader"] = self.cache.facts
        found["declared"] = self.declared
        found["exported"] = exported(model)
        found["optimized"] = optimized(model, self.user.optimizer)
        found["parallel"], found["devices"] = devices_of(model)
        if found["parallel"] == "distributed" and found["devices"] > 1:
            found["ranks"], found["rank_problem"] = compare_ranks(found["layers"])
        self._as_handed_over()
        self._trace()
        self._plan()
        self._states()
        self._attribute()
        self._attribute_batches()
        self._suspects()
        self._leak()
        self._deployment()
        self._reference()

    # --- as handed over: before anything changes a mode -----------------------------------------------------------

    def _as_handed_over(self) -> None:
        self.patient.progress.at("the model as it was handed over")
        user, model, first = self.user, self.patient.model, self.cache.batches[0]
        if user.evaluate is not None:
            self.found["mutation"] = evaluate_once(model, user.evaluate, self.home)
        if user.train_step is not None:
            with self.home:
                batches = self.splits.a or self.cache.batches
                self.found["steps"] = take_steps(model, batches, user.train_step, user.optimizer, self.patient.device)
        if user.roundtrip is not None:
            with self.home:
                self.found["roundtrip"] = round_trip(self.patient, self.found["layers"], user.roundtrip, first)
        frozen = any(not p.requires_grad for p in model.parameters())
        if frozen and any(layer.training or not layer.keeps_mode for layer in self.found["layers"]):
            with self.home:
                fed = fed_frozen(self.patient, first)
            layers = self.found["layers"]
            self.found["layers"] = tuple(dataclasses.replace(x, fed_frozen=fed.get(x.name)) for x in layers)
        if user.predict is not None:
            with self.home:
                self.found["dependence"] = dependence(self.patient, few_of(first), user.predict)

    # --- P1 -------------------------------------------------------------------------------------------------------

    def _trace(self) -> None:
        """One traced forward with a clock, and a few samples twice, which shows the repeat noise."""
        patient, first = self.patient, self.cache.batches[0]
        tracer = Tracer(patient.model)
        with patient.evaluating():
            start = time.monotonic()
            try:
                with tracer.attached():
                    output, data = patient.run(first)
            except Exception as error:
                raise _cannot_run(error, patient.forward is not None) from error
            self.pace = max(time.monotonic() - start, 1e-6) / max(first.size, 1)
            few = self._few(first)
            self.found["repeat"] = self._repeat(first, few)
            sites = _with_constants(patient, tracer.sites)
        self.found["sites"] = sites
        self.found["functional"] = tuple(tracer.calls)
        self.found["last"] = tracer.lineage.norms(output)
        self.found["rectified"] = tuple(sorted(tracer.lineage.rectified))
        self.found["fed"] = linear_before(patient, few)
        linears = {n: patient.model.get_submodule(n) for n, _ in self.found["fed"].values()}
        self.found["biased"] = tuple(n for n, module in linears.items() if module._parameters.get("bias") is not None)
        self.found["ranges"] = folded_ranges(patient.model, self.found["layers"], self.found["fed"])
        reached = {site.layer for site in tracer.sites}
        self.found["unreached"] = tuple(x.name for x in self.found["layers"] if x.name not in reached and not x.script)
        self._infer(output, data)
        if "dependence" not in self.found:
            with self.home:
                self.found["dependence"] = dependence(patient, few, None)

    def _few(self, batch: Batch) -> Batch:
        """The samples for questions that need no more than eight; fewer where forwards are slow."""
        affordable = self.left * QUESTIONS / (FEW_PASSES * self.pace)
        return few_of(batch, int(min(FEWEST_CUT, max(SMALL, affordable))))

    def _repeat(self, first: Batch, few: Batch) -> float | None:
        """The relative difference of two runs of a few samples with other random numbers."""
        outputs = []
        for seed in (self.seed, self.seed + 1):
            torch.manual_seed(seed)
            try:
                outputs.append(self.patient.run(few)[0])
            except Exception:
                few = first  # a batch that cannot be cut
                outputs.append(self.patient.run(few)[0])
        return difference(*outputs)

    def _infer(self, output: Any, data: Any) -> None:
        """Where nothing was passed, class scores with whole-number labels are taken for what they look like."""
        patient = self.patient
        if patient.loss is not None or patient.metric is not None or not _is_classification(output, data):
            return
        patient.loss, patient.metric = _cross_entropy, _hits
        patient.inferred = "cross entropy and accuracy, inferred from class scores and whole-number labels"

    # --- the plan -------------------------------------------------------------------------------------------------

    def _plan(self) -> None:
        """Take as many batches as the budget allows, evenly from all splits; of one that is too slow, a part."""
        affordable = self.left * PLANNED / (self.pace * self.cache.batches[0].size * COST_PER_TRIPLE)
        if affordable >= max(len(self.splits.a), 1):
            return
        parts = (self.splits.a, self.splits.b, self.splits.c)
        self.splits = Splits(*(thin(part, max(1, int(affordable))) for part in parts))
        if affordable < 1:
            self._cut(affordable)
        told = f"the budget of {self.budget:g} s allows {sum(self.splits.samples)} samples"
        self.notes.append(f"{told}; a larger one sees smaller effects")

    def _cut(self, share: float) -> None:
        """Go on with a part of one batch per split: too few for rules about batches, which then say so."""
        most = max(FEWEST_CUT, int(share * self.cache.batches[0].size))
        parts = (self.splits.a, self.splits.b, self.splits.c)
        self.splits = Splits(*(tuple(few_of(batch, most) for batch in part) for part in parts))
        self.notes.append(f"one batch takes longer than the budget allows: batches were cut to {most} samples")

    def _affords(self, passes: float, batches: Sequence[Batch], what: str) -> bool:
        """Whether the budget has room for that many more passes; a note where it has not."""
        if passes * sum(batch.size for batch in batches) * self.pace <= self.left:
            return True
        self.notes.append(f"{what} was left out: the budget is spent")
        return False

    # --- P2 to P4 -------------------------------------------------------------------------------------------------

    def _states(self) -> None:
        patient, splits, t = self.patient, self.splits, self.thresholds
        patient.progress.expect(2, len(splits.a))
        if patient.loss is not None or patient.metric is not None:
            patient.progress.expect(3, len(splits.b))
        unfit: list[Batch] = []
        with patient.evaluating():
            seen = patient.measure("P2 evaluation, statistics (A)", splits.a, samples=True, unfit=unfit)
        self._leave_out(unfit)
        self.found["seen"] = seen
        self.found["unreached"] = tuple(n for n in self.found["unreached"] if n not in seen)
        self.found["design"] = gates.design_effect(seen, t, self.seed)
        own = self._own()
        self.found["own"] = own
        usable = tuple(layer for layer in self.found["layers"] if layer.name in own)
        self.found["drift"] = gates.drifts(usable, own, t, self.seed)
        if own:
            self.found["estimators"] = max(_estimator_gap(m) for m in own.values())
        self._score_states(own)
        patient.progress.settle()

    def _leave_out(self, unfit: list[Batch]) -> None:
        """Go on without the batches on which the model fails; its first one it has passed."""
        if unfit and len(unfit) < len(self.cache.batches):
            parts = (self.splits.a, self.splits.b, self.splits.c)
            self.splits = Splits(*(tuple(batch for batch in part if batch not in unfit) for part in parts))
            places = ", ".join(str(batch.index) for batch in unfit[:5])
            self.notes.append(
                f"batches on which the model fails were left out: {len(unfit)}, among them number {places}"
            )

    def _own(self) -> dict[str, Moments]:
        """Inputs with all normalizers on batch statistics; what is not finite is left out."""
        unfit: list[Batch] = []
        with self.patient.on_batches():
            own = self.patient.measure("P4 batch statistics (A)", self.splits.a, unfit=unfit)
        if unfit:
            # Mostly a last batch of one sample; what its size cannot do in A it cannot do in B.
            least = max(batch.size for batch in unfit)
            if own and least < max(batch.size for batch in self.splits.a):
                self._leave_out([x for part in (self.splits.a, self.splits.b) for x in part if x.size <= least])
            else:
                self.found["batch_problem"] = self.patient.problem
        return {n: m for n, m in own.items() if np.isfinite(m.means).all() and np.isfinite(m.vars).all()}

    def _score_states(self, own: dict[str, Moments]) -> None:
        patient, b, t = self.patient, self.splits.b, self.thresholds
        outcomes: dict[str, Outcome] = self.found.setdefault("outcomes", {})
        if patient.loss is None and patient.metric is None:
            self.found["score_problem"] = "neither loss nor metric was passed"
        elif not b:
            self.found["score_problem"] = "the loader has one batch; two are needed to verify on other samples"
        if self.found.get("score_problem"):
            return
        unfit: list[Batch] = []
        with patient.evaluating():
            outcomes["eval"] = patient.score("P2 evaluation (B)", b, unfit=unfit)
        self._leave_out(unfit)
        b = self.splits.b
        self._most_frequent(b)
        if own:
            self._score_recalibrated(own, outcomes)
        self._score_prediction(outcomes)
        if "predict" in outcomes:
            self.found["predicted"] = gates.effect(outcomes["predict"], outcomes["eval"], t, self.seed)
        elif self.found["dependence"].layers and "batch_problem" not in self.found:
            self._score_small(outcomes)
        if "recalibrated" in outcomes:
            now, other = outcomes["eval"], outcomes["recalibrated"]
            self.found["recalibrated"] = gates.effect(now, other, t, self.seed)
            self.found["needed"] = gates.needed(now, other, t)
        if self._at_chance(outcomes):
            self.notes.append("no state of the model is better than chance at these labels: the cost tells nothing")
            self.found |= {"recalibrated": Effect(), "batch": Effect(), "small": Effect(), "predicted": Effect()}

    def _score_prediction(self, outcomes: dict[str, Outcome]) -> None:
        """The user's own path on split B, in the modes as handed over, if loss or metric can read what it returns."""
        predict = self.user.predict
        if predict is None:
            return
        twin = dataclasses.replace(self.patient, forward=lambda model, data: predict(model, _input(data)))
        if self.patient.inferred:
            twin.loss = None  # predict may return probabilities, whose order is all that can be relied on
        try:
            with self.home, torch.no_grad():
                outcomes["predict"] = twin.score("predict (B)", self.splits.b)
        except Exception as error:
            self.notes.append(f"predict could not be scored: {type(error).__name__}: {error}")

    def _most_frequent(self, batches: Sequence[Batch]) -> None:
        """The accuracy of always answering the most frequent label."""
        if self.patient.inferred and batches:
            labels = torch.cat([batch.data[1].flatten() for batch in batches])
            self.found["chance"] = float(torch.bincount(labels.cpu()).max()) / len(labels)

    def _at_chance(self, outcomes: dict[str, Outcome]) -> bool:
        """Whether a guessed accuracy is no better than chance in any state: the labels may be none."""
        chance = self.found.get("chance")
        if chance is None:
            return False
        best = max(float(o.metric.mean()) for o in outcomes.values() if o.metric is not None)
        error = math.sqrt(chance * (1 - chance) / max(1, outcomes["eval"].samples))
        return bool(best <= chance + 3 * error)

    def _score_recalibrated(self, own: dict[str, Moments], outcomes: dict[str, Outcome]) -> None:
        patient, b, t = self.patient, self.splits.b, self.thresholds
        estimators = ["population"] + (["mean"] if self.found["estimators"] > 0.01 else [])
        tried = {}
        for estimator in estimators:
            with patient.with_statistics(statistics_of(own, estimator)):
                tried[estimator] = patient.score(f"P4 recalibrated, {estimator} (B)", b)
        best = max(tried, key=lambda name: gates.quality(tried[name]))
        self.found["best_estimator"] = best
        outcomes["recalibrated"] = tried[best]
        try:
            with patient.on_batches():
                outcomes["batch statistics"] = patient.score("P3 batch statistics (B)", b)
        except (ValueError, RuntimeError) as error:
            self.found["batch_problem"] = str(error).splitlines()[0]
            return
        self.found["batch"] = gates.effect(outcomes["eval"], outcomes["batch statistics"], t, self.seed)
        self.found["small"] = gates.effect(outcomes["batch statistics"], outcomes["recalibrated"], t, self.seed)

    def _score_small(self, outcomes: dict[str, Outcome]) -> None:
        """A model whose evaluation depends on the batch: the same samples in batches of two."""
        pairs = tuple(
            Batch(batch.index, regroup(batch.data, batch.size, [k, k + 1]), 2)
            for batch in thin(self.splits.b, ATTRIBUTION_BATCHES)
            for k in range(0, batch.size - 1, SMALL)
        )
        whole = tuple(
            Batch(
                batch.index,
                regroup(batch.data, batch.size, list(range(batch.size - batch.size % 2))),
                batch.size - batch.size % 2,
            )
            for batch in thin(self.splits.b, ATTRIBUTION_BATCHES)
            if batch.size > 1
        )
        try:
            with self.patient.evaluating():
                small = self.patient.score("evaluation in batches of two (B)", pairs)
                large = self.patient.score("evaluation in whole batches (B)", whole)
        except (ValueError, RuntimeError):
            return
        outcomes["batches of two"] = small
        self.found["predicted"] = gates.effect(small, large, self.thresholds, self.seed)

    # --- P5 -------------------------------------------------------------------------------------------------------

    def _attribute(self) -> None:
        """Which layers carry what evaluation loses by its statistics, the worst drift first."""
        effect: Effect = self.found.get("recalibrated", Effect())
        drift = self.found["drift"]
        far = [n for n in drift if drift[n].share > 0] or drift
        names = sorted(far, key=lambda n: (-drift[n].share, -_size(drift[n])))
        if not effect.harmful or not names:
            return
        patient, statistics = self.patient, self._recalibrated()
        coalitions = self._coalitions(
            effect, ("eval", "recalibrated"), lambda layers: patient.with_statistics(statistics, layers)
        )
        if coalitions is None:
            return
        self.found["shares"] = self._searched(coalitions, names)
        if self._has_time():
            coalitions.share([name for name in names if drift[name].beyond])
        self.found["coalitions"] = coalitions.shares

    def _attribute_batches(self) -> None:
        """Which layers carry what batch statistics gain, or lose in training, the noisiest first."""
        found, patient = self.found, self.patient
        own, gains, loses = found["own"], found.get("batch", Effect()), found.get("small", Effect())
        t, layers = self.thresholds, Measurements(layers=found["layers"], steps=found.get("steps"))
        if found.get("recalibrated", Effect()).errors >= t.gap or max(gains.errors, loses.errors) < t.gap:
            return
        noise = {name: gates.noise_energy(moments, layers.layer(name).eps) for name, moments in own.items()}
        statistics = self._recalibrated()

        @contextlib.contextmanager
        def others_on_batches(kept: Collection[str]) -> Iterator[None]:
            with patient.with_statistics(statistics, kept), patient.on_batches(own.keys() - set(kept)):
                yield

        if gains.errors >= t.gap:
            coalitions = self._coalitions(gains, ("eval", "batch statistics"), patient.on_batches)
        elif layers.trains and max(noise.values()) < t.noise_warning:  # else the noise tells which layers
            coalitions = self._coalitions(loses, ("batch statistics", "recalibrated"), others_on_batches)
        else:
            return
        if coalitions is not None:
            found["batch_shares"] = self._searched(coalitions, sorted(noise, key=lambda name: -noise[name]))

    def _recalibrated(self) -> Statistics:
        return statistics_of(self.found["own"], self.found.get("best_estimator", "population"))

    def _searched(self, coalitions: Coalitions, names: Sequence[str]) -> dict[str, float]:
        """The shares of the first of these layers, as many as the budget allows."""
        candidates, progress = names[:CANDIDATES], self.patient.progress
        progress.expect(3 * len(candidates) - 1, len(self._part()))

        def go_on(k: int) -> bool:
            progress.part = f"P5 attribution, layer {k + 1} of {len(candidates)}"
            if not self._has_time():
                self.notes.append("the search for the layers that carry the cost ended with the budget")
                return False
            return True

        shares = search(coalitions, candidates, self.thresholds.explained, go_on)
        progress.settle()
        return shares

    def _part(self) -> tuple[Batch, ...]:
        """As much of split B as the search scores on: small batches have to be more."""
        size = max(batch.size for batch in self.splits.b)
        return thin(self.splits.b, max(ATTRIBUTION_BATCHES, math.ceil(ATTRIBUTION_SAMPLES / size)))

    def _coalitions(
        self,
        effect: Effect,
        states: tuple[str, str],
        changed: Callable[[Collection[str]], contextlib.AbstractContextManager[None]],
    ) -> Coalitions | None:
        """Sets of layers in the better of two states, on a part of split B; None where that part shows no loss."""
        patient, b, outcomes = self.patient, self._part(), self.found["outcomes"]
        everyone = frozenset(self.found["own"])
        # What the cost was seen in: a loss may hide what the metric shows, and the other way round.
        by_metric = effect.cost is not None and effect.cost.unit != "loss" and effect.cost.low > 0

        def score(layers: Collection[str]) -> float:
            with changed(layers):
                outcome = patient.score(f"P5 attribution, {len(layers)} of {len(everyone)} layers (B)", b)
            return gates.quality(outcome, by_metric)

        whole = len(b) == len(self.splits.b)
        low, high = (
            gates.quality(outcomes[state], by_metric) if whole else score(layers)
            for state, layers in zip(states, ((), everyone), strict=True)
        )
        return Coalitions(score, everyone, low, high) if high > low else None

    def _has_time(self) -> bool:
        """Whether the budget allows another candidate of the search: three passes as long as the longest of late."""
        spent = max(p.seconds for p in self.patient.passes[-3:])
        return self.left >= self.budget * (1 - ATTRIBUTION_ENDS) + 3 * spent

    # --- trials, another loader, costs ----------------------------------------------------------------------------

    def _suspects(self) -> None:
        """What only some rules ask for, where there is ground and time."""
        found, own = self.found, self.found.get("own", {})
        pooled = statistics_of(own, found.get("best_estimator", "population")) if own else {}
        found["traced"] = self.cache.batches[0].size
        a, b, t = self.splits.a, self.splits.b, self.thresholds
        if not Suspects(self.patient, found, a, b, pooled, t, self.seed, self._has_time).run():
            self.notes.append("some trials of single suspicions were left out: the budget is spent")
        del found["traced"]

    def _leak(self) -> None:
        """Whether embeddings betray their batch, if they are declared to be compared."""
        if LEAK not in self.declared:
            return
        if not self._affords(2, self.splits.a, "whether embeddings tell their batch"):
            return
        with self.home:
            self.found["leak"] = leak(self.patient, self.splits.a, self.seed)

    def _deployment(self) -> None:
        """The same statistics against the batches of a second loader."""
        if self.user.deployment is None:
            return
        found, patient, t = self.found, self.patient, self.thresholds
        cache = read(self.user.deployment, self.budget * SECOND_LOADER)
        parts = split(cache.batches, self.seed)
        fit = int(self.left / (3 * self.pace * cache.batches[0].size))
        parts = Splits(*(thin(part, max(1, fit)) for part in (parts.a, parts.b, parts.c)))
        if not self._affords(3, parts.a, "the deployment loader"):
            return
        try:
            with patient.on_batches():
                own = patient.measure("deployment, batch statistics", parts.a)
            found["deployment"] = gates.drifts(found["layers"], own, t, self.seed)
            found["same_samples"] = _same_labels(self.cache, cache)
            if parts.b and (patient.loss is not None or patient.metric is not None):
                with patient.evaluating():
                    now = patient.score("deployment, evaluation", parts.b)
                with patient.with_statistics(statistics_of(own, "population")):
                    other = patient.score("deployment, recalibrated", parts.b)
                found["shift"] = gates.effect(now, other, t, self.seed)
        except (ValueError, RuntimeError) as error:
            self.notes.append(f"the deployment loader could not be used: {type(error).__name__}: {error}")

    def _costs(self) -> None:
        """Times, if a selected rule asks for them and the budget allows."""
        if self.prices and self.left > self.budget * (1 - ATTRIBUTION_ENDS):
            with self.home:
                patient, folding = self.patient, FOLDING in self.prices
                first, seconds = self.cache.batches[0], self.left / 4
                self.found["costs"] = costs_of(patient.model, first, patient.forward, patient.device, seconds, folding)

    # --- the other model ------------------------------------------------------------------------------------------

    def _reference(self) -> None:
        other = self.user.reference
        if other is None:
            return
        layers, others = self.found["layers"], layers_of(other)
        facts = reference_facts(self.patient.model, layers, other, others)
        if not facts.problem:
            facts = self._outputs(facts, other)
        scored = not facts.problem and "eval" in self.found.get("outcomes", {})
        if scored and self._affords(4, self.splits.b, "what statistics of the reference cost"):
            facts = dataclasses.replace(
                facts,
                copied=self._with_buffers_of(self.patient, layers, others, self.found["outcomes"]["eval"]),
                theirs=self._theirs(other, layers, others),
            )
        self.found["reference"] = facts

    def _outputs(self, facts: Reference, other: Module) -> Reference:
        """How far the outputs of both lie apart on one batch, or on a few samples where time is short."""
        patient, first = self.patient, self.cache.batches[0]
        if 2 * first.size * self.pace > self.left:
            first = few_of(first)
        try:
            with Snapshot(other), patient.evaluating():
                mine, _ = patient.run(first)
                switch(other)
                theirs = feed(other, first.fresh(patient.device), patient.forward)
        except Exception as error:
            self.notes.append(f"the reference could not be run: {type(error).__name__}: {error}")
            return facts
        half = any(leaf.itemsize < 4 for x in (mine, theirs) for leaf in raw_tensors_of(x))
        return dataclasses.replace(facts, difference=difference(theirs, mine), half=half)

    def _with_buffers_of(
        self, patient: Patient, layers: tuple[Layer, ...], others: tuple[Layer, ...], now: Outcome
    ) -> Effect:
        source = {
            bare(x.name): (torch.from_numpy(x.mean), torch.from_numpy(x.var))
            for x in others
            if x.mean is not None and x.var is not None
        }
        statistics = {
            x.name: source[bare(x.name)]
            for x in layers
            if bare(x.name) in source and x.mean is not None and x.mean.size == source[bare(x.name)][0].numel()
        }
        with patient.with_statistics(statistics):
            outcome = patient.score("buffers of the reference (B)", self.splits.b)
        return gates.effect(now, outcome, self.thresholds, self.seed)

    def _theirs(self, other: Module, layers: tuple[Layer, ...], others: tuple[Layer, ...]) -> Effect:
        twin = dataclasses.replace(self.patient, model=other)
        try:
            with Snapshot(other):
                with twin.evaluating():
                    now = twin.score("reference, evaluation (B)", self.splits.b)
                return self._with_buffers_of(twin, others, layers, now)
        except Exception as error:
            self.notes.append(f"the reference could not be run: {type(error).__name__}: {error}")
            return Effect()


def _with_constants(patient: Patient, sites: Sequence[Site]) -> tuple[Site, ...]:
    """The traced calls, those in half precision with what an input without variance does to them."""
    modules = {f.name: f.module for f in patient.layers}

    def tried(site: Site) -> Site:
        if site.dtype not in HALVES:
            return site
        return dataclasses.replace(site, finite=constant_is_finite(modules[site.layer], site, patient.device))

    return tuple(tried(site) for site in sites)


def _same_labels(one: Cache, other: Cache) -> bool:
    """Whether two loaders yield the same labels in the same order: the same samples, transformed otherwise."""
    pairs = list(zip(one.batches, other.batches, strict=False))
    labels = [(_label(a.data), _label(b.data)) for a, b in pairs]
    return bool(labels) and all(a is not None and b is not None and torch.equal(a, b) for a, b in labels)


def _label(data: Any) -> Tensor | None:
    label = data[1] if isinstance(data, (tuple, list)) and len(data) > 1 else None
    return label if isinstance(label, Tensor) and label.dim() > 0 else None


def _input(data: Any) -> Any:
    return data[0] if isinstance(data, (tuple, list)) and data else data


def _size(drift: Any) -> float:
    known = drift.delta[np.isfinite(drift.delta)]
    return float(np.abs(known).mean()) if len(known) else math.inf


def _estimator_gap(m: Moments) -> float:
    """The median relative difference of the two estimators' variances."""
    with np.errstate(all="ignore"):
        ratio = np.abs(m.var / m.mean_of_vars - 1)
    ratio = ratio[np.isfinite(ratio)]
    return float(np.median(ratio)) if len(ratio) else 0.0


def _cannot_run(error: Exception, custom: bool) -> ArgumentError:
    what = "forward(model, batch)" if custom else "the model"
    half = " The model may be in half precision while the loader yields float32." if "dtype" in str(error) else ""
    return ArgumentError(
        f"{what} raised {type(error).__name__} on the loader's first batch: {error}",
        cure="pass forward=lambda model, batch: … that runs in model.eval()." + half,
    )


# --- what class scores and labels look like ---------------------------------------------------------------------------


def _is_classification(output: Any, data: Any) -> bool:
    labels = data[1] if isinstance(data, (tuple, list)) and len(data) > 1 else None
    return (
        isinstance(output, Tensor)
        and isinstance(labels, Tensor)
        and output.is_floating_point()
        and output.dim() == 2
        and output.shape[1] > 1
        and labels.dtype in (torch.int64, torch.int32, torch.uint8)
        and labels.shape == output.shape[:1]
        and int(labels.min()) >= 0
        and int(labels.max()) < output.shape[1]
    )


def _cross_entropy(output: Tensor, data: Any) -> Tensor:
    return F.cross_entropy(output.float(), data[1].to(output.device).long(), reduction="none")


def _hits(output: Tensor, data: Any) -> Tensor:
    hits: Tensor = output.argmax(1) == data[1].to(output.device)
    return hits.double()

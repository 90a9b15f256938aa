"""From judgements to the ledger: merged verdicts, open claims, contradictions."""

import itertools

import numpy as np
import pytest

from normscope.errors import ArgumentError
from normscope.lab import advice, contradictions, ledger
from normscope.lab.experiment import Results
from normscope.lab.registry import load
from normscope.lab.sketch import row
from normscope.lab.verdicts import among_best, by_effect, by_equivalence, identity, merge, ruled, tiny
from normscope.records import Interval
from normscope.report import claims, words
from normscope.statistics import Effect


@pytest.mark.parametrize(
    ("verdicts", "merged"),
    [
        ([], "open"),
        (["EXACT"], "EXACT"),
        (["EXACT", "CONFIRMED"], "CONFIRMED"),
        (["CONFIRMED", "REFUTED"], "CONDITIONAL"),
        (["EXACT", "REFUTED"], "CONDITIONAL"),
        (["CONFIRMED", "UNDECIDED"], "UNDECIDED"),
        (["REFUTED", "UNDECIDED"], "UNDECIDED"),
        (["CONFIRMED", "CONDITIONAL", "UNDECIDED"], "CONDITIONAL"),
        (["UNDECIDED", "UNDECIDED"], "UNDECIDED"),
    ],
)
def test_merged_verdicts(verdicts, merged):
    for order in itertools.permutations(verdicts):
        assert merge(order) == merged


def test_judgements_say_when_seeds_are_too_few():
    few, enough = (Effect(1.0, 0.5, 1.5, 0.1, n) for n in (5, 6))
    judged = [by_effect(("000-1",), "?", e, "Seen", "here", unit="points") for e in (few, enough)]
    assert [j.verdict for j in judged] == ["UNDECIDED", "CONFIRMED"]
    assert "5 seeds are too few" in judged[0].outcome
    assert judged[1].effect == Interval(1.0, 0.5, 1.5, "points")
    assert by_equivalence((), "?", enough, "Seen", "here", unit="", margin=2).verdict == "CONFIRMED"
    assert (identity((), "?", True, "").verdict, identity((), "?", False, "").verdict) == ("EXACT", "REFUTED")
    assert (tiny(0.0), tiny(1.2e-16)) == ("0", "1e-16")


def test_effects_in_words():
    assert words.effect(Interval(0.026, 0.026, 0.026, "share")) == "0.0260 share"
    assert words.effect(Interval(float("nan"), 0.0, float("inf"), "times")) == "undetermined (0 to inf) times"
    assert words.effect(None) == ""


def runs(*names):
    return [ledger.Run(name, "cpu", (0,), load(name).run("cpu", (0,)), (), ()) for name in names]


def test_a_claim_says_what_is_still_open():
    record = ledger.ledger(runs("A16", "A07"))
    found = {claim.id: claim for claim in record.claims}
    assert (found["001-28"].verdict, found["001-28"].undone) == ("REFUTED", ())
    assert (found["000-5"].verdict, found["000-5"].undone) == ("CONDITIONAL", ("B04",))
    assert claims.missing(found["000-5"]) == "not run: B04"
    assert (found["001-7"].verdict, found["001-7"].judgements) == ("RECORD", ())
    assert record.partial == sum(bool(c.judgements and c.undone) for c in record.claims) > 0
    assert sum(record.count(v) for v in claims.VERDICTS) == 118


def test_the_largest_complete_profile_counts():
    small, whole = (ledger.Run("A03", p, (0,), load("A03").run(p, (0,)), (), ()) for p in ("quick", "cpu"))
    empty = ledger.Run("A03", "full", (0, 1), whole.results, (), ())
    assert not empty.complete
    for order in itertools.permutations((small, whole, empty)):
        (experiment,) = ledger.ledger(order).experiments
        assert experiment.profile == "cpu"
    (experiment,) = ledger.ledger([ledger.Run("A03", "cpu", (0,), Results(), (), ())]).experiments
    assert (experiment.runs, experiment.planned, experiment.judgements, experiment.picture) == (0, 1, (), None)


def test_contradictions_say_what_decided_or_why_not():
    found = {c.code: c for c in ledger.ledger(runs("A10")).contradictions}
    assert found["X1"].verdict == "open"
    assert claims.decided(found["X1"]) == ["Not run: F01, F02."]
    assert found["X6"].verdict == "in part"
    told, undone = claims.decided(found["X6"])
    assert told.startswith("A10 on 002-11: is a batch of 1 impossible? CONDITIONAL, 1.000 largest")
    assert undone == "Not run: C01."


def test_a_contradiction_may_stay_open_after_its_experiments(monkeypatch):
    experiment = load("A10")
    question = "is a batch of 1 impossible?"
    unsure = ruled(experiment.registration.claims, question, "UNDECIDED", "Seen.", "here")
    monkeypatch.setattr(type(experiment), "judge", lambda self, results: (unsure,))
    pair = next(p for p in contradictions.CONTRADICTIONS if p.code == "X6")
    monkeypatch.setattr(contradictions, "CONTRADICTIONS", (type(pair)(pair.code, pair.text, pair.claims, ("A10",)),))
    (found,) = ledger.ledger(runs("A10")).contradictions
    assert found.verdict == "open"
    assert claims.decided(found)[-1] == "A10 could not decide at this size."


def test_what_cannot_be_told_from_the_best():
    rng = np.random.default_rng(0)
    noise = {name: 0.01 * rng.normal(size=6) for name in "abcd"}
    rows = {"a": 0.9 + noise["a"], "b": 0.9 + 0.001 + noise["b"], "c": 0.7 + noise["c"]}
    assert among_best(rows) == {"a", "b"}
    # Against its own noise 0.2 is 20 deviations; with five seeds nothing is sure.
    assert among_best({name: values[:5] for name, values in rows.items()}) == {"a", "b", "c"}
    found = row("loss", {"a": rows["a"], "c": rows["c"]}, ("c", "x", "a"), unit="%", least=True)
    assert [one and one.mark for one in found.cells] == ["best", None, ""]
    assert found.cells[2].value.value == pytest.approx(100 * rows["a"].mean())
    assert claims.cell(found, found.cells[1]) == ("–", "")
    assert claims.cell(found, found.cells[0])[0] == f"{100 * rows['c'].mean():.1f}"


@pytest.mark.parametrize(
    ("verdict", "supports", "text", "stance"),
    [
        ("CONFIRMED", "CONFIRMED", "So.", "for"),
        ("CONFIRMED", "REFUTED", "So.", "against"),
        ("REFUTED", "CONFIRMED", "Not so.", "against"),
        ("REFUTED", "REFUTED", "Not so.", "for"),
        ("REFUTED", None, "Not so.", "note"),
        ("CONDITIONAL", "CONFIRMED", "At times.", "for"),
        ("UNDECIDED", "CONFIRMED", "Not decided: whether so.", "unknown"),
    ],
)
def test_advice_says_what_the_verdict_allows(monkeypatch, verdict, supports, text, stance):
    asked = advice._Asked("A10", "?", "so", "not so", supports=supports, mixed="at times")
    monkeypatch.setattr(advice, "SITUATIONS", (advice._Situation("t", "u", (), "c", "", (asked,)),))
    monkeypatch.setattr(type(load("A10")), "judge", lambda self, results: (ruled((), "?", verdict, "", ""),))
    (point,) = ledger.ledger(runs("A10")).advice[0].points
    assert (point.text, point.stance) == (text, stance)
    (point,) = ledger.ledger([]).advice[0].points
    assert (point.text, point.stance, point.judgement) == ("Not measured: whether so.", "unknown", None)


def test_advice_on_a_question_that_is_not_asked_is_refused(monkeypatch):
    asked = advice._Asked("A10", "is it?", "so", "not so")
    monkeypatch.setattr(advice, "SITUATIONS", (advice._Situation("t", "u", (), "c", "", (asked,)),))
    with pytest.raises(ArgumentError, match="A10 does not answer 'is it\\?'"):
        ledger.ledger(runs("A10"))

"""From judgements to the ledger: merged verdicts, open claims, contradictions."""

import itertools

import pytest

from normscope.lab import contradictions, ledger
from normscope.lab.experiment import Results
from normscope.lab.registry import load
from normscope.lab.verdicts import by_effect, by_equivalence, identity, merge, ruled, tiny
from normscope.records import Interval
from normscope.report import claims
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
    assert claims.effect(Interval(0.026, 0.026, 0.026, "share")) == "0.0260 share"
    assert claims.effect(Interval(float("nan"), 0.0, float("inf"), "times")) == "undetermined (0 to inf) times"
    assert claims.effect(None) == ""


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
    assert (found["X1"].verdict, found["X1"].outcome) == ("open", "Not run: F01, F02.")
    assert found["X6"].verdict == "in part"
    assert found["X6"].outcome.startswith("A10 on 002-11: CONDITIONAL.")
    assert found["X6"].outcome.endswith("Not run: C01.")


def test_a_contradiction_may_stay_open_after_its_experiments(monkeypatch):
    experiment = load("A10")
    unsure = ruled(experiment.registration.claims, "?", "UNDECIDED", "Seen.", "here")
    monkeypatch.setattr(type(experiment), "judge", lambda self, results: (unsure,))
    pair = next(p for p in contradictions.CONTRADICTIONS if p.code == "X6")
    monkeypatch.setattr(contradictions, "CONTRADICTIONS", (type(pair)(pair.code, pair.text, pair.claims, ("A10",)),))
    (found,) = ledger.ledger(runs("A10")).contradictions
    assert found.verdict == "open"
    assert found.outcome.endswith("A10 could not decide at this size.")

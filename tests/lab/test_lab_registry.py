"""Every claim has its experiments or its record; every experiment has its registration."""

from collections import Counter

import pytest

from normscope.errors import ArgumentError
from normscope.lab import registry
from normscope.lab.catalogue import CATALOGUE
from normscope.lab.claims import CLAIMS, SOURCES
from normscope.lab.contradictions import CONTRADICTIONS
from normscope.lab.facts import CORRECTIONS

EXACT = [f"A{k:02}" for k in range(1, 18)]


def test_all_118_claims_are_here():
    assert Counter(claim.id[:3] for claim in CLAIMS) == {"000": 29, "001": 32, "002": 22, "003": 13, "004": 22}
    for text in ("000", "001", "002", "003", "004"):
        numbers = [int(claim.id[4:]) for claim in CLAIMS if claim.id.startswith(text)]
        assert numbers == list(range(1, len(numbers) + 1))


def test_every_claim_has_experiments_or_a_record():
    for claim in CLAIMS:
        assert claim.text.endswith(".")
        assert bool(claim.experiments) != bool(claim.record), claim.id
        assert set(claim.experiments) <= set(CATALOGUE), claim.id


def test_every_experiment_is_about_a_claim():
    named = {name for claim in CLAIMS for name in claim.experiments}
    assert named == set(CATALOGUE)


def test_sources_are_spelled_out():
    for claim in CLAIMS:
        keys = {key for part in claim.source.replace(",", ";").split(";") for key in part.split() if key[-1:].isdigit()}
        keys = {key for key in keys if key[:2].isupper() and len(key) == 4 and key[2:].isdigit()}
        assert keys <= set(SOURCES), claim.id


@pytest.mark.parametrize("name", registry.runnable())
def test_a_registration_is_whole(name):
    experiment = registry.load(name)
    r = experiment.registration
    assert r.name == name
    assert r.statement.endswith(".")
    assert all((r.source, r.confirms, r.refutes, r.design, r.claims, r.thresholds))
    assert r.title == CATALOGUE[name]
    assert set(experiment.seeds) == {"quick", "cpu", "full"}
    if not name.startswith("A"):
        assert min(experiment.seeds["cpu"], experiment.seeds["full"]) >= 6


def test_the_exact_experiments_can_be_run():
    assert set(EXACT) <= set(registry.runnable())


def test_contradictions_name_what_exists():
    assert [pair.code for pair in CONTRADICTIONS] == [f"X{k}" for k in range(1, 24)]
    claims = {claim.id: claim for claim in CLAIMS}
    for pair in CONTRADICTIONS:
        assert set(pair.experiments) <= set(CATALOGUE)
        for identifier in pair.claims:
            assert set(claims[identifier].experiments) & set(pair.experiments), (pair.code, identifier)


def test_corrections_are_of_claims():
    assert [c.code for c in CORRECTIONS] == [f"R{k}" for k in range(1, 21)]
    claims = {claim.id: claim for claim in CLAIMS}
    for c in CORRECTIONS:
        assert set(c.claims) <= set(claims)
        assert c.said.endswith(".")
        assert c.fact.endswith(".")
        assert {word for word in c.source.replace(";", "").split() if word.isupper()} <= set(SOURCES)
        for word in c.fact.replace(")", " ").split():  # (see A09)
            if word in CATALOGUE:
                assert word in claims[c.claims[0]].experiments


def test_the_whole_catalogue_can_be_run():
    assert registry.runnable() == tuple(CATALOGUE)


def test_a_wrong_name_is_told(monkeypatch):
    with pytest.raises(ArgumentError, match="no experiment 'B99'"):
        registry.load("B99")
    monkeypatch.setitem(CATALOGUE, "B98", "Not written yet")
    with pytest.raises(ArgumentError, match="open"):
        registry.load("B98")

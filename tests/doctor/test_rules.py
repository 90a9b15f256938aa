"""Every rule finds its defect, and is silent about what is sound or only looks defective: one network, one seed.

All networks and seeds: python scripts/confusion.py
"""

import pytest
from fixtures import FIXTURES, KINDS, ROLES, build, examine

SEED = 0


def kind_of(rule):
    return KINDS[list(FIXTURES).index(rule) % len(KINDS)]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("rule", FIXTURES)
def test_rule(rule, role):
    r = examine(rule, role, kind_of(rule), SEED)
    assert r.status != "absent", "no such rule"
    assert not r.wrong, f"{r.status}: {r.reason}"
    assert r.unrelated == ()
    assert r.placed is not False, "the injected layers are not the first ones"
    if r.loss is not None and r.loss >= 1:
        assert r.first, r.treatments
        assert r.restored >= 0.9 * r.loss


@pytest.mark.parametrize("rule", FIXTURES)
def test_fixtures_are_the_same_every_time(rule):
    from normscope.surgery import state_hash

    a, b = (build(rule, "defect", kind_of(rule), SEED) for _ in range(2))
    assert state_hash(a.model) == state_hash(b.model)
    for x, y in zip(a.loader, b.loader, strict=True):
        assert str(x) == str(y)
        break


def test_there_is_a_fixture_for_every_rule_of_the_first_set():
    numbers = "101 102 103 104 106 113 201 203 204 205 208 210 301 302 304 602 901 902 903"
    assert sorted(FIXTURES) == [f"NRM{n}" for n in numbers.split()]

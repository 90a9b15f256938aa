"""Every rule finds its defect, and is silent about what is sound or only looks defective: one network, one seed.

All networks and seeds: python scripts/confusion.py
"""

import pytest
import torch
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
    if r.loss is not None:
        assert r.first, r.treatments
        assert r.restored >= 0.9 * r.loss


@pytest.mark.parametrize("rule", FIXTURES)
def test_fixtures_are_the_same_every_time(rule):
    a, b = (build(rule, "defect", kind_of(rule), SEED) for _ in range(2))
    mine, other = a.model.state_dict(), b.model.state_dict()
    assert list(mine) == list(other)
    assert all(torch.equal(mine[name].nan_to_num(7.0), other[name].nan_to_num(7.0)) for name in mine)
    x, y = (next(iter(f.loader)) for f in (a, b))
    assert torch.equal(x[0], y[0])


def test_there_is_a_fixture_for_every_rule_of_the_first_set():
    numbers = "101 102 103 104 106 113 201 203 204 205 208 210 301 302 304 602 901 902 903"
    assert sorted(FIXTURES) == [f"NRM{n}" for n in numbers.split()]

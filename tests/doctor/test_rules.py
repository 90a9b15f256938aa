"""Every rule finds its defect, and is silent about what is sound or only looks defective: one network, one seed.

All networks and seeds: python scripts/confusion.py
"""

import fixtures_loops  # noqa: F401 - they register themselves
import fixtures_models  # noqa: F401
import pytest
import torch
from fixtures import FIXTURES, KINDS, ROLES, build, examine

from normscope.doctor import RULES

SEED = 0
# Of several devices, of the user's save and load, and of time: tests of their own, in tests/test_doctor_*.py.
ELSEWHERE = {"NRM309", "NRM605", "NRM607", "NRM702", "NRM801", "NRM803", "NRM804"}


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


@pytest.mark.parametrize(("seed", "said"), [(1, "evaluation loses"), (2, "training mode loses")])
def test_every_sort_of_gap_is_told_with_its_layers(seed, said):
    """Seed 0 is the third sort, one channel far off; batches of 4 through ten normalizers are the report's own."""
    r = examine("NRM114", "defect", "conv", seed)
    assert r.severity in ("E", "W")
    assert said in r.reason
    assert "most of it: " in r.reason
    assert r.placed


@pytest.mark.parametrize("rule", FIXTURES)
def test_fixtures_are_the_same_every_time(rule):
    a, b = (build(rule, "defect", kind_of(rule), SEED) for _ in range(2))
    mine, other = dict(a.model.state_dict()), dict(b.model.state_dict())
    assert list(mine) == list(other)
    assert all(torch.equal(mine[name].nan_to_num(7.0), other[name].nan_to_num(7.0)) for name in mine)
    x, y = (next(iter(f.loader)) for f in (a, b))
    x, y = (batch[0] if isinstance(batch, (list, tuple)) else batch for batch in (x, y))
    assert torch.equal(x, y)


def test_there_is_a_fixture_for_every_rule():
    assert set(FIXTURES) == set(RULES) - ELSEWHERE

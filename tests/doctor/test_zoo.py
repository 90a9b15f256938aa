"""Healthy models on the embedded digits: no error, at most one warning in all, and nothing for fix to improve."""

import pytest
import zoo


@pytest.fixture(scope="module")
def health():
    return {name: zoo.examine("digits", name, steps=150) for name in zoo.IMAGES}


def test_the_models_are_trained(health):
    assert len(health) >= 6
    assert {name: h.score for name, h in health.items() if not h.score > 75} == {}


def test_no_error_and_at_most_one_warning(health):
    assert {name: h.errors for name, h in health.items() if h.errors} == {}
    assert sum(len(h.warnings) for h in health.values()) <= 1, {name: h.warnings for name, h in health.items()}


def test_fix_does_not_improve_what_is_healthy(health):
    assert {name: h.applied for name, h in health.items() if h.applied} == {}
    assert [name for name, h in health.items() if not h.same] == []

"""The exact experiments: their verdicts, and that each can come out otherwise."""

import pytest

from normscope.lab import registry
from normscope.lab.experiment import Measured, Results
from normscope.records import Judgement, Picture, from_json, to_json

# The verdicts in the order of the judgements. What was found by running; a change here must be explained.
VERDICTS = {
    "A01": ["EXACT"],
    "A02": ["EXACT"],
    "A03": ["CONDITIONAL", "CONFIRMED"],
    "A04": ["EXACT", "EXACT"],
    "A05": ["CONDITIONAL", "EXACT"],
    "A06": ["EXACT"],
    "A07": ["CONDITIONAL"],
    "A08": ["EXACT", "EXACT", "EXACT"],
    "A09": ["EXACT", "REFUTED", "EXACT", "CONDITIONAL"],
    "A10": ["CONDITIONAL"],
    "A11": ["REFUTED", "CONFIRMED", "CONFIRMED", "CONFIRMED", "CONDITIONAL"],
    "A12": ["EXACT", "CONDITIONAL"],
    "A13": ["REFUTED", "CONDITIONAL"],
    "A14": ["REFUTED", None],  # the second is a clock's
    "A15": [None, "EXACT"],  # the first as well
    "A16": ["REFUTED", "EXACT"],
    "A17": ["CONDITIONAL"],
}

# One number changed as a broken normalizer would change it: which, to what, and the verdict that must change with it.
PLANTED = {
    "A01": ("mean", 1e-3, 0),
    "A02": ("autograd", 0.1, 0),
    "A03": ("value", 0.5, 0),
    "A04": ("folding", 0.1, 0),
    "A05": ("inference", 0.1, 0),
    "A06": ("gradient", 0.1, 0),
    "A07": ("output", 0.5, 0),
    "A08": ("counted", 21.0, 0),
    "A09": ("parameters", 16.0, 1),
    "A10": ("instance", 0.1, 0),
    "A11": ("change", 0.5, 0),
    "A12": ("after", 0.0, 0),
    "A13": ("BatchNorm, inference", 1.0, 0),
    "A14": ("products", 3.0, 0),
    "A15": ("gradient Newton", float("nan"), 1),
    "A16": ("share", 0.5, 0),
    "A17": ("b mean detached", 0.5, 0),
}


@pytest.fixture(scope="module")
def done():
    kept = {}

    def run(name):
        if name not in kept:
            kept[name] = registry.load(name).run("quick")
        return kept[name]

    return run


@pytest.mark.parametrize("name", VERDICTS)
def test_verdicts(name, done):
    experiment = registry.load(name)
    judgements = experiment.judge(done(name))
    for judgement, verdict in zip(judgements, VERDICTS[name], strict=True):
        assert judgement.verdict == verdict or verdict is None
        assert from_json(Judgement, to_json(judgement)) == judgement
    assert {claim for j in judgements for claim in j.claims} == set(experiment.registration.claims)
    picture = experiment.figure(done(name))
    assert picture is None or from_json(Picture, to_json(picture)) == picture


@pytest.mark.parametrize("name", PLANTED)
def test_each_can_come_out_otherwise(name, done):
    number, value, index = PLANTED[name]
    experiment, results = registry.load(name), done(name)
    planted = Results(_changed(m, number, value) for m in results)
    before, after = (experiment.judge(r)[index].verdict for r in (results, planted))
    assert before != after


def _changed(measured, number, value):
    old = measured.numbers[number]
    numbers = dict(measured.numbers) | {number: value if isinstance(old, float) else [value] * len(old)}
    return Measured(measured.task, numbers, measured.seconds)


@pytest.mark.parametrize("name", ["A02", "A03", "A05", "A11", "A13", "A17"])
def test_the_same_numbers_again_bit_for_bit(name, done):
    again = registry.load(name).run("quick")
    assert [m.numbers for m in again] == [m.numbers for m in done(name)]

"""A sample of the reported cases: the doctor names the cause that the report's thread settled on.

All of them: python scripts/confusion.py --cases
"""

import pytest
import reported

from normscope.doctor import RULES, check

# Of every sort one that is quick: statistics, modes, batches, numbers, and three where silence is right.
SAMPLE = ("A-02", "A-10", "A-12", "A-17", "B-03", "B-09", "B-12", "B-18b", "C-01", "C-12", "D-01", "D-04b", "D-17")


@pytest.mark.parametrize("one", [case for case in reported.CASES if case.name in SAMPLE], ids=lambda case: case.name)
def test_the_doctor_names_the_cause(one):
    said = reported.examine(one)
    assert not said.wrong, f"{said.said}; expected {one.expected or 'silence'}"


def test_cases_are_records_of_known_rules():
    assert len({case.name for case in reported.CASES}) == len(reported.CASES)
    assert len({case.name.rstrip("b") for case in reported.CASES}) >= 40
    assert {code for case in reported.CASES for code in case.expected} <= set(RULES)
    assert set(SAMPLE) <= {case.name for case in reported.CASES}


@pytest.mark.filterwarnings("error")
def test_statistics_that_are_infinite_take_no_rule_with_them():
    (f,) = (case.act() for case in reported.CASES if case.name == "A-12")
    assert not [v for v in check(f.model, f.loader).verdicts if "raised" in v.reason]


def test_what_is_expected_can_fail():
    (one,) = (case for case in reported.CASES if case.name == "A-10")
    wrong = reported.Case(one.name, one.report, one.cause, ("NRM401",), one.act)
    assert reported.examine(wrong).wrong
    assert reported.examine(reported.Case(one.name, one.report, one.cause, (), one.act)).wrong

"""What a rule is: a code, a name, a page and a pure function from measurements to a judgement."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from normscope.doctor.measurements import Effect, Grade, Measurements
from normscope.doctor.thresholds import Thresholds
from normscope.errors import ArgumentError
from normscope.records import Interval, Severity, Status

__all__ = [
    "RULES", "Judgement", "Rule", "absent", "alarm", "failed", "fine", "judge", "rule", "several", "short", "unfit",
]  # fmt: skip

Facts = Mapping[str, float | str]
CODE = re.compile(r"NRM\d{3}")


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a rule says about one model.

    Attributes:
        status: As in `Verdict`.
        reason: One sentence.
        layers: Where, worst first.
        facts: The evidence by name.
        cost: What it costs, where that was measured.
        remedies: Codes of remedies, best first.
    """

    status: Status
    reason: str
    layers: tuple[str, ...] = ()
    facts: Facts = field(default_factory=dict)
    cost: Interval | None = None
    remedies: tuple[str, ...] = ()

    @property
    def severity(self) -> Severity | None:
        """The severity of an alarm; None for every other verdict."""
        severities: dict[str, Severity] = {"fail": "E", "warn": "W", "info": "I"}
        return severities.get(self.status)


Judge = Callable[[Measurements, Thresholds], Judgement]


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule.

    Attributes:
        code: NRM and three digits; never used again for another rule.
        name: What is wrong, in words with hyphens.
        judge: The function.
        causes: Codes of the rules whose findings explain this one's.
        intents: Declared intentions under which it is no trouble.
        uses: Declared uses of the model that only this rule asks about.
    """

    code: str
    name: str
    judge: Judge
    causes: tuple[str, ...] = ()
    intents: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()

    @property
    def page(self) -> str:
        """Its documentation."""
        return inspect.cleandoc(self.judge.__doc__ or "")


RULES: dict[str, Rule] = {}


def rule(
    code: str, name: str, *, causes: Iterable[str] = (), intents: Iterable[str] = (), uses: Iterable[str] = ()
) -> Callable[[Judge], Judge]:
    """Register the decorated function as a rule."""
    if not CODE.fullmatch(code):
        raise ArgumentError(f"{code!r} is no rule code", cure="NRM and three digits")
    if code in RULES:
        raise ArgumentError(f"{code} is registered twice", cure="codes are never used again; take a free one")

    def register(judge: Judge) -> Judge:
        RULES[code] = Rule(code, name, judge, tuple(causes), tuple(intents), tuple(uses))
        return judge

    return register


def judge(one: Rule, m: Measurements, t: Thresholds) -> Judgement:
    """What a rule says; one that fails says so and does not take the others with it."""
    try:
        return one.judge(m, t)
    except Exception as error:
        return Judgement("could-not-check", f"the rule raised {type(error).__name__}: {error}")


# --- judgements in short ----------------------------------------------------------------------------------------------

_STATUS: dict[Grade, Status] = {"E": "fail", "W": "warn", "I": "info"}


def alarm(
    grade: Grade,
    reason: str,
    layers: Iterable[str] = (),
    facts: Facts | None = None,
    effect: Effect | None = None,
    remedies: tuple[str, ...] = (),
) -> Judgement:
    """An alarm of this severity."""
    cost = None if effect is None else effect.cost
    return Judgement(_STATUS[grade], reason, tuple(layers), facts or {}, cost, remedies)


def fine(reason: str, facts: Facts | None = None) -> Judgement:
    """The rule ran and found nothing."""
    return Judgement("pass", reason, facts=facts or {})


def unfit(reason: str) -> Judgement:
    """The rule has nothing to look at in this model."""
    return Judgement("not-applicable", reason)


def absent(needs: str) -> Judgement:
    """The rule needs more input."""
    return Judgement("needs-input", needs)


def failed(reason: str) -> Judgement:
    """The rule could not run."""
    return Judgement("could-not-check", reason)


def short(layers: Iterable[str], most: int = 3) -> str:
    """Names for a sentence."""
    names = [name or "(the model itself)" for name in layers]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def several(names: Collection[object]) -> str:
    """How many normalizers, for a sentence."""
    return f"{len(names)} normalizer{'' if len(names) == 1 else 's'}"


def lower(grade: Grade, most: Literal["W", "I"]) -> Grade:
    """A grade capped at a severity."""
    order = {"I": 0, "W": 1, "E": 2}
    return grade if order[grade] <= order[most] else most

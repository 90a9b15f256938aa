"""From numbers to judgements, in the words of the ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from normscope.records import Interval, Judgement, LabVerdict
from normscope.statistics import MINIMUM_SEEDS, Effect, decide, decide_equivalence, paired_effect

__all__ = [
    "among_best",
    "by_effect",
    "by_equivalence",
    "by_rivals",
    "identity",
    "interval",
    "merge",
    "ruled",
    "tiny",
    "told",
]


def identity(
    claims: Sequence[str], question: str, holds: bool, outcome: str, *, effect: Interval | None = None
) -> Judgement:
    """An identity: exact, or refuted."""
    return Judgement(tuple(claims), question, "EXACT" if holds else "REFUTED", effect, outcome, "any data: an identity")


def ruled(
    claims: Sequence[str],
    question: str,
    verdict: LabVerdict,
    outcome: str,
    validity: str,
    *,
    effect: Interval | None = None,
    seeds: int = 0,
    tests: int = 0,
) -> Judgement:
    """A verdict by a rule of the experiment's own."""
    return Judgement(tuple(claims), question, verdict, effect, outcome, validity, seeds, tests)


def by_effect(
    claims: Sequence[str], question: str, effect: Effect, outcome: str, validity: str, *, unit: str, least: float = 0.0
) -> Judgement:
    """A claim that something is greater: by the decision rule of the protocol."""
    return Judgement(
        tuple(claims),
        question,
        decide(effect, least=least),
        interval(effect, unit),
        _with_p(outcome, effect),
        validity,
        effect.n,
        1,
    )


def by_equivalence(
    claims: Sequence[str], question: str, effect: Effect, outcome: str, validity: str, *, unit: str, margin: float
) -> Judgement:
    """A claim that nothing differs by more than a margin."""
    return Judgement(
        tuple(claims),
        question,
        decide_equivalence(effect, margin=margin),
        interval(effect, unit),
        _with_p(outcome, effect),
        validity,
        effect.n,
        1,
    )


def by_rivals(
    claims: Sequence[str], question: str, ours: Sequence[float], rivals: Mapping[str, Sequence[float]], outcome: str,
    validity: str, *, unit: str, margin: float = 0.0,
) -> Judgement:  # fmt: skip
    """A claim that one of several is best, larger numbers being better.

    CONFIRMED: against every rival the interval of the difference lies above −margin. REFUTED: against one it lies below
    0. The intervals are widened to hold together (Bonferroni: Holm's steps could not reject with six seeds).
    """
    level = 1 - 0.05 / len(rivals)
    effects = {name: paired_effect(ours, row, level=level) for name, row in rivals.items()}
    name, nearest = min(effects.items(), key=lambda pair: pair[1].value)
    verdict: LabVerdict = "UNDECIDED"
    if nearest.n >= MINIMUM_SEEDS:
        if any(effect.high < 0 for effect in effects.values()):
            verdict = "REFUTED"
        elif all(effect.low > -margin for effect in effects.values()):
            verdict = "CONFIRMED"
    effect = interval(nearest, f"{unit}, less the best rival's ({name})")
    return ruled(claims, question, verdict, outcome, validity, effect=effect, seeds=nearest.n, tests=len(rivals))


def among_best(rows: Mapping[str, Sequence[float]]) -> set[str]:
    """Those whose numbers the best does not surely beat, larger ones being better, the best included.

    By the rule of `by_rivals`: differences paired by seed, their intervals widened to hold together.
    """
    best = max(rows, key=lambda name: sum(rows[name]))
    level = 1 - 0.05 / max(1, len(rows) - 1)
    effects = {name: paired_effect(rows[best], row, level=level) for name, row in rows.items() if name != best}
    return {best, *(name for name, e in effects.items() if e.low <= 0 or e.n < MINIMUM_SEEDS)}


def interval(effect: Effect, unit: str = "") -> Interval:
    """As a record."""
    return Interval(effect.value, effect.low, effect.high, unit)


def merge(verdicts: Sequence[LabVerdict]) -> LabVerdict:
    """One verdict for several: what all say; CONDITIONAL where both sides were found; else what stays unsure."""
    found = set(verdicts)
    if not found:
        return "open"
    if len(found) == 1:
        return found.pop()
    if "CONDITIONAL" in found or ("REFUTED" in found and found & {"CONFIRMED", "EXACT"}):
        return "CONDITIONAL"
    if "UNDECIDED" in found:
        return "UNDECIDED"
    return "CONFIRMED" if found <= {"CONFIRMED", "EXACT"} else "UNDECIDED"


def told(rows: Mapping[str, Sequence[float]], form: str = ".1%") -> str:
    """The mean of every arm in words of a sentence."""
    return ", ".join(f"{arm} {format(sum(row) / len(row), form)}" for arm, row in rows.items())


def tiny(value: float) -> str:
    """An error of rounding in words of a sentence: its power of ten."""
    return "0" if value == 0 else f"{value:.0e}"


def _with_p(outcome: str, effect: Effect) -> str:
    few = f"; {effect.n} seeds are too few to decide" if effect.n < MINIMUM_SEEDS else ""
    return f"{outcome} (sign-flip p = {effect.p:.2g}, {effect.n} seeds{few})."

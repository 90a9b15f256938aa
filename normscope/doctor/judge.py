"""From measurements to verdicts and findings: all rules, declared intents, causes before symptoms."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

from torch.nn import Module

from normscope.doctor.attribution import together
from normscope.doctor.measurements import Measurements
from normscope.doctor.remedies import REMEDIES
from normscope.doctor.rules import RULES, Judgement, Rule
from normscope.doctor.rules import base as rules
from normscope.doctor.thresholds import Thresholds
from normscope.errors import ArgumentError
from normscope.records import Fact, Finding, Verdict
from normscope.surgery.find import selected

__all__ = ["chosen", "findings_of", "known_intents", "verdicts_of"]

_ORDER = {"E": 0, "W": 1, "I": 2}


def known_intents() -> tuple[str, ...]:
    """Every intent or use that can be declared: those that a rule knows; accepting others would promise an effect."""
    return tuple(sorted({intent for rule in RULES.values() for intent in (*rule.intents, *rule.uses)}))


def chosen(select: Iterable[str] | str | None, ignore: Iterable[str] | str | None) -> tuple[Rule, ...]:
    """The rules to run: those whose code begins with a selected prefix, without those of an ignored one."""
    wanted, unwanted = _prefixes(select, "select"), _prefixes(ignore, "ignore")
    kept = [code for code in sorted(RULES) if not wanted or code.startswith(wanted)]
    return tuple(RULES[code] for code in kept if not (unwanted and code.startswith(unwanted)))


def _prefixes(given: Iterable[str] | str | None, name: str) -> tuple[str, ...]:
    prefixes = (given,) if isinstance(given, str) else tuple(given or ())
    for prefix in prefixes:
        if not any(code.startswith(prefix) for code in RULES):
            raise ArgumentError(
                f"{name} {prefix!r} matches no rule",
                cure=f"use a code or its beginning: NRM1, NRM203; the rules are {', '.join(sorted(RULES))}",
            )
    return prefixes


def check_intents(intent: Iterable[str]) -> tuple[str, ...]:
    """The declared intents; an unknown one raises ArgumentError."""
    declared = (intent,) if isinstance(intent, str) else tuple(intent)
    for one in declared:
        if one not in known_intents():
            raise ArgumentError(f"intent {one!r} is unknown", cure=f"use one of {', '.join(known_intents())}")
    return declared


def verdicts_of(
    m: Measurements, run: Iterable[Rule], intent: tuple[str, ...], t: Thresholds
) -> list[tuple[Rule, Judgement]]:
    """What every rule says; an alarm under a declared intent becomes intentional and keeps its numbers."""
    judged = []
    for rule in run:
        judgement = rules.judge(rule, m, t)
        declared = [one for one in intent if one in rule.intents]
        if declared and judgement.status in ("fail", "warn"):
            reason = f"{judgement.reason} (declared: {declared[0]})"
            judgement = dataclasses.replace(judgement, status="intentional", reason=reason)
        judged.append((rule, judgement))
    return judged


def spare(
    judged: list[tuple[Rule, Judgement]], ignores: Mapping[str, Iterable[str]]
) -> tuple[list[tuple[Rule, Judgement]], tuple[str, ...]]:
    """The same without the layers that are ignored for a rule, and the ignores that nothing needed.

    Args:
        judged: What every rule says.
        ignores: By pattern of module paths, codes or their beginnings.
    """
    pairs = [(pattern, code) for pattern, codes in ignores.items() for code in codes]
    _prefixes([code for _, code in pairs], "per-module ignore")
    used: set[tuple[str, str]] = set()
    kept = []
    for rule, judgement in judged:
        mine = [pair for pair in pairs if rule.code.startswith(pair[1])]
        if judgement.severity is not None and mine:
            matched = {
                name: hits
                for name in judgement.layers
                if (hits := [p for p in mine if selected([p[0]])(name, _NO_MODULE)])
            }
            used.update(pair for hits in matched.values() for pair in hits)
            judgement = _without(judgement, tuple(matched))
        kept.append((rule, judgement))
    unused = [
        f"the ignore of {code} for {pattern!r} is not needed" for pattern, code in pairs if (pattern, code) not in used
    ]
    return kept, tuple(unused)


_NO_MODULE = Module()


def _without(judgement: Judgement, names: tuple[str, ...]) -> Judgement:
    if not names:
        return judgement
    rest = tuple(name for name in judgement.layers if name not in names)
    reason = f"{judgement.reason} (ignored: {rules.short(names)})"
    return dataclasses.replace(
        judgement, reason=reason, layers=rest or judgement.layers, status=judgement.status if rest else "intentional"
    )


def unneeded(
    judged: list[tuple[Rule, Judgement]],
    m: Measurements,
    ignore: Iterable[str] | str | None,
    intent: tuple[str, ...],
    t: Thresholds,
) -> tuple[str, ...]:
    """Ignores and intents without which nothing would be otherwise."""
    notes = []
    for prefix in _prefixes(ignore, "ignore"):
        loud = [r for code, r in RULES.items() if code.startswith(prefix) and rules.judge(r, m, t).severity]
        if not loud:
            notes.append(f"ignore {prefix} is not needed: it raises nothing")
    used = {one for rule, j in judged if j.status == "intentional" for one in rule.intents}
    uses = {use for rule in RULES.values() for use in rule.uses}
    notes += [f"intent {one} is not needed: no alarm is about it" for one in intent if one not in used | uses]
    return tuple(notes)


def findings_of(judged: list[tuple[Rule, Judgement]], m: Measurements) -> tuple[Finding, ...]:
    """The alarms as findings: the worst first, each cause before what it explains."""
    alarms = {rule.code: (rule, j) for rule, j in judged if j.severity is not None}
    place = {site.layer: k for k, site in reversed(list(enumerate(m.sites)))}
    made = [_finding(rule, j, _cause(rule, j, alarms, place), m) for rule, j in alarms.values()]
    by_code = {f.code: f for f in made}

    def rank(f: Finding) -> tuple[int, int, float, str]:
        top = _root(f, by_code)
        gain = -(top.cost.value if top.cost is not None else 0.0)
        worst = min(_ORDER[x.severity] for x in made if _root(x, by_code).code == top.code)
        return worst, 0, gain, top.code

    ordered = sorted(made, key=lambda f: (*rank(f), f.explained_by != "", _depth(f, by_code), f.code))
    return tuple(ordered)


def _root(f: Finding, by_code: dict[str, Finding]) -> Finding:
    seen = {f.code}
    while f.explained_by in by_code and f.explained_by not in seen:
        f = by_code[f.explained_by]
        seen.add(f.code)
    return f


def _depth(f: Finding, by_code: dict[str, Finding]) -> int:
    depth, seen = 0, {f.code}
    while f.explained_by in by_code and f.explained_by not in seen:
        f = by_code[f.explained_by]
        seen.add(f.code)
        depth += 1
    return depth


def _cause(rule: Rule, j: Judgement, alarms: dict[str, tuple[Rule, Judgement]], place: Mapping[str, int]) -> str:
    """The alarm that explains this one: a known cause at half of its layers or more; `place` is the order of calls."""
    best, share = "", 0.0
    for code in rule.causes:
        if code not in alarms or not j.layers:
            continue
        cause = alarms[code][1]
        # Information is no cause of an alarm that was felt.
        if _ORDER[cause.severity or "I"] > _ORDER[j.severity or "I"] and cause.severity == "I":
            continue
        # What is wrong in one layer reaches the layers behind it, but not the other way round.
        overlap = len(set(cause.layers) & set(j.layers)) / len(set(j.layers))
        if code == "NRM304" or (code == "NRM405" and _first(cause.layers, place) < _first(j.layers, place)):
            overlap = max(overlap, 0.5)
        if overlap >= 0.5 and overlap > share:
            best, share = code, overlap
    return best


def _first(names: Iterable[str], place: Mapping[str, int]) -> float:
    return min((place[name] for name in names if name in place), default=math.inf)


def _finding(rule: Rule, j: Judgement, cause: str, m: Measurements) -> Finding:
    felt = j.cost is not None and j.cost is m.recalibrated.cost
    return Finding(
        code=rule.code,
        name=rule.name,
        severity=j.severity or "I",
        layers=j.layers,
        message=j.reason,
        facts=facts(j),
        cost=j.cost,
        remedies=tuple(REMEDIES[code].record(rule.code) for code in j.remedies if _offered(code, m)),
        explained_by=cause,
        explains=together(m.coalitions, j.layers) if felt else None,
    )


def _offered(code: str, m: Measurements) -> bool:
    return code != "copy-buffers" or (m.reference is not None and not m.reference.problem)


def facts(j: Judgement) -> tuple[Fact, ...]:
    """The evidence as records."""
    return tuple(
        Fact(name, None, value) if isinstance(value, str) else Fact(name, float(value))
        for name, value in j.facts.items()
    )


def verdict(rule: Rule, j: Judgement, cause: str) -> Verdict:
    """The judgement as a record."""
    reason = f"{j.reason} (explained by {cause})" if cause else j.reason
    return Verdict(rule.code, rule.name, j.status, reason, j.layers, facts(j), j.cost)

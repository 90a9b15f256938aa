"""The normalizers of a model as the tree of its modules."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from normscope.records import CheckRecord, NormRow
from normscope.report import words

__all__ = ["Branch", "Leaf", "tree_of"]

# Above as many, a branch without a finding is folded.
MOST_OPEN = 60


@dataclass(frozen=True, slots=True)
class Leaf:
    """A normalizer: its name within the branch, which row of the table it is, and the worst of its findings."""

    label: str
    index: int
    severity: str
    reached: bool


@dataclass(frozen=True, slots=True)
class Branch:
    """A module that holds normalizers.

    Attributes:
        label: Its name within the branch that holds it.
        total: Its normalizers at any depth.
        found: Those of them with an error or a warning.
        folded: Whether it is shown closed.
    """

    label: str
    branches: tuple[Branch, ...]
    leaves: tuple[Leaf, ...]
    total: int
    found: int
    folded: bool


def tree_of(record: CheckRecord) -> Branch:
    """All normalizers of the record; modules that hold but one branch, or but one normalizer, join its name."""
    severity = {finding.code: finding.severity for finding in record.findings}
    return _branch("", [(row.name.split("."), _leaf(row, k, severity)) for k, row in enumerate(record.layers)])


def _leaf(row: NormRow, index: int, severity: Mapping[str, str]) -> Leaf:
    found = [severity[code] for code in row.codes if code in severity]
    return Leaf(row.name, index, min(found, key=words.SEVERITIES.index, default=""), row.calls > 0)


def _branch(label: str, inside: Sequence[tuple[list[str], Leaf]]) -> Branch:
    """The module that holds these normalizers, whose paths begin below it."""
    parts: dict[str, list[tuple[list[str], Leaf]]] = {}
    leaves = []
    for path, leaf in inside:
        if len(path) < 2:
            leaves.append(dataclasses.replace(leaf, label=words.layer(path[0])))
        else:
            parts.setdefault(path[0], []).append((path[1:], leaf))
    branches = []
    for name, rest in parts.items():
        if len(rest) == 1:
            path, leaf = rest[0]
            leaves.append(dataclasses.replace(leaf, label=".".join((name, *path))))
        else:
            branches.append(_branch(name, rest))
    if label and len(branches) == 1 and not leaves:
        only = branches[0]
        return dataclasses.replace(only, label=f"{label}.{only.label}")
    leaves.sort(key=lambda leaf: leaf.index)
    found = sum(leaf.severity in ("E", "W") for _, leaf in inside)
    return Branch(label, tuple(branches), tuple(leaves), len(inside), found, not found and len(inside) > MOST_OPEN)

"""The frame of every edit: all or nothing, proven where it claims to keep the function, and undone bit for bit."""

from __future__ import annotations

import copy as copies
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.nn import Module

from normscope.errors import ArgumentError
from normscope.surgery.prove import Proof
from normscope.surgery.state import Snapshot, uninterrupted

__all__ = ["Draft", "Surgery", "copied", "operate"]

# Names shown per list when a report is printed.
SHOWN = 12


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Surgery:
    """What an edit of a model did.

    Attributes:
        operation: Its name.
        model: The edited model; another object than was passed where a copy was asked for, or where the model itself
            was a normalizer that has been replaced.
        changed: Names of the modules that were changed.
        skipped: Names of those that were not, each with the reason.
        notes: What else is worth knowing, one sentence each.
        details: What was measured or chosen, by name, for programs; what it holds is told by the operation.
        recipe: What has to be known, besides the names, to do it again without the data it was made from; plain data.
    """

    operation: str
    model: Module
    changed: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    details: Mapping[str, Any]
    recipe: Mapping[str, Any]
    _before: Snapshot = field(repr=False)
    _original: Module = field(repr=False)

    def undo(self) -> Module:
        """Take back what the edit changed, bit for bit, and return the model.

        What has happened to the rest of the model since then stays, e.g. weights trained after `freeze`. Undo several
        edits in reverse order.
        """
        self._before.restore()
        return self._original

    def __repr__(self) -> str:
        return f"Surgery({self.operation!r}, {len(self.changed)} changed, {len(self.skipped)} skipped)"

    def __str__(self) -> str:
        return self.table()

    def table(self, shown: int = SHOWN) -> str:
        """The report in words, with so many names of each kind."""
        head = f"{self.operation}: {len(self.changed)} changed, {len(self.skipped)} skipped"
        changed = [_shown(name) for name in self.changed]
        width = min(40, max((len(_shown(name)) for name, _ in self.skipped), default=0))
        skipped = [f"{_shown(name):{width}}  {reason}" for name, reason in self.skipped]
        # The last notes are of the whole: how it was proven, what it costs.
        lists = (("changed", changed, 0), ("skipped", skipped, 0), ("note", self.notes, 3))
        return "\n".join([head, *(row for label, lines, last in lists for row in _rows(label, lines, shown, last))])


def _shown(name: str) -> str:
    return name or "(the model itself)"


def _rows(label: str, lines: Sequence[str], shown: int, last: int) -> list[str]:
    if len(lines) > shown:
        lines = [*lines[: shown - last], f"… and {len(lines) - shown} more", *lines[len(lines) - last :]]
    return [f"  {label if k == 0 else '':7}  {line}" for k, line in enumerate(lines)]


class Draft:
    """An edit in progress.

    Attributes:
        model: The model being edited; replacing the root replaces it here.
        before: The model as it was.
    """

    def __init__(self, model: Module) -> None:
        self.model = model
        self.before = Snapshot(model)
        self.changed: dict[str, None] = {}
        self.skipped: list[tuple[str, str]] = []
        self.notes: list[str] = []
        self.details: dict[str, Any] = {}
        self.recipe: dict[str, Any] = {}

    def change(self, name: str) -> None:
        """Note that a module was changed."""
        self.changed[name] = None

    def skip(self, name: str, reason: str) -> None:
        """Note that a module was left alone, and why."""
        self.skipped.append((name, reason))


def operate(
    operation: str,
    model: Module,
    edit: Callable[[Draft], None],
    *,
    copy: bool = False,
    proof: Proof | None = None,
    finish: Callable[[Draft], None] | None = None,
) -> Surgery:
    """Run an edit so that it happens wholly or not at all.

    Args:
        operation: Its name in the report.
        model: The model.
        edit: Changes `draft.model` in place and notes what it did; whatever it raises, KeyboardInterrupt included,
            leaves the model as it was.
        copy: Edit a deep copy.
        proof: For an edit that claims to keep the function: how to show it.
        finish: Runs last, with the edited and proven model; what it raises takes the edit back, too.

    Raises:
        ArgumentError: The model cannot be copied.
        NormscopeError: The edit changed the function; it has been undone.
    """
    original = copied(model) if copy else model
    draft = Draft(original)
    try:
        reference = None if proof is None else proof.observe(original)
        edit(draft)
        if proof is not None and reference is not None:
            draft.notes.append(proof.compare(reference, draft.model, operation))
        if finish is not None:
            finish(draft)
        with uninterrupted():
            draft.before.keep_changes()
            return Surgery(
                operation, draft.model, tuple(draft.changed), tuple(draft.skipped), tuple(draft.notes),
                types.MappingProxyType(draft.details), draft.recipe, draft.before, original,
            )  # fmt: skip
    except BaseException:
        draft.before.restore()
        raise


def copied(model: Module, cure: str = "copy=False edits it in place, and .undo() takes that back") -> Module:
    """A deep copy.

    Raises:
        ArgumentError: The model cannot be copied.
    """
    try:
        return copies.deepcopy(model)
    except Exception as error:
        raise ArgumentError(f"the model cannot be copied: {type(error).__name__}: {error}", cure=cure) from error

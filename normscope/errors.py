"""Exceptions whose messages name the culprit and the cure.

    NormscopeError
    ├── NotationError         (ValueError)                a scope pattern that cannot be read
    ├── ShapeError            (ValueError, RuntimeError)  a tensor that does not fit its scope or its parameters
    ├── DegenerateScopeError  (ValueError)                one cell per set: x − μ would be zero everywhere
    ├── ArgumentError         (ValueError)                an option outside its range
    ├── DtypeError            (TypeError, NotImplementedError)  a tensor of the wrong kind of number
    ├── ProofError            (RuntimeError)              an edit of a model that did not keep its function
    ├── SynchronizationError  (RuntimeError)              ranks that do not compute the same layer
    ├── StateError            (RuntimeError)              keys or values that are not those of a layer
    ├── DataError             (RuntimeError)              a data set that is absent or damaged
    └── DependencyError       (ImportError)               an optional package that is not installed

Each class also is what torch raises in the same place, so that `except ValueError` written for torch keeps working.
"""

from __future__ import annotations

__all__ = [
    "ArgumentError",
    "DataError",
    "DegenerateScopeError",
    "DependencyError",
    "DtypeError",
    "NormscopeError",
    "NotationError",
    "ProofError",
    "RecomputationError",
    "ShapeError",
    "StateError",
    "SynchronizationError",
]


class NormscopeError(Exception):
    """An error that says what is wrong, where, and how to mend it.

    Args:
        sentence: What is wrong; torch's own sentence where torch raises in the same place.
        cure: What to do about it.
        **context: Facts printed one per line under the sentence, e.g. `shape=(4, 3)`, `pattern="[n] c"`.

    Example:
        >>> print(ShapeError("expected 4D input (got 2D input)", shape=(8, 3), cure="pass (N, C, H, W)"))
        expected 4D input (got 2D input)
          shape: (8, 3)
          cure: pass (N, C, H, W)
    """

    def __init__(self, sentence: str, *, cure: str = "", **context: object) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.cure = cure
        self.context = context

    def __str__(self) -> str:
        facts = [f"  {name}: {value}" for name, value in self.context.items()]
        cure = [f"  cure: {self.cure}"] if self.cure else []
        return "\n".join([self.sentence, *facts, *cure])


class NotationError(NormscopeError, ValueError):
    """A scope pattern cannot be read; the message shows the pattern with a caret under the culprit."""


class ShapeError(NormscopeError, ValueError, RuntimeError):
    """A tensor does not fit the scope, the parameters or the layer it meets."""


class DegenerateScopeError(NormscopeError, ValueError):
    """Every set of the scope holds one cell, so that centring would return zeros."""


class ArgumentError(NormscopeError, ValueError):
    """An option has a value outside its range."""


class DtypeError(NormscopeError, TypeError, NotImplementedError):
    """A tensor holds a kind of number that cannot be normalized."""


class ProofError(NormscopeError, RuntimeError):
    """An edit that claims to keep a model's function changed it, and was undone."""


class RecomputationError(NormscopeError, RuntimeError):
    """Activation checkpointing computes a layer again whose earlier statistics are gone."""


class SynchronizationError(NormscopeError, RuntimeError):
    """The ranks of a process group do not compute the same layer, or one of them does not come."""


class StateError(NormscopeError, RuntimeError):
    """The state of a layer lacks a key, has one too many, or holds values that the other system cannot express."""


class DataError(NormscopeError, RuntimeError):
    """A data set is absent, damaged or of the wrong shape."""


class DependencyError(NormscopeError, ImportError):
    """An optional package is needed and not installed."""

"""The notation: a pattern names the axes of x in order, and brackets mark the axes averaged over.

"[n] c [h w]"        BatchNorm: one mean and one variance per channel
"... [c]"            LayerNorm: "..." stands for any number of axes
"n (g [c]) [h w]"    GroupNorm: parentheses split one axis; all its sizes but one are given, here g=32

pattern := item+          item := name | "..." | "[" item+ "]" | "(" name+ ")"
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NoReturn

from normscope.errors import ArgumentError, NotationError, ShapeError

__all__ = ["Part", "Pattern", "Scope", "parse"]

ELLIPSIS = "..."
_TOKEN = re.compile(r"\.\.\.|[\[\]()]|[^\s\[\]().]+|\S")


@dataclass(frozen=True)
class Part:
    """One axis of x, or one factor of an axis that the pattern splits."""

    name: str
    axis: int
    averaged: bool
    column: int


@dataclass(frozen=True)
class Scope:
    """A pattern for tensors of one rank: which parts exist, and which of them S averages over.

    A tensor is seen through its *parts*: its shape with every split axis unfolded into its factors. The positions
    `inside` and `outside` count parts; the formula only ever needs those.
    """

    pattern: str
    parts: tuple[Part, ...]

    @property
    def rank(self) -> int:
        """The number of axes of x."""
        return self.parts[-1].axis + 1 if self.parts else 0

    @property
    def inside(self) -> tuple[int, ...]:
        """Positions of the parts that S averages over."""
        return tuple(i for i, part in enumerate(self.parts) if part.averaged)

    @property
    def outside(self) -> tuple[int, ...]:
        """Positions of the parts that number the sets."""
        return tuple(i for i, part in enumerate(self.parts) if not part.averaged)

    @property
    def splits(self) -> bool:
        """Whether any axis is split, so that parts and axes differ."""
        return len(self.parts) > self.rank

    def factors(self, axis: int) -> tuple[int, ...]:
        """Positions of the parts of one axis."""
        return tuple(i for i, part in enumerate(self.parts) if part.axis == axis)

    def axis_of(self, name: str) -> int | None:
        """The axis that carries a name, or whose factor does."""
        return next((part.axis for part in self.parts if part.name == name), None)

    def unfold(self, shape: Sequence[int], sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The sizes of the parts of a tensor.

        Args:
            shape: The sizes of the axes of x.
            sizes: Sizes given by name: for each split axis all factors but one; other axes may be named as a check.

        Returns:
            One size per part.

        Raises:
            ShapeError: A size does not fit or does not divide its axis.
            NotationError: A size is missing, or named and not in the pattern.
        """
        if not sizes and not self.splits:
            return tuple(shape)
        self._check_sizes(sizes)
        unfolded: list[int] = []
        for axis, size in enumerate(shape):
            unfolded += self._unfold_axis([self.parts[i] for i in self.factors(axis)], size, shape, sizes)
        return tuple(unfolded)

    def _check_sizes(self, sizes: Mapping[str, int]) -> None:
        names = [part.name for part in self.parts]
        for name, size in sizes.items():
            if name not in names:
                raise NotationError(
                    f"size {name}={size} was given, but the pattern has no axis {name!r}",
                    pattern=self.pattern,
                    cure=f"the pattern names {', '.join(names)}",
                )
            if not hasattr(size, "__index__"):
                raise ArgumentError(f"size {name}={size!r} must be an integer", pattern=self.pattern)
            if size < 1:
                raise ArgumentError(f"size {name}={size} must be at least 1", pattern=self.pattern)

    def _unfold_axis(
        self, parts: Sequence[Part], size: int, shape: Sequence[int], sizes: Mapping[str, int]
    ) -> list[int]:
        given = [sizes.get(part.name) for part in parts]
        missing = [i for i, value in enumerate(given) if value is None]
        written = " ".join(f"[{part.name}]" if part.averaged else part.name for part in parts)
        if len(parts) > 1 and len(missing) > 1:
            names = ", ".join(part.name for part in parts)
            raise NotationError(
                f"the split ({written}) needs the sizes of all its factors but one",
                pattern=_caret(self.pattern, parts[0].column),
                cure=f"give all but one of {names}, e.g. {parts[0].name}=32",
            )
        product = math.prod([value for value in given if value is not None])
        if (size % product if missing else size != product) != 0:
            what = f"({written})" if len(parts) > 1 else written
            stated = ", ".join(f"{part.name}={sizes[part.name]}" for part in parts if part.name in sizes)
            raise ShapeError(
                f"axis {parts[0].axis} of size {size} does not fit {what} with {stated}",
                pattern=_caret(self.pattern, parts[0].column),
                shape=tuple(shape),
                cure=f"the sizes of {what} must multiply to {size}",
            )
        return [size // product if value is None else value for value in given]

    def param_axes(self, params: str) -> tuple[int, ...]:
        """The axes of x that weight and bias run over, in the order in which `params` names them.

        Raises:
            NotationError: A name is not in the pattern, or an axis is named twice.
        """
        names = params.split()
        axes: list[int] = []
        for k, name in enumerate(names):
            axis = self.axis_of(name)
            if axis is None:
                known = ", ".join(part.name for part in self.parts if not part.name.startswith(ELLIPSIS))
                raise NotationError(
                    f"params names {name!r}, which is no axis of the pattern {self.pattern!r}",
                    params=_caret(params, _column(params, k), label="params"),
                    cure=f"name one or more of {known}",
                )
            if axis in axes:
                raise NotationError(
                    f"params names axis {axis} twice",
                    params=_caret(params, _column(params, k), label="params"),
                    cure="name each axis once; one factor of a split stands for the whole axis",
                )
            axes.append(axis)
        return tuple(axes)


@dataclass(frozen=True)
class Pattern:
    """A pattern that has been read; `at` fits it to tensors of a rank."""

    text: str
    parts: tuple[Part, ...]

    @property
    def ellipsis(self) -> int | None:
        """Position of the "..." among the parts."""
        return next((i for i, part in enumerate(self.parts) if part.name == ELLIPSIS), None)

    @property
    def least(self) -> int:
        """The number of axes that the pattern names, the smallest rank that fits."""
        return len({part.axis for part in self.parts if part.name != ELLIPSIS})

    def at(self, rank: int) -> Scope:
        """The scope for tensors with `rank` axes.

        Raises:
            ShapeError: The pattern does not name that many axes.
        """
        return _fit(self, rank)


@lru_cache(maxsize=512)
def _fit(pattern: Pattern, rank: int) -> Scope:
    least = pattern.least
    if rank < least or (pattern.ellipsis is None and rank > least):
        at_least = "" if pattern.ellipsis is None else " or more"
        raise ShapeError(
            f"the pattern {pattern.text!r} is for tensors of {least}{at_least} axes, this one has {rank}",
            cure="name every axis of the tensor in order, or write ... for the axes that need no name",
        )
    parts: list[Part] = []
    for part in pattern.parts:
        if part.name != ELLIPSIS:
            parts.append(replace(part, axis=part.axis + (rank - least - 1) * _is_after_ellipsis(pattern, part)))
            continue
        for k in range(rank - least):
            parts.append(replace(part, name=f"{ELLIPSIS}{k}", axis=part.axis + k))
    return Scope(pattern.text, tuple(parts))


def _is_after_ellipsis(pattern: Pattern, part: Part) -> bool:
    return pattern.ellipsis is not None and part.axis > pattern.parts[pattern.ellipsis].axis


@lru_cache(maxsize=512)
def parse(pattern: str) -> Pattern:
    """Read a pattern; each is read once and kept.

    Args:
        pattern: The axes of x in order, brackets around those averaged over.

    Raises:
        NotationError: With the pattern, a caret under the culprit, and what would be right.

    Example:
        >>> parse("n (g [c]) [h w]").at(4).inside
        (2, 3, 4)
        >>> parse("[n] c [h w").at(4)
        Traceback (most recent call last):
            ...
        normscope.errors.NotationError: this bracket is never closed
          pattern: [n] c [h w
                         ^
          cure: close it with ']'
    """
    if not isinstance(pattern, str):
        raise NotationError(f"a scope is a pattern such as '[n] c [h w]', not {pattern!r}")
    parts = tuple(_Reader(pattern).read())
    if not parts:
        raise NotationError("the pattern is empty", pattern=repr(pattern), cure="name the axes, e.g. '[n] c [h w]'")
    if not any(part.averaged for part in parts):
        raise NotationError(
            "no axis is averaged over, so the scope is empty",
            pattern=_caret(pattern, parts[0].column),
            cure="put brackets around the axes that share one mean and variance, e.g. '[n] c [h w]'",
        )
    return Pattern(pattern, parts)


class _Reader:
    """One pass over the tokens, remembering the bracket and the parenthesis that are open."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.axis = 0
        self.bracket: int | None = None  # columns of what is open
        self.split: int | None = None
        self.bracket_in_split = False
        self.names: set[str] = set()
        self.filled = True  # whether the innermost open bracket or parenthesis holds an axis
        self.factors = 0

    def read(self) -> Iterator[Part]:
        for match in _TOKEN.finditer(self.pattern):
            token, column = match.group(), match.start()
            if token == "[":  # noqa: S105
                self._open_bracket(column)
            elif token == "]":  # noqa: S105
                self._close_bracket(column)
            elif token == "(":  # noqa: S105
                self._open_split(column)
            elif token == ")":  # noqa: S105
                self._close_split(column)
            else:
                yield self._axis(token, column)
        if self.bracket is not None:
            self._fail("this bracket is never closed", self.bracket, "close it with ']'")
        if self.split is not None:
            self._fail("this parenthesis is never closed", self.split, "close it with ')'")

    def _open_bracket(self, column: int) -> None:
        if self.bracket is not None:
            self._fail("brackets do not nest", column, "close the first bracket before opening another")
        self.bracket, self.bracket_in_split, self.filled = column, self.split is not None, False

    def _close_bracket(self, column: int) -> None:
        if self.bracket is None:
            self._fail("there is no bracket to close here", column, "open it with '[' or drop this one")
        if self.split is not None and not self.bracket_in_split:
            self._fail("the parenthesis opened inside this bracket is still open", column, "close it with ')' first")
        if not self.filled:
            self._fail("these brackets are empty", self.bracket, "name the axes to average over, or drop the brackets")
        self.bracket = None

    def _open_split(self, column: int) -> None:
        if self.split is not None:
            self._fail("splits do not nest", column, "write all factors of an axis in one pair of parentheses")
        self.split, self.factors = column, 0

    def _close_split(self, column: int) -> None:
        if self.split is None:
            self._fail("there is no parenthesis to close here", column, "open it with '(' or drop this one")
        if self.bracket is not None and self.bracket_in_split:
            self._fail("the bracket opened inside this split is still open", column, "close it with ']' first")
        if self.factors < 2:
            self._fail("a split needs two factors or more", self.split, "write e.g. (g [c]), or drop the parentheses")
        self.split = None
        self.axis += 1

    def _axis(self, token: str, column: int) -> Part:
        if token == ELLIPSIS:
            if self.split is not None:
                self._fail("'...' stands for whole axes and cannot be a factor", column, "name the factor")
        elif not token.isidentifier():
            bad = next((k for k, char in enumerate(token) if not (char.isalnum() or char == "_")), 0)
            self._fail(
                f"{token[bad:] if bad else token!r} is not an axis name", column + bad,
                "axis names are identifiers such as n, c, h, separated by spaces",
            )  # fmt: skip
        if token in self.names:
            self._fail(f"axis {token!r} is named twice", column, "give every axis a name of its own")
        self.names.add(token)
        self.filled = True
        part = Part(token, self.axis, self.bracket is not None, column)
        if self.split is None:
            self.axis += 1
        else:
            self.factors += 1
        return part

    def _fail(self, sentence: str, column: int, cure: str) -> NoReturn:
        raise NotationError(sentence, pattern=_caret(self.pattern, column), cure=cure)


def _caret(text: str, column: int, label: str = "pattern") -> str:
    line = re.sub(r"\s", " ", text)
    return f"{line}\n{' ' * (len(f'  {label}: ') + column)}^"


def _column(text: str, word: int) -> int:
    return [match.start() for match in re.finditer(r"\S+", text)][word]

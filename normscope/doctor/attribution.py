"""Pass P5: which layers carry the cost. Each is recalibrated alone, and all but each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["Coalitions", "search", "together"]

Layers = frozenset[str]


@dataclass(slots=True)
class Coalitions:
    """What recalibrating some of the layers gives back, as a share of what recalibrating all of them does.

    Attributes:
        score: The model's score with these layers recalibrated, higher is better; one pass.
        everyone: All layers that can be recalibrated.
        low: The score with none of them.
        high: The score with all of them, higher than `low`.
        shares: What was measured.
    """

    score: Callable[[Layers], float]
    everyone: Layers
    low: float
    high: float
    shares: dict[Layers, float] = field(init=False)

    def __post_init__(self) -> None:
        self.shares = {frozenset(): 0.0, self.everyone: 1.0}

    def share(self, layers: Collection[str]) -> float:
        """The share that these layers give back; each set is measured once."""
        key = frozenset(layers)
        if key not in self.shares:
            self.shares[key] = (self.score(key) - self.low) / (self.high - self.low)
        return self.shares[key]


def search(
    coalitions: Coalitions, order: Sequence[str], enough: float, go_on: Callable[[int], bool]
) -> dict[str, float]:
    """The share of the cost that each layer carries, from the first of `order` on, until enough is explained.

    A layer's share is the mean of what it gives back alone and of what is missing when all but it are recalibrated.
    For two layers that is Shapley's value. Of two layers where either one spoils everything neither helps alone, of two
    where either one suffices neither is missed: each half alone would call them harmless, the mean gives both their
    half. Of three or more such layers each gets a half again, which is more than there is: where the shares found add
    up to more than the layers together give back, they are scaled to that, so that like layers get like shares of it.

    Args:
        coalitions: The measurements.
        order: Layers, the most suspicious first.
        enough: The share at which the search stops: of the cost given back by the layers so far together, and of the
            sum of their shares, which stays below it while others could stand in for them.
        go_on: Whether there is time for the candidate of this index.

    Source: Shapley 1953, "A Value for n-Person Games", of whose sum these are the first term and the last.
    """
    shares: dict[str, float] = {}
    for k, name in enumerate(order):
        if not go_on(k):
            break
        missing = 1 - coalitions.share(coalitions.everyone - {name})
        shares[name] = (coalitions.share([name]) + missing) / 2
        if coalitions.share(shares) >= enough and sum(shares.values()) >= enough:
            break
    return _scaled(shares, coalitions.share(shares))


def _scaled(shares: dict[str, float], most: float) -> dict[str, float]:
    """Shares that add up to no more than their layers together; one that was measured alone is left as it is."""
    total = sum(shares.values())
    excess = len(shares) > 1 and total > max(most, 0.0) > 0
    return {name: share * most / total for name, share in shares.items()} if excess else shares


def together(shares: Mapping[Layers, float], layers: Collection[str]) -> float | None:
    """The largest share that a measured set of some of these layers gives back; None where none was measured."""
    known = [share for some, share in shares.items() if some and some <= frozenset(layers)]
    return min(1.0, max(0.0, *known)) if known else None

"""How far an examination has come, in passes, layers and batches, for whoever shows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Progress", "Tell"]

# tell(done, total, what): batches, and a few words; a total of 0 is not known yet.
Tell = Callable[[int, int, str], object]


@dataclass(slots=True)
class Progress:
    """Counts what is done of what is known to come.

    Attributes:
        tell: Who wants to know; None for nobody.
        part: What the passes are about now, e.g. "attribution, layer 2 of 8"; "" where their names say enough.
    """

    tell: Tell | None = None
    part: str = ""
    passes: int = 0
    batches: int = 0
    begun: int = 0
    done: int = 0
    name: str = ""

    def expect(self, passes: int, batches: int) -> None:
        """So many more passes will come, over so many batches each."""
        self.passes += passes
        self.batches += passes * batches

    def settle(self) -> None:
        """Nothing more will come of what was expected."""
        self.passes, self.batches, self.part = self.begun, self.done, ""

    def at(self, name: str) -> None:
        """Something begins that is no pass."""
        if self.tell is not None:
            self.tell(self.done, self.batches, name)

    def begin(self, name: str) -> None:
        """A pass begins."""
        self.begun, self.name = self.begun + 1, name
        self.passes = max(self.passes, self.begun)
        self._say()

    def step(self) -> None:
        """A batch of it is done."""
        self.done += 1
        self.batches = max(self.batches, self.done)
        self._say()

    def _say(self) -> None:
        self.at(f"pass {self.begun} of {self.passes}: {self.part or self.name}")

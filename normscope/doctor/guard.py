"""Bringing a model back, whatever interrupts."""

from __future__ import annotations

from normscope.surgery import Snapshot

__all__ = ["bring_back"]


def bring_back(*snapshots: Snapshot) -> None:
    """Restore all of them; an interrupt that hits before a restoration holds interrupts back makes it start again."""
    interrupted: KeyboardInterrupt | None = None
    for snapshot in snapshots:
        done = False
        while not done:
            try:
                snapshot.restore()
                done = True
            except KeyboardInterrupt as error:
                interrupted = error
    if interrupted is not None:
        raise interrupted

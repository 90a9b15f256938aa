"""A callback for Lightning that examines the model while it trains, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from normscope.doctor import Report
from normscope.errors import DependencyError
from normscope.integrations.observer import Checkup, Observer

try:
    from lightning.pytorch.callbacks import Callback
except ImportError:
    try:
        from pytorch_lightning.callbacks import Callback
    except ImportError as error:
        raise DependencyError(
            "this callback needs Lightning, which is not installed", cure="pip install lightning"
        ) from error

__all__ = ["HealthCallback"]


class HealthCallback(Callback):  # type: ignore[misc,unused-ignore]
    """Check the module's normalization after every so many epochs and at the end of `fit`.

    Batches are copied as they pass by `training_step`; no loader is iterated. With several ranks each checks its
    own copy on its own batches.

    Args:
        every: Epochs between checks; 0 for none.
        start: Whether one more is made as soon as six batches have passed by.
        end: Whether one is made when `fit` ends.
        on_report: Called with every report and its `Checkup`.
        **options: Of `normscope.check`: forward, loss, metric, intent, budget, … What is not given comes from
            `[tool.normscope]` of the project.

    Attributes:
        history: One `Checkup` per check: moment, step, epoch, record.

    Example:
        >>> from normscope.integrations.lightning import HealthCallback
        >>> HealthCallback(every=2, budget=20).history
        []
    """

    def __init__(
        self, every: int = 1, *, start: bool = False, end: bool = True,
        on_report: Callable[[Report, Checkup], None] | None = None, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self._observer = Observer(every, start, end, on_report, options)

    @property
    def history(self) -> list[Checkup]:
        """What was found so far."""
        return self._observer.history

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        """Forget what another fit has left."""
        self._observer.begin()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        """Keep a copy, perhaps."""
        self._observer.see(batch)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """The check at the start, when there are enough batches."""
        if self._observer.is_ready():
            self._observer.examine(pl_module, "start", trainer.global_step, trainer.current_epoch)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """The check of an epoch."""
        self._observer.after_epoch(pl_module, trainer.global_step, trainer.current_epoch + 1)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """The last check."""
        self._observer.after_training(pl_module, trainer.global_step, trainer.current_epoch)

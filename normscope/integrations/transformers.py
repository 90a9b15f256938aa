"""A callback for the Trainer of transformers that examines the model while it trains, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from normscope.doctor import Report
from normscope.doctor.watcher import Tap
from normscope.errors import DependencyError
from normscope.integrations.observer import Checkup, Observer

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise DependencyError(
        "this callback needs transformers, which is not installed", cure="pip install transformers accelerate"
    ) from error

__all__ = ["HealthCallback"]


def _loss_of_output(output: Any, _: Any) -> Any:
    """The loss that the models of transformers compute by themselves where the batch has labels."""
    return output["loss"]


class HealthCallback(TrainerCallback):  # type: ignore[misc,unused-ignore]
    """Check the model's normalization after every so many epochs and at the end of `train`.

    What the model is called with in training is copied by a hook on the model, which goes when the training ends; no
    loader is iterated. Without `loss` and `metric` the model's own loss is the score, one number per batch. With
    several ranks each checks its own copy on its own batches.

    Args:
        every: Epochs between checks; 0 for none.
        start: Whether one more is made as soon as six batches have passed by.
        end: Whether one is made when the training ends.
        on_report: Called with every report and its `Checkup`.
        **options: Of `normscope.check`. What is not given comes from `[tool.normscope]` of the project.

    Attributes:
        history: One `Checkup` per check: moment, step, epoch, record.

    Example:
        >>> from normscope.integrations.transformers import HealthCallback
        >>> HealthCallback(every=0).history
        []
    """

    def __init__(
        self, every: int = 1, *, start: bool = False, end: bool = True,
        on_report: Callable[[Report, Checkup], None] | None = None, **options: Any,
    ) -> None:  # fmt: skip
        given = {"forward": lambda model, batch: model(**batch), **options}
        if not {"loss", "metric"} & set(options):
            given["loss"] = _loss_of_output
        self._observer = Observer(every, start, end, on_report, given)
        self._handle: Any = None

    @property
    def history(self) -> list[Checkup]:
        """What was found so far."""
        return self._observer.history

    def _see(self, module: Module, _: Any, kwargs: dict[str, Any]) -> None:
        """What training is fed; the doctor's own forwards are in evaluation mode."""
        if module.training and torch.is_grad_enabled() and kwargs:
            self._observer.see({name: value for name, value in kwargs.items() if isinstance(value, Tensor)})

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Look on from now; a hook that a broken training has left is taken away."""
        self._observer.begin()
        self._release()
        self._handle = kwargs["model"].register_forward_pre_hook(Tap(self._see), with_kwargs=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """The check at the start, when there are enough batches."""
        if self._observer.is_ready():
            self._observer.examine(kwargs["model"], "start", state.global_step, int(state.epoch or 0))

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """The check of an epoch."""
        self._observer.after_epoch(kwargs["model"], state.global_step, round(state.epoch or 0))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """The last check; the hook goes."""
        self._release()
        self._observer.after_training(kwargs["model"], state.global_step, round(state.epoch or 0))

    def _release(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

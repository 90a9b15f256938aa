"""Prove: two models compute the same on an example, in evaluation and in training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from normscope.errors import ArgumentError, ProofError
from normscope.surgery.forward import Forward, feed, quiet
from normscope.surgery.state import Snapshot

__all__ = ["DrawnInOrder", "Observation", "Proof"]


@dataclass(frozen=True)
class Observation:
    """What a model computed.

    Attributes:
        outputs: Its output tensors by mode; a mode in which the model itself fails is left out.
        double: Whether model and example had been converted to float64.
        eps: The machine epsilon of the numbers that the model holds, its coarsest.
    """

    outputs: dict[str, list[Tensor]]
    double: bool
    eps: float


@dataclass(frozen=True)
class Proof:
    """A numerical proof on an example.

    Two outputs are the same where |a − b| ≤ √ε · max|a|, ε the machine epsilon of the model's own numbers: half of
    their digits, far above rounding and far below any change of the function. The model is left as it was by every run,
    and random numbers are the same in every run, whatever the memory format of the tensors that they are drawn for.

    Attributes:
        example: A batch as the loader yields it.
        forward: `forward(model, batch)`; see `normscope.recalibrate`.
        double: Convert model and example to float64 for the runs, where the model allows it: a deep network can blow
            rounding up beyond the tolerance. Without it the proof is about what runs in production.
        modes: The modes in which the function is kept.
    """

    example: Any
    forward: Forward | None = None
    double: bool = False
    modes: tuple[str, ...] = ("evaluation", "training")

    def observe(self, model: Module) -> Observation:
        """Run a model in its modes.

        Raises:
            ArgumentError: It returns no tensor.
        """
        if self.double:
            try:
                return self._observe(model, double=True)
            except Exception:  # noqa: S110 - some models hold to one dtype; their own then has to do
                pass
        return self._observe(model, double=False)

    def compare(self, reference: Observation, model: Module, operation: str) -> str:
        """Run a second model and say in a sentence how close it is.

        Raises:
            ProofError: It computes something else.
        """
        worst = self._worst(reference, self._observe(model, double=reference.double), reference.eps, operation)
        modes = " and ".join(reference.outputs)
        return f"same output in {modes} mode (largest difference {worst:.1e} of the tolerance)"

    def _worst(self, reference: Observation, observation: Observation, eps: float, operation: str) -> float:
        worst = 0.0
        for mode, expected in reference.outputs.items():
            outputs = observation.outputs.get(mode)
            problem = "it fails there" if outputs is None else _differs(expected, outputs, eps)
            if isinstance(problem, str):
                raise ProofError(
                    f"{operation} would change what the model computes in {mode} mode: {problem}",
                    cure="the model is as it was; leave out modules with select=, or pass the example as it is used",
                )
            worst = max(worst, problem)
        return worst

    def _observe(self, model: Module, *, double: bool) -> Observation:
        outputs, example = {}, _double(self.example) if double else self.example
        before = Snapshot(model)
        for mode in self.modes:
            with before, quiet(), DrawnInOrder():
                if double:
                    self._widen(model)
                model.train(mode == "training")
                torch.manual_seed(0)  # whatever the edit has drawn
                try:
                    outputs[mode] = _tensors(feed(model, example, self.forward))
                except Exception:
                    # A batch of one sample cannot be normalized in training; evaluation must work.
                    if mode == "evaluation":
                        raise
        floating = [t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
        return Observation(outputs, double, max((torch.finfo(dtype).eps for dtype in floating), default=0.0))

    def _widen(self, model: Module) -> None:
        model.double()


_RANDOM = {
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout,
    torch.bernoulli, torch.rand_like, torch.randn_like, torch.randint_like, Tensor.bernoulli, Tensor.bernoulli_,
    Tensor.uniform_, Tensor.normal_, Tensor.exponential_, Tensor.random_,
}  # fmt: skip


class DrawnInOrder(TorchFunctionMode):
    """Draws random numbers in the order of a tensor's cells.

    torch draws them in the order of memory, and an edit may change the strides of what a layer returns: torch's
    LayerNorm of a channels_last tensor is contiguous, this package's is channels_last.
    """

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        x = args[0] if args else None
        if function not in _RANDOM or not isinstance(x, Tensor) or x.is_contiguous():
            return function(*args, **kwargs)
        ordered = x.contiguous()
        y = function(ordered, *args[1:], **kwargs)
        if y is ordered:
            return x.copy_(y)  # in place
        order = sorted(range(x.dim()), key=x.stride, reverse=True)
        return y.permute(order).contiguous().permute([order.index(k) for k in range(x.dim())])


def _double(example: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, example)


def _tensors(output: Any) -> list[Tensor]:
    tensors = [leaf.detach().clone() for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    if not tensors:
        raise ArgumentError(
            f"the model returns no tensor but {type(output).__name__}, so nothing can be compared",
            cure="pass forward=lambda model, batch: … that returns tensors",
        )
    return tensors


def _differs(expected: list[Tensor], outputs: list[Tensor], eps: float) -> float | str:
    """The largest difference in units of the tolerance, or in words what is otherwise."""
    if len(expected) != len(outputs):
        return f"{len(outputs)} tensors in place of {len(expected)}"
    worst, floating = 0.0, any(t.is_floating_point() or t.is_complex() for t in expected)
    for k, (a, b) in enumerate(zip(expected, outputs, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"output {k} is {tuple(b.shape)} of {b.dtype}, it was {tuple(a.shape)} of {a.dtype}"
        if not (a.is_floating_point() or a.is_complex()):
            # Rounding may move an argmax: whole numbers decide only where there is nothing else.
            if not floating and not torch.equal(a, b):
                return f"output {k} differs"
            continue
        distance = _distance(a, b, max(eps, torch.finfo(a.dtype).eps))
        if distance > 1:
            return f"output {k} differs by {distance:.3g} times the tolerance"
        worst = max(worst, distance)
    return worst


def _distance(a: Tensor, b: Tensor, eps: float) -> float:
    wide = torch.complex128 if a.is_complex() else torch.float64
    a, b = a.cpu().to(wide), b.cpu().to(wide)
    if not torch.equal(a.isnan(), b.isnan()) or not torch.equal(a[a.isinf()], b[b.isinf()]):
        return math.inf
    finite = a.isfinite() & b.isfinite()
    scale = a[finite].abs().max().item() if finite.any() else 0.0
    difference = (a - b)[finite].abs().max().item() if finite.any() else 0.0
    return difference / max(math.sqrt(eps) * scale, eps)

"""ONNX files of edited models, compared with the model where onnxruntime is installed."""

from __future__ import annotations

import importlib.util
import inspect
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils import _pytree as pytree

from normscope.errors import ArgumentError, DependencyError, ProofError
from normscope.surgery.forward import Forward, feed, quiet
from normscope.surgery.state import Snapshot

__all__ = ["export_onnx"]

# Another library computes with sums in another order: largest difference over the largest output.
TOLERANCE, HALF = 1e-4, 3e-2


def export_onnx(model: Module, example: Any, forward: Forward | None, path: str | os.PathLike[str]) -> str:
    """Write a model as ONNX, compare it with itself, and say in a sentence how close they are.

    Args:
        model: The model; it is left as it is.
        example: A batch.
        forward: `forward(model, batch)`, which calls the model once.
        path: The file; written whole or not at all, weights included.

    Raises:
        ArgumentError: The model cannot be exported.
        DependencyError: onnx or onnxscript is not installed.
        ProofError: onnxruntime computes something else.
    """
    absent = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if absent:
        raise DependencyError(f"exporting to ONNX needs {' and '.join(absent)}", cure="pip install 'normscope[onnx]'")
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    call, output = _call(model, example, forward)
    try:
        try:
            with warnings.catch_warnings(), Snapshot(model):
                warnings.simplefilter("ignore")
                program: Any = torch.onnx.export(model, call.args, kwargs=call.kwargs, dynamo=True, verbose=False)
                program.save(part)
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ArgumentError(f"the model cannot be exported to ONNX: {reason}", cure="fold without onnx=") from error
        note = _compared(part, (call.args, call.kwargs), output)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return f"written as ONNX, {note}"


def _call(model: Module, example: Any, forward: Forward | None) -> tuple[inspect.BoundArguments, Any]:
    """What the model is called with, and what it returns."""
    calls: list[tuple[inspect.BoundArguments, Any]] = []
    signature = inspect.signature(model.forward)

    def note(_: Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append((signature.bind(*args, **kwargs), output))

    with Snapshot(model), quiet():
        model.register_forward_hook(note, with_kwargs=True)
        feed(model, example, forward)
    return calls[0]


def _compared(path: Path, inputs: Any, output: Any) -> str:
    if importlib.util.find_spec("onnxruntime") is None:
        return "not compared: onnxruntime is not installed"
    import onnxruntime  # type: ignore[import-not-found, unused-ignore]

    given, expected = (
        [t.detach().cpu() for t in pytree.tree_leaves(v) if isinstance(t, Tensor)] for v in (inputs, output)
    )
    try:
        session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
        names = [node.name for node in session.get_inputs()]
        outputs = session.run(None, {name: t.numpy() for name, t in zip(names, given, strict=True)})
    except Exception as error:
        return f"not compared: onnxruntime cannot run it: {str(error).splitlines()[0]}"
    worst, half = 0.0, any(t.dtype == torch.float16 for t in expected)
    for ours, theirs in zip(expected, map(torch.from_numpy, outputs), strict=True):
        worst = max(worst, float((ours.double() - theirs.double()).abs().max() / ours.abs().max().clamp(min=1e-30)))
    if not worst <= (HALF if half else TOLERANCE):
        raise ProofError(
            f"onnxruntime computes something else than the model: {worst:.1e} of the largest output",
            cure="nothing was changed; fold without onnx=",
        )
    return f"onnxruntime agrees within {worst:.0e} of the largest output"

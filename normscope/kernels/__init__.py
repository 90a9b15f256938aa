"""The kernels, and the one table that chooses among them.

A kernel computes the four bodies {statistics, apply, backward reduce, backward apply} from a plan; it never learns
which normalizer it serves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

__all__ = ["COMPUTE_DTYPE", "Backend", "Backends", "backends"]

# Statistics and arithmetic are in float32 or wider, whatever x is stored in.
COMPUTE_DTYPE = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}


@dataclass(frozen=True)
class Backend:
    """One implementation of the four bodies.

    Attributes:
        name: The module under `normscope.kernels`.
        usable: Whether it can run here.
        devices: The devices it serves, "any" for all of torch's.
        reason: What it is, or why it cannot run and how to get it.
    """

    name: str
    usable: bool
    devices: str
    reason: str


class Backends(tuple[Backend, ...]):
    """The backends of this installation, fastest first; prints as a table."""

    def __str__(self) -> str:
        return "\n".join(
            f"{'usable ' if backend.usable else 'missing'}  {backend.name:8s} {backend.devices:6s} {backend.reason}"
            for backend in self
        )

    def named(self, name: str) -> Backend:
        """The one of a name."""
        return next(backend for backend in self if backend.name == name)

    def usable(self) -> Iterator[Backend]:
        """Those that can run here."""
        return (backend for backend in self if backend.usable)


_EAGER = Backend("eager", True, "any", "torch operators, every dtype, layout and transformation")


def backends() -> Backends:
    """What can compute here, and why the rest cannot.

    Example:
        >>> import normscope as ns
        >>> print(ns.backends())
        usable   cpu      cpu    compiled loops (...), float64, float32, bfloat16 and float16, dense tensors
        ...      triton   cuda   ...
        usable   eager    any    torch operators, every dtype, layout and transformation
    """
    from normscope.kernels import cpu, triton

    serves = "float32, bfloat16 and float16, dense tensors"
    missing, no_gpu = cpu.missing(), triton.missing()
    loops = f"compiled loops ({cpu.isa()}), float64, {serves}" if missing is None else missing
    gpu = f"{'its interpreter on the CPU, for tests' if triton.interpreted() else 'compiled for the GPU'}, {serves}"
    return Backends(
        [
            Backend("cpu", missing is None, "cpu", loops),
            Backend("triton", no_gpu is None, "cuda", gpu if no_gpu is None else no_gpu),
            _EAGER,
        ]
    )

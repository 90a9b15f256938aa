"""Normalization for PyTorch as one idea: y = activation(γ · (x − μ_S)/√(σ²_S + ε) + β + residual)."""

from typing import TYPE_CHECKING, Any

from normscope import functional, nn
from normscope.errors import (
    ArgumentError,
    DataError,
    DegenerateScopeError,
    DependencyError,
    DtypeError,
    NormscopeError,
    NotationError,
    ProofError,
    ShapeError,
)
from normscope.functional.normalize import Moments, moments, normalize, plan
from normscope.kernels import backends
from normscope.surgery import freeze, recalibrate, unfreeze

if TYPE_CHECKING:
    from normscope.doctor.check import assert_healthy, check

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "DataError",
    "DegenerateScopeError",
    "DependencyError",
    "DtypeError",
    "Moments",
    "NormscopeError",
    "NotationError",
    "ProofError",
    "ShapeError",
    "__version__",
    "assert_healthy",
    "backends",
    "check",
    "freeze",
    "functional",
    "moments",
    "nn",
    "normalize",
    "plan",
    "recalibrate",
    "unfreeze",
]


def __getattr__(name: str) -> Any:
    """The doctor comes with scipy, which is loaded when it is first called for."""
    if name in ("assert_healthy", "check"):
        from normscope import doctor

        return getattr(doctor, name)
    raise AttributeError(f"module 'normscope' has no attribute {name!r}")

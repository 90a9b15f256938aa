"""Normalization for PyTorch as one idea: y = activation(γ · (x − μ_S)/√(σ²_S + ε) + β + residual)."""

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
    "backends",
    "freeze",
    "functional",
    "moments",
    "nn",
    "normalize",
    "plan",
    "recalibrate",
    "unfreeze",
]

"""Normalization for PyTorch as one idea: y = activation(γ · (x − μ_S)/√(σ²_S + ε) + β + residual)."""

from typing import TYPE_CHECKING, Any

from normscope import functional, nn, optim, parametrizations, states
from normscope.errors import (
    ArgumentError,
    DataError,
    DegenerateScopeError,
    DependencyError,
    DtypeError,
    NormscopeError,
    NotationError,
    ProofError,
    RecomputationError,
    ShapeError,
    StateError,
    SynchronizationError,
)
from normscope.functional.normalize import Moments, moments, normalize, plan
from normscope.kernels import backends
from normscope.surgery import (
    accelerate,
    adapt,
    convert,
    desynchronize,
    fold,
    freeze,
    pause_statistics,
    provisional_statistics,
    recalibrate,
    split_statistics,
    synchronize,
    to_torch,
    unfreeze,
)

if TYPE_CHECKING:
    from normscope.doctor import (
        FixReport,
        Report,
        SelfTestReport,
        StateNotRestoredError,
        Thresholds,
        UnhealthyError,
        Watcher,
        assert_healthy,
        check,
        load,
        selftest,
        watch,
    )

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "DataError",
    "DegenerateScopeError",
    "DependencyError",
    "DtypeError",
    "FixReport",
    "Moments",
    "NormscopeError",
    "NotationError",
    "ProofError",
    "RecomputationError",
    "Report",
    "SelfTestReport",
    "ShapeError",
    "StateError",
    "StateNotRestoredError",
    "SynchronizationError",
    "Thresholds",
    "UnhealthyError",
    "Watcher",
    "__version__",
    "accelerate",
    "adapt",
    "assert_healthy",
    "backends",
    "check",
    "convert",
    "desynchronize",
    "fold",
    "freeze",
    "functional",
    "load",
    "moments",
    "nn",
    "normalize",
    "optim",
    "parametrizations",
    "pause_statistics",
    "plan",
    "provisional_statistics",
    "recalibrate",
    "selftest",
    "split_statistics",
    "states",
    "synchronize",
    "to_torch",
    "unfreeze",
    "watch",
]

_OF_THE_DOCTOR = (
    "FixReport",
    "Report",
    "SelfTestReport",
    "StateNotRestoredError",
    "Thresholds",
    "UnhealthyError",
    "Watcher",
    "assert_healthy",
    "check",
    "convert",
    "load",
    "selftest",
    "watch",
)


def __getattr__(name: str) -> Any:
    """The doctor comes with scipy, which is loaded when it is first called for."""
    if name in _OF_THE_DOCTOR:
        from normscope import doctor

        return getattr(doctor, name)
    raise AttributeError(f"module 'normscope' has no attribute {name!r}")

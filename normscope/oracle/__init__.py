"""The formulas in NumPy float64: the truth that kernels are tested against, and may not share a line with."""

from normscope.oracle.activations import ACTIVATIONS
from normscope.oracle.formulas import (
    Caffe,
    Gradients,
    Moments,
    Normalization,
    backward,
    fold,
    moments,
    normalize,
    running,
    unbiased,
)

__all__ = [
    "ACTIVATIONS",
    "Caffe",
    "Gradients",
    "Moments",
    "Normalization",
    "backward",
    "fold",
    "moments",
    "normalize",
    "running",
    "unbiased",
]

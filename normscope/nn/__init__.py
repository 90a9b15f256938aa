"""Layers: torch's normalizers as drop-ins, and `Norm`, the layer of any scope."""

from normscope.nn.batchnorm import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
)
from normscope.nn.conditional import SPADE, AdaIN, ConditionalBatchNorm, SplitBatchNorm
from normscope.nn.estimators import BatchRenorm, EvalNorm, FrozenBatchNorm, GhostBatchNorm, SwitchNorm
from normscope.nn.instancenorm import (
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LazyInstanceNorm1d,
    LazyInstanceNorm2d,
    LazyInstanceNorm3d,
)
from normscope.nn.norm import Norm
from normscope.nn.normalization import GroupNorm, LayerNorm, RMSNorm
from normscope.nn.recurrent import BatchNormLSTM, LayerNormGRU, LayerNormLSTM, RecurrentBatchNorm
from normscope.nn.response import DynamicTanh, EvoNormB0, EvoNormS0, FilterResponseNorm, GlobalResponseNorm
from normscope.nn.scoped import LayerNorm2d, MeanOnlyBatchNorm, PositionalNorm, ScaleNorm
from normscope.nn.streaming import CrossIterationBatchNorm, OnlineNorm
from normscope.nn.syncbatchnorm import SyncBatchNorm
from normscope.nn.whitening import DecorrelatedBatchNorm, IterNorm

__all__ = [
    "SPADE",
    "AdaIN",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormLSTM",
    "BatchRenorm",
    "ConditionalBatchNorm",
    "CrossIterationBatchNorm",
    "DecorrelatedBatchNorm",
    "DynamicTanh",
    "EvalNorm",
    "EvoNormB0",
    "EvoNormS0",
    "FilterResponseNorm",
    "FrozenBatchNorm",
    "GhostBatchNorm",
    "GlobalResponseNorm",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "IterNorm",
    "LayerNorm",
    "LayerNorm2d",
    "LayerNormGRU",
    "LayerNormLSTM",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "LazyInstanceNorm1d",
    "LazyInstanceNorm2d",
    "LazyInstanceNorm3d",
    "MeanOnlyBatchNorm",
    "Norm",
    "OnlineNorm",
    "PositionalNorm",
    "RMSNorm",
    "RecurrentBatchNorm",
    "ScaleNorm",
    "SplitBatchNorm",
    "SwitchNorm",
    "SyncBatchNorm",
]

"""What regularizes weights, and spares normalizers and biases."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.functional import softshrink
from torch.nn.modules.batchnorm import _NormBase

from normscope.errors import ArgumentError
from normscope.nn.base import Layer

__all__ = ["decay_groups", "l1_penalty", "l2_penalty", "proximal_l1"]

_NORMS = (_NormBase, torch.nn.GroupNorm, torch.nn.LayerNorm, torch.nn.RMSNorm, Layer)
# Of other libraries: LayerNorm2d, FrozenBatchNorm2d, RmsNorm, BatchNormAct2d. Only vectors: a network may be so named.
_NORM_NAME = re.compile(r"norm(act)?(\dd)?$", re.IGNORECASE)


def decay_groups(model: Module, weight_decay: float = 0.01) -> list[dict[str, Any]]:
    """Two parameter groups for an optimizer: weights, which decay, and normalizers and biases, which do not.

    In front of a normalizer the scale of the weights has no effect on the output, and decay acts on the step size;
    γ and β have no such freedom, and decay would only pull them to 0.

    Args:
        model: The model; a parameter used twice comes once.
        weight_decay: Of the first group; torch's default for AdamW.

    Returns:
        `[{"params": […], "weight_decay": weight_decay}, {"params": […], "weight_decay": 0.0}]`, in the order of
        `model.parameters()`, parameters that do not learn included.

    Source: van Laarhoven 2017, "L2 Regularization versus Batch and Weight Normalization", §2.

    Example:
        >>> import torch, normscope as ns
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), ns.nn.BatchNorm1d(4))
        >>> [len(group["params"]) for group in ns.optim.decay_groups(model)]
        [1, 3]
    """
    if weight_decay < 0:
        raise ArgumentError(f"weight_decay must be non-negative, but got {weight_decay}", cure="0.01 is usual")
    spared: list[Parameter] = []
    decayed: list[Parameter] = []
    for p, spare in _parameters(model):
        (spared if spare else decayed).append(p)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]


def l1_penalty(model: Module) -> Tensor:
    """Σ |w| over the weights that decay, to be added to the loss.

    Args:
        model: The model; normalizers and biases are spared, as in `decay_groups`.

    Example:
        >>> import torch, normscope as ns
        >>> layer = torch.nn.Linear(2, 1)
        >>> _ = torch.nn.init.constant_(layer.weight, -3)
        >>> ns.optim.l1_penalty(layer)
        tensor(6., grad_fn=<...>)
    """
    return _total([p.abs().sum() for p in _decayed(model)])


def l2_penalty(model: Module) -> Tensor:
    """½ Σ w² over the weights that decay, to be added to the loss: λ times it is `weight_decay=λ` of torch.optim.SGD.

    Args:
        model: The model; normalizers and biases are spared, as in `decay_groups`.

    Example:
        >>> import torch, normscope as ns
        >>> layer = torch.nn.Linear(2, 1)
        >>> _ = torch.nn.init.constant_(layer.weight, -3)
        >>> ns.optim.l2_penalty(layer)
        tensor(9., grad_fn=<...>)
    """
    return _total([p.square().sum() / 2 for p in _decayed(model)])


@torch.no_grad()
def proximal_l1(model: Module, threshold: float) -> None:
    """The proximal step of λ Σ |w|, after the optimizer's: w ← sign(w) · max(|w| − threshold, 0), with exact zeros.

    A gradient of |w| only makes weights hover around 0.

    Args:
        model: The model, changed in place; normalizers and biases are spared, as in `decay_groups`.
        threshold: Learning rate · λ.

    Source: Parikh & Boyd 2014, "Proximal Algorithms", §6.5.2.

    Example:
        >>> import torch, normscope as ns
        >>> layer = torch.nn.Linear(2, 1)
        >>> _ = layer.weight.data.copy_(torch.tensor([[0.5, -2.0]]))
        >>> ns.optim.proximal_l1(layer, 1.0)
        >>> layer.weight.data
        tensor([[ 0., -1.]])
    """
    if threshold < 0:
        raise ArgumentError(f"threshold must be non-negative, but got {threshold}", cure="learning rate · λ")
    for p in _decayed(model):
        p.copy_(softshrink(p, threshold))


def _parameters(model: Module) -> Iterator[tuple[Parameter, bool]]:
    """Every parameter once, and whether it is spared; shared with a normalizer it is."""
    spared: dict[Parameter, bool] = {}
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            norm = isinstance(module, _NORMS) or (p.dim() < 2 and _NORM_NAME.search(type(module).__name__))
            spared[p] = spared.get(p, False) or bool(norm) or name.startswith("bias")
    return ((p, spared[p]) for p in model.parameters())


def _decayed(model: Module) -> list[Parameter]:
    return [p for p, spare in _parameters(model) if not spare]


def _total(terms: list[Tensor]) -> Tensor:
    return torch.stack(terms).sum() if terms else torch.zeros(())

"""`synchronize` and `desynchronize`: batch normalization over the batches of all ranks, and back.

The module keeps its class, which is what code around it asks for, and the behaviour of a subclass: a trait lets its
forward run as ever and computes, over all ranks, the one call of `batch_norm` in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import Module
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from normscope.errors import SynchronizationError
from normscope.functional import batch_norm
from normscope.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm
from normscope.nn.base import Layer
from normscope.nn.collective import Exchange, Grouped, exchange_of
from normscope.nn.syncbatchnorm import BatchNormNd, synchronized_batch_norm, synchronized_forward
from normscope.surgery.find import Found, Select, find
from normscope.surgery.operation import Draft, Surgery, operate
from normscope.surgery.replace import adopt, obstacle, replace
from normscope.surgery.traits import Trait, add_trait, base_of, has_trait, remove_trait, traits_of

__all__ = ["Synchronized", "desynchronize", "synchronize"]


@SyncBatchNorm.register
class Synchronized(Trait, Grouped):
    """The trait of a batch normalizer that, in training, normalizes over the batches of all ranks."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The class's own, with its batch_norm computed over all ranks."""
        exchange = exchange_of(self, self.process_group, SyncBatchNorm.timeout)
        if exchange is None or any(isinstance(value, fx.Proxy) for value in args):
            return super().forward(*args, **kwargs)
        others = [
            trait for trait in traits_of(type(self)) if trait.forward not in (Trait.forward, Synchronized.forward)
        ]
        if base_of(type(self)).forward in (_BatchNorm.forward, BatchNormNd.forward) and not others:
            return synchronized_forward(self, exchange, *args, **kwargs)  # type: ignore[arg-type]
        if torch.compiler.is_compiling():  # which does not see calls of functions as the interception does
            return torch.compiler.disable(_intercepted)(super().forward, exchange, *args, **kwargs)  # type: ignore[no-untyped-call]
        return _intercepted(super().forward, exchange, *args, **kwargs)

    def extra_repr(self) -> str:
        """The class's own, and that it is synchronized."""
        return f"{super().extra_repr()}, synchronized"


def _intercepted(forward: Callable[..., Any], exchange: Exchange, *args: Any, **kwargs: Any) -> Any:
    intercept = _Intercept(exchange)
    with intercept:
        output = forward(*args, **kwargs)
    if not intercept.calls:
        raise SynchronizationError(
            "nothing was synchronized: this forward in training does not call batch_norm",
            layer=exchange.layer,
            cure="let it call super().forward or torch.nn.functional.batch_norm, or leave it out with select=",
        )
    return output


class _Intercept(TorchFunctionMode):
    """Computes every `batch_norm` in training over all ranks."""

    def __init__(self, exchange: Exchange) -> None:
        super().__init__()
        self.exchange = exchange
        self.calls = 0

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is F.batch_norm or function is batch_norm:
            self.calls += 1
            return _batch_norm(self.exchange, *args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def _batch_norm(
    exchange: Exchange,
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    **added: Any,
) -> Tensor:
    """`batch_norm` with torch's signature or ours."""
    if not training:
        return batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps, **added)
    return synchronized_batch_norm(
        exchange, input, running_mean, running_var, weight, bias, momentum=momentum, eps=eps, **added
    )


def synchronize(model: Module, group: Any = None, *, select: Select = None, copy: bool = False) -> Surgery:
    """Let batch normalizers normalize over the batches of all ranks while they train, on any device.

    BatchNorm of any number of axes, of torch, of this package, and subclasses of them, which keep their class, their
    activation and whatever else they do; `torch.nn.SyncBatchNorm` becomes `SyncBatchNorm`, which needs no GPU. Keys of
    the state_dict, parameters, optimizers, hooks and `isinstance` stay as they are. Without a process group, with one
    rank, and in evaluation nothing changes.

    Args:
        model: The model; call this before DDP or FSDP wraps it.
        group: The process group whose ranks share statistics; None for all.
        select: Which normalizers: names ("layer1" takes all below it), patterns, or a function of name and module.
        copy: Synchronize a deep copy.

    Returns:
        A report; `.undo()` or `desynchronize` takes it back.

    Raises:
        ArgumentError: `select` matches nothing.

    Example:
        >>> import torch, normscope as ns
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
        >>> ns.synchronize(model).model[1]
        BatchNorm1d(3, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True, synchronized)
    """

    def edit(draft: Draft) -> None:
        for found in find(draft.model, select):
            reason = _unfit(found, group)
            if reason is None:
                _synchronize(draft, found.module, group)
                draft.change(found.name)
            elif reason:
                draft.skip(found.name, reason)

    return operate("synchronize", model, edit, copy=copy)


def desynchronize(model: Module, *, select: Select = None, copy: bool = False) -> Surgery:
    """Let synchronized batch normalizers normalize by their own rank's batch again.

    What `synchronize` changed gets back its class. A layer built as `SyncBatchNorm`, torch's or this package's, becomes
    a BatchNorm for any number of axes, since it says nothing about theirs.

    Args:
        model: The model.
        select: Which normalizers, as in `synchronize`.
        copy: Change a deep copy.

    Returns:
        A report.

    Raises:
        ArgumentError: `select` matches nothing.

    Example:
        >>> import torch, normscope as ns
        >>> model = ns.synchronize(torch.nn.BatchNorm1d(3)).model
        >>> ns.desynchronize(model).model
        BatchNorm1d(3, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
    """

    def edit(draft: Draft) -> None:
        for found in find(draft.model, select):
            reason = _desynchronize(draft, found.module)
            if reason is None:
                draft.change(found.name)
            elif reason:
                draft.skip(found.name, reason)

    return operate("desynchronize", model, edit, copy=copy)


def _unfit(found: Found, group: Any) -> str | None:
    """Why a normalizer is not synchronized; empty where there is nothing to say."""
    module = found.module
    if found.kind != "BatchNorm":
        looks = found.kind == "custom" and found.running
        return f"{type(module).__name__} keeps running statistics in a way unknown here" if looks else ""
    if isinstance(module, SyncBatchNorm):
        return "synchronized over this group already" if module.process_group is group else None
    if isinstance(module, torch.nn.SyncBatchNorm) and _derived(module, torch.nn.SyncBatchNorm):
        return "a subclass of torch.nn.SyncBatchNorm, which synchronizes in its own way"
    if isinstance(module, Layer) and not isinstance(module, (BatchNorm1d, BatchNorm2d, BatchNorm3d, BatchNormNd)):
        return f"{type(module).__name__} estimates its moments in a way of its own"
    return obstacle(module)


def _synchronize(draft: Draft, module: Module, group: Any) -> None:
    if isinstance(module, torch.nn.SyncBatchNorm):
        module = _become(draft, module, SyncBatchNorm)
    elif not isinstance(module, SyncBatchNorm):
        add_trait(module, Synchronized)
    module.process_group = group


def _desynchronize(draft: Draft, module: Module) -> str | None:
    if has_trait(module, Synchronized):
        remove_trait(module, Synchronized)
        del vars(module)["process_group"]
        return None
    for cls in (SyncBatchNorm, torch.nn.SyncBatchNorm):
        if isinstance(module, cls):
            if _derived(module, cls):
                return f"a subclass of {cls.__name__} would lose what it does besides"
            reason = obstacle(module)
            if reason is None:
                _become(draft, module, BatchNormNd)
            return reason
    return ""


def _derived(module: Module, cls: type[Module]) -> bool:
    return base_of(type(module)) is not cls


def _become(draft: Draft, old: _BatchNorm, cls: type[BatchNormNd]) -> BatchNormNd:
    new = cls(
        old.num_features, old.eps, old.momentum, old.affine, old.track_running_stats,
        bias=old.bias is not None, activation=old.activation if isinstance(old, Layer) else None,
    )  # fmt: skip
    adopt(old, new, ("process_group",))
    replace(draft, old, new)
    return new

"""`split_statistics`: one batch normalizer's statistics become several, by domain or by place of call."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import Module, Parameter

from normscope.errors import ArgumentError
from normscope.nn import SplitBatchNorm
from normscope.surgery.convert import constructor_attributes
from normscope.surgery.find import Found, Select, find, trace
from normscope.surgery.forward import Forward
from normscope.surgery.freeze import is_frozen
from normscope.surgery.operation import Draft, Surgery, operate
from normscope.surgery.optimizers import rebind, watch
from normscope.surgery.replace import adopt, obstacle, replace
from normscope.surgery.synchronize import Synchronized
from normscope.surgery.targets import Followed, Source, source_of
from normscope.surgery.traits import Trait, add_trait, has_trait

__all__ = ["PerCall", "split_statistics", "use_domain"]


class PerCall(Trait):
    """The trait of a `SplitBatchNorm` that takes the place of the call for the domain."""

    def forward(self, input: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: A002
        """Normalize as the next of the places, and begin again behind the last."""
        site = int(vars(self)["sites_called"])
        vars(self)["sites_called"] = (site + 1) % int(vars(self)["num_domains"])
        return super().forward(input, site, *args, **kwargs)


class _Begin:
    """The hook with which every forward of the model begins at the first place, also after one that failed."""

    def __call__(self, model: Module, _: object) -> None:
        for module in model.modules():
            if has_trait(module, PerCall):
                vars(module)["sites_called"] = 0


def split_statistics(
    model: Module,
    domains: int | None = None,
    *,
    example: Any = None,
    share_affine: bool = True,
    optimizer: Any = None,
    select: Select = None,
    forward: Forward | None = None,
    copy: bool = False,
) -> Surgery:
    """Give batch normalizers separate running statistics for every domain, or for every place where they are called.

    Each becomes a `SplitBatchNorm` whose parts begin with the statistics that it has now, so that the model computes
    what it did; batches then move only the statistics of the domain to which they belong. The domain is set with
    `normscope.surgery.use_domain(model, k)`. Without `domains`, normalizers that the example's forward calls several
    times keep statistics for every call, by order, and nothing has to be set.

    Args:
        model: The model.
        domains: How many domains; None for the places of call.
        example: A batch, to see the calls.
        share_affine: Keep one γ and β for all; False copies them, and domains learn their own.
        optimizer: Its parameter groups follow; see `convert`.
        select: Which normalizers; see `freeze`.
        forward: `forward(model, batch)`; see `recalibrate`.
        copy: Split a deep copy.

    Returns:
        A report. The keys of the state_dict change: "bn.weight" is "bn.domains.0.weight".

    Raises:
        ArgumentError: Fewer than two domains, neither domains nor an example, or `select` matches nothing.

    Source: Chang et al. 2019 (domain-specific BN); Xie et al. 2020 (AdvProp); Cooijmans et al. 2016 (per call).

    Example:
        >>> import torch, normscope as ns
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
        >>> _ = ns.split_statistics(model, 2)
        >>> ns.surgery.use_domain(model, 1)
        >>> _ = model(torch.randn(8, 3) + 5)
        >>> model[1].domains[0].num_batches_tracked, model[1].domains[1].num_batches_tracked
        (tensor(0), tensor(1))
    """
    if domains is not None and domains < 2:
        raise ArgumentError(f"domains must be at least 2, but got {domains}", cure="one domain is what there is now")
    if domains is None and example is None:
        raise ArgumentError(
            "neither domains nor an example is given", cure="example= shows which layers are called twice"
        )
    if copy and optimizer is not None:
        raise ArgumentError("the optimizer holds the parameters of the model, not of its copy", cure="copy=False")

    def edit(draft: Draft) -> None:
        if optimizer is not None:
            watch(draft, optimizer)
        calls = [] if domains is not None else [c.module for c in trace(draft.model, example, forward, select=select)]
        replaced = []
        for found in find(draft.model, select):
            count = domains or sum(module is found.module for module in calls)
            source = _fit(found) if count > 1 else ""
            if isinstance(source, Source):
                new = _split(draft, source, count, share_affine, per_call=domains is None)
                replaced.append((found.name, found.module, new))
                draft.change(found.name)
            elif source:
                draft.skip(found.name, source)
        if domains is None and replaced:
            draft.model.register_forward_pre_hook(_Begin(), prepend=True)
        if optimizer is not None:
            rebind(draft, optimizer, replaced)

    return operate("split_statistics", model, edit, copy=copy)


def use_domain(model: Module, domain: int) -> None:
    """Choose the domain to which the inputs of all `SplitBatchNorm` in a model belong from now on.

    Raises:
        ArgumentError: A layer has no such domain; nothing was changed.

    Example:
        >>> import torch, normscope as ns
        >>> model = torch.nn.Sequential(ns.nn.SplitBatchNorm(3, 2))
        >>> use_domain(model, 1)
        >>> model[0].domain
        1
    """
    layers = [module for module in model.modules() if isinstance(module, SplitBatchNorm)]
    for layer in layers:
        if not 0 <= domain < layer.num_domains:
            raise ArgumentError(
                f"domain {domain} is not one of the {layer.num_domains}", cure=f"pass 0 to {layer.num_domains - 1}"
            )
    for layer in layers:
        layer.domain = domain


def _fit(found: Found) -> Source | str:
    """What is split, or why not; empty where there is nothing to say."""
    module = found.module
    if found.kind != "BatchNorm":
        return ""
    if not found.running:
        return "keeps no running statistics"
    if is_frozen(module):
        return "frozen; ns.unfreeze makes it learn statistics again"
    if has_trait(module, Synchronized) or type(module).__name__ == "SyncBatchNorm":
        return "synchronized over ranks, which its parts would not be"
    return obstacle(module) or source_of(found)


def _split(draft: Draft, source: Source, count: int, share_affine: bool, *, per_call: bool) -> SplitBatchNorm:
    old: Any = source.module
    new = SplitBatchNorm(
        source.channels, count, old.eps, old.momentum, old.weight is not None, True,
        bias=old.bias is not None, activation=source.activation, share_affine=share_affine,
    )  # fmt: skip
    tensors = {name for name, t in (*old._parameters.items(), *old._buffers.items()) if t is not None}
    adopt(old, new, tensors | constructor_attributes(old), traits=())
    for k, part in enumerate(new.domains):
        part.training = old.training
        for registry in ("_parameters", "_buffers"):
            own = getattr(part, registry)
            for name, t in getattr(old, registry).items():
                shared = k == 0 or (share_affine and registry == "_parameters")
                own[name] = t if shared or t is None else _copied(t)
    if source.followed:
        add_trait(new, Followed)
    if per_call:
        add_trait(new, PerCall)
        vars(new)["sites_called"] = 0
    replace(draft, old, new)
    return new


def _copied(t: Tensor) -> Tensor:
    copy = t.detach().clone()
    return Parameter(copy, t.requires_grad) if isinstance(t, Parameter) else copy.requires_grad_(False)

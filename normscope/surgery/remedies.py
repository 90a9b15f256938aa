"""Small edits that mend one thing each: momentum, ε, buffers, precision, a bias without effect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.nn import Module
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from normscope.errors import ArgumentError
from normscope.surgery.find import Found, Select, find, paths
from normscope.surgery.forward import Forward, feed, quiet
from normscope.surgery.operation import Draft, Surgery, operate
from normscope.surgery.prove import Proof
from normscope.surgery.state import Snapshot
from normscope.surgery.traits import Trait, add_trait, has_trait

__all__ = ["Float32", "absorb_bias", "copy_buffers", "fed_by", "keep_float32", "set_eps", "set_momentum"]


def set_momentum(model: Module, momentum: float | None, *, select: Select = None, copy: bool = False) -> Surgery:
    """Set the weight of the newest batch in running statistics.

    Args:
        model: The model.
        momentum: In [0, 1], or None for the cumulative mean of all batches.
        select: Which normalizers; see `freeze`.
        copy: Edit a deep copy.

    Raises:
        ArgumentError: The momentum is out of range, or `select` matches nothing.

    Example:
        >>> import torch
        >>> set_momentum(torch.nn.BatchNorm1d(2), 0.01).model
        BatchNorm1d(2, eps=1e-05, momentum=0.01, affine=True, bias=True, track_running_stats=True)
    """
    if momentum is not None and not 0 <= momentum <= 1:
        raise ArgumentError(
            f"momentum must lie between 0 and 1, but got {momentum}",
            cure="torch's momentum weighs the new batch: 0.1 where Keras and JAX say 0.9",
        )
    return _set("momentum", momentum, model, lambda found: found.running, select, copy)


def set_eps(model: Module, eps: float, *, select: Select = None, copy: bool = False) -> Surgery:
    """Set ε, which is added to the variance.

    Args:
        model: The model.
        eps: Greater than 0.
        select: Which normalizers; see `freeze`.
        copy: Edit a deep copy.

    Raises:
        ArgumentError: ε is not positive, or `select` matches nothing.

    Example:
        >>> import torch
        >>> set_eps(torch.nn.LayerNorm(2), 1e-6).model
        LayerNorm((2,), eps=1e-06, elementwise_affine=True, bias=True)
    """
    if not eps > 0:
        raise ArgumentError(f"eps must be positive, but got {eps}", cure="the usual value is 1e-5")
    return _set("eps", eps, model, lambda found: hasattr(found.module, "eps"), select, copy)


def _set(
    name: str, value: float | None, model: Module, fits: Callable[[Found], bool], select: Select, copy: bool
) -> Surgery:
    def edit(draft: Draft) -> None:
        for found in find(draft.model, select):
            if found.kind == "custom" or not hasattr(found.module, name):
                draft.skip(found.name, f"{type(found.module).__name__} has no known {name}")
            elif fits(found) and getattr(found.module, name) != value:
                setattr(found.module, name, value)
                draft.change(found.name)

    return operate(f"set_{name}", model, edit, copy=copy)


def copy_buffers(model: Module, source: Module, *, select: Select = None, copy: bool = False) -> Surgery:
    """Copy the buffers of normalizers from another model, by name: what an average of the weights forgets.

    Args:
        model: The model that lacks them, e.g. an exponential moving average of the weights.
        source: The model that has them; the prefixes that DataParallel, DDP, torch.compile and AveragedModel put before
            names make no difference.
        select: Which normalizers of `model`; see `freeze`.
        copy: Edit a deep copy.

    Raises:
        ArgumentError: `select` matches nothing.

    Example:
        >>> import torch
        >>> trained, average = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
        >>> _ = trained(torch.tensor([[0.0, 10.0], [2.0, 10.0]]))
        >>> copy_buffers(average, trained).model.running_mean
        tensor([0.1000, 1.0000])
    """
    theirs = {_bare(name): module for module, names in paths(source) for name in names}

    def edit(draft: Draft) -> None:
        for found in find(draft.model, select):
            own = {name: buffer for name, buffer in found.module._buffers.items() if buffer is not None}
            if not own:
                continue
            reason = _copy(own, theirs.get(_bare(found.name)))
            if reason is None:
                draft.change(found.name)
            else:
                draft.skip(found.name, reason)

    return operate("copy_buffers", model, edit, copy=copy)


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))


def _copy(own: dict[str, Tensor], source: Module | None) -> str | None:
    if source is None:
        return "the source has no module of this name"
    for name, buffer in own.items():
        other = source._buffers.get(name)
        if other is None or other.shape != buffer.shape:
            return f"{name} is {None if other is None else tuple(other.shape)} there, {tuple(buffer.shape)} here"
    with torch.no_grad():
        for name, buffer in own.items():
            buffer.copy_(cast(Tensor, source._buffers[name]))
    return None


# --- precision ----------------------------------------------------------------------------------------------------


class Float32(Trait):
    """The trait of a module that computes in float32 inside a model of lower precision."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32:
        """Follow the model to another device, and to float64, but not to half precision."""

        def wide(t: Tensor) -> Tensor:
            moved = fn(t)
            lower = t.is_floating_point() and moved.is_floating_point() and moved.dtype.itemsize < 4 <= t.dtype.itemsize
            return t.to(moved.device) if lower else moved

        return cast(Float32, super()._apply(wide, recurse))  # type: ignore[no-untyped-call]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Widen what comes in, narrow what goes out."""
        tracer = next((a.tracer for a in (*args, *kwargs.values()) if isinstance(a, fx.Proxy)), None)
        if isinstance(tracer, fx.Tracer):  # one node, so that the casts stay with the module
            return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)
        first = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        if first is None or not _half(first):
            return super().forward(*args, **kwargs)
        wide, named = pytree.tree_map_only(Tensor, lambda t: t.float() if _half(t) else t, (args, kwargs))
        return pytree.tree_map_only(Tensor, lambda t: t.to(first.dtype), super().forward(*wide, **named))

    def extra_repr(self) -> str:
        """The class's own, and that it computes in float32."""
        return f"{super().extra_repr()}, float32"


def _half(t: Tensor) -> bool:
    return t.is_floating_point() and t.dtype.itemsize < 4


def keep_float32(model: Module, *, select: Select = None, copy: bool = False) -> Surgery:
    """Let normalizers hold and compute everything in float32 inside a model of lower precision.

    Parameters, buffers and gradients in half precision become float32 (the same Parameter objects), inputs are widened
    and outputs narrowed again; a later `half()` or `bfloat16()` of the model leaves these modules in float32. To keep
    the digits that a conversion would lose, call this before it.

    Args:
        model: The model, before or after its conversion.
        select: Which normalizers; see `freeze`.
        copy: Edit a deep copy.

    Raises:
        ArgumentError: `select` matches nothing.

    Example:
        >>> import torch
        >>> model = keep_float32(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))).model.bfloat16()
        >>> model[1].weight.dtype, model(torch.zeros(1, 2, dtype=torch.bfloat16)).dtype
        (torch.float32, torch.bfloat16)
    """

    def edit(draft: Draft) -> None:
        for found in find(draft.model, select):
            if isinstance(found.module, torch.jit.ScriptModule):
                draft.skip(found.name, "TorchScript: its code cannot be exchanged")
            elif has_trait(found.module, Float32):
                draft.skip(found.name, "in float32 already")
            else:
                found.module._apply(lambda t: t.float() if _half(t) else t)  # type: ignore[no-untyped-call]
                add_trait(found.module, Float32)
                draft.change(found.name)

    return operate("keep_float32", model, edit, copy=copy)


# --- a bias without effect ----------------------------------------------------------------------------------------

_LINEAR: tuple[type[Module], ...] = (
    torch.nn.Linear,
    torch.nn.Conv1d,
    torch.nn.Conv2d,
    torch.nn.Conv3d,
    torch.nn.ConvTranspose1d,
    torch.nn.ConvTranspose2d,
    torch.nn.ConvTranspose3d,
)


def absorb_bias(
    model: Module,
    example: Any,
    *,
    drop: bool = True,
    forward: Forward | None = None,
    select: Select = None,
    copy: bool = False,
) -> Surgery:
    """Remove the bias of layers whose output goes straight into BatchNorm or InstanceNorm, which subtract it again.

    In training the mean of the batch takes the bias away; in evaluation the running mean does, from which it is
    subtracted here: (x + b) − μ = x − (μ − b). The function is kept in both modes, which is proven on the example.

    Args:
        model: The model.
        example: A batch as the loader yields it; one forward shows which layer feeds which.
        drop: Remove the parameter, which changes the keys of the state_dict; False sets it to zero.
        forward: `forward(model, batch)`; see `recalibrate`.
        select: Which normalizers; see `freeze`.
        copy: Edit a deep copy.

    Returns:
        A report; names are those of the layers that had the bias.

    Raises:
        ArgumentError: `select` matches nothing.
        NormscopeError: The proof failed; nothing was changed.

    Source: Ioffe & Szegedy 2015, §3.2.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
        >>> absorb_bias(model, torch.randn(8, 2)).model[0]
        Linear(in_features=2, out_features=3, bias=False)
    """

    def edit(draft: Draft) -> None:
        for norm, source, reason in fed_by(draft.model, example, forward=forward, select=select):
            linear = draft.model.get_submodule(source)
            if linear._parameters.get("bias") is None:
                continue
            if reason:
                draft.skip(source, reason)
                continue
            _absorb(linear, draft.model.get_submodule(norm), drop)
            draft.change(source)

    return operate("absorb_bias", model, edit, copy=copy, proof=Proof(example, forward, double=True))


def fed_by(
    model: Module, example: Any, *, forward: Forward | None = None, select: Select = None
) -> tuple[tuple[str, str, str], ...]:
    """Which linear layer or convolution feeds which BatchNorm or InstanceNorm, as one forward shows it.

    Args:
        model: The model.
        example: A batch as the loader yields it.
        forward: `forward(model, batch)`; see `recalibrate`.
        select: Which normalizers; see `freeze`.

    Returns:
        (normalizer, layer before it, why its bias cannot go or "").

    Example:
        >>> import torch
        >>> fed_by(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)), torch.randn(8, 2))
        (('1', '0', ''),)
    """
    names = {id(module): found for module, found in paths(model)}
    flow = _follow(model, example, forward)
    pairs = []
    for norm in find(model, select):
        source = flow.source(norm.module) if norm.kind in ("BatchNorm", "InstanceNorm") else None
        if source is not None:
            pairs.append((norm.name, names[id(source)][0], _keeps_bias(model, source, flow) or ""))
    return tuple(pairs)


@dataclass
class _Flow:
    """Which linear layer feeds which module, as one forward showed it.

    Attributes:
        fed: For every normalizer called, the ids of the modules whose outputs it received; None for other tensors.
        feeds: For every linear layer, the ids of the normalizers that received its output.
        elsewhere: Ids of linear layers whose output somebody else used, too.
        modules: The linear layers by id.
    """

    fed: dict[int, set[int | None]] = field(default_factory=dict)
    feeds: dict[int, set[int]] = field(default_factory=dict)
    elsewhere: set[int] = field(default_factory=set)
    modules: dict[int, Module] = field(default_factory=dict)

    def source(self, norm: Module) -> Module | None:
        """The one linear layer that feeds a normalizer."""
        sources = self.fed.get(id(norm), set())
        return self.modules.get(next(iter(sources)) or 0) if len(sources) == 1 else None


class _Watch(TorchFunctionMode):
    """Notes every use of a linear layer's output outside a normalizer.

    The mark is an attribute of the tensor: it dies with the tensor, whose id another one could inherit.
    """

    def __init__(self, flow: _Flow) -> None:
        super().__init__()
        self.flow = flow
        self.inside = 0

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        harmless = function in _METADATA or getattr(function, "__name__", "") == "__get__"
        if not self.inside and not harmless:
            self.use((args, kwargs or {}))
        return function(*args, **(kwargs or {}))

    def use(self, values: object) -> None:
        """Note that these values are used."""
        marks = [getattr(t, "_normscope_from", None) for t in pytree.tree_leaves(values) if isinstance(t, Tensor)]
        self.flow.elsewhere.update(mark for mark in marks if mark is not None)


_METADATA = {Tensor.dim, Tensor.size, Tensor.numel, Tensor.stride, Tensor.is_contiguous, Tensor.is_floating_point}


def _follow(model: Module, example: Any, forward: Forward | None) -> _Flow:
    """One forward in evaluation mode, watched; the model is left as it was."""
    flow = _Flow()
    watch = _Watch(flow)

    def leave(module: Module, _: object, output: object) -> None:
        flow.modules[id(module)] = module
        if isinstance(output, Tensor):
            output._normscope_from = id(module)  # type: ignore[attr-defined]
            if output.dim() != (2 if isinstance(module, torch.nn.Linear) else cast(Tensor, module.weight).dim()):
                flow.elsewhere.add(id(module))  # its channels are not on axis 1

    def enter(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        watch.inside += 1
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        mark = getattr(tensors[0], "_normscope_from", None) if tensors else None
        flow.fed.setdefault(id(module), set()).add(mark)
        if mark is not None:
            flow.feeds.setdefault(mark, set()).add(id(module))
        watch.use(tensors[1:])

    def end(*_: object) -> None:
        watch.inside -= 1

    with Snapshot(model), quiet():
        for module, _ in paths(model):
            if isinstance(module, _LINEAR) and not module._forward_hooks:
                module.register_forward_hook(leave)
        for found in find(model):
            if found.kind in ("BatchNorm", "InstanceNorm"):
                found.module.register_forward_pre_hook(enter, with_kwargs=True)
                found.module.register_forward_hook(end, always_call=True)
        model.eval()
        with watch:
            watch.use(feed(model, example, forward))
    return flow


def _keeps_bias(model: Module, source: Module, flow: _Flow) -> str | None:
    bias = source._parameters.get("bias")
    if id(source) in flow.elsewhere:
        return "its output is used elsewhere, too"
    if len(flow.feeds[id(source)]) != 1:
        return "it feeds several normalizers"
    if (
        bias is not None
        and sum(bias is other for module, _ in paths(model) for other in module._parameters.values()) > 1
    ):
        return "its bias is shared"
    return "its parameters are parametrized" if parametrize.is_parametrized(source) else None


def _absorb(source: Module, norm: Module, drop: bool) -> None:
    bias = source.get_parameter("bias")
    with torch.no_grad():
        mean = cast("Tensor | None", norm.running_mean)
        if mean is not None:
            mean.copy_(mean.double() - bias.double())
        if drop:
            source.register_parameter("bias", None)
        else:
            bias.zero_()

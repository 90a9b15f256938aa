"""Passes P0 and P1: what the model says about itself, and one traced forward."""

from __future__ import annotations

import collections
import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module
from torch.nn import functional as F
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from normscope.doctor.cache import Batch, few_of
from normscope.doctor.lineage import Lineage
from normscope.doctor.measurements import Array, FunctionalCall, Layer, Site
from normscope.doctor.patient import Patient
from normscope.surgery import Snapshot, feed, find, is_frozen, paths, switch
from normscope.surgery.find import Found

__all__ = [
    "Tracer",
    "average_without_buffers",
    "constant_is_finite",
    "exported",
    "fed_frozen",
    "infinite_weights",
    "layers_of",
    "raw_tensors_of",
    "tensors_of",
]

_FUNCTIONS: dict[Any, str] = {
    F.batch_norm: "batch_norm", F.instance_norm: "instance_norm", F.group_norm: "group_norm",
    F.layer_norm: "layer_norm", F.rms_norm: "rms_norm", torch.batch_norm: "batch_norm",
    torch.instance_norm: "instance_norm", torch.group_norm: "group_norm", torch.layer_norm: "layer_norm",
    torch.rms_norm: "rms_norm", torch.native_batch_norm: "batch_norm",
}  # fmt: skip
# Where the functions keep the flag that asks for batch statistics.
_FLAG = {"batch_norm": ("training", 5), "instance_norm": ("use_input_stats", 5)}


# --- P0 -----------------------------------------------------------------------------------------------------------


def layers_of(model: Module, home: Snapshot | None = None) -> tuple[Layer, ...]:
    """The normalizers as they are, and what telling the model to train would do to them.

    Args:
        model: The model.
        home: A snapshot of it as it is, if there is one.
    """
    found = find(model)
    before = {f.name: bool(f.module.training) for f in found}
    with home or Snapshot(model):
        switch(model, True)
        after = {f.name: bool(f.module.training) for f in found}
    return tuple(_layer(f, before[f.name], after[f.name]) for f in found)


def _layer(found: Found, training: bool, after: bool) -> Layer:
    module = found.module
    own = [p for p in module.parameters(recurse=False) if not is_lazy(p)]
    tracks = getattr(module, "track_running_stats", None)
    return Layer(
        name=found.name,
        kind=found.kind,
        cls=type(module).__name__,
        training=training,
        running=found.running,
        tracks=tracks if isinstance(tracks, bool) else None,
        held=is_frozen(module) or (found.running and not hasattr(module, "momentum")),
        momentum=_number(getattr(module, "momentum", None)),
        eps=_number(getattr(module, "eps", None)) or 0.0,
        seen=_count(getattr(module, "num_batches_tracked", None)),
        mean=_values(getattr(module, "running_mean", None)),
        var=_values(getattr(module, "running_var", None)),
        weight=_values(getattr(module, "weight", None)),
        bias=_values(getattr(module, "bias", None)),
        learns=any(p.requires_grad for p in own) if own else None,
        keeps_mode=training == after,
        script=isinstance(module, torch.jit.ScriptModule),
        dtype=_dtype(getattr(module, "running_var", None)),
    )


def _dtype(value: Any) -> str:
    return str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else ""


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _count(value: Any) -> int | None:
    return int(value) if isinstance(value, Tensor) and value.numel() == 1 and not is_lazy(value) else None


def _values(value: Any) -> Array | None:
    if not isinstance(value, Tensor) or is_lazy(value) or value.device.type == "meta":
        return None
    values: Array = value.detach().to("cpu", torch.float64, copy=True).reshape(-1).numpy()
    return values


def average_without_buffers(model: Module) -> str:
    """The name of a weight average that leaves buffers out, "" for any other model."""
    averaged = isinstance(model, AveragedModel) and not model.use_buffers and int(model.n_averaged) > 1
    return "AveragedModel(use_buffers=False)" if averaged else ""


def infinite_weights(model: Module) -> tuple[str, ...]:
    """Names of parameters that hold NaN or infinity."""
    named = ((n, p) for n, p in model.named_parameters() if not is_lazy(p) and p.is_floating_point())
    return tuple(n for n, p in named if p.device.type != "meta" and not bool(torch.isfinite(p).all()))


# --- P1 -----------------------------------------------------------------------------------------------------------


class Tracer(TorchFunctionMode):
    """One forward: the calls of normalizers, modules or functions, and the names of modules that are running."""

    def __init__(self, model: Module) -> None:
        super().__init__()
        self.model = model
        self.sites: list[Site] = []
        self.calls: list[FunctionalCall] = []
        self._stack: list[str] = []
        self._counts: collections.Counter[str] = collections.Counter()
        self._norms = {id(f.module): f for f in find(model)}
        # A class of one's own that calls a function is asked by that call; a known one answers for itself.
        self._known = {id(f.module) for f in find(model) if f.kind != "custom"}
        self._inside = 0
        self.lineage = Lineage()
        self._buffers = {
            id(buffer): f.name for f in find(model) for buffer in f.module._buffers.values() if buffer is not None
        }

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """With its hooks on every module."""
        handles = []
        try:
            for module, names in paths(self.model):
                if not isinstance(module, torch.jit.ScriptModule):
                    handles.append(module.register_forward_pre_hook(self._enter(names[0]), with_kwargs=True))
                    handles.append(module.register_forward_hook(self._leave, always_call=True))
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str) -> Callable[[Module, tuple[Any, ...], dict[str, Any]], None]:
        def enter(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._stack.append(name)
            found = self._norms.get(id(module))
            if found is None:
                return
            self._inside += id(module) in self._known
            x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
            if x is not None:
                self.sites.append(self._site(found, x))
                self._counts[name] += 1

        return enter

    def _site(self, found: Found, x: Tensor) -> Site:
        mark, shape = self.lineage.of(x), tuple(x.shape)
        return Site(
            found.name,
            self._counts[found.name],
            shape,
            _per_statistic(found, shape),
            _dtype(x),
            mark.axis,
            mark.norm or "",
            mark.dropout,
        )

    def _leave(self, module: Module, args: Any, output: Any = None) -> None:
        if self._stack:
            self._stack.pop()
        if id(module) in self._known:
            self._inside -= 1
        found = self._norms.get(id(module))
        self.lineage.module(module, None if found is None else found.name, args, output)

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = _FUNCTIONS.get(function)
        if name is not None and self._inside <= 0:
            key, place = _FLAG.get(name, ("", 0))
            flag = kwargs.get(key, args[place] if key and len(args) > place else False)
            batch = name == "batch_norm" and bool(flag)
            owner = next((self._buffers[id(v)] for v in (*args, *kwargs.values()) if id(v) in self._buffers), None)
            self.calls.append(FunctionalCall(name, self._stack[-1] if self._stack else "", batch, owner))
        output = function(*args, **kwargs)
        self.lineage.function(function, (*args, *kwargs.values()), output)
        return output


def exported(model: Module) -> tuple[str, ...] | None:
    """The batch normalizations that an exported graph computes in training mode; None for a model that is no graph."""
    if isinstance(model, torch.jit.ScriptModule):
        graph = getattr(model, "inlined_graph", None)
        return None if graph is None else tuple(_scripted(graph))
    if not isinstance(model, torch.fx.GraphModule):
        return None
    return tuple(node.name for node in model.graph.nodes if node.op == "call_function" and _trains(node))


# Where the operators keep the flag, and those that know no other mode.
_OPERATORS = {"batch_norm": 5, "native_batch_norm": 5, "_native_batch_norm_legit": 5, "cudnn_batch_norm": 5}
_ALWAYS = ("_native_batch_norm_legit_functional", "_batch_norm_with_update", "_batch_norm_with_update_functional")


def _trains(node: torch.fx.Node) -> bool:
    name = getattr(node.target, "__name__", "").split(".")[0]
    place = _OPERATORS.get(name)
    if place is None:
        return name in _ALWAYS
    flag = node.kwargs.get("training", node.kwargs.get("train", node.args[place] if len(node.args) > place else False))
    return flag is True


def _scripted(graph: Any) -> Iterator[str]:
    for node in graph.findAllNodes("aten::batch_norm", recurse=True):
        flag = list(node.inputs())[5].toIValue()
        if flag is True:
            yield node.scopeName() or node.kind()


def _per_statistic(found: Found, shape: tuple[int, ...]) -> float:
    """How many values share one statistic in training."""
    count = float(np.prod(shape))
    module, kind = found.module, found.kind
    if kind in ("BatchNorm", "custom", "Norm") and len(shape) > 1:
        return count / max(1, shape[1])
    if kind == "InstanceNorm" and len(shape) > 2:
        return count / max(1, shape[0] * shape[1])
    if kind == "GroupNorm" and len(shape) > 1:
        return count / max(1, shape[0] * cast(torch.nn.GroupNorm, module).num_groups)
    if kind in ("LayerNorm", "RMSNorm"):
        return float(np.prod(cast(torch.nn.LayerNorm, module).normalized_shape))
    return count


def fed_frozen(patient: Patient, batch: Batch) -> dict[str, bool]:
    """By normalizer, whether nothing before it learns: autograd knows."""
    fed: dict[str, bool] = {}

    def hook(name: str) -> Callable[[Module, tuple[Any, ...], dict[str, Any]], None]:
        def see(_: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
            if x is not None:
                fed[name] = fed.get(name, True) and not x.requires_grad

        return see

    handles = [f.module.register_forward_pre_hook(hook(f.name), with_kwargs=True) for f in patient.trackers]
    try:
        switch(patient.model)
        # Few, because activations are kept: hooks that forget them would outlive an interrupt and spoil every backward.
        with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            feed(patient.model, few_of(batch).fresh(patient.device), patient.forward)
    except Exception:
        return {}  # a forward that cannot run with gradients leaves the question open
    finally:
        for handle in handles:
            handle.remove()
    return fed


def constant_is_finite(module: Module, site: Site, device: torch.device | None) -> bool | None:
    """Whether a normalizer gives finite numbers for an input without variance, in the dtype in which it is called."""
    x = torch.full((min(site.shape[0], 2), *site.shape[1:]), 3.3, dtype=getattr(torch, site.dtype), device=device)
    try:
        output = module(x)
    except Exception:
        return None
    return all(bool(torch.isfinite(t).all()) for t in tensors_of(output))


def raw_tensors_of(output: Any) -> list[Tensor]:
    """The floating-point tensors of an output."""
    leaves = (leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))
    return [leaf.detach() for leaf in leaves if leaf.is_floating_point()]


def tensors_of(output: Any) -> list[Tensor]:
    """The same, widened."""
    return [leaf.double() for leaf in raw_tensors_of(output)]


def difference(a: Any, b: Any) -> float | None:
    """The largest relative difference of two outputs, ‖a − b‖/‖a‖ per tensor; None where they cannot be compared."""
    first, second = tensors_of(a), tensors_of(b)
    if not first or [t.shape for t in first] != [t.shape for t in second]:
        return None
    worst = 0.0
    for x, y in itertools.zip_longest(first, second):
        known = torch.isfinite(x) & torch.isfinite(y)
        scale = float(x[known].norm())
        worst = max(worst, float((x - y)[known].norm()) / scale if scale > 0 else float((x - y)[known].norm() > 0))
    return worst

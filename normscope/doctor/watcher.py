"""`watch`: percentiles of what units receive, along a training; hooks look on and leave nothing behind."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from normscope.errors import ArgumentError, DependencyError
from normscope.records import Bands, Picture, Plot, Series

# As in Report: report knows records only, so nothing runs in a circle.
from normscope.report import words
from normscope.surgery import find, paths
from normscope.surgery.find import Select, selected

__all__ = ["Tap", "Watcher", "watch"]

# Values of a unit behind one set of percentiles: of 4096 a percentile is known to about ±0.7 points.
VALUES = 4096
# By their shape these have their units last; all others on axis 1.
_UNITS_LAST = (torch.nn.Linear, torch.nn.LayerNorm, torch.nn.RMSNorm, torch.nn.MultiheadAttention)
SPARKS = "▁▂▃▄▅▆▇█"
MOST_PLOTS = 12


class Tap:
    """A hook that lives in one model only: copies and files of the model get one that does nothing."""

    def __init__(self, see: Callable[[Module, tuple[Any, ...], dict[str, Any]], None]) -> None:
        self.see = see

    def __call__(self, module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pass on what the module is called with; never changes it."""
        if not torch.compiler.is_compiling():
            self.see(module, args, kwargs)

    def __reduce__(self) -> Any:
        # Takes any arguments and returns None, and a file of the model does not need this package to be read.
        return getattr, (contextlib.nullcontext(), "__exit__")


class Watcher:
    """What `normscope.watch` returns: it looks on until it is left or stopped, and keeps a bounded record.

    Attributes:
        percentiles: The three that are kept.
        steps: Forwards of the model in training mode so far.

    Example:
        >>> import torch, normscope as ns
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(4))
        >>> watcher = ns.watch(model)
        >>> _ = model(torch.randn(32, 4))
        >>> watcher.stop()
        >>> watcher.steps
        1
    """

    def __init__(
        self, model: Module, layers: dict[str, Module], units: int, percentiles: tuple[float, float, float],
        every: int, points: int,
    ) -> None:  # fmt: skip
        self.percentiles, self.steps = percentiles, 0
        self._units, self._every, self._points = units, every, points
        self._model, self._modules = model, layers
        self._chosen: dict[str, Tensor] = {}
        self._kept: dict[str, list[tuple[int, Tensor]]] = {name: [] for name in layers}
        self._stride: dict[str, int] = dict.fromkeys(layers, 1)
        self._last: dict[str, int] = dict.fromkeys(layers, 0)
        self._handles = [model.register_forward_pre_hook(Tap(self._step), with_kwargs=True, prepend=True)]
        for name, module in layers.items():
            tap = Tap(functools.partial(self._see, name))
            self._handles.append(module.register_forward_pre_hook(tap, with_kwargs=True))

    # --- looking on -----------------------------------------------------------------------------------------------

    def _step(self, module: Module, *_: Any) -> None:
        self.steps += int(module.training)

    def _see(self, name: str, module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is not self._modules[name]:
            return  # a replica of DataParallel, which has the same hooks and runs in a thread of its own
        due = self._model.training and self.steps % (self._every * self._stride[name]) == 0
        if not due or self._last[name] == self.steps:
            return  # of several calls in one forward the first is taken
        x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
        if x is None or not _plain(x):
            return
        self._last[name] = self.steps
        with torch.no_grad():
            self._keep(name, self._percentiles(name, module, x.detach()))

    def _percentiles(self, name: str, module: Module, x: Tensor) -> Tensor:
        rows = x if isinstance(module, _UNITS_LAST) or x.dim() < 3 else x.transpose(1, -1)
        rows = rows.reshape(-1, rows.shape[-1])
        if name not in self._chosen:
            count = min(self._units, rows.shape[1])
            places = np.unique(np.linspace(0, rows.shape[1] - 1, count).round().astype(int))
            self._chosen[name] = torch.from_numpy(places).to(x.device)
        rows = rows[:: max(1, rows.shape[0] // VALUES)][:VALUES, self._chosen[name]]
        shares = torch.tensor(self.percentiles, device=x.device, dtype=torch.float32) / 100
        return torch.quantile(rows.float(), shares, dim=0)

    def _keep(self, name: str, found: Tensor) -> None:
        """Every second point goes when there are too many, and from then on every second one is not taken."""
        kept = self._kept[name]
        kept.append((self.steps, found))
        if len(kept) > self._points:
            self._stride[name] *= 2
            stride = self._every * self._stride[name]
            self._kept[name] = [point for point in kept if point[0] % stride == 0]

    # --- the end --------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Remove the hooks; what was seen stays."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> Watcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # --- what was seen --------------------------------------------------------------------------------------------

    @property
    def layers(self) -> tuple[str, ...]:
        """Paths of what is watched."""
        return tuple(self._kept)

    @property
    def unseen(self) -> tuple[str, ...]:
        """Those of which nothing was seen: not called, or where hooks are not run (NRM905)."""
        return tuple(name for name, kept in self._kept.items() if not kept)

    def units(self, layer: str) -> tuple[int, ...]:
        """The units of a layer that are kept, evenly spread."""
        return tuple(self._chosen[self._named(layer)].tolist()) if self._kept[layer] else ()

    def bands(self, layer: str, unit: int | None = None) -> Bands:
        """The percentiles of one unit along the steps.

        Args:
            layer: One of `layers`.
            unit: One of `units(layer)`; by default the typical one, whose middle percentile travels as far as that of
                the median unit.

        Raises:
            ArgumentError: The layer is not watched or was not seen, or the unit is not kept.
        """
        if not self._kept[self._named(layer)]:
            raise ArgumentError(f"nothing was seen of {layer or 'the model itself'}", cure=_UNSEEN)
        places = self._chosen[layer].tolist()
        values = torch.stack([found for _, found in self._kept[layer]]).double().cpu().numpy()
        if unit is not None and unit not in places:
            raise ArgumentError(f"unit {unit} of {layer} is not kept", cure=f"these are: {places}")
        place = _typical(values[:, 1]) if unit is None else places.index(unit)
        low, middle, high = (tuple(values[:, k, place].tolist()) for k in range(3))
        steps = tuple(step for step, _ in self._kept[layer])
        return Bands(places[place], self.percentiles, steps, low, middle, high)

    def _named(self, layer: str) -> str:
        if layer not in self._kept:
            raise ArgumentError(f"layer {layer!r} is not watched", cure=f"these are: {', '.join(self._kept)}")
        return layer

    def picture(self) -> Picture:
        """One plot per layer of its typical unit, as a record that can be drawn; of many layers evenly spread ones.

        Raises:
            ArgumentError: Nothing was seen.
        """
        seen = [name for name, kept in self._kept.items() if kept]
        if not seen:
            raise ArgumentError("nothing was seen", cure=_UNSEEN)
        places = np.unique(np.linspace(0, len(seen) - 1, min(len(seen), MOST_PLOTS)).round().astype(int))
        plots = tuple(self._plot(seen[k]) for k in places)
        ordinals = ", ".join(f"{p:g}" for p in self.percentiles)
        return Picture(f"Percentiles {ordinals} of what one unit of each layer receives, along the training.", plots)

    def _plot(self, name: str) -> Plot:
        b = self.bands(name)
        lines = tuple(Series("line", "", b.steps, values) for values in (b.low, b.middle, b.high))
        band = Series("band", "", b.steps, b.middle, b.low, b.high)
        return Plot(f"{name or '(the model itself)'}, unit {b.unit}", "training steps", "input", (band, *lines))

    def to_figure(self, path: str | os.PathLike[str]) -> None:
        """Draw the picture with matplotlib, into a file of the kind that its ending says: .svg, .png, .pdf.

        Raises:
            DependencyError: matplotlib is not installed.
            ArgumentError: Nothing was seen, or the ending is unknown.
        """
        from normscope.report import plots
        from normscope.report.figures import require_matplotlib

        require_matplotlib()
        figure = plots.figure(self.picture())
        known = figure.canvas.get_supported_filetypes()
        if Path(path).suffix.removeprefix(".") not in known:
            raise ArgumentError(f"{path} has no ending of a picture", cure=f"one of {', '.join(sorted(known))}")
        figure.savefig(path, facecolor="white")

    def _repr_html_(self) -> str | None:
        """For notebooks: the picture; without matplotlib, or before anything was seen, the text has to do."""
        from normscope.report import plots
        from normscope.report.figures import require_matplotlib

        try:
            require_matplotlib()
        except DependencyError:
            return None
        if len(self.unseen) == len(self._kept):
            return None
        drawn = plots.as_file(self.picture())
        return f'<div style="background: white; display: inline-block">{drawn[drawn.index("<svg") :]}</div>'

    def __repr__(self) -> str:
        return f"Watcher({len(self._kept)} layers, {words.plural(self.steps, 'step')})"

    def __str__(self) -> str:
        if self.steps == 0:
            return f"{self!r}: the model itself was not called in training mode; watch the module that is called"
        low, _, high = (f"{p:g}th" for p in self.percentiles)
        rows = [f"{self!r}: the middle percentile along the training, then {low} to {high} at its end"]
        width = min(34, max(len(name) for name in self._kept))
        for name, kept in self._kept.items():
            if kept:
                b = self.bands(name)
                span = f"{words.number(b.low[-1])} to {words.number(b.high[-1])}"
                rows.append(f"  {name[-width:]:{width}}  unit {b.unit:<4}  {_sparks(b.middle)}  {span}")
        rows += [f"  not seen: {name or '(the model itself)'}: {_UNSEEN}" for name in self.unseen]
        return "\n".join(rows)


_UNSEEN = (
    "hooks do not see modules that are compiled, replicated by DataParallel, or called by .forward (NRM905); "
    "watch the module that is called, and before torch.compile"
)


def watch(
    model: Module,
    select: Select = None,
    *,
    units: int = 8,
    percentiles: Sequence[float] = (15, 50, 85),
    every: int = 1,
    points: int = 512,
) -> Watcher:
    """Look on at what units receive while a model trains: figure 1(b, c) of the Batch Normalization paper.

    Every forward in training mode is a step. Of each watched module the percentiles of its input are kept, over the
    batch and all places in it, for a few units; nothing of the activations is. Training is the same bit for bit with
    and without: the hooks draw no random numbers and change nothing. They go when the context is left, however that
    happens, or with `stop()`. Copies and files of the model made meanwhile hold hooks that do nothing.

    Args:
        model: The model.
        select: What to watch: paths or patterns of any modules, as in `select` elsewhere; by default the normalizers.
            The paper shows the input of an activation: name that.
        units: So many units (channels) of each module, evenly spread.
        percentiles: Three, ascending.
        every: Look at every so many steps only.
        points: So many points per module at most; beyond, every second one goes, and steps double.

    Raises:
        ArgumentError: Nothing matches, a number is out of range, or the model is compiled, so that hooks see nothing.

    Source:
        S. Ioffe and C. Szegedy, "Batch Normalization", 2015, figure 1(b, c): 15th, 50th and 85th percentiles.

    Example:
        >>> import torch, normscope as ns
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Sigmoid())
        >>> with ns.watch(model, ["1", "2"]) as watcher:
        ...     for _ in range(20):
        ...         _ = model(torch.randn(32, 4))
        >>> watcher.steps, watcher.units("2"), len(watcher.bands("2").middle)
        (20, (0, 1, 2, 3, 4, 5, 6, 7), 20)
    """
    three = tuple(float(p) for p in percentiles)
    if len(three) != 3 or not 0 <= three[0] < three[1] < three[2] <= 100:
        raise ArgumentError(
            f"percentiles must be three, ascending, from 0 to 100, but are {three}", cure="(15, 50, 85)"
        )
    for name, value, least in (("units", units, 1), ("every", every, 1), ("points", points, 2)):
        if value < least:
            raise ArgumentError(f"{name} must be at least {least}, but got {value}", cure=f"{name}={least} or more")
    return Watcher(model, _layers(model, select), units, (three[0], three[1], three[2]), every, points)


def _layers(model: Module, select: Select) -> dict[str, Module]:
    if not isinstance(model, Module):
        raise ArgumentError(
            f"the model must be a torch.nn.Module, but it is a {type(model).__name__}", cure="build it first"
        )
    if _compiled(model):
        raise ArgumentError(
            "the model is compiled: hooks that come afterwards are not run in it (NRM905)",
            cure="watch it first and compile it then, or train it uncompiled while you watch",
        )
    if select is None:
        found = {f.name: f.module for f in find(model)}
    else:
        keep = selected(select)
        found = {names[0]: module for module, names in paths(model) if any(keep(name, module) for name in names)}
    hidden = [name for name, module in found.items() if _compiled(module)]
    if hidden:
        raise ArgumentError(f"{hidden[0]!r} is compiled: hooks do not run in it (NRM905)", cure="watch others")
    if not found:
        raise ArgumentError("select matches no module", cure="name modules as model.named_modules() does")
    return found


def _compiled(module: Module) -> bool:
    wrapped = hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
    return wrapped or isinstance(module, torch.jit.ScriptModule)


def _plain(x: Tensor) -> bool:
    """Whether there are numbers to look at, and not those of a transform or of a trace."""
    numbers = x.is_floating_point() and x.numel() > 0 and x.dim() > 1 and x.device.type != "meta"
    return numbers and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def _typical(middle: Any) -> int:
    """The unit whose middle percentile travels as far as that of the median unit."""
    travelled = np.ptp(middle, axis=0)
    return int(np.argsort(travelled, kind="stable")[len(travelled) // 2])


def _sparks(values: Sequence[float], width: int = 24) -> str:
    """A line of blocks."""
    places = np.unique(np.linspace(0, len(values) - 1, min(width, len(values))).round().astype(int))
    chosen = np.nan_to_num(np.array(values)[places])
    span = float(np.ptp(chosen)) or 1.0
    return "".join(SPARKS[int((v - chosen.min()) / span * (len(SPARKS) - 1))] for v in chosen)

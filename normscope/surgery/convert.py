"""`convert`: any normalizer becomes any other, by rule."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from normscope.errors import ArgumentError, DataError, ProofError
from normscope.surgery.calibrate import Calibration, HeldFit, Loss, Replaced, calibrate, compare, observe
from normscope.surgery.find import Found, find, selected, trace
from normscope.surgery.foreign import Foreign
from normscope.surgery.forward import Forward
from normscope.surgery.freeze import Frozen
from normscope.surgery.operation import Draft, Surgery, operate
from normscope.surgery.optimizers import rebind, watch
from normscope.surgery.replace import adopt, obstacle, replace_all
from normscope.surgery.synchronize import Synchronized
from normscope.surgery.targets import CHANNELS, Followed, Source, Target, is_affine, read_target, source_of
from normscope.surgery.traits import Trait, add_trait, base_of, traits_of

__all__ = ["Rules", "constructor_attributes", "convert", "replay"]

Selector = str | type[Module] | Callable[[str, Module], bool]
Rules = Mapping[Any, Any] | Iterable[tuple[Any, Any]]


def convert(
    model: Module,
    rules: Rules,
    *,
    calibrate: Iterable[Any] | None = None,
    held: Iterable[Any] | None = None,
    within: float = 0.05,
    example: Any = None,
    optimizer: Any = None,
    batches: int = 8,
    nearest: bool = False,
    forward: Forward | None = None,
    loss: Loss | None = None,
    copy: bool = False,
) -> Surgery:
    """Replace normalizers by others.

    The new layer takes over γ and β (the Parameter objects) and whatever else both have: options, running statistics, a
    fused activation, children such as timm's `drop` and `act`, hooks, `training`, `requires_grad`, device and dtype,
    attributes of the user. It is tried out on random numbers first, and is not built where it would normalize single
    values (a GroupNorm with one channel per group on 1×1 maps), look for the channels on another axis, or lose what the
    old layer's class does besides.

    A conversion changes the function. `calibrate` sets γ and β so that every new layer's output has, channel by
    channel, the mean and the variance that the old one's had on data, one layer after the other in the order in which
    they run, which takes a pass per layer, and one alone where the loader yields a single batch; the running statistics
    of layers that have some are measured on the way. `held` proves it on other data, or the conversion is refused.
    Nothing is exchanged between ranks: let all read the same batches.

    Args:
        model: The model.
        rules: What becomes what: a dictionary, or pairs. The key is the name of a class or family ("BatchNorm2d",
            "BatchNorm"), a pattern for the module's name ("layer1", "*.downsample.1"), a class, or a function of name
            and module. The value is a layer of `normscope.nn` as text, without the number of channels ("GroupNorm(32)",
            "LayerNorm2d", "Norm('n (g [c]) [h w]', g=8)"), a class, a function that builds the new module from the old
            one, or None to leave it. The first rule that fits a normalizer counts.
        calibrate: A loader.
        held: A loader of other data, on which the calibration is judged.
        within: How far, there, the moments of a calibrated layer's output may be from the old one's: root mean square
            over the channels of the difference of means, or of σ, over that of σ.
        example: A batch, to see the shapes of the layers' inputs where nothing is calibrated.
        optimizer: Its parameter groups follow: state stays with parameters that are kept, moves to new ones of the same
            name and shape, and is dropped otherwise.
        batches: How many batches of a loader to use; they are read once and kept.
        nearest: Where a number of groups does not divide the channels, or leaves single values, take the nearest number
            that does not.
        forward: `forward(model, batch)`; see `recalibrate`.
        loss: `loss(output, batch)`, to be reported before and after next to the distance of the model's outputs.
        copy: Convert a deep copy.

    Returns:
        A report; `.details["layers"]` has the text and the input shape of every new layer, `.details["calibration"]`
        the moments, outputs and losses before and after.

    Raises:
        ArgumentError: A rule cannot be read or fits no normalizer, or an option does not fit another.
        ProofError: On the data held out a layer is off by more than `within`. As after any error, the model is as it
            was.
        DataError: A loader is empty, or NaN came out of a layer.

    Source: Wu & He 2018 (what BN becomes where batches are small); matching of moments as in Nagel et al. 2019, §4.2.

    Example:
        >>> import torch, normscope as ns
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 48, 3), torch.nn.BatchNorm2d(48), torch.nn.ReLU())
        >>> print(ns.convert(model, {"BatchNorm": "GroupNorm(32)"}, nearest=True))
        convert: 1 changed, 0 skipped
          changed  1
          note     1: GroupNorm(24) in place of GroupNorm(32), for 48 channels
        >>> model[1]
        GroupNorm(24, 48, eps=1e-05, affine=True, bias=True)
    """
    read = _read_rules(rules)
    if copy and optimizer is not None:
        raise ArgumentError("the optimizer holds the parameters of the model, not of its copy", cure="copy=False")
    if batches < 1:
        raise ArgumentError(f"batches must be at least 1, but got {batches}", cure="8 are enough for most models")
    if held is not None and calibrate is None:
        raise ArgumentError("held= judges a calibration, and there is none", cure="pass calibrate=, too")
    if not within > 0:
        raise ArgumentError(f"within must be greater than 0, but got {within}", cure="0.05 is 5 %")

    def edit(draft: Draft) -> None:
        if optimizer is not None:
            watch(draft, optimizer)
        data, others = (None if loader is None else _read(loader, batches) for loader in (calibrate, held))
        chosen = _chosen(draft.model, read)
        first = example if data is None else data[0]
        calls = () if first is None or not chosen else trace(draft.model, first, forward, select=_among(chosen))
        plans = list(_plans(draft, chosen, calls, data is not None, nearest))
        fits = [] if data is None else [plan for plan in plans if _fits(draft, plan)]
        known = [plan.as_it_is() for plan in fits]
        before = [observe(draft.model, known, each, forward, loss) for each in (data, others) if fits and each]
        _carry_out(draft, plans)
        if optimizer is not None:
            rebind(draft, optimizer, [(plan.found.name, plan.found.module, plan.new) for plan in plans])
        if before and data:
            rank = {id(call.module): k for k, call in reversed(list(enumerate(calls)))}
            fits = sorted(fits, key=lambda plan: rank[id(plan.found.module)])
            layers = [plan.replaced() for plan in fits]
            calibration = _calibrated(draft.model, layers, before[0], data, forward, loss)
            if others:
                after = observe(draft.model, layers, others, forward, loss)
                held_loss = None if loss is None else (before[1].loss, after.loss)
                calibration = replace(calibration, held=compare(before[0], before[1], after), held_loss=held_loss)
                _judge(calibration.held, within)
            _note(draft, calibration)

    return operate("convert", model, edit, copy=copy)


def replay(model: Module, layers: Iterable[tuple[str, str, list[int]]], *, affine: bool) -> Surgery:
    """Convert as a checkpoint says: name, text and, where known, input shape of every layer."""

    def edit(draft: Draft) -> None:
        names = {name: found for found in find(draft.model) for name in found.paths}
        plans = []
        for name, text, shape in layers:
            if name not in names:
                raise ArgumentError(
                    f"the checkpoint converts {name!r}, which this model does not have",
                    cure="build the model as it was before the conversion",
                )
            source = source_of(names[name], (tuple(shape),) if shape else ())
            built = source if isinstance(source, str) else read_target(text).build(source, affine=affine, nearest=False)
            if isinstance(source, str) or isinstance(built, str):
                raise ArgumentError(f"{name} cannot become {text}: {built}", cure="build the model as it was")
            plans.append(_Plan(names[name], source, *built))
        _carry_out(draft, plans)

    return operate("convert", model, edit)


# Under another name, because the argument `calibrate` hides it.
_calibrated = calibrate


def _read(loader: Iterable[Any], batches: int) -> list[Any]:
    if isinstance(loader, Tensor):
        raise ArgumentError("a tensor is one batch, not a loader", shape=tuple(loader.shape), cure="pass [tensor]")
    data = list(itertools.islice(loader, batches))
    if not data:
        raise DataError("the loader is empty", cure="pass one that yields batches; a generator is read only once")
    return data


# --- rules --------------------------------------------------------------------------------------------------------


def _read_rules(rules: Rules) -> list[tuple[Selector, Target | None]]:
    if isinstance(rules, str):
        raise ArgumentError("rules are pairs", rules=rules, cure='write {"BatchNorm": "GroupNorm(32)"}')
    pairs = list(rules.items() if isinstance(rules, Mapping) else rules)
    if not pairs or any(not isinstance(pair, tuple) or len(pair) != 2 for pair in pairs):
        raise ArgumentError("rules are pairs, at least one", cure='write {"BatchNorm": "GroupNorm(32)"}')
    for key, _ in pairs:
        if not (isinstance(key, str) or callable(key)):
            raise ArgumentError(f"{key!r} selects nothing", cure="use a name, a pattern, a class or a function")
    return [(key, None if target is None else read_target(target)) for key, target in pairs]


def _chosen(model: Module, rules: Sequence[tuple[Selector, Target | None]]) -> list[tuple[Found, Target]]:
    """Every normalizer that a rule fits, and what it becomes."""
    found = find(model)
    used = [False] * len(rules)
    chosen = []
    for each in found:
        fitting = [k for k, (key, _) in enumerate(rules) if _selects(key, each)]
        for k in fitting:
            used[k] = True
        target = rules[fitting[0]][1] if fitting else None
        if target is not None:
            chosen.append((each, target))
    for (key, _), was_used in zip(rules, used, strict=True):
        if not was_used:
            raise ArgumentError(
                f"{key!r} fits no normalizer",
                normalizers=", ".join(f"{f.name or '(the model itself)'} ({f.kind})" for f in found[:12]) or "none",
                cure="name a class, a family such as BatchNorm, or modules as model.named_modules() does",
            )
    return chosen


def _selects(key: Selector, found: Found) -> bool:
    if isinstance(key, type):
        return isinstance(found.module, key)
    if isinstance(key, str):
        classes = {cls.__name__ for cls in type(found.module).__mro__ if cls is not Module and cls is not object}
        return key == found.kind or key in classes or any(selected(key)(name, found.module) for name in found.paths)
    return any(key(name, found.module) for name in found.paths)


def _among(chosen: Sequence[tuple[Found, Target]]) -> Callable[[str, Module], bool]:
    modules = {id(found.module) for found, _ in chosen}
    return lambda _, module: id(module) in modules


# --- one layer ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Plan:
    """A replacement that can be made."""

    found: Found
    source: Source
    new: Module
    text: str

    def as_it_is(self) -> Replaced:
        return Replaced(self.found, self.found.module, self.source.axis, self.source.followed)

    def replaced(self) -> Replaced:
        return Replaced(self.found, self.new, self.source.axis, self.source.followed)


def _plans(draft: Draft, chosen: Any, calls: Any, affine: bool, nearest: bool) -> Iterable[_Plan]:
    for found, target in chosen:
        shapes = tuple(dict.fromkeys(c.shape for c in calls if c.module is found.module and c.shape is not None))
        source = obstacle(found.module) or source_of(found, shapes)
        if not isinstance(source, Source) and target.function is not None and obstacle(found.module) is None:
            source = Source(found.module, 0, 1, False, shapes)
        if isinstance(source, str):
            draft.skip(found.name, source)
            continue
        built = target.build(source, affine=affine, nearest=nearest)
        if isinstance(built, str):
            draft.skip(found.name, built)
            continue
        new, text = built
        if base_of(type(new)) is base_of(type(found.module)) and repr(new) == repr(found.module):
            draft.skip(found.name, f"is {text or type(new).__name__} already")
            continue
        if text != target.text:
            draft.notes.append(f"{found.name}: {text} in place of {target.text}, for {source.channels} channels")
        yield _Plan(found, source, new, text)


def _carry_out(draft: Draft, plans: Sequence[_Plan]) -> None:
    """Put the new layers in the old ones' places."""
    held = set(draft.model.modules())
    for plan in plans:
        if plan.new in held:
            raise ArgumentError("the function gave a module that the model has already", layer=plan.found.name)
        held.add(plan.new)
        _hand_over(draft, plan)
    replace_all(draft, {plan.found.module: plan.new for plan in plans})


def _hand_over(draft: Draft, plan: _Plan) -> None:
    """Give the new layer all that both have."""
    old, new = plan.found.module, plan.new
    if plan.source.followed and "act" not in new._modules:
        add_trait(new, Followed)
    tensors = {name: t for name, t in (*old._parameters.items(), *old._buffers.items()) if t is not None}
    shared = {name for name, t in tensors.items() if _same_place(name, t, old, new)}
    with torch.no_grad():
        for name in tensors.keys() - shared:  # γ and β of a frozen layer are buffers
            theirs = new._parameters.get(name, new._buffers.get(name))
            if theirs is not None and theirs.shape == tensors[name].shape:
                theirs.copy_(tensors[name])
    names = old._parameters.keys() | old._buffers.keys() | constructor_attributes(old)
    adopt(old, new, names - shared, traits=_traits(old, new))
    if not any(p.requires_grad for p in old.parameters(recurse=False)) and old._parameters.get("weight") is not None:
        for p in new.parameters(recurse=False):
            p.requires_grad_(False)
    if new._buffers.get("running_var") is not None and "running_var" not in shared:
        draft.notes.append(f"{plan.found.name}: running statistics begin anew; calibrate=, recalibrate or train")
    draft.change(plan.found.name)
    draft.details.setdefault("layers", {})[plan.found.name] = (plan.text, plan.source.shapes[:1])


def _fits(draft: Draft, plan: _Plan) -> bool:
    """Whether γ and β of a new layer can be fitted; a note where not."""
    weight = getattr(plan.new, "weight", None)
    old = plan.found.module
    if not plan.source.shapes:
        reason = "never reached by these batches"
    elif not isinstance(weight, Tensor) or weight.shape != (plan.source.channels,):
        reason = "it has no γ per channel"
    elif not is_affine(plan.new, plan.source):
        reason = "γ and β are not the last thing that it does"
    elif sum(_gamma(m) is _gamma(old) for m in draft.model.modules() if _gamma(old) is not None) > 1:
        reason = "its γ is shared with another layer"
    else:
        return True
    draft.notes.append(f"{plan.found.name}: not calibrated, {reason}")
    return False


def _gamma(module: Module) -> Tensor | None:
    return module._parameters.get("weight")


def _judge(held: dict[str, HeldFit], within: float) -> None:
    """Refuse what the data held out do not confirm."""
    far = [name for name, fit in held.items() if not fit.off <= within]
    if far:
        worst = max(far, key=lambda name: held[name].off)
        off, sampling = held[worst].off, held[worst].sampling
        raise ProofError(
            f"on the data held out moments of {len(far)} of {len(held)} layers are off by more than {within:.0%}, the "
            f"worst by {off:.0%}, where the old layer's own are {sampling:.0%} from those that it was calibrated to",
            layer=worst,
            cure="calibrate on more data, or allow more: within=",
        )


def _note(draft: Draft, calibration: Calibration) -> None:
    draft.details["calibration"] = calibration
    before, after = calibration.output
    draft.notes.append(f"output of the model off by {before:.0%} of its spread, {after:.0%} after the calibration")
    if calibration.loss is not None:
        old, naive, new = calibration.loss
        draft.notes.append(f"loss {old:.4g} before the conversion, {naive:.4g} after it, {new:.4g} calibrated")
    if calibration.held:
        off = max(fit.off for fit in calibration.held.values())
        draft.notes.append(f"on the data held out, moments are off by {off:.1%} at most")
    if calibration.held_loss is not None:
        draft.notes.append("loss there {:.4g} before the conversion, {:.4g} calibrated".format(*calibration.held_loss))
    draft.notes += [f"{name}: {fit}" for name, fit in calibration.layers.items()]


def _same_place(name: str, t: Tensor, old: Module, new: Module) -> bool:
    registry = "_parameters" if name in old._parameters else "_buffers"
    theirs = getattr(new, registry).get(name)
    return theirs is not None and theirs.shape == t.shape


def constructor_attributes(old: Module) -> set[str]:
    """Attributes that torch's or this package's constructor has set: they say nothing of the new layer."""
    mine: set[str] = {"activation", "kinds", "process_group"}
    for cls in base_of(type(old)).__mro__:
        if cls.__module__.startswith(("torch.nn.modules", "normscope.nn")) and cls is not Module:
            mine |= set(getattr(cls, "__constants__", ())) | set(_parameter_names(cls))
    return mine


def _parameter_names(cls: type) -> tuple[str, ...]:
    code = getattr(vars(cls).get("__init__"), "__code__", None)
    return (*CHANNELS, *(() if code is None else code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]))


def _traits(old: Module, new: Module) -> tuple[type[Trait], ...]:
    """Those that mean something for the new layer."""
    running = new._buffers.get("running_mean") is not None
    kept = {Frozen: running, Synchronized: False, Followed: False}
    return tuple(t for t in traits_of(type(old)) if kept.get(t, not issubclass(t, Foreign)))

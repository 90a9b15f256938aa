"""`adapt`: normalizers that follow a shift of the data, without labels, and a proof on data that adapted nothing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import Module

from normscope.errors import ArgumentError, DataError, ProofError
from normscope.functional.normalize import moments
from normscope.surgery.calibrate import evaluating
from normscope.surgery.find import Found, Select, find, trace
from normscope.surgery.forward import Forward, feed
from normscope.surgery.operation import Draft, Surgery, operate
from normscope.surgery.recalibrate import Meter, OneValueError, measurable

__all__ = ["Adaptation", "adapt", "judge"]

Method = Literal["statistics", "entropy"]
Metric = Callable[[Any, Any], Any]

# The first normalizer's symmetric divergence between its statistics in training and here, median over the channels,
# below which there is no shift to adapt to. Measured on small networks for MNIST, Fashion-MNIST and CIFAR-10: two
# classes of ten without any shift give at most 0.06, half the contrast at least 0.4. Their predicted classes differ
# from the whole by at most 0.06; in a perceptron, whose first normalizer sees the classes, by 0.2 to 3.
SHIFT = 0.1
# The effective number of predicted classes, as a share of what balanced classes would give, below which the classes
# are taken for unbalanced. Measured there: all 18 shifts of balanced classes pass; so do 21 of the 36 of one or two
# classes (docs/adapt.md).
BALANCE = 0.4
# Few classes are also given away by what adapting the later layers does: it spreads the predictions over more classes
# than the first had found, by this factor, and does not reach the share that balanced ones do. Measured there: balanced
# ones reach 0.82 at least; of 12 shifts of few classes that would lose, this and the above refuse 9, 6 without this;
# of 24 that would gain, 14 pass, 15 without this.
GROWTH, SPREAD = 1.2, 0.65
# Samples of a predicted class from which statistics are taken.
FEW = 5
# γ and β are moved this far at most per step, as in the paper's experiments (Adam).
RATE = 1e-3


@dataclass(frozen=True, slots=True)
class Adaptation:
    """What an adaptation measured.

    Attributes:
        first: Name of the first normalizer; empty where there is none with running statistics.
        shift: Divergence of the first normalizer's statistics from those of training, and the least that is a shift.
        mixing: Divergence of its statistics between the classes that the adapted model predicts, mean over the samples,
            and the most with which a shift can be told from a mix of classes; None where it cannot be measured.
        classes: Effective number of classes predicted on the part held out, with nothing but the first normalizer
            adapted, and its threshold; None where the output is no class scores.
        spread: The same with all adapted, and what it has to reach if it is to be larger.
        entropy: Mean entropy of the predictions on the part held out, before and after; None where the output is no
            class scores.
        metric: The metric on the part held out, before and after, and the standard error of the difference; None
            without one.
        samples: How many samples adapted, and how many were held out.
    """

    first: str
    shift: tuple[float, float]
    mixing: tuple[float, float] | None
    classes: tuple[float, float] | None
    spread: tuple[float, float] | None
    entropy: tuple[float, float] | None
    metric: tuple[float, float, float] | None
    samples: tuple[int, int]


def adapt(
    model: Module,
    loader: Iterable[Any],
    *,
    prior: float = 16.0,
    method: Method = "statistics",
    batches: int | None = 200,
    metric: Metric | None = None,
    guard: bool = True,
    select: Select = None,
    copy: bool = False,
    forward: Forward | None = None,
) -> Surgery:
    """Adapt a model to unlabelled data from another distribution, and prove that it helps before it counts.

    "statistics" lets normalizers with running statistics take those of the data into account. With μ_s, σ²_s the
    statistics of training, worth N samples, and μ_t, σ²_t those of n samples of the data:

        μ = (N μ_s + n μ_t)/(N + n),   σ² = (N σ²_s + n σ²_t)/(N + n)

    N = 0 takes the data's alone (AdaBN), N → ∞ leaves the model as it is. Every layer normalizes by what it has come to
    so far, so that the layers behind it are measured on what they will receive. "entropy" does the same and then moves
    γ and β of normalizers of any kind down the gradient of the predictions' entropy, one step per batch (Tent); the
    running statistics are measured again behind that.

    Every fourth batch is held out: it adapts nothing and judges. Statistics of a batch also depend on the mix of its
    classes, and adapting to that makes a good model bad. In deep networks the first normalizer's hardly do. So an
    adaptation is refused (a) where the first normalizer sees no shift, (b) where its statistics differ between the
    predicted classes, so that they could be the cause, (c) where the predictions on the part held out, with the first
    normalizer alone adapted, fall into few classes, and (d) where adapting the others spreads them over more, but not
    over as many as balanced data would. This errs on the safe side: a shift so strong that adapting one layer does not
    bring the classes back is refused, too. Who has labels for the part held out passes `metric`, which then decides
    alone.

    Args:
        model: A classifier, unless `metric` is given or `guard` is off; its mode does not matter.
        loader: Any iterable of batches; see `recalibrate`. Four batches or more, in random order.
        prior: N.
        method: "statistics" or "entropy".
        batches: How many batches to read at most; None for all.
        metric: `metric(output, batch)`, higher is better, a number per batch or per sample.
        guard: Refuse what cannot be shown to help; False adapts in any case.
        select: Which normalizers; see `freeze`.
        copy: Adapt a deep copy.
        forward: `forward(model, batch)`; see `recalibrate`.

    Returns:
        A report; `.details["adaptation"]` has the figures, `.undo()` takes everything back.

    Raises:
        ProofError: The guard refuses; the model is as it was.
        ArgumentError: An option is out of range, or the output is no class scores and the guard needs some.
        DataError: Fewer than two batches, or NaN.

    Source: Schneider et al. 2020, §3 (N); Li et al. 2016 (AdaBN); Wang et al. 2021 (Tent), eq. 2 and §3.

    Example:
        >>> import torch, normscope as ns
        >>> model = torch.nn.BatchNorm1d(2).eval()
        >>> data = [torch.randn(16, 2) * 3 + 5 for _ in range(8)]
        >>> _ = ns.adapt(model, data, prior=0, guard=False)
        >>> (model.running_mean - 5).abs().max() < 1
        tensor(True)
    """
    if not prior >= 0:
        raise ArgumentError(f"prior must be a number of samples, 0 or more, but got {prior}", cure="16 is a start")
    if method not in get_args(Method):
        raise ArgumentError(f"method {method!r} is unknown", cure=f"use one of {', '.join(get_args(Method))}")
    if batches is not None and batches < 2:
        raise ArgumentError(f"batches must be at least 2, but got {batches}", cure="one adapts, one judges")
    if isinstance(loader, Tensor):
        raise ArgumentError("a tensor is one batch, not a loader", shape=tuple(loader.shape), cure="pass a list")

    def edit(draft: Draft) -> None:
        data = list(itertools.islice(loader, batches))
        if len(data) < 2:
            raise DataError(f"the loader has {len(data)} batches, one must adapt and one judge", cure="pass more")
        step = min(4, len(data))
        held, given = data[step - 1 :: step], [batch for k, batch in enumerate(data) if k % step != step - 1]
        plan = _Plan(draft, given, held, prior, forward)
        layers = _in_order(draft, list(measurable(draft, select)), given[0], forward)
        measured = None if method == "statistics" and not layers else _adapted(plan, layers, method, select, metric)
        if measured is None:
            raise ArgumentError(
                "this model has no running statistics to adapt",
                cure='method="entropy" adapts γ and β of any normalizer',
            )
        if guard:
            judge(measured)
        _report(draft, measured)

    return operate("adapt", model, edit, copy=copy)


@dataclass(frozen=True, slots=True)
class _Plan:
    draft: Draft
    given: Sequence[Any]
    held: Sequence[Any]
    prior: float
    forward: Forward | None


@dataclass(frozen=True, slots=True)
class _Judged:
    """What a model does on the part held out."""

    probabilities: Tensor | None
    metric: Tensor | None

    @property
    def entropy(self) -> float | None:
        return None if self.probabilities is None else _entropy(self.probabilities).mean().item()


def _adapted(plan: _Plan, layers: list[Found], method: Method, select: Select, metric: Metric | None) -> Adaptation:
    """Adapt the model and measure what that did."""
    model = plan.draft.model
    before = _judged(model, plan, metric)
    first, shift, mixing, classes, samples = "", math.inf, None, None, 0
    if layers:
        old = _statistics(layers)
        samples = _measure(model, plan, layers)
        new = _statistics(layers)
        first = layers[0].name
        shift = _divergence(old[first], new[first], plan.prior, samples)
        _write(layers, {**old, first: new[first]})
        classes = _classes(_judged(model, plan, None).probabilities, BALANCE)
        _write(layers, new)
        mixing = _mixing(model, plan, layers[0])
    if method == "entropy":
        classes = classes or _classes(before.probabilities, BALANCE)
        learned = _minimize_entropy(model, plan, select)
        for name in learned:
            plan.draft.change(name)
        if layers:
            _write(layers, old)
            _measure(model, plan, layers)
    for found in layers:
        plan.draft.change(found.name)
    after = _judged(model, plan, metric)
    held = 0 if after.probabilities is None else len(after.probabilities)
    if method == "entropy":  # the easiest way to a low entropy is one class for everything
        classes = min(filter(None, (classes, _classes(after.probabilities, BALANCE))), default=None)
    spread = _classes(after.probabilities, SPREAD)
    result = Adaptation(first, (shift, SHIFT), mixing, classes, spread, None, None, (samples, held))
    if before.entropy is not None and after.entropy is not None:
        result = replace(result, entropy=(before.entropy, after.entropy))
    if before.metric is not None and after.metric is not None:
        gain = after.metric - before.metric
        error = gain.std().item() / math.sqrt(len(gain)) if len(gain) > 1 else math.inf
        result = replace(result, metric=(before.metric.mean().item(), after.metric.mean().item(), error))
    return result


def judge(measured: Adaptation) -> None:
    """Refuse what cannot be shown to help.

    Raises:
        ProofError: The metric falls, or there is no shift, or the classes are unbalanced.
        ArgumentError: Nothing is known of the classes.
    """
    refused = "guard=False adapts in any case; metric= lets labels decide"
    if measured.metric is not None:
        before, after, _ = measured.metric
        if after < before:
            raise ProofError(f"adaptation would lower the metric from {before:.4g} to {after:.4g}", cure=refused)
        return
    shift, least = measured.shift
    if shift < least:
        raise ProofError(
            f"the first normalizer sees no shift (divergence {shift:.3f} < {least:g}): what differs behind it is the "
            "mix of classes, and adapting to that would do harm",
            cure=refused,
        )
    if measured.mixing is not None and measured.mixing[0] > measured.mixing[1]:
        raise ProofError(
            "the first normalizer's statistics differ between the predicted classes (divergence {:.3f} > {:g}): a "
            "shift cannot be told from a mix of classes".format(*measured.mixing),
            cure=refused,
        )
    if measured.classes is None or measured.spread is None:
        raise ArgumentError("the output is no class scores, by which the guard could judge", cure=refused)
    alone = f"select={measured.first!r} with guard=False adapts the first normalizer alone, which loses less often; "
    cure = f"let the loader mix its classes; {alone if measured.first else ''}{refused}"
    found, wanted = measured.classes
    if found < wanted:
        raise ProofError(
            f"predictions on the part held out fall into {found:.1f} classes, fewer than {wanted:.1f}: adapting to "
            "such a mix of classes would do harm",
            cure=cure,
        )
    spread, wanted = measured.spread
    if GROWTH * found < spread < wanted:
        raise ProofError(
            f"adapting the later layers spreads the predictions from {found:.1f} over {spread:.1f} classes, fewer than "
            f"{wanted:.1f}: that is what it does to a mix of few classes, and does harm",
            cure=cure,
        )


def _report(draft: Draft, measured: Adaptation) -> None:
    draft.details["adaptation"] = measured
    adapted, held = measured.samples
    if adapted:
        draft.notes.append(f"adapted to {adapted} samples, first normalizer's divergence {measured.shift[0]:.2g}")
    if measured.entropy is not None:
        draft.notes.append(
            "entropy of the predictions {:.3f} before, {:.3f} after, on {} samples held out".format(
                *measured.entropy, held
            )
        )
    if measured.metric is not None:
        before, after, error = measured.metric
        draft.notes.append(f"metric {before:.4g} before, {after:.4g} after, ± {error:.2g}, on the part held out")


# --- statistics ---------------------------------------------------------------------------------------------------


def _in_order(draft: Draft, layers: list[Found], batch: Any, forward: Forward | None) -> list[Found]:
    """Those that a batch reaches, in the order in which it does."""
    rank: dict[int, int] = {}
    for call in trace(draft.model, batch, forward) if layers else ():
        rank.setdefault(id(call.module), len(rank))
    for found in layers:
        if id(found.module) not in rank:
            draft.skip(found.name, "never reached by these batches; it keeps its statistics")
    return sorted((f for f in layers if id(f.module) in rank), key=lambda f: rank[id(f.module)])


def _statistics(layers: Sequence[Found]) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        found.name: tuple(found.module.get_buffer(name).clone() for name in ("running_mean", "running_var"))  # type: ignore[misc]
        for found in layers
    }


def _write(layers: Sequence[Found], statistics: dict[str, tuple[Tensor, Tensor]]) -> None:
    for found in layers:
        for name, value in zip(("running_mean", "running_var"), statistics[found.name], strict=True):
            found.module.get_buffer(name).copy_(value)


def _measure(model: Module, plan: _Plan, layers: Sequence[Found]) -> int:
    """Let every layer's buffers follow the data, batch by batch; returns the number of samples."""
    meters = [_Follower(found, plan.prior) for found in layers]
    handles = [m.found.module.register_forward_pre_hook(m.see, with_kwargs=True) for m in meters]
    try:
        with evaluating(model):
            for k, batch in enumerate(plan.given):
                try:
                    feed(model, batch, plan.forward)
                except OneValueError:
                    raise DataError(
                        f"batch {k + 1} has one value per channel, which has no variance", cure="use larger batches"
                    ) from None
                for meter in meters:
                    meter.commit(k + 1)
    finally:
        for handle in handles:
            handle.remove()
    return meters[0].samples


class _Follower(Meter):
    """A meter that writes the mixture of training's statistics and the data's before the layer normalizes by it."""

    def __init__(self, found: Found, prior: float) -> None:
        super().__init__(found)
        self.prior = prior
        self.samples = 0
        ((_, self.source),) = _statistics([found]).items()

    def see(self, module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The forward pre-hook."""
        super().see(module, args, kwargs)
        x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        self.samples += len(x)
        self.mix(self.prior / (self.prior + self.samples), self.source)


def _divergence(old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], prior: float, samples: int) -> float:
    """Between the statistics of training and the data's own, which are in the mixture."""
    share = samples / (prior + samples)
    (m, v), (m_t, v_t) = ((t.double() for t in pair) for pair in (old, new))
    return _apart(m, v, m + (m_t - m) / share, v + (v_t - v) / share)


def _apart(mean: Tensor, var: Tensor, other_mean: Tensor, other_var: Tensor) -> float:
    """½(KL + KL) of two normal distributions per channel, median over the channels."""
    v, w = var.clamp(min=1e-12), other_var.clamp(min=1e-12)
    each = (v / w + w / v - 2) / 4 + (other_mean - mean).square() * (1 / v + 1 / w) / 4
    return each.median().item()


def _mixing(model: Module, plan: _Plan, first: Found) -> tuple[float, float] | None:
    """How far the first normalizer's statistics of each predicted class are from those of all samples."""
    if first.kind != "BatchNorm":
        return None
    means, squares, predicted = [], [], []

    def note(_: Module, args: tuple[Any, ...]) -> None:
        mean, var = moments(args[0].detach().double(), "n c [...]")[:2]
        means.append(mean)
        squares.append(var + mean.square())

    handle = first.module.register_forward_pre_hook(note)
    try:
        with evaluating(model):
            for batch in plan.given:
                predicted.append(_probabilities(feed(model, batch, plan.forward)))
    finally:
        handle.remove()
    if any(p is None for p in predicted) or sum(map(len, means)) != sum(len(p) for p in predicted if p is not None):
        return None  # the layer sees other samples than the output is for
    mean, square = torch.cat(means), torch.cat(squares)
    labels = torch.cat([p.argmax(1) for p in predicted if p is not None])
    total, apart = 0, 0.0
    for label in range(int(labels.max()) + 1):
        own = labels == label
        # The variance of a few samples is far from any other by chance.
        if int(own.sum()) >= FEW:
            groups = [
                (t.mean(0), q.mean(0) - t.mean(0).square()) for t, q in ((mean, square), (mean[own], square[own]))
            ]
            apart += int(own.sum()) * _apart(*groups[0], *groups[1])
            total += int(own.sum())
    return None if total == 0 else (apart / total, SHIFT)


# --- entropy ------------------------------------------------------------------------------------------------------


def _minimize_entropy(model: Module, plan: _Plan, select: Select) -> list[str]:
    """One step of Adam per batch on γ and β; gradients and flags of the model end as they began."""
    parameters = {
        id(p): (found.name, p)
        for found in find(model, select)
        for name, p in found.module.named_parameters(recurse=False)
        if name in ("weight", "bias") and p.is_floating_point()
    }
    if not parameters:
        raise ArgumentError("no normalizer of this model has γ or β", cure='method="statistics" adapts running ones')
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    wanted = [p for _, p in parameters.values()]
    optimizer = torch.optim.Adam(wanted, RATE)
    try:
        with evaluating(model):
            for p in model.parameters():
                p.requires_grad_(id(p) in parameters)
                p.grad = None
            for batch in plan.given:
                with torch.enable_grad():
                    probabilities = _probabilities(feed(model, batch, plan.forward))
                    if probabilities is None:
                        raise ArgumentError(
                            "the output is no class scores, whose entropy could be lowered",
                            cure="pass forward=lambda model, batch: … that returns scores (N, classes)",
                        )
                    gradients = torch.autograd.grad(_entropy(probabilities).mean(), wanted, allow_unused=True)
                for p, gradient in zip(wanted, gradients, strict=True):
                    p.grad = gradient
                optimizer.step()
    finally:
        for p, flag, grad in flags:
            p.requires_grad_(flag)
            p.grad = grad
    return list(dict.fromkeys(name for name, _ in parameters.values()))


# --- judging ------------------------------------------------------------------------------------------------------


def _judged(model: Module, plan: _Plan, metric: Metric | None) -> _Judged:
    probabilities, values = [], []
    with evaluating(model):
        for batch in plan.held:
            output = feed(model, batch, plan.forward)
            probabilities.append(_probabilities(output))
            if metric is not None:
                values.append(torch.as_tensor(metric(output, batch)).double().reshape(-1))
    known = [p for p in probabilities if p is not None]
    return _Judged(
        torch.cat(known) if len(known) == len(probabilities) else None, torch.cat(values) if values else None
    )


def _probabilities(output: Any) -> Tensor | None:
    """(N, classes), or None where the output is none."""
    scores = output if isinstance(output, Tensor) and output.dim() == 2 and output.shape[1] > 1 else None
    return None if scores is None else scores.softmax(1)


def _entropy(probabilities: Tensor) -> Tensor:
    return -(probabilities * probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).log()).sum(1)


def _classes(probabilities: Tensor | None, share: float) -> tuple[float, float] | None:
    """The effective number of predicted classes, exp of the entropy, and the given share of what balanced ones give."""
    if probabilities is None:
        return None
    n, classes = probabilities.shape
    counts = torch.bincount(probabilities.argmax(1), minlength=classes)
    # n draws from balanced classes do not hit all of them: what they do give is drawn, always the same.
    random = torch.Generator().manual_seed(0)
    drawn = torch.bincount(torch.randint(classes, (n,), generator=random), minlength=classes)
    found, balanced = (float(_entropy((c / n)[None].double()).exp()) for c in (counts, drawn.to(counts.device)))
    return found, share * balanced

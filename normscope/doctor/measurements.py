"""What the passes measured: plain numbers, from which the rules judge without seeing a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from normscope.doctor.cache import LoaderFacts
from normscope.records import Interval

__all__ = [
    "Array",
    "Change",
    "Costs",
    "Dependence",
    "Drift",
    "Effect",
    "FunctionalCall",
    "Layer",
    "Leak",
    "Measurements",
    "Moments",
    "Mutation",
    "Optimized",
    "Outcome",
    "Padding",
    "Reference",
    "Rescaled",
    "RoundTrip",
    "Site",
    "Steps",
]

Array = NDArray[np.float64]
Grade = Literal["E", "W", "I"]


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A normalizer before anything ran (pass P0).

    Attributes:
        name: Its path.
        kind: Its family; see `normscope.surgery.find`.
        training: Its mode, as the model was handed over.
        running: Whether it normalizes by running statistics in evaluation.
        tracks: Its flag track_running_stats; None where its class has none.
        held: Kept in evaluation mode for good, by `freeze` or by a class without momentum.
        momentum: Weight of the newest batch; None for the cumulative mean.
        seen: num_batches_tracked; None where nothing counts.
        mean: Running mean, flattened.
        learns: Whether a parameter of its own requires a gradient; None without parameters.
        keeps_mode: Whether it stays as it is when the model is told to train.
        fed_frozen: Whether nothing before it learns; None where that was not measured.
        script: Compiled by TorchScript, so that nothing can watch it.
        dtype: Of its running statistics, e.g. "float32"; "" without any.
    """

    name: str
    kind: str
    cls: str = ""
    training: bool = False
    running: bool = True
    tracks: bool | None = True
    held: bool = False
    momentum: float | None = 0.1
    eps: float = 1e-5
    seen: int | None = None
    mean: Array | None = None
    var: Array | None = None
    weight: Array | None = None
    bias: Array | None = None
    learns: bool | None = True
    keeps_mode: bool = False
    fed_frozen: bool | None = None
    script: bool = False
    dtype: str = ""


@dataclass(frozen=True, slots=True)
class Site:
    """One call of a normalizer in the traced forward.

    Attributes:
        layer: The normalizer.
        index: How often it had been called before.
        shape: Of its input.
        values: Values that share one statistic in training.
        dtype: Of its input.
        axis: Where the module that made the input put its features; None where that is not known.
        after: The normalizer whose output this is, but for its shape and dropout.
        dropout: Whether dropout lies between the last normalizer and this one.
        finite: Whether a constant input of this shape and dtype gives finite numbers; None where that was not tried.
    """

    layer: str
    index: int
    shape: tuple[int, ...]
    values: float
    dtype: str = "float32"
    axis: int | None = None
    after: str = ""
    dropout: bool = False
    finite: bool | None = None


@dataclass(frozen=True, slots=True)
class FunctionalCall:
    """A normalization called as a function, outside of any normalizer.

    Attributes:
        function: "batch_norm", "layer_norm", …
        where: The module whose forward called it.
        batch: Whether it used batch statistics in evaluation.
        bypassed: The normalizer whose buffers it used, unseen by hooks; None where it is no normalizer's.
    """

    function: str
    where: str
    batch: bool
    bypassed: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """The input of a normalizer over the batches of one pass.

    Attributes:
        sizes: (k,) values per channel in each batch.
        means: (k, c).
        vars: (k, c), biased; for InstanceNorm the mean of the instances' variances.
        samples: (n, c') means of every sample, of evenly chosen channels; None where they were not kept.
        groups: (n,) the batch of every sample.
        infinite: Channels of samples that held NaN or infinity.
        low: (c,) smallest value; None where it was not kept.
        high: (c,) largest value.
        dtype: Of the input.
        sites: By call of a normalizer that is called several times, the moments of that call.
        dominated: Largest share of the channels of a batch in which one and the same sample has most of the variance.
        culprit: That sample, as "batch 3, sample 7".
    """

    sizes: Array
    means: Array
    vars: Array
    samples: Array | None = None
    groups: NDArray[np.int64] | None = None
    infinite: int = 0
    low: Array | None = None
    high: Array | None = None
    dtype: str = "float32"
    sites: tuple[Moments, ...] = ()
    dominated: float = 0.0
    culprit: str = ""

    @property
    def mean(self) -> Array:
        """The mean of all values, by channel."""
        return np.asarray(self.sizes @ self.means / self.sizes.sum())

    @property
    def var(self) -> Array:
        """The variance of all values, by channel: within the batches and between them."""
        between = (self.means - self.mean) ** 2
        return np.asarray(self.sizes @ (self.vars + between) / self.sizes.sum())

    @property
    def mean_of_vars(self) -> Array:
        """The mean of the batches' unbiased variances: where an exponential average ends up."""
        return np.asarray((self.vars * (self.sizes / np.maximum(self.sizes - 1, 1))[:, None]).mean(axis=0))


@dataclass(frozen=True, slots=True, eq=False)
class Drift:
    """Running statistics against the data's.

    Attributes:
        delta: (running mean − data mean)/σ by channel.
        rho: ln(running variance/data variance) by channel.
        share: Share of channels beyond the thresholds.
        p: How often resampled healthy averages drift as much.
        beyond: Whether that is beyond chance, all layers considered.
    """

    delta: Array
    rho: Array
    share: float
    p: float = 1.0
    beyond: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """The scores of the model in one state, one number per sample (or per batch where that is all there is)."""

    loss: Array | None = None
    metric: Array | None = None
    samples: int = 0
    infinite: float = 0.0


@dataclass(frozen=True, slots=True)
class Effect:
    """What one state loses against another on the same samples.

    Attributes:
        cost: In the metric, or in the loss where there is no metric; positive is worse.
        loss: In the loss.
        grade: "E" and "W" by size with an interval that excludes 0, "I" for less; None where nothing was measured.
        errors: The cost in units of what is worth an error; 0 where its interval includes 0.
    """

    cost: Interval | None = None
    loss: Interval | None = None
    grade: Grade | None = None
    errors: float = 0.0

    @property
    def harmful(self) -> bool:
        """Whether a loss worth a warning was measured."""
        return self.grade in ("E", "W")


@dataclass(frozen=True, slots=True)
class Dependence:
    """How the answer about a sample changes with its batch.

    Attributes:
        path: "predict" or "evaluation mode".
        change: Largest relative change with other samples around it.
        noise: Relative change when nothing changes.
        half: Whether the output is in half precision.
        flips: Share of samples whose argmax changed; None where there is none.
        alone: The error on a sample alone, "" without one.
        layers: Normalizers that used batch statistics.
        problem: Why nothing was measured.
    """

    path: str
    change: float = 0.0
    noise: float = 0.0
    half: bool = False
    flips: float | None = None
    alone: str = ""
    layers: tuple[str, ...] = ()
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Mutation:
    """What the user's evaluation changed in the model."""

    buffers: tuple[str, ...] = ()
    modes: int = 0
    problem: str = ""


@dataclass(frozen=True, slots=True)
class RoundTrip:
    """The model after the user's save and load.

    Attributes:
        changed: Normalizers whose statistics came back otherwise, or not at all.
        difference: Relative difference of the outputs in evaluation mode; None where they cannot be compared.
        problem: Why nothing was compared.
    """

    changed: tuple[str, ...] = ()
    difference: float | None = None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Steps:
    """Training steps on a copy.

    Attributes:
        count: How many.
        moved: By layer, how far its running statistics moved: median over channels of |Δμ|/σ.
        trained: Layers that were in training mode inside a step.
        updates: By layer, updates of its statistics per step.
        problem: Why there are none.
        called: Layers that were called in a step.
        learning: Those that were called with gradients.
        apart: Those that were in training mode and only called without.
        forwards: Forwards of the whole model per step.
        backwards: Backwards that reached a parameter per step.
        optimizer: Steps of the optimizer in all; None where none was passed.
    """

    count: int = 0
    moved: Mapping[str, float] = field(default_factory=dict)
    trained: tuple[str, ...] = ()
    updates: Mapping[str, float] = field(default_factory=dict)
    problem: str = ""
    called: tuple[str, ...] = ()
    learning: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    forwards: float = 0.0
    backwards: float = 0.0
    optimizer: int | None = None

    @property
    def accumulated(self) -> float:
        """Forwards per step of the optimizer; 1 where that is not known."""
        return self.forwards * self.count / self.optimizer if self.optimizer and self.forwards else 1.0


@dataclass(frozen=True, slots=True)
class Optimized:
    """What the optimizer does with γ and β.

    Attributes:
        decayed: Normalizers of which a parameter is decayed.
        missing: Those of which a parameter requires a gradient and lies in no group.
        decay: The largest weight decay among the former.
    """

    decayed: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    decay: float = 0.0


@dataclass(frozen=True, slots=True)
class Padding:
    """Positions that only fill up a batch.

    Attributes:
        share: Of all positions.
        known: How they were recognized: "mask" or "tail".
        changes: By normalizer, how much its output at the other positions changes without them, relative.
        effect: What the model loses on samples in a batch against the same samples alone, cut to their length.
    """

    share: float = 0.0
    known: str = ""
    changes: Mapping[str, float] = field(default_factory=dict)
    effect: Effect = Effect()


@dataclass(frozen=True, slots=True)
class Rescaled:
    """The input map under which the first normalizer sees what its statistics describe.

    Attributes:
        name: Such as "× 255".
        ratio: Median over channels of running over data variance, without the map.
        effect: What the model loses against itself with the map.
    """

    name: str
    ratio: float
    effect: Effect


@dataclass(frozen=True, slots=True)
class Costs:
    """What normalizers cost in a training step.

    Attributes:
        step: Milliseconds, the median.
        saved: Milliseconds less with identity statistics in their place; None where it was not measured.
        spread: Interquartile range of the step, relative: on a busy machine nothing can be said.
        held: By normalizer, bytes kept for its backward pass and for nothing before it.
        layers: Those that were replaced.
        problem: Why nothing was timed.
        moved: By normalizer whose output lies in memory otherwise than its input, the copies there and back in
            milliseconds.
        synced: Milliseconds of a step that synchronized normalizers take more than others; None where there is none.
        inference: Milliseconds of a forward in evaluation mode.
        folded: Normalizers that `fold` puts into the layers beside them.
        folding: Milliseconds of a forward that this saves; None where nothing was timed.
        fold_problem: Why that was not timed.
    """

    step: float = 0.0
    saved: Interval | None = None
    spread: float = 0.0
    held: Mapping[str, int] = field(default_factory=dict)
    layers: tuple[str, ...] = ()
    problem: str = ""
    moved: Mapping[str, float] = field(default_factory=dict)
    synced: Interval | None = None
    inference: float = 0.0
    folded: tuple[str, ...] = ()
    folding: Interval | None = None
    fold_problem: str = ""


@dataclass(frozen=True, slots=True)
class Leak:
    """What two embeddings of a sample tell about the batch that it was normalized in.

    Attributes:
        samples: How many were embedded.
        betrayed: Of the embeddings, how many have their nearest stranger in their own batch.
        chance: How many would.
        gain: Points of retrieval that a sample gains when both of its embeddings come from one batch.
        layers: Normalizers that used batch statistics.
        problem: Why nothing was measured.
    """

    samples: int = 0
    betrayed: float = 0.0
    chance: float = 0.0
    gain: Interval | None = None
    layers: tuple[str, ...] = ()
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Change:
    """An attribute of a normalizer that is another in the reference.

    Attributes:
        layer: Its name.
        attribute: "eps", "momentum", "class", "training".
        here: In the checked model.
        there: In the reference.
        scale: Median over channels of the relative change of the output that ε makes; 0 for others.
    """

    layer: str
    attribute: str
    here: str
    there: str
    scale: float = 0.0


@dataclass(frozen=True, slots=True)
class Reference:
    """The other model that was passed.

    Attributes:
        follows: Correlation of the parameters.
        same_weights: Whether these are equal bit for bit.
        matched: Normalizers found in both.
        equal: Those whose buffers are equal bit for bit.
        initial: Those whose buffers are initial in the checked model and not in the reference.
        initial_there: The other way round.
        older: Those whose buffers have seen fewer batches here.
        older_there: The other way round.
        copied: What the checked model loses against itself with the reference's buffers.
        theirs: What the reference loses against itself with the checked model's buffers.
        problem: Why they cannot be compared.
        difference: Relative difference of the outputs in evaluation mode; None where they cannot be compared.
        half: Whether one of the outputs is in half precision.
        changes: Attributes of normalizers that differ.
        gone: Normalizers of the reference that the model does not have.
        folded: Whether the layers before them are in both models, so that they may have been folded into these.
    """

    follows: float = 0.0
    same_weights: bool = False
    matched: tuple[str, ...] = ()
    equal: tuple[str, ...] = ()
    initial: tuple[str, ...] = ()
    initial_there: tuple[str, ...] = ()
    older: tuple[str, ...] = ()
    older_there: tuple[str, ...] = ()
    copied: Effect = Effect()
    theirs: Effect = Effect()
    problem: str = ""
    difference: float | None = None
    half: bool = False
    changes: tuple[Change, ...] = ()
    gone: tuple[str, ...] = ()
    folded: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Measurements:
    """Everything that the rules may look at.

    Attributes:
        training: Whether the model was handed over in training mode.
        learns: Whether any parameter requires a gradient.
        average: The class of a weight average that leaves buffers out, e.g. "AveragedModel(use_buffers=False)".
        layers: All normalizers.
        infinite_weights: Parameters that hold NaN or infinity.
        sites: The calls in one forward.
        unreached: Normalizers that no cached batch reached.
        seen: Inputs in evaluation mode.
        own: Inputs with every normalizer on batch statistics, so that a layer answers for itself only.
        drift: Running statistics against `own`.
        design: By layer, (design effect, p-value).
        outcomes: Scores by state.
        recalibrated: What the model loses against itself with statistics of split A.
        batch: The same against itself on batch statistics.
        small: What batch statistics lose against recalibrated ones.
        predicted: What the user's own path loses against evaluation mode, or batches of two against whole ones.
        shares: By layer, the share of that loss that it carries; see `normscope.doctor.attribution`.
        batch_shares: By layer, the share of what batch statistics gain against running ones, or else lose in training.
        coalitions: By set of layers, the share of that loss that recalibrating them gives back.
        estimators: Largest relative difference of the two estimators' variances.
        chance: Accuracy of always answering the most frequent class.
        repeat: Relative difference of two evaluations of one batch.
        batch_problem: Why batch statistics could not be used.
        score_problem: Why nothing could be scored, "" if it could.
        batch_size: Samples in the largest batch.
        traced_size: Samples in the batch that was traced.
        batches: Batches in A, B and C.
        needed: Samples needed to see an effect of the stated size; None where it was not measured.
        declared: Intents and uses that were declared.
        rectified: Normalizers whose output goes straight into a ReLU.
        last: Normalizers whose output is the model's.
        fed: By normalizer, the linear layer or convolution whose output it gets, and what keeps that one's bias in use.
        biased: Linear layers and convolutions that have a bias.
        ranges: By normalizer, the largest over the median range of the channels of the layer before it, once folded.
        trials: Effects of small changes that only suspects get: "bessel", "eps", "sites".
        noise_of_average: What the score varies by with the end point of the running averages, one number per draw.
        rescaled: The input map that explains the first normalizer's statistics; None where there is none.
        padding: None where no positions only fill up.
        optimized: None without an optimizer.
        exported: Names of batch normalizations that an exported graph computes in training mode; None for other models.
        parallel: How the model is spread over devices: "", "DataParallel", "distributed".
        devices: Over how many.
        ranks: By normalizer, the largest distance of the ranks' running means in σ; None without ranks.
        rank_problem: Why ranks could not be compared.
        costs: None where no rule asked, or no budget was left for them.
        leak: None where no use was declared that compares samples.
        deployment: Drift against a second loader, if one was passed.
        shift: What the model loses there against itself with statistics of that loader.
        same_samples: Whether both loaders yield the same labels in the same order.
    """

    layers: tuple[Layer, ...] = ()
    training: bool = False
    learns: bool = True
    average: str = ""
    infinite_weights: tuple[str, ...] = ()
    sites: tuple[Site, ...] = ()
    functional: tuple[FunctionalCall, ...] = ()
    unreached: tuple[str, ...] = ()
    seen: Mapping[str, Moments] = field(default_factory=dict)
    own: Mapping[str, Moments] = field(default_factory=dict)
    drift: Mapping[str, Drift] = field(default_factory=dict)
    design: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    outcomes: Mapping[str, Outcome] = field(default_factory=dict)
    recalibrated: Effect = Effect()
    batch: Effect = Effect()
    small: Effect = Effect()
    predicted: Effect = Effect()
    shares: Mapping[str, float] = field(default_factory=dict)
    batch_shares: Mapping[str, float] = field(default_factory=dict)
    coalitions: Mapping[frozenset[str], float] = field(default_factory=dict)
    estimators: float = 0.0
    best_estimator: str = "population"
    chance: float | None = None
    repeat: float | None = None
    dependence: Dependence | None = None
    mutation: Mutation | None = None
    roundtrip: RoundTrip | None = None
    steps: Steps | None = None
    reference: Reference | None = None
    loader: LoaderFacts = field(default_factory=LoaderFacts)
    batch_size: int = 0
    traced_size: int = 0
    batches: tuple[int, int, int] = (0, 0, 0)
    batch_problem: str = ""
    score_problem: str = ""
    needed: int | None = None
    declared: tuple[str, ...] = ()
    rectified: tuple[str, ...] = ()
    last: tuple[str, ...] = ()
    fed: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    biased: tuple[str, ...] = ()
    ranges: Mapping[str, float] = field(default_factory=dict)
    trials: Mapping[str, Effect] = field(default_factory=dict)
    noise_of_average: Array | None = None
    rescaled: Rescaled | None = None
    padding: Padding | None = None
    optimized: Optimized | None = None
    exported: tuple[str, ...] | None = None
    parallel: str = ""
    devices: int = 1
    ranks: Mapping[str, float] | None = None
    rank_problem: str = ""
    costs: Costs | None = None
    leak: Leak | None = None
    deployment: Mapping[str, Drift] = field(default_factory=dict)
    shift: Effect = Effect()
    same_samples: bool = False

    @property
    def trains(self) -> bool:
        """Whether normalizers use batch statistics in the user's training, as far as this can be known."""
        if self.steps is not None and not self.steps.problem:
            return bool(self.steps.trained)
        return any(layer.training and layer.kind == "BatchNorm" and not layer.held for layer in self.layers)

    @property
    def running(self) -> tuple[Layer, ...]:
        """The layers that hold running statistics."""
        return tuple(x for x in self.layers if x.running and x.mean is not None and x.var is not None)

    def layer(self, name: str) -> Layer:
        """A layer by name."""
        return next(layer for layer in self.layers if layer.name == name)

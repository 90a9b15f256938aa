"""Every threshold of the doctor, in one place, with the reason why it lies there."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from normscope.records import Threshold

__all__ = ["DEFAULTS", "Thresholds"]


def _because(default: float, reason: str) -> Any:
    return dataclasses.field(default=default, metadata={"reason": reason})


@dataclass(frozen=True, slots=True)
class Thresholds:
    """The numbers by which the rules judge, as they are; a check records those that it used.

    Example:
        >>> [(row.name, row.value) for row in Thresholds().table()[:2]]
        [('cost_error', 1.0), ('cost_warning', 0.3)]
    """

    cost_error: float = _because(1.0, "pp; reported troubles worth an error cost 1 to 66 pp, noise lies below 0.2 pp")
    cost_warning: float = _because(0.3, "pp; twice the 0.09–0.2 pp by which healthy evaluations were seen to differ")
    loss_error: float = _because(
        0.05, "share of the loss; without a metric: about what 1 pp of accuracy costs in nats near 95 %"
    )
    loss_warning: float = _because(0.015, "share of the loss; in the same proportion as 0.3 pp to 1 pp")
    level: float = _because(0.99, "of the bootstrap interval that has to exclude 0 (gate 3)")
    null_point: float = _because(0.001, "a statistic must lie beyond the 99.9 % point of its null (gate 1)")
    discovery_rate: float = _because(0.01, "share of false alarms allowed among the layers of a rule (gate 1)")
    drift_mean: float = _because(
        0.25, "σ; 2 to 6 times the jitter of a healthy average (0.041 at batch 32, 0.115 at 4)"
    )
    drift_var: float = _because(math.log(1.5), "|ln ratio|; 1.5 is 22 % of the output's scale")
    drift_share: float = _because(0.1, "share of channels beyond both before a layer counts as drifted (gate 2)")
    gap: float = _because(
        5.0,
        "times an error; then a loss is told though no layer stands out; batches of 16 cost healthy networks 3 to 4",
    )
    residual_warning: float = _because(0.01, "weight of the initial values; 44 batches reach it at momentum 0.1")
    residual_error: float = _because(0.1, "weight of the initial values; a tenth of the statistic was never data")
    momentum_high: float = _because(0.5, "0.001–0.1 is torch's practice, 0.9–0.999 are the numbers of other libraries")
    jitter: float = _because(0.1, "σ; momentum 0.1 with about 5 samples per batch, or 0.9 with 96")
    dependence: float = _because(1e-3, "relative change of an output with its batch; kernels alone stay near 1e-6")
    dependence_half: float = _because(1e-2, "the same for half precision, which keeps three digits")
    dependence_noise: float = _because(10.0, "times the model's own repeat noise")
    values_error: float = _because(2.0, "values per statistic; with 2 only their order survives, with 1 torch raises")
    values_warning: float = _because(4.0, "values per statistic; noise of 40 % of the output's energy")
    noise_warning: float = _because(0.05, "energy of the noise; about 30 effective values per statistic")
    noise_error: float = _because(0.2, "energy of the noise; about 8 effective values per statistic")
    design_warning: float = _because(1.3, "design effect; shuffled loaders stay within 0.89–1.11")
    design_error: float = _because(2.0, "design effect; the effective batch is halved")
    design_p: float = _because(0.005, "of regrouping the same samples at random")
    bessel_values: float = _because(10.0, "values per statistic; n/(n − 1) is then 11 % of the variance or more")
    population_share: float = _because(
        0.2, "of the variance lies between calls; pooled it grows by a quarter and each call is 0.45 σ off"
    )
    population_ratio: float = _because(
        2.0, "largest over smallest variance of the calls; 1.4 in scale, twice the drift's"
    )
    padding: float = _because(0.01, "relative change of an output by padding; rounding stays below 1e-5")
    dominated: float = _because(
        0.5, "of a batch's channels with most of their variance from one sample; heavy tails hit each another"
    )
    last_shift: float = _because(
        0.05, "σ by which an incomplete last batch moves an average; 4 samples at momentum 0.1"
    )
    dead_share: float = _because(0.05, "of a layer's channels; below this no pruning pays")
    dead_warning: float = _because(
        0.2, "of a layer's channels put out nothing but 0 for any sample; healthy ones lose few"
    )
    constant_times: float = _because(100.0, "data variance over running variance in a channel held for constant")
    dropout_ratio: float = _because(
        1.25, "running over evaluation variance; dropout 0.5 after a ReLU makes it 2.5, 0.05 makes it 1.1"
    )
    eps_times: float = _because(10.0, "ε; below, the scale changes by 5 % or more with ε")
    eps_share: float = _because(0.05, "of a layer's channels with so small a variance")
    gamma_zero: float = _because(1e-3, "of the largest |γ|; below, a channel is switched off")
    overflow: float = _because(16384.0, "largest input in float16, two bits below its end at 65504")
    cancellation_float32: float = _because(1e3, "|mean|/σ; rounding of the input then reaches 1e-4 σ and more")
    cancellation_float16: float = _because(200.0, "|mean|/σ; rounding of the input reaches 0.1 σ")
    cancellation_bfloat16: float = _because(25.0, "|mean|/σ; rounding of the input reaches 0.1 σ")
    span: float = _because(1e6, "largest over smallest variance of a layer; usually an input that was not scaled")
    span_variance: float = _because(1e5, "running variance; the same in absolute terms")
    half_stall: float = _because(65504.0, "a running variance in float16 ends here and is infinite beyond")
    rank_spread: float = _because(0.1, "σ between ranks; twice the jitter of a healthy average")
    conversion: float = _because(1e-4, "relative change of the output by a conversion that claims to keep it")
    eps_scale: float = _because(0.01, "relative change of the output's scale by another ε, median over channels")
    fold_range: float = _because(30.0, "largest over median range; of 8 bits the median channel keeps 3")
    cost_share: float = _because(0.03, "of a training step; less is not worth an edit")
    cost_noise: float = _because(0.2, "interquartile range of a step; a busy machine times nothing")
    leak_errors: float = _because(5.0, "standard errors above chance at which embeddings lie next to their batch mates")
    leak_times: float = _because(2.0, "times chance; less gives no answer away")
    follows: float = _because(0.99, "correlation of the parameters at which one model follows another")
    random_output: float = _because(1e-3, "relative difference of two evaluations; atomics and threads stay near 1e-6")
    explained: float = _because(0.9, "share of the gap at which the search for layers stops")
    power_effect: float = _because(1.0, "pp that the check should be able to see")

    def table(self) -> tuple[Threshold, ...]:
        """The thresholds as records."""
        return tuple(Threshold(f.name, getattr(self, f.name), f.metadata["reason"]) for f in dataclasses.fields(self))


DEFAULTS = Thresholds()

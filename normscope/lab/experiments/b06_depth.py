"""B06: depth: vanishing, exploding, activation scale."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from normscope.lab.catalogue import register
from normscope.lab.experiment import Experiment, Numbers, ProfileName, Results, Task
from normscope.lab.networks import Perceptrons
from normscope.lab.samples import available, samples
from normscope.lab.sketch import dashes, line, points
from normscope.lab.training import train
from normscope.lab.verdicts import by_effect, interval, ruled
from normscope.records import Judgement, LabVerdict, Picture, Plot, Series
from normscope.statistics import MINIMUM_SEEDS, paired_effect, slope

__all__ = ["EXPERIMENT", "Depth"]

UNITS = ("sigmoid", "tanh", "relu")
LABELS = {"sigmoid": "sigmoid", "tanh": "tanh", "relu": "ReLU"}
NORMS = ("BN", "none", "LN")
LAYERS = 30
WIDTH: Mapping[ProfileName, int] = {"quick": 64, "cpu": 256, "full": 384}
BATCH: Mapping[ProfileName, int] = {"quick": 64, "cpu": 128, "full": 128}
DEPTHS: Mapping[ProfileName, tuple[int, ...]] = {
    "quick": (2, 20),
    "cpu": (2, 8, 16, 32, 64),
    "full": (2, 8, 16, 32, 50, 64, 100, 200),
}
STEPS: Mapping[ProfileName, int] = {"quick": 20, "cpu": 500, "full": 8300}
RATES: Mapping[ProfileName, tuple[float, ...]] = {
    "quick": (0.01,),
    "cpu": (0.001, 0.01, 0.1),
    "full": (0.0001, 0.001, 0.01, 0.1),
}
TOLD = {"CONFIRMED": "yes", "REFUTED": "no", "UNDECIDED": "undecided"}
# ½·ln(π/(π − 1)): growth of the gradient's norm per layer of ReLU and BatchNorm as the batch grows.
YANG = 0.5 * math.log(math.pi / (math.pi - 1))


class Depth(Experiment):
    """Deep perceptrons at their start, and after training."""

    registration = register(
        "B06",
        statement="Batch Normalization keeps gradients from vanishing and from exploding in deep networks.",
        source="Ioffe & Szegedy 2015, §3.3; against: Yang et al. 2019",
        confirms="vanishing: ln‖∂L/∂h‖ of sigmoids falls by 0.5 per layer or more without it, and by less than "
        "0.1 with it. Exploding: with it "
        "the slope of ReLU networks stays within 0.1 of 0",
        refutes="exploding: the slope of ReLU networks with it holds 0.1916, half the logarithm of π/(π − 1), "
        "and excludes 0",
        thresholds={
            "vanishing": 0.5,
            "flat": 0.1,
            "theory": YANG,
            "theory within": 0.02,
            "accuracy of a trained network": 0.5,
        },
        design="At the start: 30 layers, Gaussian input and random upstream gradient, weights 1/√n (√2/√n for "
        "ReLU), the slope of ln‖∂L/∂h_l‖ "
        "towards the input over layers 6 to 24, the deviation of what layers receive, the growth of a change of "
        "1 %; none, "
        "BatchNorm, LayerNorm; sigmoid, tanh, ReLU. Then training on MNIST of 14 × 14, SGD, batch 64, ReLU and "
        "sigmoid, depth 2 to 64, best of three "
        "rates on validation data.",
        cuts=("depth 200 and 100", "depth 50", "8300 steps down to 500", "training with LayerNorm"),
    )
    seeds: Mapping[ProfileName, int] = {"quick": 6, "cpu": 10, "full": 10}

    def tasks(self, profile: ProfileName, seeds: Sequence[int], results: Results) -> list[Task]:
        """The start of every arm, and training by depth."""
        starts = [
            Task(
                self.name,
                (
                    ("stage", "start"),
                    ("norm", norm),
                    ("activation", unit),
                    ("width", WIDTH[profile]),
                    ("batch", BATCH[profile]),
                ),
                tuple(seeds),
                cost=50,
            )
            for unit in UNITS
            for norm in NORMS
        ]
        name = available("mnist") if profile != "quick" else "digits"
        few = tuple(seeds)[:MINIMUM_SEEDS]
        trained = [
            Task(
                self.name,
                (
                    ("stage", "train"),
                    ("data", name),
                    ("norm", norm),
                    ("activation", unit),
                    ("depth", depth),
                    ("steps", STEPS[profile]),
                    ("rate", rate),
                ),
                few,
                cost=depth * STEPS[profile],
            )
            for unit in ("sigmoid", "relu")
            for norm in ("none", "BN")
            for depth in DEPTHS[profile]
            for rate in RATES[profile]
        ]
        return starts + trained

    def measure(self, task: Task) -> Numbers:
        """Slopes at the start, or accuracies after training."""
        return _start(task) if task.text("stage") == "start" else _train(task)

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """Vanishing, exploding, scale, amplification."""
        width = results.where(stage="start")[0].task["width"]
        valid = f"{LAYERS} layers of {width} units at their start"
        slopes = {
            (unit, norm): results.per_seed("slope", stage="start", activation=unit, norm=norm)
            for unit in UNITS
            for norm in NORMS
        }
        plain, normed = paired_effect(slopes["sigmoid", "none"]), paired_effect(slopes["sigmoid", "BN"])
        relu = paired_effect(slopes["relu", "BN"])
        flat = self.threshold("flat")
        enough = plain.n >= MINIMUM_SEEDS
        vanish: LabVerdict = "UNDECIDED"
        if enough and plain.high <= -self.threshold("vanishing") and -flat < normed.low and normed.high < flat:
            vanish = "CONFIRMED"
        elif enough and (plain.low > -flat or normed.high < -self.threshold("vanishing")):
            vanish = "REFUTED"
        theory = abs(relu.value - self.threshold("theory")) < self.threshold("theory within")
        explode: LabVerdict = "UNDECIDED"
        if enough and relu.low > 0:
            explode = "REFUTED" if theory or relu.low > flat else "UNDECIDED"
        elif enough and -flat < relu.low and relu.high < flat:
            explode = "CONFIRMED"
        both: LabVerdict = (
            "CONDITIONAL"
            if (vanish, explode) == ("CONFIRMED", "REFUTED")
            else vanish
            if vanish == explode
            else "UNDECIDED"
        )
        sigmoid = (
            f"ln‖∂L/∂h‖ of sigmoids changes by {plain.value:+.2f} per layer without and {normed.value:+.3f} with it"
        )
        rectified = (
            f"with ReLU by {statistics.mean(slopes['relu', 'none']):+.3f} without and {relu.value:+.3f} "
            f"({relu.low:+.3f} to {relu.high:+.3f}) with it, "
            f"theory {YANG:.3f}"
        )

        def scale(unit: str, norm: str) -> float:
            return statistics.mean(results.per_seed("scale", stage="start", activation=unit, norm=norm))

        sigma = paired_effect(
            *(results.per_seed("scale", stage="start", activation="sigmoid", norm=n) for n in ("none", "BN"))
        )
        return (
            ruled(
                ("001-12", "001-10"),
                "does it stop vanishing?",
                vanish,
                f"{sigmoid}.",
                f"sigmoid, {valid}",
                effect=interval(normed, "ln per layer"),
                seeds=normed.n,
                tests=2,
            ),
            ruled(
                ("003-12", "000-7", "002-2"),
                "does it stop vanishing and exploding?",
                both,
                f"{sigmoid}; {rectified}.",
                f"vanishing of sigmoids {TOLD[vanish]}, explosion of plain ReLU networks {TOLD[explode]}; {valid}",
                effect=interval(relu, "ln per layer, ReLU"),
                seeds=relu.n,
                tests=3,
            ),
            by_effect(
                ("000-3",),
                "are layers of one magnitude?",
                sigma,
                f"ln(largest/smallest deviation) over layers: sigmoid {scale('sigmoid', 'none'):.2f} without, "
                f"{scale('sigmoid', 'BN'):.2f} with it; ReLU {scale('relu', 'none'):.2f} and {scale('relu', 'BN'):.2f}",
                valid,
                unit="ln(largest/smallest), without − with",
            ),
            self._amplified(results, valid),
            self._trained(results),
        )

    def _amplified(self, results: Results, valid: str) -> Judgement:
        growth = {
            unit: paired_effect(results.per_seed("growth", stage="start", activation=unit, norm="none"))
            for unit in UNITS
        }
        signs = {unit: "+" if e.low > 0 else "−" if e.high < 0 else "0" for unit, e in growth.items()}
        verdict: LabVerdict = "UNDECIDED"
        if growth["relu"].n >= MINIMUM_SEEDS:
            verdict = (
                "CONFIRMED"
                if set(signs.values()) == {"+"}
                else "REFUTED"
                if "+" not in signs.values()
                else "CONDITIONAL"
            )
        listed = ", ".join(f"{unit} {e.value:+.3f}" for unit, e in growth.items())
        return ruled(
            ("001-8", "003-3"),
            "is a small change amplified with depth?",
            verdict,
            f"Logarithm of the growth per layer of a change of 1 % of the first layer's output, without it: {listed}.",
            f"depends on the activation and the initial scale; {valid}",
            effect=interval(growth["relu"], "ln per layer, ReLU"),
            seeds=growth["relu"].n,
            tests=3,
        )

    def _trained(self, results: Results) -> Judgement:
        depths = sorted({int(m.task["depth"]) for m in results.where(stage="train")})
        last = depths[-1]
        rows = {n: _best(results, "relu", n, last) for n in ("none", "BN")}
        cured = {n: _best(results, "sigmoid", n, depths[len(depths) // 2]) for n in ("none", "BN")}
        return by_effect(
            ("001-11",),
            "does ReLU without it train where sigmoid does not?",
            paired_effect(_best(results, "relu", "none", depths[len(depths) // 2]), cured["none"]),
            f"Depth {depths[len(depths) // 2]}, without it: ReLU "
            f"{statistics.mean(_best(results, 'relu', 'none', depths[len(depths) // 2])):.1%}, sigmoid "
            f"{statistics.mean(cured['none']):.1%}; with it sigmoid {statistics.mean(cured['BN']):.1%}. At "
            f"depth {last} ReLU reaches {statistics.mean(rows['none']):.1%} "
            f"without and {statistics.mean(rows['BN']):.1%} with it",
            f"after training, {results.where(stage='train')[0].task['steps']} steps",
            unit="of accuracy",
        )

    def figure(self, results: Results) -> Picture:
        """Gradient norm against the layer; accuracy against depth."""
        plots = []
        for unit in ("sigmoid", "relu"):
            series: list[Series] = []
            for k, norm in enumerate(NORMS):
                row = results.where(stage="start", activation=unit, norm=norm)[0].row("profile")
                series.append(
                    line(
                        {"none": "without", "BN": "BatchNorm", "LN": "LayerNorm"}[norm], range(1, len(row) + 1), row, k
                    )
                )
            if unit == "relu":
                x = (1, LAYERS)
                series.append(dashes("theory, BatchNorm", x, (YANG / math.log(10) * (LAYERS - 1), 0), 3))
            plots.append(
                Plot(f"gradient at the start, {LABELS[unit]}", "layer", "log₁₀ ‖∂L/∂h‖, last layer 0", tuple(series))
            )
        depths = sorted({int(m.task["depth"]) for m in results.where(stage="train")})
        after: list[Series] = []
        for i, unit in enumerate(("sigmoid", "relu")):
            for k, norm in enumerate(("BN", "none")):
                means = [statistics.mean(_best(results, unit, norm, depth)) for depth in depths]
                name = f"{LABELS[unit]}, {'with' if norm == 'BN' else 'without'}"
                after += [points(name, depths, means, 2 * i + k), line("", depths, means, 2 * i + k)]
        plots.append(Plot("after training", "layers", "test accuracy", tuple(after), x_log=True))
        return Picture(
            "Gradients at the start against the layer, of one seed, and mean test accuracy after training against the "
            "depth, at the best rate.",
            tuple(plots),
        )


def _start(task: Task) -> dict[str, list[float]]:
    width, seeds, unit = task.whole("width"), task.seeds, task.text("activation")
    network = Perceptrons((width,) * (LAYERS + 1) + (10,), seeds, norm=task.text("norm"), activation=unit)
    draws = [torch.Generator().manual_seed(1000 + seed) for seed in seeds]
    x, direction = (
        torch.stack([torch.randn(task.whole("batch"), width, generator=g) for g in draws]) for _ in range(2)
    )
    received = network.hidden(x.requires_grad_())
    upstream = torch.stack([torch.randn(received[-1].shape[1:], generator=g) for g in draws])
    norms = torch.stack([g.double().norm(dim=(1, 2)) for g in torch.autograd.grad(received[-1], received, upstream)])
    logs = norms.clamp(min=1e-300).log()  # (layers, seeds)
    part = slice(5, 24)
    # Towards the input, that is, with the layer falling.
    slopes = [-float(slope(range(part.start, part.stop), logs[part, k].numpy())) for k in range(len(seeds))]
    scale = torch.stack([h.detach().std((1, 2)) for h in received]).clamp(min=1e-12).log()
    return {
        "slope": slopes,
        "scale": (scale.amax(0) - scale.amin(0)).tolist(),
        "growth": _growth(network, x.detach(), direction),
        "profile": ((logs[:, 0] - logs[-1, 0]) / math.log(10)).tolist(),
    }


@torch.no_grad()
def _growth(network: Perceptrons, x: Tensor, direction: Tensor) -> list[float]:
    """Logarithm, per layer, of how a relative change of 1 % of the input grows."""
    changed = x + 0.01 * direction
    pairs = list(zip(network.hidden(x), network.hidden(changed), strict=True))
    relative = (
        torch.stack([(b - a).norm(dim=(1, 2)) / a.norm(dim=(1, 2)) for a, b in pairs]).clamp(min=1e-12).log().double()
    )
    return [float(slope(range(len(pairs)), relative[:, k].numpy())) for k in range(x.shape[0])]


def _train(task: Task) -> dict[str, list[float]]:
    data = samples(task.text("data"), "half", 10_000, 5_000).flat
    width = 100
    widths = (data.shape.numel(), *[width] * task.whole("depth"), data.classes)
    network = Perceptrons(widths, task.seeds, norm=task.text("norm"), activation=task.text("activation"))
    return train(network, data, task.seeds, steps=task.whole("steps"), batch=64, rate=task.number("rate"), probes=1)


def _best(results: Results, unit: str, norm: str, depth: int) -> tuple[float, ...]:
    """Test accuracies at the rate that is best on validation data."""
    found = results.where(stage="train", activation=unit, norm=norm, depth=depth)
    return max(found, key=lambda m: statistics.mean(m.row("valid"))).row("test")


EXPERIMENT = Depth()

"""B08: before or after the activation."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from normscope.lab.catalogue import register
from normscope.lab.experiment import Numbers, ProfileName, Results, Task
from normscope.lab.samples import available
from normscope.lab.sketch import points
from normscope.lab.training import Arm, Tuned, classify
from normscope.lab.verdicts import by_effect, interval, ruled
from normscope.records import Judgement, LabVerdict, Picture, Plot
from normscope.statistics import Decision, Effect, decide, holm, paired_effect

__all__ = ["EXPERIMENT", "Place"]

CASES: Mapping[ProfileName, tuple[tuple[str, str], ...]] = {
    "quick": (("mlp3", "relu"), ("cnn", "relu")),
    "cpu": (("mlp3", "relu"), ("mlp3", "tanh"), ("cnn", "relu"), ("cnn", "tanh"), ("resnet", "relu")),
    "full": (
        ("mlp3", "relu"),
        ("mlp3", "tanh"),
        ("cnn", "relu"),
        ("cnn", "tanh"),
        ("resnet", "relu"),
        ("resnet", "tanh"),
    ),
}
STEPS: Mapping[ProfileName, int] = {"quick": 40, "cpu": 500, "full": 5000}


class Place(Tuned):
    """The same number of normalizers before or after the activation."""

    registration = register(
        "B08",
        statement="Batch Normalization works better after the activation than before it.",
        source="a tutorial; Mishkin's benchmark: +2.1 points in CaffeNet, −1.1 in GoogLeNet",
        confirms="after − before in test accuracy lies above 0 pooled over networks, and in most of them",
        refutes="it lies below 0 pooled; signs that differ between networks, both decided: conditional",
        thresholds={"difference": 0},
        design="A perceptron of three layers, a network of four convolutions, the same with residuals; ReLU and "
        "tanh; the "
        "same number of layers at either place; SGD with momentum 0.9, batch 64, Fashion-MNIST averaged to 14 × "
        "14, 10 000 images; four "
        "rates tuned with 2 seeds for every combination; Holm within the networks.",
        cuts=("residual with tanh", "5000 steps down to 500", "10 seeds down to 8"),
    )
    seeds: Mapping[ProfileName, int] = {"quick": 2, "cpu": 8, "full": 10}
    rates: Mapping[ProfileName, tuple[float, ...]] = {
        "quick": (0.03,),
        "cpu": (0.01, 0.03, 0.1, 0.3),
        "full": (0.003, 0.01, 0.03, 0.1, 0.3),
    }
    together = 8

    def arms(self, profile: ProfileName) -> list[Arm]:
        """Both places in every network."""
        name = available("fashion-mnist") if profile != "quick" else "digits"
        return [
            {"data": name, "net": net, "norm": "BN", "activation": unit, "place": place, "steps": STEPS[profile]}
            for net, unit in CASES[profile]
            for place in ("before", "after")
        ]

    def baseline(self, arm: Arm) -> Arm:
        """Before the activation, as the paper has it."""
        return dict(arm) | {"place": "before"}

    def measure(self, task: Task) -> Numbers:
        """Train."""
        return classify(task, form="half", train_size=10_000, test_size=5_000, batch=64, momentum=0.9)

    def _differences(self, results: Results) -> dict[str, list[float]]:
        """After − before, per network and seed."""
        cases = dict.fromkeys((str(m.task["net"]), str(m.task["activation"])) for m in results)
        found = {}
        for net, unit in cases:
            after, before = (
                self.at_best(results, "test", net=net, activation=unit, place=place) for place in ("after", "before")
            )
            found[f"{net} {unit}"] = [a - b for a, b in zip(after, before, strict=True)]
        return found

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """Pooled, and network by network."""
        task = next(iter(results)).task
        valid = f"{task['data']} of 14 × 14 or less, {task['steps']} steps of 64, tuned"
        differences = self._differences(results)
        effects = {case: paired_effect(row) for case, row in differences.items()}
        pooled = paired_effect(np.mean(list(differences.values()), axis=0))
        listed = ", ".join(f"{case} {100 * e.value:+.2f} points" for case, e in effects.items())
        verdict = _verdict(effects, pooled)
        shared = "; ".join(
            f"{case} {self.shared(results, 'test', net=case.split()[0], activation=case.split()[1], place='after')}"
            for case in effects
        )
        tests = len(effects) + 1
        before = Effect(-pooled.value, -pooled.high, -pooled.low, pooled.p, pooled.n)
        return (
            ruled(
                ("004-4",),
                "is it better after?",
                verdict,
                f"After − before: {100 * pooled.value:+.2f} points pooled ({100 * pooled.low:+.2f} to "
                f"{100 * pooled.high:+.2f}); {listed}. After against before: {shared}.",
                valid,
                effect=interval(pooled, "of accuracy, after − before"),
                seeds=pooled.n,
                tests=tests,
            ),
            by_effect(
                ("001-23", "003-7"),
                "is it better before?",
                before,
                f"Before − after: {-100 * pooled.value:+.2f} points pooled",
                valid,
                unit="of accuracy, before − after",
            ),
        )

    def figure(self, results: Results) -> Picture:
        """A forest of differences."""
        effects = {case: paired_effect(row) for case, row in self._differences(results).items()}
        within = [interval(e) for e in effects.values()]
        series = points("", range(len(within)), [i.value for i in within], within=within)
        plot = Plot(
            "after − before the activation",
            "",
            "test accuracy",
            (series,),
            ticks=tuple(effects),
            levels=(("no difference", 0.0),),
        )
        return Picture(
            "Difference in test accuracy between the two places, with 95 % intervals over seeds, every network tuned.",
            (plot,),
        )


def _verdict(effects: Mapping[str, Effect], pooled: Effect) -> LabVerdict:
    """By the pooled effect, unless single networks, corrected for their number, disagree in sign."""
    sure = holm([e.p for e in effects.values()]).rejected
    signs = {decide(e) for e, s in zip(effects.values(), sure, strict=True) if s} - {"UNDECIDED"}
    if len(signs) == 2:
        return "CONDITIONAL"
    found: Decision = decide(pooled)
    most = sum(e.value > 0 for e in effects.values()) > len(effects) / 2
    return found if found != "CONFIRMED" or most else "UNDECIDED"


EXPERIMENT = Place()

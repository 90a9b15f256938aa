"""H02: weight normalization."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping

import normscope as ns
from normscope.lab.catalogue import register
from normscope.lab.experiment import Numbers, ProfileName, Results, Task
from normscope.lab.networks import Convolutional, Network
from normscope.lab.samples import available
from normscope.lab.sketch import beside
from normscope.lab.training import Arm, Tuned, classify
from normscope.lab.verdicts import by_effect, told
from normscope.records import Judgement, Picture
from normscope.statistics import paired_effect

__all__ = ["EXPERIMENT", "WeightNormalization"]

STEPS: Mapping[ProfileName, int] = {"quick": 30, "cpu": 400, "full": 40_000}
NAMES = {"none": "none", "BN": "BatchNorm", "none WN": "weight norm", "none WN mean": "weight norm, mean-only BN"}


class WeightNormalization(Tuned):
    """Normalizing the weights of convolutions in place of what they compute."""

    registration = register(
        "H02",
        statement="Normalizing weights is another family than normalizing activations: it trains as well and "
        "generalises worse.",
        source="Salimans & Kingma 2016; Gitman & Ginsburg 2017: 6 points worse than Batch Normalization on ResNet-50",
        confirms="test accuracy with Batch Normalization − with weight normalization, both tuned, lies above 0",
        refutes="it lies below 0",
        thresholds={"difference": 0, "slower": 0.1},
        design="Four convolutions, CIFAR-10 averaged to 16 × 16, 5 000 images, SGD with momentum 0.9, batch 64; none, "
        "Batch Normalization, weight normalization of the convolutions (gains start so that the weights are those of "
        "the other arms), the same with mean-only Batch Normalization; four rates tuned with 2 seeds for every arm. "
        "The time of a step is told by the clock of whole runs.",
        cuts=("40 000 steps down to 400", "10 seeds down to 6"),
    )
    seeds: Mapping[ProfileName, int] = {"quick": 2, "cpu": 6, "full": 10}
    rates: Mapping[ProfileName, tuple[float, ...]] = {
        "quick": (0.03,),
        "cpu": (0.01, 0.03, 0.1, 0.3),
        "full": (0.003, 0.01, 0.03, 0.1, 0.3),
    }

    def arms(self, profile: ProfileName) -> list[Arm]:
        """All four."""
        name = available("cifar10") if profile != "quick" else "digits"
        return [{"data": name, "net": "cnn", "norm": norm, "steps": STEPS[profile]} for norm in NAMES]

    def tuning(self, arm: Arm) -> Arm:
        """Half of the steps."""
        return dict(arm) | {"steps": int(arm["steps"]) // 2}

    def measure(self, task: Task) -> Numbers:
        """Train."""

        def change(network: Network) -> None:
            if "WN" not in task.text("norm") or not isinstance(network, Convolutional):
                return
            for block in network.blocks:
                conv = block[0]  # type: ignore[index]
                ns.parametrizations.weight_norm(conv)
                if task.text("norm").endswith("mean"):
                    block[1] = ns.nn.MeanOnlyBatchNorm(conv.out_channels)  # type: ignore[operator]

        return classify(task, form="half", train_size=5_000, test_size=1_000, batch=64, momentum=0.9, change=change)

    def _rows(self, results: Results, name: str) -> dict[str, tuple[float, ...]]:
        return {told: self.at_best(results, name, norm=norm) for norm, told in NAMES.items()}

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """Test, training, time."""
        task = results.where(stage="test")[0].task
        valid = f"{task['data']} of 16 × 16 or less, four convolutions, {task['steps']} steps of 64, tuned"
        test, train = self._rows(results, "test"), self._rows(results, "train")
        clocks = {n: [math.log(v) for v in row] for n, row in self._rows(results, "time").items()}
        slower = paired_effect(clocks["BatchNorm"], clocks["weight norm"])
        shared = self.shared(results, "test", norm="none WN")
        return (
            by_effect(
                ("004-2",),
                "do the two families differ in generalisation?",
                paired_effect(test["BatchNorm"], test["weight norm"]),
                f"Test accuracy: {told(test)}; weight norm {shared}",
                valid,
                unit="of accuracy, BatchNorm − weight norm",
            ),
            by_effect(
                (),
                "does weight normalization fit the training images better?",
                paired_effect(train["weight norm"], train["BatchNorm"]),
                f"Training accuracy: {told(train)}",
                valid,
                unit="of training accuracy, weight norm − BatchNorm",
            ),
            by_effect(
                (),
                "is a step with Batch Normalization slower by a tenth?",
                slower,
                f"A step takes {math.exp(statistics.mean(clocks['BatchNorm']) - statistics.mean(clocks['none'])):.2f} "
                f"times as long with Batch Normalization, "
                f"{math.exp(statistics.mean(clocks['weight norm']) - statistics.mean(clocks['none'])):.2f} times with "
                "weight normalization, as with neither",
                valid,
                unit="ln of the times' ratio",
                least=math.log(1 + self.threshold("slower")),
            ),
        )

    def figure(self, results: Results) -> Picture:
        """Training and test accuracy."""
        groups = {"test": self._rows(results, "test"), "training": self._rows(results, "train")}
        return Picture(
            "Test and training accuracy by what is normalized, mean and range over seeds, every arm tuned.",
            (beside("weights or activations", "accuracy", groups),),
        )


EXPERIMENT = WeightNormalization()

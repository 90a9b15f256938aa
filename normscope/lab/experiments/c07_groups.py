"""C07: groups between LayerNorm and InstanceNorm."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from normscope.lab.catalogue import register
from normscope.lab.experiment import Numbers, ProfileName, Results, Task
from normscope.lab.samples import available
from normscope.lab.sketch import beside
from normscope.lab.training import Arm, Tuned, classify
from normscope.lab.verdicts import by_effect, by_rivals, told
from normscope.records import Judgement, Picture
from normscope.statistics import paired_effect

__all__ = ["EXPERIMENT", "Groups"]

GROUPS: Mapping[ProfileName, tuple[int, ...]] = {"quick": (4,), "cpu": (2, 4, 8), "full": (2, 4, 8, 16)}
STEPS: Mapping[ProfileName, int] = {"quick": 30, "cpu": 400, "full": 4000}
ENDS = {"LN": "LayerNorm", "IN": "InstanceNorm"}


class Groups(Tuned):
    """One group, several, and as many as channels."""

    registration = register(
        "C07",
        statement="GroupNorm lies between LayerNorm and InstanceNorm, and is better than both.",
        source="Wu & He 2018, Table 3: error 24.1 % with 32 groups, 25.3 with one, 28.4 with one per channel",
        confirms="the number of groups that is best on validation data reaches a higher test accuracy than LayerNorm "
        "and than InstanceNorm, both intervals above 0",
        refutes="the interval against one of them lies below 0",
        thresholds={"difference": 0},
        design="Four convolutions of 16, 32, 32, 64 channels, CIFAR-10 averaged to 16 × 16, 5 000 images, SGD with "
        "momentum 0.9, batch 32; one group of all channels (LayerNorm), 2, 4, 8, 16 groups, a group per channel "
        "(InstanceNorm); three rates tuned with 2 seeds for every arm. The number of groups is chosen by the same "
        "validation scores.",
        cuts=("16 groups", "4000 steps down to 400", "10 seeds down to 6"),
    )
    seeds: Mapping[ProfileName, int] = {"quick": 2, "cpu": 6, "full": 10}
    rates: Mapping[ProfileName, tuple[float, ...]] = {
        "quick": (0.03,),
        "cpu": (0.01, 0.03, 0.1),
        "full": (0.003, 0.01, 0.03, 0.1, 0.3),
    }

    def arms(self, profile: ProfileName) -> list[Arm]:
        """Both ends and what lies between."""
        name = available("cifar10") if profile != "quick" else "digits"
        norms = ["LN", *(f"groups{g}" for g in GROUPS[profile]), "IN"]
        return [{"data": name, "net": "cnn", "norm": norm, "steps": STEPS[profile]} for norm in norms]

    def tuning(self, arm: Arm) -> Arm:
        """Half of the steps."""
        return dict(arm) | {"steps": int(arm["steps"]) // 2}

    def measure(self, task: Task) -> Numbers:
        """Train."""
        return classify(task, form="half", train_size=5_000, test_size=1_000, batch=32, momentum=0.9)

    def _rows(self, results: Results) -> dict[str, tuple[float, ...]]:
        norms = results.texts("norm")
        return {norm: self.at_best(results, "test", norm=norm) for norm in norms}

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """The best interior against both ends, and the ends against each other."""
        task = results.where(stage="test")[0].task
        valid = f"{task['data']} of 16 × 16 or less, four convolutions, {task['steps']} steps of 32, tuned"
        rows = self._rows(results)
        inside = [norm for norm in rows if norm.startswith("groups")]

        def score(norm: str) -> float:
            found = results.where(stage="tune", norm=norm, rate=self.best_rate(results, norm=norm))
            return statistics.mean(m.row("valid")[0] for m in found)

        best = max(inside, key=score)
        listed = told({ENDS.get(n, n.replace("groups", "groups: ")): row for n, row in rows.items()})
        return (
            by_rivals(
                ("004-16", "004-22"),
                "is a number of groups between better than both ends?",
                rows[best],
                {name: rows[norm] for norm, name in ENDS.items()},
                f"Test accuracy: {listed}; chosen on validation data: {best[6:]} groups.",
                valid,
                unit="of accuracy",
            ),
            by_effect(
                (),
                "is LayerNorm better than InstanceNorm in convolutions?",
                paired_effect(rows["LN"], rows["IN"]),
                f"Test accuracy: {listed}",
                valid,
                unit="of accuracy, LayerNorm − InstanceNorm",
            ),
        )

    def figure(self, results: Results) -> Picture:
        """Accuracy against the number of groups."""
        arms = {ENDS.get(norm, norm[6:]): row for norm, row in self._rows(results).items()}
        plot = beside("groups", "test accuracy", {"": arms}, "from one group to one per channel")
        return Picture("Test accuracy by the number of groups, mean and range over seeds, every arm tuned.", (plot,))


EXPERIMENT = Groups()

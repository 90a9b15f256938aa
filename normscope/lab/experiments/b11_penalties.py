"""B11: weight penalties under normalization."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from normscope.lab.catalogue import register
from normscope.lab.experiment import Numbers, ProfileName, Results, Task
from normscope.lab.networks import Convolutional
from normscope.lab.samples import Samples, available, batches, samples
from normscope.lab.sketch import spread
from normscope.lab.training import Arm, Tuned, accuracies, columns, descend
from normscope.lab.verdicts import by_effect, by_equivalence, ruled, told
from normscope.records import Judgement, LabVerdict, Picture, Plot, Series
from normscope.statistics import decide, paired_effect

__all__ = ["EXPERIMENT", "Penalties"]

LAMBDAS: Mapping[ProfileName, tuple[float, ...]] = {
    "quick": (0.0, 1e-2),
    "cpu": (0.0, 1e-3, 1e-2),
    "full": (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1),
}
STEPS: Mapping[ProfileName, int] = {"quick": 30, "cpu": 400, "full": 10_000}
NORMS = {"none": "without", "BN": "with BN"}


class Penalties(Tuned):
    """L1 and L2 penalties on the convolutions, and a network that is given the norms of a penalised one."""

    registration = register(
        "B11",
        statement="L1 penalties give sparse, L2 penalties small weights, and both avoid overfitting, under "
        "normalization too.",
        source="a tutorial; van Laarhoven 2017 against: under normalization L2 sets the effective rate alone",
        confirms="zeros grow with λ under L1 and norms shrink under L2; and with Batch Normalization the best test "
        "accuracy with L2 − that of a network without it whose weights are given the same norms in every step differs",
        refutes="it does not: the difference lies within half a point",
        thresholds={"equal": 0.005},
        design="Four convolutions, CIFAR-10 averaged to 16 × 16, 1 000 images, SGD without momentum, batch 32; "
        "penalties on the weights of convolutions: L2 as decay w ← (1 − ηλ)w, L1 by soft thresholding at ηλ; λ = 0, "
        "10⁻³, 10⁻²; two rates tuned with 2 seeds for every arm. Replayed: beside the network with the largest λ "
        "another without penalty takes the same batches, every convolution rescaled after each step to the first's "
        "norm.",
        cuts=("three more λ", "10 000 steps down to 400", "10 seeds down to 6"),
    )
    seeds: Mapping[ProfileName, int] = {"quick": 2, "cpu": 6, "full": 10}
    rates: Mapping[ProfileName, tuple[float, ...]] = {
        "quick": (0.1,),
        "cpu": (0.1, 0.3),
        "full": (0.01, 0.03, 0.1, 0.3, 1.0),
    }

    def arms(self, profile: ProfileName) -> list[Arm]:
        """Both penalties at every λ, with and without."""
        name = available("cifar10") if profile != "quick" else "digits"
        fixed: Arm = {"data": name, "net": "cnn", "steps": STEPS[profile]}
        most = max(LAMBDAS[profile])
        return [
            {**fixed, "norm": norm, "penalty": penalty, "lambda": value, "replay": penalty == "L2" and value == most}
            for norm in NORMS
            for penalty in ("L2", "L1")
            for value in LAMBDAS[profile]
            if value or penalty == "L2"
        ]

    def baseline(self, arm: Arm) -> Arm:
        """None: each at its own best rate."""
        return arm

    def tuning(self, arm: Arm) -> Arm:
        """Half of the steps."""
        return dict(arm) | {"steps": int(arm["steps"]) // 2}

    def measure(self, task: Task) -> Numbers:
        """Train under the penalty, and with it a replayed network."""
        data, seed = samples(task.text("data"), "half", 1_000, 1_000), task.seeds[0]
        network = Convolutional(data.shape[0], data.classes, seed, norm=task.text("norm"))
        rate, value, steps = task.number("rate"), task.number("lambda"), task.whole("steps")
        weights = _convolutions(network)
        twin = copy.deepcopy(network)

        @torch.no_grad()
        def penalise(_: int) -> None:
            for w in weights:
                if task.text("penalty") == "L2":
                    w.mul_(1 - rate * value)
                else:
                    w.copy_(F.softshrink(w, rate * value))
            for own, other in zip(weights, _convolutions(twin), strict=True):
                other.mul_(own.norm() / other.norm().clamp(min=1e-12))

        networks = [network, twin] if task["replay"] else [network]
        parameters = [p for one in networks for p in one.train().parameters()]
        descend(parameters, _losses(networks, data, seed), steps, rate, on_step=penalise)
        whole = torch.cat([w.detach().flatten() for w in weights])
        found = {
            name: accuracies(network, x, y, 1)
            for name, x, y in (
                ("test", data.test_x, data.test_y),
                ("valid", data.valid_x, data.valid_y),
                ("train", data.train_x, data.train_y),
            )
        }
        found |= {"zeros": [float((whole == 0).float().mean())], "norm": [float(whole.norm())]}
        return found | ({"replayed": accuracies(twin, data.test_x, data.test_y, 1)} if task["replay"] else {})

    def _rows(self, results: Results, name: str, norm: str, penalty: str) -> dict[float, tuple[float, ...]]:
        """λ → a number per seed; λ = 0 is common to both penalties."""
        values = sorted({m.task.number("lambda") for m in results})
        return {
            value: self.at_best(results, name, norm=norm, penalty=penalty if value else "L2", **{"lambda": value})
            for value in values
        }

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """Sparse, small, of use; and whether decay is a rate."""
        task = results.where(stage="test")[0].task
        valid = f"{task['data']} of 16 × 16 or less, 1 000 images, four convolutions, {task['steps']} steps, tuned"
        zeros, sizes = (
            {norm: self._rows(results, name, norm, penalty) for norm in NORMS}
            for name, penalty in (("zeros", "L1"), ("norm", "L2"))
        )
        largest = max(zeros["BN"])
        sparse = [decide(paired_effect(rows[largest], rows[0.0])) for rows in zeros.values()]
        small = [decide(paired_effect(rows[0.0], rows[largest])) for rows in sizes.values()]
        found = {*sparse, *small}
        verdict: LabVerdict = found.pop() if len(found) == 1 else "CONDITIONAL" if "REFUTED" in found else "UNDECIDED"
        test = {norm: self._rows(results, "test", norm, "L2") for norm in NORMS}
        replayed = self.at_best(results, "replayed", norm="BN", penalty="L2", **{"lambda": largest})
        listed = "; ".join(
            f"{NORMS[norm]} {told({f'λ = {v:g}': row for v, row in rows.items()})}" for norm, rows in test.items()
        )
        use = {norm: [max(c) - c[0] for c in zip(*rows.values(), strict=True)] for norm, rows in test.items()}
        same = by_equivalence(
            (),
            "",
            paired_effect(test["BN"][largest], replayed),
            f"L2 at λ = {largest:g} {sum(test['BN'][largest]) / len(replayed):.1%}, replayed without it "
            f"{sum(replayed) / len(replayed):.1%}",
            valid,
            unit="of accuracy, L2 − replayed norms",
            margin=self.threshold("equal"),
        )
        return (
            ruled(
                ("004-3",),
                "does L1 give zeros, and L2 small weights?",
                verdict,
                f"Zeros under L1: {told({NORMS[n]: rows[largest] for n, rows in zeros.items()})}; ‖w‖ under L2: "
                f"{told({NORMS[n]: rows[largest] for n, rows in sizes.items()}, '.2f')}, at λ = 0 "
                f"{told({NORMS[n]: rows[0.0] for n, rows in sizes.items()}, '.2f')}.",
                valid,
                seeds=len(replayed),
                tests=4,
            ),
            ruled(
                ("004-2",),
                "is decay under normalization more than a schedule of norms?",
                {"CONFIRMED": "REFUTED", "REFUTED": "CONFIRMED"}.get(same.verdict, "UNDECIDED"),  # type: ignore[arg-type]
                same.outcome,
                valid,
                effect=same.effect,
                seeds=same.seeds,
                tests=1,
            ),
            by_effect(
                (),
                "is the best decay of more use without it?",
                paired_effect(use["none"], use["BN"]),
                f"Test accuracy under L2: {listed}",
                valid,
                unit="of accuracy gained, without − with",
            ),
        )

    def figure(self, results: Results) -> Picture:
        """Accuracy, zeros and norms against λ."""
        plots = []
        for name, penalty, what in (
            ("test", "L2", "test accuracy"),
            ("norm", "L2", "‖w‖"),
            ("zeros", "L1", "share of zeros"),
        ):
            series: list[Series] = []
            for k, (norm, label) in enumerate(NORMS.items()):
                rows = self._rows(results, name, norm, penalty)
                series += spread(label, range(len(rows)), columns(rows.values()), k)
            ticks = tuple(f"{value:g}" for value in rows)
            plots.append(Plot(f"{what} under {penalty}", "λ", what, tuple(series), ticks=ticks))
        return Picture("By the penalty's weight λ, mean and range over seeds, every arm tuned.", tuple(plots))


def _convolutions(network: Convolutional) -> list[Tensor]:
    return [block[0].weight for block in network.blocks]  # type: ignore[index]


def _losses(networks: list[Convolutional], data: Samples, seed: int) -> Iterator[Tensor]:
    """The sum over networks that share nothing but their batches."""
    for rows in batches(len(data.train_y), 32, seed):
        x, y = data.train_x[rows], data.train_y[rows]
        yield torch.stack([F.cross_entropy(network(x), y) for network in networks]).sum()


EXPERIMENT = Penalties()

"""B09: what γ and β are worth."""

from __future__ import annotations

from collections.abc import Mapping

from normscope.lab.catalogue import register
from normscope.lab.experiment import Numbers, ProfileName, Results, Task
from normscope.lab.networks import Network
from normscope.lab.samples import available
from normscope.lab.sketch import beside
from normscope.lab.training import Arm, Tuned, classify, mean_of
from normscope.lab.verdicts import by_effect, interval, ruled, told
from normscope.records import Judgement, LabVerdict, Picture
from normscope.statistics import MINIMUM_SEEDS, Effect, paired_effect

__all__ = ["EXPERIMENT", "Affine"]

CASES: Mapping[ProfileName, tuple[tuple[str, str], ...]] = {
    "quick": (("mlp3", "sigmoid"), ("cnn", "relu")),
    "cpu": (("mlp3", "sigmoid"), ("mlp3", "relu"), ("cnn", "relu")),
    "full": (("mlp3", "sigmoid"), ("mlp3", "relu"), ("cnn", "sigmoid"), ("cnn", "relu")),
}
STEPS: Mapping[ProfileName, int] = {"quick": 30, "cpu": 400, "full": 4000}
# Norm → the last names of the parameters that learn.
LEARNS = {
    "BN": ("weight", "bias"),
    "BN scale": ("weight",),
    "BN shift": ("bias",),
    "BN bare": (),
    "BN only": ("weight", "bias"),
}
NAMES = {"BN": "γ and β", "BN scale": "γ alone", "BN shift": "β alone", "BN bare": "neither", "BN only": "nothing else"}


class Affine(Tuned):
    """Batch Normalization whose γ and β both learn, one of them, none; and a network of which nothing else learns."""

    registration = register(
        "B09",
        statement="Batch Normalization without γ and β spoils what layers have learned; they must not be left out.",
        source="tutorials; Ioffe & Szegedy 2015, §3; Frankle et al. 2021 against: worth 0.5 to 2 points",
        confirms="left out, test accuracy falls by more than 5 points in the mean over networks",
        refutes="it falls by less than a point",
        thresholds={"indispensable": 0.05, "dispensable": 0.01, "learns": 0.3},
        design="A perceptron of three layers of 100 units with sigmoid or ReLU and a network of four convolutions with "
        "ReLU; MNIST averaged to 14 × 14, 5 000 images; SGD with momentum 0.9, batch 64; three rates tuned with 2 "
        "seeds for every arm. Arms: γ and β learn; γ alone; β alone; neither; nothing but γ and β learns. What does "
        "not learn stays at its start. Whether learning them costs is told by the mean test accuracy while training.",
        cuts=("convolutions with sigmoid", "4000 steps down to 400", "10 seeds down to 8"),
    )
    seeds: Mapping[ProfileName, int] = {"quick": 2, "cpu": 8, "full": 10}
    rates: Mapping[ProfileName, tuple[float, ...]] = {
        "quick": (0.03,),
        "cpu": (0.01, 0.03, 0.1),
        "full": (0.003, 0.01, 0.03, 0.1, 0.3),
    }
    together = 8

    def arms(self, profile: ProfileName) -> list[Arm]:
        """Every way in every network."""
        name = available("mnist") if profile != "quick" else "digits"
        return [
            {"data": name, "net": net, "norm": norm, "activation": unit, "steps": STEPS[profile]}
            for net, unit in CASES[profile]
            for norm in LEARNS
        ]

    def baseline(self, arm: Arm) -> Arm:
        """None: each at its own best rate."""
        return arm

    def measure(self, task: Task) -> Numbers:
        """Train what is to learn."""

        def choose(network: Network) -> None:
            if task.text("norm") == "BN only":
                network.requires_grad_(False)
            for name, p in network.named_parameters():
                if ".1." in name:  # the second of a block is its normalizer
                    p.requires_grad_(name.rpartition(".")[2] in LEARNS[task.text("norm")])

        return classify(task, form="half", train_size=5_000, test_size=2_000, batch=64, momentum=0.9, change=choose)

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """Left out, of use at a sigmoid, learned at all, and at what price."""
        task = next(iter(results)).task
        valid = f"{task['data']} of 14 × 14 or less, {task['steps']} steps of 64, tuned"
        cases = _cases(results)
        rows = {
            (case, norm): self.at_best(results, "test", net=case[0], activation=case[1], norm=norm)
            for case in cases
            for norm in LEARNS
        }
        mean = {norm: mean_of([rows[case, norm] for case in cases]) for norm in LEARNS}
        lost = paired_effect(mean["BN"], mean["BN bare"])
        listed = "; ".join(f"{' '.join(c)}: {told({NAMES[n]: rows[c, n] for n in LEARNS})}" for c in cases)
        sigmoid = next(case for case in cases if case[1] == "sigmoid")
        spoiled = paired_effect(rows[sigmoid, "BN"], rows[sigmoid, "BN bare"])
        speed = [
            mean_of([self.along(results, net=net, activation=unit, norm=norm) for net, unit in cases])
            for norm in ("BN bare", "BN")
        ]
        return (
            ruled(
                ("003-9",),
                "must γ and β not be left out?",
                self._verdict(lost),
                f"Test accuracy, {listed}.",
                valid,
                effect=interval(lost, "of accuracy, γ and β − neither"),
                seeds=lost.n,
                tests=1,
            ),
            by_effect(
                ("001-18", "003-8"),
                "does bare normalization spoil a network of sigmoids?",
                spoiled,
                f"γ and β − neither in front of sigmoids: {100 * spoiled.value:+.2f} points",
                valid,
                unit="of accuracy",
            ),
            by_effect(
                ("001-32",),
                "do γ and β learn by gradient descent?",
                paired_effect([value - 0.1 for value in mean["BN only"]]),
                f"A network of which they alone learn reaches {sum(mean['BN only']) / len(mean['BN only']):.1%}",
                valid,
                unit="of accuracy, above chance",
                least=self.threshold("learns"),
            ),
            by_effect(
                ("000-17",),
                "does learning them cost?",
                paired_effect(*speed),
                f"Mean accuracy while training: {told({'neither': speed[0], 'γ and β': speed[1]})}",
                valid,
                unit="of mean accuracy, neither − γ and β",
            ),
        )

    def _verdict(self, lost: Effect) -> LabVerdict:
        if lost.n < MINIMUM_SEEDS:
            return "UNDECIDED"
        if lost.low > self.threshold("indispensable"):
            return "CONFIRMED"
        return "REFUTED" if lost.high < self.threshold("dispensable") else "UNDECIDED"

    def figure(self, results: Results) -> Picture:
        """Accuracy by what learns."""
        groups = {
            " ".join(case): {
                NAMES[norm]: self.at_best(results, "test", net=case[0], activation=case[1], norm=norm)
                for norm in LEARNS
            }
            for case in _cases(results)
        }
        plot = beside("which parameters of Batch Normalization learn", "test accuracy", groups)
        return Picture("Test accuracy by what learns, mean and range over seeds, every arm tuned.", (plot,))


def _cases(results: Results) -> list[tuple[str, str]]:
    return list(dict.fromkeys((m.task.text("net"), m.task.text("activation")) for m in results))


EXPERIMENT = Affine()

"""B13: statistics outside the gradient step, in a network."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

import normscope as ns
from normscope.lab.catalogue import register
from normscope.lab.experiment import Numbers, ProfileName, Results, Task
from normscope.lab.networks import Perceptrons, renew
from normscope.lab.samples import available, samples
from normscope.lab.sketch import beside, line
from normscope.lab.training import Arm, Tuned, train
from normscope.lab.verdicts import by_effect, interval, ruled, told
from normscope.records import Judgement, LabVerdict, Picture, Plot
from normscope.statistics import decide, paired_effect

__all__ = ["EXPERIMENT", "Detached"]

STEPS: Mapping[ProfileName, int] = {"quick": 60, "cpu": 2000, "full": 20_000}
WAYS = {"true": "true gradient", "mean": "mean detached", "both": "mean and variance detached"}


class Detached(Tuned):
    """Perceptrons whose gradient ignores that the statistics depend on the weights."""

    registration = register(
        "B13",
        statement="If normalization stands outside the gradient step the model blows up: the bias in front grows "
        "without bound.",
        source="Ioffe & Szegedy 2015, §2",
        confirms="with the mean detached, with γ and β and without, the norm of the biases grows in the second half of "
        "training by more than half of what it had reached in the first",
        refutes="without γ and β it grows by less than half; conditional if it grows so only without them",
        thresholds={"growth": 0.5},
        design="Three layers of 100 units with sigmoid, MNIST averaged to 14 × 14, 5 000 images, SGD, batch 60; four "
        "rates tuned with 2 seeds for every arm. The statistics of a batch as constants for the gradient: the mean, or "
        "mean and variance; with γ and β and without. In evaluation the statistics of the test images. Growth is told "
        "at the rate that is best for the true gradient. Linear growth gives 1, that of a random walk 0.41, a bounded "
        "bias 0.",
        cuts=("20 000 steps down to 2000",),
    )
    seeds: Mapping[ProfileName, int] = {"quick": 2, "cpu": 10, "full": 10}
    rates: Mapping[ProfileName, tuple[float, ...]] = {
        "quick": (0.3,),
        "cpu": (0.03, 0.1, 0.3, 1.0),
        "full": (0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
    }
    together = 10

    def arms(self, profile: ProfileName) -> list[Arm]:
        """Every way with and without γ and β."""
        name = available("mnist") if profile != "quick" else "digits"
        fixed: Arm = {"data": name, "net": "mlp3", "steps": STEPS[profile]}
        return [{**fixed, "way": way, "affine": affine} for affine in (True, False) for way in WAYS]

    def baseline(self, arm: Arm) -> Arm:
        """The true gradient."""
        return dict(arm) | {"way": "true"}

    def measure(self, task: Task) -> Numbers:
        """Train, following the sizes of biases and weights."""
        data = samples(task.text("data"), "half", 5_000, 2_000).flat
        widths = (data.shape.numel(), 100, 100, 100, data.classes)
        network = Perceptrons(widths, task.seeds, norm="none", activation="sigmoid")
        way, affine = task.text("way"), bool(task["affine"])
        renew(network, lambda _: _Outside(len(task.seeds), 100, way, affine=affine))
        layers = [block[0] for block in network.trunk]  # type: ignore[index]
        sizes: dict[str, list[Tensor]] = {"bias": [], "weight": []}

        def look(_: int) -> None:
            for name, rows in sizes.items():
                parts = [layer.get_parameter(name).detach().flatten(1) for layer in layers]
                rows.append(torch.cat(parts, 1).norm(dim=1))

        steps, rate = task.whole("steps"), task.number("rate")
        found = train(network, data, task.seeds, steps=steps, batch=60, rate=rate, on_probe=look)
        # Seeds outermost, as in the curve of accuracies.
        return found | {name: torch.stack(rows, 1).flatten().tolist() for name, rows in sizes.items()}

    def _growth(self, results: Results, name: str, way: str, affine: bool) -> list[float]:
        """Per seed, what was added in the second half over what there was after the first."""
        found = []
        for steps, row in self._sizes(results, name, way, affine):
            half = next(k for k, step in enumerate(steps) if step >= steps[-1] / 2)
            found.append((row[-1] - row[half]) / max(row[half], 1e-12))
        return found

    def _sizes(
        self, results: Results, name: str, way: str, affine: bool
    ) -> list[tuple[tuple[float, ...], tuple[float, ...]]]:
        """Steps and sizes of every seed, at the best rate of the true gradient."""
        rate = self.best_rate(results, way="true", affine=affine)
        rows = []
        for m in results.where(stage="test", way=way, affine=affine, rate=rate):
            steps, values = m.row("steps"), m.row(name)
            rows += [(steps, values[k * len(steps) : (k + 1) * len(steps)]) for k in range(len(m.task.seeds))]
        return rows

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """Growth of the bias, and accuracy."""
        task = next(iter(results)).task
        valid = f"{task['data']} of 14 × 14 or less, three layers of sigmoids, {task['steps']} steps of 60, tuned"
        least = self.threshold("growth")
        growth = {
            affine: paired_effect([v - least for v in self._growth(results, "bias", "mean", affine)])
            for affine in (False, True)
        }
        bare, affine = (decide(growth[key]) for key in (False, True))
        verdict: LabVerdict = bare
        if bare == "CONFIRMED" and affine != "CONFIRMED":
            verdict = "CONDITIONAL" if affine == "REFUTED" else "UNDECIDED"
        listed = "; ".join(
            f"{'with' if a else 'without'} γ and β "
            + told({WAYS[w]: self._growth(results, part, w, a) for w in ("mean", "both")}, ".2f")
            + f" ({part})"
            for a in (False, True)
            for part in ("bias", "weight")
        )
        scores = {WAYS[w]: self.at_best(results, "test", way=w, affine=True) for w in WAYS}
        return (
            ruled(
                ("001-14",),
                "does the bias grow without bound?",
                verdict,
                f"Growth in the second half over the size before: {listed}.",
                f"without γ and β: {bare}, with them: {affine}; {valid}",
                effect=interval(growth[False], f"growth without γ and β, less {least:g}"),
                seeds=growth[False].n,
                tests=2,
            ),
            by_effect(
                ("001-19",),
                "is it better that the statistics take part in back-propagation?",
                paired_effect(scores[WAYS["true"]], scores[WAYS["both"]]),
                f"Test accuracy with γ and β, each at its best rate: {told(scores)}",
                valid,
                unit="of accuracy, true gradient − both detached",
            ),
        )

    def figure(self, results: Results) -> Picture:
        """Size of the biases, accuracies."""
        plots = []
        for affine in (False, True):
            series = [
                line(name if i == 0 else "", steps, row, k)
                for k, (way, name) in enumerate(WAYS.items())
                for i, (steps, row) in enumerate(self._sizes(results, "bias", way, affine))
            ]
            plots.append(Plot(f"{'with' if affine else 'without'} γ and β", "step", "‖b‖", tuple(series)))
        groups = {
            f"{'with' if affine else 'without'} γ and β": {
                name: self.at_best(results, "test", way=way, affine=affine) for way, name in WAYS.items()
            }
            for affine in (False, True)
        }
        return Picture(
            "The norm of the biases in front of the normalizers, a line per seed, at the rate that is best for the "
            "true gradient; test accuracy, each at its own best rate.",
            (*plots, beside("after training", "test accuracy", groups)),
        )


class _Outside(nn.Module):
    """Batch Normalization of (seeds, n, width) by the batch's statistics, some of them constants for the gradient."""

    def __init__(self, seeds: int, width: int, way: str, *, affine: bool) -> None:
        super().__init__()
        self.way = way
        self.weight = nn.Parameter(torch.ones(seeds, width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(seeds, width)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalize, the same in training and evaluation."""
        own = ns.moments(x, "s [n] c")
        mean = own.mean if self.way == "true" else own.mean.detach()
        var = own.var.detach() if self.way == "both" else own.var
        return ns.normalize(x, "s [n] c", moments=(mean, var), weight=self.weight, bias=self.bias, params="s c")


EXPERIMENT = Detached()

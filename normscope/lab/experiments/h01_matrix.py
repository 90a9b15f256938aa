"""H01: tasks × normalizers, faults × normalizers."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence

from normscope.lab.catalogue import register
from normscope.lab.experiment import Numbers, ProfileName, Results, Task
from normscope.lab.matrix import MEASURE, successors
from normscope.lab.sketch import beside, row
from normscope.lab.training import Arm, Tuned
from normscope.lab.verdicts import by_effect, by_rivals, interval, ruled, told
from normscope.records import Judgement, LabVerdict, Picture, Table
from normscope.statistics import Effect, decide, paired_effect

__all__ = ["EXPERIMENT", "Matrix"]

# Task → the normalizers that are tried on it; "BN" in "small batch" is over two samples.
TASKS: Mapping[str, tuple[str, ...]] = {
    "perceptron": ("none", "BN", "LN"),
    "convolutions": ("none", "BN", "LN", "IN", "GN"),
    "small batch": ("BN",),
    "recurrent": ("none", "BN", "LN"),
    "transformer": ("none", "BN", "LN"),
    "super-resolution": ("none", "BN", "LN", "IN"),
    "denoising": ("none", "BN", "LN", "IN"),
}
QUICK: Mapping[str, tuple[str, ...]] = {
    "perceptron": ("none", "BN"),
    "convolutions": ("none", "BN", "LN", "GN"),
    "small batch": ("BN",),
    "recurrent": ("none", "LN"),
    "transformer": ("none", "LN"),
    "super-resolution": ("none", "BN", "LN"),
    "denoising": ("none",),
}
STEPS: Mapping[ProfileName, int] = {"quick": 10, "cpu": 300, "full": 10_000}
# Normalizers that look at one sample at a time.
FREE = ("LN", "IN", "GN")


class Matrix(Tuned):
    """Every normalizer on every task, trained as in the other experiments."""

    registration = register(
        "H01",
        statement="All four faults of Batch Normalization come from depending on the batch; LayerNorm is for recurrent "
        "networks only, GroupNorm for small batches, Batch Normalization for the rest.",
        source="a tutorial; Wu & He 2018",
        confirms="in super-resolution LayerNorm − Batch Normalization in PSNR lies above 0; a recommended "
        "normalizer is among the best of its task",
        refutes="it lies below 0; another normalizer of the task is surely better",
        thresholds={"difference": 0, "as good": 0.005, "nearly all": 0.8},
        design="Perceptron of three layers and four convolutions as in B07 and C01 (batch 32; over two samples in the "
        "column of small batches), rows of images through a tanh network as in E01 and through a transformer of two "
        "blocks (32 features, normalizers in front of attention and of the perceptron, over images and rows for Batch "
        "Normalization), super-resolution as in F01 and denoising as in F02. The same number of steps everywhere; "
        "three rates tuned with 2 seeds for every arm (a tenth of them with Adam). Best of a task: surely beaten by no "
        "other, intervals widened to hold together. Of the layers of the package that followed Batch Normalization, "
        "those whose output for a sample in training changes with another sample are counted.",
        cuts=("10 000 steps down to 300", "10 seeds down to 6", "style and adversarial networks: F05, F06"),
    )
    seeds: Mapping[ProfileName, int] = {"quick": 2, "cpu": 6, "full": 10}
    rates: Mapping[ProfileName, tuple[float, ...]] = {
        "quick": (0.03,),
        "cpu": (0.01, 0.03, 0.1),
        "full": (0.003, 0.01, 0.03, 0.1, 0.3),
    }

    def arms(self, profile: ProfileName) -> list[Arm]:
        """Every normalizer on every task."""
        small = profile == "quick"
        chosen = QUICK if small else TASKS
        return [
            {"net": "any", "task": task, "norm": norm, "small": small, "steps": STEPS[profile]}
            for task, norms in chosen.items()
            for norm in norms
        ]

    def baseline(self, arm: Arm) -> Arm:
        """None: each at its own best rate."""
        return arm

    def tuning(self, arm: Arm) -> Arm:
        """Half of the steps."""
        return dict(arm) | {"steps": int(arm["steps"]) // 2}

    def measure(self, task: Task) -> Numbers:
        """As the task's own experiment does, or count the successors."""
        found = MEASURE[task.text("task")](task)
        return {"test": [statistics.mean(_row(found, "test", "psnr"))], "valid": _row(found, "valid")}

    def _scores(self, results: Results) -> dict[str, dict[str, tuple[float, ...]]]:
        """Task → normalizer → a score per seed; networks without a batch are the same for small batches."""
        pairs = dict.fromkeys((m.task.text("task"), m.task.text("norm")) for m in results)
        found: dict[str, dict[str, tuple[float, ...]]] = {}
        for task, norm in pairs:
            found.setdefault(task, {})[norm] = self.at_best(results, "test", task=task, norm=norm)
        if "small batch" in found:
            same = {norm: row for norm, row in found["convolutions"].items() if norm != "BN"}
            found["small batch"] |= same
        return found

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """Faults, recommendations, LayerNorm elsewhere, successors."""
        task = next(iter(results)).task
        scores = self._scores(results)
        valid = f"small networks, {task['steps']} steps or half of them, tuned; accuracy or PSNR"
        faults = _faults(scores)
        listed = "; ".join(f"{name}: {told(rows, '+.3f')}" for name, rows in faults.items())
        better = paired_effect(scores["super-resolution"]["LN"], scores["super-resolution"]["BN"])
        matrix = "; ".join(f"{name}: {_ranked(rows)}" for name, rows in scores.items())
        alone, count = successors()
        share = alone / count
        nearly: LabVerdict = "CONFIRMED" if share >= self.threshold("nearly all") else "REFUTED"
        judged = [
            by_effect(
                ("004-10",),
                "does it lose less in super-resolution without a batch?",
                better,
                f"What is lost by fault: {listed}",
                valid,
                unit="dB, LayerNorm − BatchNorm",
            ),
            ruled(
                ("004-11",),
                "do nearly all successors use one sample only?",
                nearly,
                f"{alone} of {count} layers of this package that followed it do ({share:.0%}).",
                "counted by changing another sample of the batch, in training",
            ),
            by_effect(
                ("002-21",),
                "is GroupNorm better where statistics have two samples?",
                paired_effect(scores["small batch"]["GN"], scores["small batch"]["BN"]),
                f"Test accuracy: {told(scores['small batch'])}",
                valid,
                unit="of accuracy, GroupNorm − BatchNorm",
            ),
            by_effect(
                ("002-22",),
                "does it make convolutional networks generalise better?",
                paired_effect(scores["convolutions"]["BN"], scores["convolutions"]["none"]),
                f"Test accuracy: {told(scores['convolutions'])}",
                valid,
                unit="of accuracy, with − without",
            ),
            self._only_recurrent(scores, valid),
        ]
        for name, norm in (("recurrent", "LN"), ("small batch", "GN"), ("convolutions", "BN"), ("perceptron", "BN")):
            rivals = {other: row for other, row in scores[name].items() if other != norm}
            judged.append(
                by_rivals(
                    ("004-20",),
                    f"{name}: is {norm} among the best?",
                    scores[name][norm],
                    rivals,
                    f"{matrix}.",
                    valid,
                    unit=f"score of {norm}",
                    margin=self.threshold("as good"),
                )
            )
        return tuple(judged)

    def _only_recurrent(self, scores: Mapping[str, Mapping[str, Sequence[float]]], valid: str) -> Judgement:
        """LayerNorm in a transformer and in convolutions, against nothing."""
        gains = {n: paired_effect(scores[n]["LN"], scores[n]["none"]) for n in ("transformer", "convolutions")}
        best = max(gains.values(), key=lambda e: e.low)
        opposite = decide(Effect(-best.value, -best.high, -best.low, best.p, best.n))
        listed = "; ".join(f"{n}: {told(dict(scores[n]))}" for n in gains)
        return ruled(
            ("004-13",),
            "is LayerNorm useful in recurrent networks only?",
            opposite,
            f"{listed}.",
            valid,
            effect=interval(best, "of accuracy, LayerNorm − none, where it helps more"),
            seeds=best.n,
            tests=len(gains),
        )

    def figure(self, results: Results) -> Picture:
        """Every task's scores, less those without a normalizer."""
        plots = []
        for names, unit in (
            (("perceptron", "convolutions", "small batch", "recurrent", "transformer"), "accuracy"),
            (("super-resolution", "denoising"), "PSNR [dB]"),
        ):
            groups = {
                name: {n: [a - b for a, b in zip(row, rows["none"], strict=True)] for n, row in rows.items()}
                for name, rows in self._scores(results).items()
                if name in names
            }
            plots.append(beside("against no normalizer", f"{unit}, less that without", groups))
        return Picture("Every normalizer on every task, mean and range over seeds, every arm tuned.", tuple(plots))

    def tables(self, results: Results) -> tuple[Table, ...]:
        """Tasks × normalizers and faults × normalizers."""
        scores = self._scores(results)
        norms, faulty = ("none", "BN", *FREE), ("BN", *FREE)
        tasks = [row(name, rows, norms, unit=_unit(name)) for name, rows in scores.items()]
        faults = [row(name, rows, faulty, unit=_unit(name), least=True) for name, rows in _faults(scores).items()]
        return (
            Table(
                "Tasks × normalizers: test accuracy or PSNR, mean over seeds with its interval. “Small batch” is the "
                "network of convolutions with statistics over two images, which concerns Batch Normalization alone.",
                norms,
                tuple(tasks),
            ),
            Table(
                "Faults × normalizers: what is lost by statistics over two images in place of 32, and against no "
                "normalizer in super-resolution and recurrent networks. Normalizers of one sample lose nothing by a "
                "small batch, nor by other statistics at inference, the fourth fault; for Batch Normalization that is "
                "measured in C05.",
                faulty,
                tuple(faults),
            ),
        )


def _unit(task: str) -> str:
    return "dB" if task in ("super-resolution", "denoising") else "%"


def _row(found: Numbers, *names: str) -> list[float]:
    """The first of these rows that is there."""
    value = next(found[name] for name in names if name in found)
    return [float(value)] if isinstance(value, int | float) else [float(v) for v in value]


def _ranked(rows: Mapping[str, Sequence[float]]) -> str:
    """From the best on, with ≈ between neighbours that are not separable."""
    order = sorted(rows, key=lambda n: -statistics.mean(rows[n]))
    parts = [f"{order[0]} {statistics.mean(rows[order[0]]):.3g}"]
    for better, worse in itertools.pairwise(order):
        sure = decide(paired_effect(rows[better], rows[worse])) == "CONFIRMED"
        parts.append(f"{'>' if sure else '≈'} {worse} {statistics.mean(rows[worse]):.3g}")
    return " ".join(parts)


def _faults(scores: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, dict[str, list[float]]]:
    """Fault → normalizer → what is lost: by a small batch, and against no normalizer where it is said to harm."""

    def lost(of: Sequence[float], to: Sequence[float]) -> list[float]:
        return [a - b for a, b in zip(of, to, strict=True)]

    convolutions, small = scores["convolutions"], scores["small batch"]
    found = {"small batch": {n: lost(convolutions[n], small[n]) for n in ("BN", *FREE) if n in small}}
    for name in ("super-resolution", "recurrent"):
        rows = scores[name]
        found[name] = {n: lost(rows["none"], row) for n, row in rows.items() if n != "none"}
    return found


EXPERIMENT = Matrix()

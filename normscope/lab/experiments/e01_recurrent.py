"""E01: recurrent networks: vertical, horizontal, γ₀."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

import normscope as ns
from normscope.lab.catalogue import register
from normscope.lab.experiment import Numbers, ProfileName, Results, Task
from normscope.lab.samples import Samples, available, batches, samples
from normscope.lab.sketch import line, points
from normscope.lab.training import Arm, Tuned, descend
from normscope.lab.verdicts import by_effect, interval, ruled
from normscope.records import Interval, Judgement, LabVerdict, Picture, Plot, Series
from normscope.statistics import MINIMUM_SEEDS, Effect, paired_effect, slope

__all__ = ["EXPERIMENT", "Recurrent"]

UNITS, BATCH = 64, 64
ARMS: Mapping[ProfileName, tuple[str, ...]] = {
    "quick": ("horizontal 0.1", "none"),
    "cpu": ("horizontal 0.1", "none", "LN", "vertical", "horizontal 1", "joint"),
    "full": ("none", "vertical", "horizontal 1", "horizontal 0.3", "horizontal 0.1", "horizontal 0.01", "joint", "LN"),
}
SEQUENCES: Mapping[ProfileName, tuple[str, ...]] = {
    "quick": ("rows",),
    "cpu": ("rows", "pixels"),
    "full": ("rows", "pixels"),
}
STEPS: Mapping[ProfileName, int] = {"quick": 15, "cpu": 200, "full": 5000}
REGIMES = ("ordinary", "prefix", "prefix and noise")
NAMES = {"none": "none", "vertical": "input to hidden", "joint": "joint", "LN": "LayerNorm"}


class Recurrent(Tuned):
    """A tanh network over the rows, or the permuted pixels, of images."""

    registration = register(
        "E01",
        statement="In recurrent networks Batch Normalization works vertically; horizontally, repeated rescaling "
        "makes gradients explode.",
        source="Laurent et al. 2015; Cooijmans et al. 2016 against",
        confirms="with it horizontally the gradient grows towards the past on ordinary inputs, and the accuracy "
        "lies below that without",
        refutes="it does not grow, and with γ₀ = 0.1 the accuracy is not below that without by half a point",
        thresholds={"growth": 0, "accuracy": 0.005, "degenerate growth": 0.5},
        design="h_t = tanh(N_h(W_h h) + N_x(W_x x) + b), 64 units, orthogonal W_h; normalizers with statistics "
        "of every time step: none, N_x only (vertical), both "
        "(γ₀ = 1, 0.1), one for the sum (joint), LayerNorm of the sum. Rows and permuted pixels (64 steps) of "
        "the embedded digits and rows of MNIST (14 × 14). "
        "Adam, clipping at 1, batch 64, every arm at its own best rate, tuned with 2 seeds. Slope of "
        "ln‖∂L/∂h_t‖ towards the past "
        "at the start: on ordinary inputs; with the first half of the "
        "inputs equal across the batch; the same with noise of 0.1 on h₀.",
        cuts=("γ₀ = 0.3 and 0.01", "5000 steps down to 200", "10 seeds down to 6"),
    )
    seeds: Mapping[ProfileName, int] = {"quick": 2, "cpu": 6, "full": 10}
    rates: Mapping[ProfileName, tuple[float, ...]] = {
        "quick": (3e-3,),
        "cpu": (3e-3, 1e-2),
        "full": (3e-4, 1e-3, 3e-3, 1e-2),
    }

    def arms(self, profile: ProfileName) -> list[Arm]:
        """Every arm on every kind of sequence."""
        return [
            {
                "data": available("mnist") if kind == "rows" and profile != "quick" else "digits",
                "net": "rnn",
                "sequence": kind,
                "norm": norm,
                "steps": STEPS[profile],
            }
            for kind in SEQUENCES[profile]
            for norm in ARMS[profile]
        ]

    def tuning(self, arm: Arm) -> Arm:
        """Half of the steps."""
        return dict(arm) | {"steps": int(arm["steps"]) // 2}

    def measure(self, task: Task) -> Numbers:
        """Gradients at the start, then training."""
        data = _sequences(task)
        network = Cell(data.train_x.shape[2], data.classes, data.train_x.shape[1], task.seeds[0], task.text("norm"))
        found = {} if task.text("stage") == "tune" else _gradients(network, data, task.seeds[0])

        def losses() -> Iterator[Tensor]:
            for rows in batches(len(data.train_y), BATCH, task.seeds[0]):
                yield nn.functional.cross_entropy(network(data.train_x[rows]), data.train_y[rows])

        network.train()
        descend(list(network.parameters()), losses(), task.whole("steps"), task.number("rate"), clip=1.0, adam=True)
        network.eval()
        with torch.no_grad():
            for name, x, y in (("valid", data.valid_x[:1000], data.valid_y[:1000]), ("test", data.test_x, data.test_y)):
                found[name] = [float((network(x).argmax(1) == y).float().mean())]
        return found

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """Growth towards the past in three regimes, and accuracies."""
        kinds = sorted({m.task.text("sequence") for m in results})
        norms = list(dict.fromkeys(m.task.text("norm") for m in results))
        kind = kinds[0]
        runs = results.where(stage="test")[0].task
        valid = f"tanh networks of {UNITS} units, {' and '.join(kinds)} of images, {runs['steps']} steps, tuned"
        horizontal = [norm for norm in norms if norm.startswith("horizontal")]
        growth = {
            (n, r): paired_effect(self.at_best(results, f"slope {r}", sequence=kind, norm=n))
            for n in norms
            for r in REGIMES
        }
        score = {n: _pooled([self.at_best(results, "test", sequence=k, norm=n) for k in kinds]) for n in norms}
        tenth = "horizontal 0.1"
        gap = paired_effect(score[tenth], score["none"])
        grows = any(growth[n, "ordinary"].low > 0 for n in horizontal)
        degenerate = any(growth[n, "prefix"].low > self.threshold("degenerate growth") for n in horizontal)
        verdict = self._verdict(gap, grows, degenerate)
        slopes = "; ".join(
            f"{r} {', '.join(f'{n} {growth[n, r].value:+.2f}' for n in ('none', *horizontal))}" for r in REGIMES
        )
        listed = ", ".join(f"{NAMES.get(n, n)} {statistics.mean(v):.1%}" for n, v in score.items())
        shared = self.shared(results, "test", sequence=kind, norm=tenth)
        text = f"ln‖∂L/∂h_t‖ per step towards the past, {kind}: {slopes}. Test accuracy: {listed}; {tenth}: {shared}"
        judged = [
            ruled(
                ("002-19", "004-8", "000-28"),
                "does it explode horizontally?",
                verdict,
                f"{text}.",
                f"not on ordinary inputs; where inputs are equal across the batch the variance is 0 and it "
                f"does; {valid}",
                effect=interval(gap, "of accuracy, horizontal γ₀ = 0.1 − none"),
                seeds=gap.n,
                tests=3 * len(horizontal),
            ),
            by_effect(
                ("004-9",),
                "is it a fault in recurrent networks?",
                Effect(-gap.value, -gap.high, -gap.low, gap.p, gap.n),
                "Accuracy without − with it horizontally",
                valid,
                unit="of accuracy",
            ),
        ]
        if "LN" in norms:
            others = [n for n in norms if n not in ("none", "LN")]
            best = max(others, key=lambda n: statistics.mean(score[n]))
            judged.append(
                by_effect(
                    ("004-13", "004-20"),
                    "is LayerNorm the best normalizer here?",
                    paired_effect(score["LN"], score[best]),
                    f"LayerNorm {statistics.mean(score['LN']):.1%}, the best other ({NAMES.get(best, best)}) "
                    f"{statistics.mean(score[best]):.1%}",
                    valid,
                    unit="of accuracy",
                )
            )
        return tuple(judged)

    def _verdict(self, gap: Effect, grows: bool, degenerate: bool) -> LabVerdict:
        if gap.n < MINIMUM_SEEDS:
            return "UNDECIDED"
        if grows and gap.high < 0:
            return "CONFIRMED"
        if not grows and gap.low > -self.threshold("accuracy"):
            return "CONDITIONAL" if degenerate else "REFUTED"
        return "UNDECIDED"

    def figure(self, results: Results) -> Picture:
        """Gradient against the time step; accuracies."""
        kinds = sorted({m.task.text("sequence") for m in results})
        norms = list(dict.fromkeys(m.task.text("norm") for m in results))
        plots = []
        for regime in ("ordinary", "prefix"):
            series: list[Series] = []
            for k, norm in enumerate(norms):
                rate = self.best_rate(results, sequence=kinds[0], norm=norm)
                row = results.where(stage="test", sequence=kinds[0], norm=norm, rate=rate)[0].row(f"profile {regime}")
                series.append(line(NAMES.get(norm, norm), range(1, len(row) + 1), row, k))
            title = "ordinary inputs" if regime == "ordinary" else "first half equal across the batch"
            plots.append(Plot(title, "time step", "log₁₀ ‖∂L/∂h_t‖, last step 0", tuple(series)))
        bars = []
        for k, kind in enumerate(kinds):
            rows = [self.at_best(results, "test", sequence=kind, norm=norm) for norm in norms]
            within = [Interval(statistics.mean(r), min(r), max(r)) for r in rows]
            bars.append(
                points(kind, [i + 0.12 * k for i in range(len(norms))], [i.value for i in within], k, within=within)
            )
        plots.append(Plot("test accuracy", "", "", tuple(bars), ticks=tuple(NAMES.get(n, n) for n in norms)))
        return Picture(
            "Gradients at the start against the time step, and test accuracy after training, mean and range "
            "over seeds.",
            tuple(plots),
        )


class Cell(nn.Module):
    """h_t = tanh(N_h(W_h h) + N_x(W_x x) + b), then a linear classifier on the last h."""

    def __init__(self, inputs: int, classes: int, steps: int, seed: int, norm: str) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.recurrent = nn.Parameter(torch.linalg.qr(torch.randn(UNITS, UNITS, generator=g))[0])
        self.input = nn.Parameter(torch.randn(inputs, UNITS, generator=g) / math.sqrt(inputs))
        self.bias = nn.Parameter(torch.zeros(UNITS))
        self.head = nn.Parameter(torch.randn(UNITS, classes, generator=g) / math.sqrt(UNITS))
        self.of_input = self.of_hidden = self.of_sum = None
        if norm in ("vertical", "joint") or norm.startswith("horizontal"):
            start = float(norm.split()[1]) if norm.startswith("horizontal") else 1.0
            first = _per_step(steps, start)
            if norm == "joint":
                self.of_sum = first
            else:
                self.of_input = first
            if norm.startswith("horizontal"):
                self.of_hidden = _per_step(steps, start)
        self.layer = ns.nn.LayerNorm(UNITS) if norm == "LN" else None

    def states(self, x: Tensor, h: Tensor) -> list[Tensor]:
        """h_1 to h_T for x (n, T, inputs) and h_0 (n, units)."""
        found = []
        for t in range(x.shape[1]):
            of_x, of_h = x[:, t] @ self.input, h @ self.recurrent
            if self.of_input is not None:
                of_x = self.of_input(of_x, t)
            if self.of_hidden is not None:
                of_h = self.of_hidden(of_h, t)
            total = of_x + of_h
            if self.of_sum is not None:
                total = self.of_sum(total, t)
            if self.layer is not None:
                total = self.layer(total)
            h = torch.tanh(total + self.bias)
            found.append(h)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        return self.states(x, x.new_zeros(len(x), UNITS))[-1] @ self.head


def _per_step(steps: int, start: float) -> ns.nn.RecurrentBatchNorm:
    norm = ns.nn.RecurrentBatchNorm(UNITS, steps, bias=False)
    if norm.weight is not None:
        nn.init.constant_(norm.weight, start)
    return norm


def _sequences(task: Task) -> Samples:
    """Images as sequences (n, T, features)."""
    data = samples(task.text("data"), "half", 10_000, 2_000)
    if task.text("sequence") == "rows":
        shape: tuple[int, ...] = (data.shape[-2], data.shape[-1])
        return data.mapped(lambda x: x.reshape(len(x), *shape))
    order = torch.randperm(data.shape.numel(), generator=torch.Generator().manual_seed(0))
    return data.mapped(lambda x: x.flatten(1)[:, order, None])


def _gradients(network: Cell, data: Samples, seed: int) -> dict[str, list[float]]:
    """Slope and profile of ln‖∂L/∂h_t‖ in the three regimes; the running statistics stay."""
    x, y = data.train_x[:BATCH], data.train_y[:BATCH]
    half = x.shape[1] // 2
    same = x.clone()
    same[:, :half] = x[:1, :half]
    noise = 0.1 * torch.randn(BATCH, UNITS, generator=torch.Generator().manual_seed(seed))
    found: dict[str, list[float]] = {}
    network.train()
    for regime, given, h in (
        ("ordinary", x, 0 * noise),
        ("prefix", same, 0 * noise),
        ("prefix and noise", same, noise),
    ):
        with ns.pause_statistics(network):
            states = network.states(given, h)
            loss = nn.functional.cross_entropy(states[-1] @ network.head, y)
            norms = torch.stack([g.double().norm() for g in torch.autograd.grad(loss, states)])
        logs = norms.clamp(min=1e-200, max=1e200).nan_to_num(nan=1e200).log()
        found[f"profile {regime}"] = ((logs - logs[-1]) / math.log(10)).tolist()
        part = logs[: half if regime != "ordinary" else len(logs)]
        found[f"slope {regime}"] = [-float(slope(range(len(part)), part.numpy()))]
    return found


def _pooled(rows: Sequence[Sequence[float]]) -> list[float]:
    """Per seed, the mean over kinds of sequences."""
    return [statistics.mean(column) for column in zip(*rows, strict=True)]


EXPERIMENT = Recurrent()

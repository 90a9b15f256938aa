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
from normscope.lab.verdicts import by_effect, by_rivals, interval, ruled
from normscope.records import Interval, Judgement, LabVerdict, Picture, Plot, Series
from normscope.statistics import MINIMUM_SEEDS, Effect, paired_effect, slope

__all__ = ["EXPERIMENT", "Recurrent"]

UNITS, BATCH = 64, 64
CELLS = ("tanh", "LSTM")
# By profile: cell and sequences, the normalizers, and the steps.
Arms = tuple[tuple[str, str, tuple[str, ...], int], ...]
TANH = ("horizontal 0.1", "none", "LN", "vertical", "horizontal 1", "joint")
GATED = ("horizontal 0.1", "none", "LN")
ARMS: Mapping[ProfileName, Arms] = {
    "quick": (("tanh", "rows", TANH[:2], 15), ("LSTM", "rows", GATED[:2], 15)),
    "cpu": (("tanh", "pixels", TANH, 200), ("tanh", "rows", TANH, 400), ("LSTM", "rows", GATED, 400)),
    "full": tuple(
        (cell, kind, norms, 5000)
        for cell, norms in (
            ("tanh", (*TANH, "horizontal 0.3", "horizontal 0.01")),
            ("LSTM", (*GATED, "horizontal 1")),
        )
        for kind in ("pixels", "rows")
    ),
}
# The largest power of ten of a gradient in float32.
OVERFLOW = 38.0
REGIMES = ("ordinary", "prefix", "prefix and noise")
NAMES = {"none": "none", "vertical": "input to hidden", "joint": "joint", "LN": "LayerNorm"}


class Recurrent(Tuned):
    """A tanh network and an LSTM over the rows, or the permuted pixels, of images."""

    registration = register(
        "E01",
        statement="In recurrent networks Batch Normalization works vertically; horizontally, repeated rescaling "
        "makes gradients explode.",
        source="Laurent et al. 2015; Cooijmans et al. 2016 against",
        confirms="with it horizontally the gradient at the start grows towards the past on ordinary inputs, and the "
        "accuracy lies below that without",
        refutes="it does not grow, and with γ₀ = 0.1 the accuracy is not below that without by half a point; "
        "conditional if it then grows where inputs are equal across the batch",
        thresholds={"growth": 0, "accuracy": 0.005, "use": 0.005, "degenerate growth": 0.5},
        design="h_t = tanh(N_h(W_h h) + N_x(W_x x) + b), 64 units, orthogonal W_h; normalizers with statistics "
        "of every time step: none, N_x only (vertical), both "
        "(γ₀ = 1, 0.3, 0.1, 0.01), one for the sum (joint), LayerNorm of the sum. An LSTM of 64 units: none, both "
        "terms and the cell (γ₀ = 1, 0.1), LayerNorm of the same. Permuted pixels (64 steps) of the embedded digits "
        "and rows of MNIST (14 × 14). "
        "Adam, clipping at 1, batch 64, every arm at its own best rate, tuned with 2 seeds. Slope of "
        "ln‖∂L/∂(state at t)‖ towards the past, at the start and after training: on ordinary inputs; with the first "
        "half of the inputs equal across the batch; the same with noise of 0.1 on h₀. It is of no use if the accuracy "
        "with it certainly lies less than half a point above that without; LayerNorm is the best normalizer if it "
        "surely beats every other.",
        cuts=(
            "γ₀ = 0.3 and 0.01; in the LSTM γ₀ = 1",
            "the LSTM over pixels",
            "5000 steps down to 400, 200 over pixels",
            "10 seeds down to 6",
        ),
    )
    seeds: Mapping[ProfileName, int] = {"quick": 2, "cpu": 6, "full": 10}
    rates: Mapping[ProfileName, tuple[float, ...]] = {
        "quick": (3e-3,),
        "cpu": (3e-3, 1e-2),
        "full": (3e-4, 1e-3, 3e-3, 1e-2),
    }

    def arms(self, profile: ProfileName) -> list[Arm]:
        """Every normalizer in every cell on every kind of sequence."""
        return [
            {
                "data": available("mnist") if kind == "rows" and profile != "quick" else "digits",
                "net": "rnn",
                "cell": cell,
                "sequence": kind,
                "norm": norm,
                "steps": steps,
            }
            for cell, kind, norms, steps in ARMS[profile]
            for norm in norms
        ]

    def tuning(self, arm: Arm) -> Arm:
        """Half of the steps."""
        return dict(arm) | {"steps": int(arm["steps"]) // 2}

    def measure(self, task: Task) -> Numbers:
        """Gradients at the start, training, gradients after it."""
        data = _sequences(task)
        shape = data.train_x.shape
        kind = Cell if task["cell"] == "tanh" else Gated
        network = kind(shape[2], data.classes, shape[1], task.seeds[0], task.text("norm"))
        tested = task.text("stage") == "test"
        found = _gradients(network, data, task.seeds[0], "start") if tested else {}

        def losses() -> Iterator[Tensor]:
            for rows in batches(len(data.train_y), BATCH, task.seeds[0]):
                yield nn.functional.cross_entropy(network(data.train_x[rows]), data.train_y[rows])

        network.train()
        descend(list(network.parameters()), losses(), task.whole("steps"), task.number("rate"), clip=1.0, adam=True)
        if tested:
            found |= _gradients(network, data, task.seeds[0], "end")
        network.eval()
        with torch.no_grad():
            for name, x, y in (("valid", data.valid_x[:1000], data.valid_y[:1000]), ("test", data.test_x, data.test_y)):
                found[name] = [float((network(x).argmax(1) == y).float().mean())]
        return found

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """Cell by cell: growth towards the past in three regimes, use, and LayerNorm."""
        return tuple(j for cell in CELLS if results.where(cell=cell) for j in self._cell(results, cell))

    def _cell(self, results: Results, cell: str) -> list[Judgement]:
        kinds, norms = _kinds(results, cell), _norms(results, cell)
        steps = " and ".join(str(results.where(stage="test", cell=cell, sequence=k)[0].task["steps"]) for k in kinds)
        what = "tanh networks" if cell == "tanh" else "LSTMs"
        valid = f"{what} of {UNITS} units, {' and '.join(kinds)} of images, {steps} steps, tuned"
        horizontal = [norm for norm in norms if norm.startswith("horizontal")]
        growth = {
            (n, r): paired_effect(self.at_best(results, f"slope {r}", sequence=kinds[0], cell=cell, norm=n))
            for n in norms
            for r in (*(f"{regime} start" for regime in REGIMES), "ordinary end")
        }
        score = {n: self._score(results, cell, n) for n in norms}
        tenth = "horizontal 0.1"
        gap = paired_effect(score[tenth], score["none"])
        grows = any(growth[n, "ordinary start"].low > 0 for n in horizontal)
        degenerate = any(growth[n, "prefix start"].low > self.threshold("degenerate growth") for n in horizontal)
        slopes = "; ".join(
            f"{told} {', '.join(f'{n} {growth[n, r].value:+.2f}' for n in ('none', *horizontal))}" for r, told in TOLD
        )
        listed = ", ".join(f"{NAMES.get(n, n)} {statistics.mean(v):.1%}" for n, v in score.items())
        shared = self.shared(results, "test", sequence=kinds[0], cell=cell, norm=tenth)
        condition = (
            f"on ordinary inputs {'yes' if grows else 'no'}, where inputs are equal across the batch "
            f"{'yes' if degenerate else 'no'}"
        )
        judged = [
            ruled(
                ("002-19",),
                f"{cell}: does it explode horizontally?",
                self._verdict(gap, grows, degenerate),
                f"ln‖∂L/∂(state)‖ per step towards the past, {kinds[0]}: {slopes}.",
                f"{condition}; {valid}",
                effect=interval(gap, "of accuracy, horizontal γ₀ = 0.1 − none"),
                seeds=gap.n,
                tests=3 * len(horizontal),
            ),
            ruled(
                ("004-8", "000-28"),
                f"{cell}: is it of no use?",
                self._useless(gap),
                f"Test accuracy: {listed}; {tenth} over {kinds[0]}: {shared}.",
                valid,
                effect=interval(gap, "of accuracy, horizontal γ₀ = 0.1 − none"),
                seeds=gap.n,
                tests=1,
            ),
            by_effect(
                ("004-9",),
                f"{cell}: is it a fault in recurrent networks?",
                Effect(-gap.value, -gap.high, -gap.low, gap.p, gap.n),
                "Accuracy without − with it horizontally",
                valid,
                unit="of accuracy",
            ),
        ]
        if "LN" in norms:
            rivals = {NAMES.get(n, n): row for n, row in score.items() if n not in ("none", "LN")}
            text = f"Test accuracy: {listed}."
            question = f"{cell}: is LayerNorm the best normalizer here?"
            unit = "accuracy of LayerNorm"
            judged.append(by_rivals(("004-13", "004-20"), question, score["LN"], rivals, text, valid, unit=unit))
        return judged

    def _score(self, results: Results, cell: str, norm: str) -> list[float]:
        """Test accuracy per seed, the mean over kinds of sequences."""
        rows = [self.at_best(results, "test", sequence=k, cell=cell, norm=norm) for k in _kinds(results, cell)]
        return [statistics.mean(column) for column in zip(*rows, strict=True)]

    def _verdict(self, gap: Effect, grows: bool, degenerate: bool) -> LabVerdict:
        if gap.n < MINIMUM_SEEDS:
            return "UNDECIDED"
        if grows and gap.high < 0:
            return "CONFIRMED"
        if not grows and gap.low > -self.threshold("accuracy"):
            return "CONDITIONAL" if degenerate else "REFUTED"
        return "UNDECIDED"

    def _useless(self, gap: Effect) -> LabVerdict:
        if gap.n < MINIMUM_SEEDS or (gap.low <= 0 and gap.high >= self.threshold("use")):
            return "UNDECIDED"
        return "CONFIRMED" if gap.high < self.threshold("use") else "REFUTED"

    def figure(self, results: Results) -> Picture:
        """Gradient against the time step; accuracies."""
        kind = _kinds(results, "tanh")[0]
        plots = []
        for regime, title in (
            ("ordinary", f"tanh, {kind}: ordinary inputs"),
            ("prefix", "first half equal across the batch"),
        ):
            series: list[Series] = []
            for k, norm in enumerate(_norms(results, "tanh")):
                rows = self._profiles(results, kind, norm, f"profile {regime} start")
                series.append(line(NAMES.get(norm, norm), range(1, len(rows[0]) + 1), _means(rows), k))
            high = max(y for drawn in series for y in drawn.y)
            levels = (("float32 overflows", OVERFLOW),) if high == OVERFLOW else ()
            axis = "log₁₀ ‖∂L/∂h_t‖ at the start, last step 0"
            plots.append(Plot(title, "time step t", axis, tuple(series), levels=levels))
        norms = _norms(results, "tanh")
        groups = [(cell, kind) for cell in CELLS if results.where(cell=cell) for kind in _kinds(results, cell)]
        marks = []
        for k, (cell, kind) in enumerate(groups):
            present = _norms(results, cell)
            rows = [self.at_best(results, "test", cell=cell, sequence=kind, norm=norm) for norm in present]
            within = [Interval(statistics.mean(r), min(r), max(r)) for r in rows]
            places = [norms.index(norm) + 0.15 * (k - (len(groups) - 1) / 2) for norm in present]
            marks.append(points(f"{cell}, {kind}", places, [i.value for i in within], k, within=within))
        plots.append(
            Plot("after training", "", "test accuracy", tuple(marks), ticks=tuple(NAMES.get(n, n) for n in norms))
        )
        return Picture(
            "Gradients at the start against the time step, mean over seeds, and test accuracy, mean and range over "
            "seeds. Horizontal: hidden and input term, each with γ = 0.1 or 1 at the start.",
            tuple(plots),
        )

    def _profiles(self, results: Results, kind: str, norm: str, name: str) -> list[tuple[float, ...]]:
        arm: Arm = {"cell": "tanh", "sequence": kind, "norm": norm}
        found = results.where(stage="test", rate=self.best_rate(results, **arm), **arm)
        return [tuple(min(value, OVERFLOW) for value in m.row(name)) for m in found]


# The slopes that are told, and their names in a sentence.
TOLD = (
    ("ordinary start", "ordinary inputs"),
    ("prefix start", "first half equal across the batch"),
    ("prefix and noise start", "the same with noise on h₀"),
    ("ordinary end", "ordinary inputs after training"),
)


def _kinds(results: Results, cell: str) -> list[str]:
    return sorted({m.task.text("sequence") for m in results.where(cell=cell)})


def _norms(results: Results, cell: str) -> list[str]:
    return list(dict.fromkeys(m.task.text("norm") for m in results.where(cell=cell)))


def _means(rows: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.mean(column) for column in zip(*rows, strict=True)]


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

    def scores(self, state: Tensor) -> Tensor:
        """Class scores from the last state."""
        return state @ self.head

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        return self.scores(self.states(x, x.new_zeros(len(x), UNITS))[-1])


class Gated(nn.Module):
    """An LSTM, then a linear classifier on the last h; all arms of a seed have the same weights."""

    def __init__(self, inputs: int, classes: int, steps: int, seed: int, norm: str) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.lstm: nn.LSTM | ns.nn.BatchNormLSTM | ns.nn.LayerNormLSTM
        if norm == "none":
            self.lstm = nn.LSTM(inputs, UNITS)
        elif norm == "LN":
            self.lstm = ns.nn.LayerNormLSTM(inputs, UNITS)
        else:
            self.lstm = ns.nn.BatchNormLSTM(inputs, UNITS, max_length=steps, gain=float(norm.split()[1]))
        gates = [torch.linalg.qr(torch.randn(UNITS, UNITS, generator=g))[0] for _ in range(4)]
        drawn = {
            "weight_hh_l0": torch.cat(gates),
            "weight_ih_l0": torch.randn(4 * UNITS, inputs, generator=g) / math.sqrt(inputs),
        }
        with torch.no_grad():
            for name, parameter in self.lstm.named_parameters():
                if name in drawn:
                    parameter.copy_(drawn[name])
                elif name.startswith("bias"):
                    parameter.zero_()
        self.head = nn.Parameter(torch.randn(UNITS, classes, generator=g) / math.sqrt(UNITS))

    def states(self, x: Tensor, h: Tensor) -> list[Tensor]:
        """(h_t, c_t) side by side for x (n, T, inputs) and h_0 (n, units), step by step: only with batch statistics."""
        found, state = [], torch.cat([h, torch.zeros_like(h)], 1)
        for t in range(x.shape[1]):
            given = tuple(part[None].contiguous() for part in state.chunk(2, 1))
            _, (h, c) = self.lstm(x[None, :, t], given)
            state = torch.cat([h[0], c[0]], 1)
            found.append(state)
        return found

    def scores(self, state: Tensor) -> Tensor:
        """Class scores from the last state."""
        return state[:, :UNITS] @ self.head

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        outputs: Tensor = self.lstm(x.transpose(0, 1))[0]
        return self.scores(outputs[-1])


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


def _gradients(network: Cell | Gated, data: Samples, seed: int, when: str) -> dict[str, list[float]]:
    """Slope and profile of ln‖∂L/∂(state at t)‖ in the three regimes; the running statistics stay."""
    x, y = data.train_x[:BATCH], data.train_y[:BATCH]
    half = x.shape[1] // 2
    same = x.clone()
    same[:, :half] = x[:1, :half]
    noise = 0.1 * torch.randn(BATCH, UNITS, generator=torch.Generator().manual_seed(seed))
    found: dict[str, list[float]] = {}
    network.train()
    for regime, given, h in zip(REGIMES, (x, same, same), (0 * noise, 0 * noise, noise), strict=True):
        with ns.pause_statistics(network):
            states = network.states(given, h)
            loss = nn.functional.cross_entropy(network.scores(states[-1]), y)
            norms = torch.stack([g.double().norm() for g in torch.autograd.grad(loss, states)])
        logs = norms.clamp(min=1e-200, max=1e200).nan_to_num(nan=1e200).log()
        found[f"profile {regime} {when}"] = ((logs - logs[-1]) / math.log(10)).tolist()
        part = logs[: half if regime != "ordinary" else len(logs)]
        found[f"slope {regime} {when}"] = [-float(slope(range(len(part)), part.numpy()))]
    return found


EXPERIMENT = Recurrent()

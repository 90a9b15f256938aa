"""E02: sequences of unequal length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import normscope as ns
from normscope.lab.catalogue import register
from normscope.lab.experiment import Numbers, ProfileName, Results, Task
from normscope.lab.sketch import line, spread
from normscope.lab.training import Arm, Tuned, descend
from normscope.lab.verdicts import by_effect, by_equivalence, told
from normscope.records import Judgement, Picture, Plot, Series
from normscope.statistics import paired_effect

__all__ = ["EXPERIMENT", "Ragged"]

STEPS: Mapping[ProfileName, int] = {"quick": 8, "cpu": 300, "full": 10_000}
UNITS, BATCH, CLASSES, FEATURES = 32, 64, 4, 2
SHORTEST, LONGEST, BEYOND = 5, 40, 80
# Of N(0, 2): a quarter lies above.
QUARTER = 0.6744898 * 2**0.5
# Lengths that are told apart in the test: (from, to).
RANGES = ((5, 10), (11, 20), (21, 40), (41, 80))
NAMES = {"none": "none", "BN": "BatchNorm", "LN": "LayerNorm"}


class Ragged(Tuned):
    """An LSTM that adds two marked inputs, in batches of sequences of very different lengths."""

    registration = register(
        "E02",
        statement="In recurrent networks statistics per step come from too few samples at late steps, and there are "
        "none beyond the longest sequence.",
        source="a tutorial; Ba, Kiros & Hinton 2016; Cooijmans et al. 2016 against",
        confirms="the accuracy with LayerNorm − Batch Normalization is larger on sequences of 21 to 40 steps than on "
        "those of 5 to 10",
        refutes="it is smaller",
        thresholds={"difference": 0, "beyond": 0.01},
        design="Sequences of a normal number and a mark; one step of the first half is marked and one of the second, "
        "and the quarter that the sum of their numbers falls into is to be told after the last; lengths 5 + a "
        "geometric number of mean 10, at most 40, in packed batches of 64; an LSTM of 32 units, plain, with batch "
        "normalization (statistics of every step over the sequences that go on, the last step's beyond the longest "
        "seen), and with layer normalization. Adam, clipping at 1, two rates tuned with 2 seeds for every arm. Test "
        "sequences of 5 to 80 steps, 200 in each of four ranges.",
        cuts=("10 000 steps down to 300", "10 seeds down to 8", "statistics shared over time"),
    )
    seeds: Mapping[ProfileName, int] = {"quick": 2, "cpu": 8, "full": 10}
    rates: Mapping[ProfileName, tuple[float, ...]] = {
        "quick": (1e-2,),
        "cpu": (3e-3, 1e-2),
        "full": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    }

    def arms(self, profile: ProfileName) -> list[Arm]:
        """All three."""
        return [{"net": "lstm", "norm": norm, "steps": STEPS[profile]} for norm in NAMES]

    def tuning(self, arm: Arm) -> Arm:
        """Half of the steps."""
        return dict(arm) | {"steps": int(arm["steps"]) // 2}

    def measure(self, task: Task) -> Numbers:
        """Train, and test range by range."""
        torch.manual_seed(task.seeds[0])
        network = _Adding(task.text("norm"))
        g = torch.Generator().manual_seed(50_000 + task.seeds[0])

        def losses() -> Iterator[Tensor]:
            while True:
                sequences, y = _drawn(_lengths(BATCH, g), g)
                yield nn.functional.cross_entropy(network(sequences), y)

        network.train()
        descend(list(network.parameters()), losses(), task.whole("steps"), task.number("rate"), clip=1.0, adam=True)
        network.eval()
        held = torch.Generator().manual_seed(1)
        valid = [_accuracy(network, _lengths(400, held), held)]
        test = [_accuracy(network, torch.randint(a, b + 1, (200,), generator=held), held) for a, b in RANGES]
        going = _going_on(torch.Generator().manual_seed(2))
        return {"valid": valid, "by length": test, "test": [sum(test[:3]) / 3], "going on": going}

    def _rows(self, results: Results, k: int) -> dict[str, list[float]]:
        """Normalizer → the accuracy in a range of lengths, per seed."""
        found = {}
        for norm, name in NAMES.items():
            runs = results.where(stage="test", norm=norm, rate=self.best_rate(results, norm=norm))
            found[name] = [m.row("by length")[k] for m in sorted(runs, key=lambda m: m.task.seeds)]
        return found

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """Late steps, and steps beyond."""
        task = results.where(stage="test")[0].task
        valid = f"adding over 5 to 40 steps, LSTM of {UNITS} units, {task['steps']} steps of {BATCH}, tuned"
        rows = [self._rows(results, k) for k in range(len(RANGES))]
        behind = [[a - b for a, b in zip(r["LayerNorm"], r["BatchNorm"], strict=True)] for r in rows]
        listed = "; ".join(f"{a} to {b} steps: {told(r)}" for (a, b), r in zip(RANGES, rows, strict=True))
        going = next(iter(results)).row("going on")
        return (
            by_effect(
                ("000-28",),
                "does it fall behind LayerNorm on longer sequences?",
                paired_effect(behind[2], behind[0]),
                f"Accuracy, {listed}. Of {BATCH} sequences {going[9]:.0f} reach step 10, {going[19]:.0f} step 20, "
                f"{going[LONGEST - 1]:.1f} step {LONGEST}",
                valid,
                unit="of accuracy, LayerNorm − BatchNorm, long − short",
            ),
            by_equivalence(
                (),
                "do the last step's statistics serve beyond the longest sequence?",
                paired_effect(rows[3]["BatchNorm"], rows[2]["BatchNorm"]),
                f"Accuracy with BatchNorm, {listed}",
                valid,
                unit="of accuracy, beyond − 21 to 40 steps",
                margin=self.threshold("beyond"),
            ),
        )

    def figure(self, results: Results) -> Picture:
        """Accuracy against length, and how many sequences are left."""
        series: list[Series] = []
        middles = [(a + b) / 2 for a, b in RANGES]
        for k, name in enumerate(NAMES.values()):
            rows = list(zip(*(self._rows(results, r)[name] for r in range(len(RANGES))), strict=True))
            series += spread(name, middles, rows, k)
        going = next(iter(results)).row("going on")
        return Picture(
            "Accuracy of adding two marked inputs by the length of the sequence, mean and range over seeds; how many "
            "sequences of a batch reach a step.",
            (
                Plot("adding", "steps", "accuracy", tuple(series)),
                Plot("samples per step", "step", "sequences", (line("", range(1, len(going) + 1), going),)),
            ),
        )


class _Adding(nn.Module):
    def __init__(self, norm: str) -> None:
        super().__init__()
        if norm == "BN":
            self.lstm: nn.Module = ns.nn.BatchNormLSTM(FEATURES, UNITS, max_length=LONGEST)
        else:
            self.lstm = (ns.nn.LayerNormLSTM if norm == "LN" else nn.LSTM)(FEATURES, UNITS)
        self.head = nn.Linear(UNITS, CLASSES)

    def forward(self, x: PackedSequence) -> Tensor:
        """Packed sequences to class scores in the order they were given in."""
        _, (h, _) = self.lstm(x)
        scores: Tensor = self.head(h[-1])
        return scores


def _lengths(count: int, g: torch.Generator) -> Tensor:
    extra = torch.empty(count).geometric_(0.1, generator=g).long() - 1
    return (SHORTEST + extra).clamp(max=LONGEST)


def _drawn(lengths: Tensor, g: torch.Generator) -> tuple[PackedSequence, Tensor]:
    """Sequences with a mark in either half, and the quarter of N(0, 2) that the marked numbers' sum falls into."""
    count = len(lengths)
    x = torch.zeros(int(lengths.max()), count, FEATURES)
    x[:, :, 0] = torch.randn(x.shape[:2], generator=g)
    half, total = lengths // 2, torch.zeros(count)
    for start, length in ((torch.zeros_like(half), half), (half, lengths - half)):
        place = start + (torch.rand(count, generator=g) * length).long()
        x[place, range(count), 1] = 1.0
        total += x[place, range(count), 0]
    y = torch.bucketize(total, torch.tensor([-QUARTER, 0.0, QUARTER]))
    return pack_padded_sequence(x, lengths, enforce_sorted=False), y


@torch.no_grad()
def _accuracy(network: _Adding, lengths: Tensor, g: torch.Generator) -> float:
    sequences, y = _drawn(lengths, g)
    return float((network(sequences).argmax(1) == y).float().mean())


def _going_on(g: torch.Generator) -> list[float]:
    """How many sequences of a batch reach every step, the mean over 50 batches."""
    steps = torch.arange(1, LONGEST + 1)
    counts = torch.stack([(_lengths(BATCH, g)[:, None] >= steps).sum(0) for _ in range(50)])
    found: list[float] = counts.float().mean(0).tolist()
    return found


EXPERIMENT = Ragged()

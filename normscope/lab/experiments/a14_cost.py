"""A14: what Batch Normalization computes, and how often it reads the data."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from normscope.lab.catalogue import register
from normscope.lab.experiment import Exact, Numbers, Results, Task
from normscope.lab.sketch import points
from normscope.lab.verdicts import ruled
from normscope.records import Interval, Judgement, LabVerdict, Picture, Plot
from normscope.statistics import median_interval

__all__ = ["EXPERIMENT", "Cost"]

PRODUCTS = (".mm", ".bmm", "addmm", "matmul", "conv", "linear", "einsum", ".dot")
# Sizes in MiB, from what lies in the cache to what does not.
SIZES = {"small": (0.25, 32.0), "whole": (0.25, 4.0, 32.0, 192.0)}
PAIRS = 15


class Cost(Exact):
    """The operators of one training step of torch's BatchNorm, and its time against scaling the same tensor."""

    registration = register(
        "A14",
        statement="Batch Normalization is slow because of many matrix products; because it reads the data twice.",
        source="tutorials; Gitman & Ginsburg 2017",
        confirms="a matrix product is among its operators; out of the cache its forward takes 1.5 times as long "
        "as a scaling, which "
        "reads once and writes once",
        refutes="no product is; or it takes less",
        thresholds={"two passes": 1.5},
        design="Operators that reach torch's dispatcher, forward and backward. Time of batch_norm in training "
        "over x·2 into the same "
        "kind of buffer, interleaved, 15 pairs after warm-up, median of ratios with its interval, one thread, "
        "from 0.25 to 192 MiB.",
    )

    def measure(self, task: Task) -> Numbers:
        """Operators counted, and ratios of times."""
        sizes = SIZES[task.text("size")]
        names = _operators()
        found: dict[str, float | list[float]] = {
            "operators": float(len(names)),
            "products": float(sum(any(p in name for p in PRODUCTS) for name in names)),
            "sizes": list(sizes),
        }
        for size in sizes:
            found[f"time ratio {size:g}"] = _ratios(size)
        return found

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """No products; reads twice."""
        run = self.first(results)
        largest = run.row("sizes")[-1]
        ratio = median_interval(run.row(f"time ratio {largest:g}"))
        bar = self.threshold("two passes")
        verdict: LabVerdict = "CONFIRMED" if ratio.low >= bar else "REFUTED" if ratio.high < bar else "UNDECIDED"
        products = run.number("products")
        return (
            ruled(
                ("000-8",),
                "does it multiply matrices?",
                "REFUTED" if products == 0 else "CONFIRMED",
                f"Of {run.number('operators'):.0f} operators of a training step {products:.0f} are products: "
                f"it is sums and "
                "element-wise work, bound by memory. Caffe's layer does broadcast by products; the remark "
                "fits that code.",
                "torch on this CPU; what share of a network's time it takes is for D01",
            ),
            ruled(
                ("002-15",),
                "does it read the data twice?",
                verdict,
                f"At {largest:g} MiB it takes {ratio.value:.2f} times as long as scaling the tensor "
                f"({ratio.low:.2f} to {ratio.high:.2f}).",
                f"forward in training, float32, one thread, {largest:g} MiB",
                effect=Interval(ratio.value, ratio.low, ratio.high, "times a scaling"),
                seeds=PAIRS,
                tests=1,
            ),
        )

    def figure(self, results: Results) -> Picture:
        """Time against size."""
        run = self.first(results)
        sizes = run.row("sizes")
        medians = [median_interval(run.row(f"time ratio {size:g}")) for size in sizes]
        within = [Interval(*m) for m in medians]
        series = (points("", sizes, [m.value for m in medians], within=within),)
        plot = Plot(
            "BatchNorm, forward in training",
            "MiB",
            "time / time of a scaling",
            series,
            x_log=True,
            y_log=True,
            levels=(("registered threshold", self.threshold("two passes")),),
        )
        return Picture(
            "Time of Batch Normalization, forward in training, in units of one reading and one writing of its tensor, "
            "against the tensor's size: median with its interval.",
            (plot,),
        )


def _operators() -> set[str]:
    x = torch.randn(8, 4, 6, 6, requires_grad=True)
    weight, bias = torch.ones(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    with _Record() as record:
        y = F.batch_norm(x, torch.zeros(4), torch.ones(4), weight, bias, training=True)
        torch.autograd.grad(y, (x, weight, bias), torch.randn_like(y))
    seen: set[str] = record.seen
    return seen


class _Record(TorchDispatchMode):
    """Notes the name of every operator."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(str(func))
        return func(*args, **(kwargs or {}))


def _ratios(size: float) -> list[float]:
    x = torch.randn(8, 16, round(size * 2**20 / 4 / 128), 1)
    out = torch.empty_like(x)

    def normalized() -> Tensor:
        return F.batch_norm(x, None, None, training=True)

    def scaled() -> Tensor:
        return torch.mul(x, 2, out=out) if size < 1 else x * 2  # a fresh result for both where fresh memory costs

    repeats = max(1, round(4 / size))
    pairs = [(_time(normalized, repeats), _time(scaled, repeats)) for _ in range(PAIRS + 3)][3:]
    return [a / b for a, b in pairs]


def _time(f: Callable[[], Tensor], repeats: int) -> float:
    clocks = []
    for _ in range(repeats):
        start = time.perf_counter()
        f()
        clocks.append(time.perf_counter() - start)
    return statistics.median(clocks)


EXPERIMENT = Cost()

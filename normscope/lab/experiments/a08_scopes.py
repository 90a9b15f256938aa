"""A08: which values share one mean and variance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import normscope as ns
from normscope.lab.catalogue import register
from normscope.lab.experiment import Exact, Numbers, Results, Task
from normscope.lab.sketch import bars
from normscope.lab.verdicts import identity, tiny
from normscope.records import Judgement, Picture, Plot

__all__ = ["EXPERIMENT", "Scopes"]

N, C, H, W = 6, 8, 5, 4
# Name → scope, sizes of splits, values in S by the claim.
SETS: dict[str, tuple[str, dict[str, Any], int]] = {
    "BatchNorm": ("[n] c [h w]", {}, H * W * N),
    "LayerNorm": ("n [c h w]", {}, C * H * W),
    "InstanceNorm": ("n c [h w]", {}, H * W),
    "GroupNorm": ("n (g [c]) [h w]", {"g": 2}, C // 2 * H * W),
}
BATCH_FREE = ("LayerNorm", "InstanceNorm", "GroupNorm")


class Scopes(Exact):
    """6 instances of 8 planes of 5 × 4, and a fully connected layer; float64."""

    registration = register(
        "A08",
        statement="BatchNorm, LayerNorm, InstanceNorm and GroupNorm differ in the set S of values that share a "
        "mean and "
        "a variance, and in nothing else.",
        source="Wu & He 2018, §3.1",
        confirms="the sets have the claimed sizes, the identities between the four hold, only BatchNorm depends on the "
        "batch, and InstanceNorm over one value is refused",
        refutes="any of these fails",
        thresholds={"identity": 1e-12},
        design="S is counted by moving one value and counting the outputs that move. GroupNorm of one group "
        "against LayerNorm over "
        "(c, h, w), of C groups against InstanceNorm; nn.LayerNorm(C) on channels-last data against both; every sample "
        "alone and in a batch, bit for bit; InstanceNorm over planes of 1 × 1.",
    )

    def measure(self, task: Task) -> Numbers:
        """Counts and differences."""
        x = torch.randn(N, C, H, W, dtype=torch.float64)
        found: dict[str, float | list[float]] = {
            "counted": [float(_reached(x, scope, sizes)) for scope, sizes, _ in SETS.values()],
            "fully connected": float(_reached(x[:, :, 0, 0].contiguous(), "[n] c", {})),
            "GN(1) − LN": _differ(x, ("n (g [c]) [h w]", {"g": 1}), ("n [c h w]", {})),
            "GN(C) − IN": _differ(x, ("n (g [c]) [h w]", {"g": C}), ("n c [h w]", {})),
            "alone": float(sum(_alone(x, name) for name in BATCH_FREE)),
            "alone, BatchNorm": float(_alone(x, "BatchNorm")),
        }
        last = nn.functional.layer_norm(x.permute(0, 2, 3, 1), (C,)).permute(0, 3, 1, 2)
        found["nn.LayerNorm(C) − LN"] = float((last - ns.normalize(x, "n [c h w]")).abs().max())
        found |= _one_value(x[:, :, :1, :1])
        return found

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """Counts, identities, refusal."""
        run, bar = self.first(results), self.threshold("identity")
        counted = run.row("counted")
        right = [c == size for c, (_, _, size) in zip(counted, SETS.values(), strict=True)]
        sizes = ", ".join(f"{name} {c:.0f}" for name, c in zip(SETS, counted, strict=True))
        counts = (
            f"Values in S for {N} instances of {C} planes of {H} × {W}: {sizes}; "
            f"fully connected {run.number('fully connected'):.0f}."
        )
        same = max(run.number("GN(1) − LN"), run.number("GN(C) − IN"))
        free = run.number("alone") == 0 and run.number("alone, BatchNorm") > 0
        only = (
            f"{counts} GroupNorm of one group is LayerNorm and of {C} groups InstanceNorm, to {tiny(same)}; "
            f"nn.LayerNorm({C}) on channels-last data is another map (difference "
            f"{run.number('nn.LayerNorm(C) − LN'):.1f}). "
            "Only BatchNorm depends on companions. Besides S, it differs by what it remembers for inference."
        )
        refused = run.number("refused") == 1 and run.number("forced") == 0
        return (
            identity(
                ("004-6", "004-7", "004-12", "004-14", "003-10"),
                "how many values are in S?",
                all(right) and run.number("fully connected") == N,
                counts,
            ),
            identity(
                ("004-5", "004-16", "004-19"), "do they differ in S only?", all(right) and same < bar and free, only
            ),
            identity(
                ("004-15",),
                "InstanceNorm over one value?",
                refused,
                "Refused with an error. Forced by given moments, the output is β whatever the input: "
                f"{run.number('forced'):.0f} values differ. Over the time of a whole sequence it is defined.",
            ),
        )

    def figure(self, results: Results) -> Picture:
        """Sizes of S."""
        plot = Plot(
            "values that share a mean",
            "",
            "",
            (bars("", range(4), self.first(results).row("counted")),),
            ticks=tuple(SETS),
        )
        return Picture(f"The set S for {N} instances of {C} planes of {H} × {W}.", (plot,))


def _reached(x: Tensor, scope: str, sizes: dict[str, Any]) -> int:
    """How many outputs move when one input does: all of its S."""
    moved = x.clone()
    moved.view(-1)[0] += 1
    return int((ns.normalize(x, scope, **sizes) != ns.normalize(moved, scope, **sizes)).sum())


def _differ(x: Tensor, a: tuple[str, dict[str, Any]], b: tuple[str, dict[str, Any]]) -> float:
    return float((ns.normalize(x, a[0], **a[1]) - ns.normalize(x, b[0], **b[1])).abs().max())


def _alone(x: Tensor, name: str) -> int:
    scope, sizes, _ = SETS[name]
    alone = torch.cat([ns.normalize(sample[None], scope, **sizes) for sample in x])
    return int((alone != ns.normalize(x, scope, **sizes)).sum())


def _one_value(x: Tensor) -> dict[str, float]:
    """Whether planes of one value are refused, and how many outputs differ from β when it is forced."""
    try:
        ns.normalize(x, "n c [h w]")
        refused = 0.0
    except ns.DegenerateScopeError:
        refused = 1.0
    bias = torch.arange(C, dtype=x.dtype)
    mean = x[:, :, 0, 0]
    forced = ns.normalize(
        x, "n c [h w]", weight=torch.ones(C, dtype=x.dtype), bias=bias, moments=(mean, torch.zeros_like(mean))
    )
    return {"refused": refused, "forced": float((forced[:, :, 0, 0] != bias).sum())}


EXPERIMENT = Scopes()

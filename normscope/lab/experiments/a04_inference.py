"""A04: at inference it is a fixed affine map: foldable, and blind to the rest of the batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import normscope as ns
from normscope.lab.catalogue import register
from normscope.lab.experiment import Exact, Numbers, Results, Task
from normscope.lab.sketch import bars
from normscope.lab.verdicts import identity
from normscope.records import Judgement, Picture, Plot

__all__ = ["EXPERIMENT", "Inference"]

SHAPE, EPS = (8, 6, 9, 9), 1e-5


class Inference(Exact):
    """A convolution and BatchNorm with statistics, γ and β off their initial values, float32."""

    registration = register(
        "A04",
        statement="At inference Batch Normalization is γ/√(Var + ε)·x + (β − γE/√(Var + ε)) and depends on its input "
        "alone.",
        source="Ioffe & Szegedy 2015, §3.1 and Algorithm 2",
        confirms="folded into the convolution in front it gives the same output, and a sample's output is the same "
        "bit for bit alone and in any batch; in training it is not",
        refutes="folding changes the output, or companions do",
        thresholds={"folding": 1e-5, "training": 1e-3},
        design="Random convolution 6 → 6, BatchNorm2d with random γ, β and running statistics; folded by the formula; "
        "every sample alone, and in batches of other samples.",
    )

    def measure(self, task: Task) -> Numbers:
        """Differences."""
        x = torch.randn(SHAPE)
        conv = nn.Conv2d(6, 6, 3).requires_grad_(False)
        mean, weight, bias, var = *torch.randn(3, 6), 0.5 + torch.rand(6)
        received = conv(x)

        def infer(batch: Tensor) -> Tensor:
            return ns.functional.batch_norm(batch, mean, var, weight, bias, training=False, eps=EPS)

        def train(batch: Tensor) -> Tensor:
            return ns.functional.batch_norm(batch, None, None, weight, bias, training=True, eps=EPS)

        whole, scale = infer(received), weight / (var + EPS).sqrt()
        offset = torch.zeros(6) if conv.bias is None else conv.bias
        folded = nn.functional.conv2d(x, conv.weight * scale[:, None, None, None], scale * (offset - mean) + bias)
        alone = torch.cat([infer(sample[None]) for sample in received])
        others = infer(torch.cat((received[:1], 100 * torch.randn(3, *received.shape[1:]))))[:1]
        trained = [train(received)[:1], train(torch.cat((received[:1], 2 * received[1:])))[:1]]
        return {
            "folding": _relative(folded, whole),
            "alone": float((alone != whole).sum()),
            "others": float((others != whole[:1]).sum()),
            "training": _relative(trained[1], trained[0]),
        }

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """Folding to rounding, companions to the bit."""
        run = self.first(results)
        fold, training = run.number("folding"), run.number("training")
        changed = run.number("alone") + run.number("others")
        folds = fold < self.threshold("folding")
        blind = changed == 0 and training > self.threshold("training")
        seen = (
            f"{changed:.0f} values differ between a sample alone and in a batch; in training, other companions "
            f"change it by {training:.0%}."
        )
        return (
            identity(
                ("001-30",), "does it fold?", folds, f"Folded into the convolution: relative difference {fold:.1e}."
            ),
            identity(("001-21", "000-13"), "does a sample's output depend on it alone?", blind, seen),
        )

    def figure(self, results: Results) -> Picture:
        """What companions change."""
        run = self.first(results)
        sizes = [max(run.number(name), 1e-9) for name in ("folding", "training")]
        plot = Plot(
            "relative change of the output",
            "",
            "",
            (bars("", (0, 1), sizes),),
            y_log=True,
            ticks=("by folding", "by companions, in training"),
        )
        return Picture(
            "Folding changes nothing but rounding; in training the rest of the batch changes the output.", (plot,)
        )


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


EXPERIMENT = Inference()

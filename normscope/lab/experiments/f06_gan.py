"""F06: generative adversarial networks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normscope.lab.catalogue import register
from normscope.lab.experiment import Numbers, ProfileName, Results, Task
from normscope.lab.networks import Convolutional, norm_2d
from normscope.lab.samples import batches, samples
from normscope.lab.sketch import beside
from normscope.lab.training import Arm, Tuned, train
from normscope.lab.verdicts import by_effect, by_rivals, ruled, told
from normscope.records import Judgement, Picture
from normscope.statistics import mcnemar, paired_effect

__all__ = ["EXPERIMENT", "Adversarial"]

GENERATORS: Mapping[ProfileName, tuple[str, ...]] = {
    "quick": ("none", "BN"),
    "cpu": ("none", "BN", "IN", "LN"),
    "full": ("none", "BN", "IN", "LN", "GN"),
}
STEPS: Mapping[ProfileName, int] = {"quick": 15, "cpu": 600, "full": 20_000}
CRITICS = ("none", "BN")
BATCH, NOISE, CLASSES = 64, 16, 10


class Adversarial(Tuned):
    """Small convolutional networks that draw digits, and others that tell them from real ones."""

    registration = register(
        "F06",
        statement="Batch Normalization is unfit for generative adversarial networks: slower, less stable; "
        "InstanceNorm comes first.",
        source="tutorials; Radford et al. 2016 (DCGAN) against",
        confirms="the log of the Fréchet distance with it in the generator − without, each tuned, the mean over the "
        "discriminators, lies above 0",
        refutes="it lies below 0",
        thresholds={"difference": 0, "collapsed": 0.5},
        design="Digits of 8 × 8. Generator: 16 normal numbers, a linear map to 32 × 2 × 2, twice doubled and convolved "
        "with 32 channels, then one channel and a sigmoid. Discriminator: convolutions of 32 and 64 channels of stride "
        "2, real and drawn batches apart. Normalizers behind the inner convolutions of either; the losses of "
        "Goodfellow et al. 2014, not saturating; Adam with β₁ = 0.5, batch 64, two rates tuned with 2 seeds for every "
        "pair. Fréchet distance of 1000 drawn and 1000 real digits in the last features of one classifier trained on "
        "digits; collapsed: what it sees has less than half of ln 10 of entropy over classes, or is not finite.",
        cuts=("GroupNorm", "20 000 steps down to 600", "10 seeds down to 6", "rings of Gaussians"),
    )
    seeds: Mapping[ProfileName, int] = {"quick": 2, "cpu": 6, "full": 10}
    rates: Mapping[ProfileName, tuple[float, ...]] = {
        "quick": (1e-3,),
        "cpu": (3e-4, 1e-3),
        "full": (1e-4, 3e-4, 1e-3, 3e-3),
    }

    def arms(self, profile: ProfileName) -> list[Arm]:
        """Every generator with every discriminator."""
        return [
            {"net": "gan", "norm": norm, "critic": critic, "steps": STEPS[profile]}
            for critic in CRITICS
            for norm in GENERATORS[profile]
        ]

    def baseline(self, arm: Arm) -> Arm:
        """None: each at its own best rate."""
        return arm

    def tuning(self, arm: Arm) -> Arm:
        """Half of the steps."""
        return dict(arm) | {"steps": int(arm["steps"]) // 2}

    def measure(self, task: Task) -> Numbers:
        """Train both, and judge what is drawn."""
        data, seed = samples("digits", "image"), task.seeds[0]
        torch.manual_seed(seed)
        generator, critic = _Generator(task.text("norm")), _critic(task.text("critic"))
        rate, g = task.number("rate"), torch.Generator().manual_seed(seed)
        of_generator, of_critic = (
            torch.optim.Adam(part.parameters(), rate, betas=(0.5, 0.999)) for part in (generator, critic)
        )
        order = batches(len(data.train_y), BATCH, seed)
        for _ in range(task.whole("steps")):
            drawn = generator(torch.randn(BATCH, NOISE, generator=g))
            of_critic.zero_grad()
            told_real, told_drawn = critic(data.train_x[next(order)]), critic(drawn.detach())
            (F.softplus(-told_real).mean() + F.softplus(told_drawn).mean()).backward()  # type: ignore[no-untyped-call]
            of_critic.step()
            of_generator.zero_grad()
            F.softplus(-critic(drawn)).mean().backward()  # type: ignore[no-untyped-call]
            of_generator.step()
        with torch.no_grad():
            drawn = generator.eval()(torch.randn(1000, NOISE, generator=torch.Generator().manual_seed(0)))
        distance, entropy = _judged(_classifier(), drawn, data.train_x[:1000])
        return {"distance": [distance], "valid": [-distance], "entropy": [entropy]}

    def _rows(self, results: Results, name: str, critic: str) -> dict[str, tuple[float, ...]]:
        norms = results.texts("norm")
        return {norm: self.at_best(results, name, norm=norm, critic=critic) for norm in norms}

    def judge(self, results: Results) -> tuple[Judgement, ...]:
        """Distance, collapse, and InstanceNorm."""
        task = results.where(stage="test")[0].task
        valid = f"digits of 8 × 8, small convolutional networks, {task['steps']} steps of {BATCH}, tuned"
        rows = {critic: self._rows(results, "distance", critic) for critic in CRITICS}
        mean = {
            norm: [sum(v) / len(v) for v in zip(*(rows[c][norm] for c in CRITICS), strict=True)] for norm in rows["BN"]
        }
        listed = "; ".join(f"discriminator {critic}: {told(found, '.2f')}" for critic, found in rows.items())
        entropy = {n: self.at_best(results, "entropy", norm=n, critic="none") for n in ("BN", "none")}
        bar = self.threshold("collapsed") * math.log(CLASSES)
        lost = [[not v > bar for v in entropy[n]] for n in ("BN", "none")]
        main = by_effect(
            ("000-15", "000-14"),
            "is it worse in the generator?",
            paired_effect(mean["BN"], mean["none"]),
            f"ln of the Fréchet distance by generator, {listed}; collapsed with it {sum(lost[0])} of {len(lost[0])}, "
            f"without {sum(lost[1])} (McNemar p = {mcnemar(*lost):.2g})",
            valid,
            unit="ln of the distance, with − without",
        )
        judged = [main]
        if "IN" in mean:
            rivals = {n: [-v for v in mean[n]] for n in ("BN", "LN")}
            judged.append(
                by_rivals(
                    ("004-20",),
                    "is InstanceNorm the best normalizer of the generator?",
                    [-v for v in mean["IN"]],
                    rivals,
                    f"ln of the Fréchet distance: {told(mean, '.2f')}.",
                    valid,
                    unit="−ln of the distance",
                )
            )
        else:
            judged.append(ruled(("004-20",), "is InstanceNorm the best?", "UNDECIDED", "It was not run.", valid))
        return tuple(judged)

    def figure(self, results: Results) -> Picture:
        """Distances of all pairs."""
        groups = {f"discriminator {critic}": self._rows(results, "distance", critic) for critic in CRITICS}
        plot = beside("normalizer of the generator", "ln of the Fréchet distance", groups)
        return Picture("Distance of drawn from real digits, mean and range over seeds, every pair tuned.", (plot,))


class _Generator(nn.Module):
    def __init__(self, norm: str) -> None:
        super().__init__()
        self.first = nn.Linear(NOISE, 128)
        self.layers = nn.Sequential(
            nn.Upsample(scale_factor=2), nn.Conv2d(32, 32, 3, padding=1), norm_2d(norm, 32), nn.ReLU(),
            nn.Upsample(scale_factor=2), nn.Conv2d(32, 32, 3, padding=1), norm_2d(norm, 32), nn.ReLU(),
            nn.Conv2d(32, 1, 3, padding=1), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, z: Tensor) -> Tensor:
        """(n, 16) to (n, 1, 8, 8)."""
        x: Tensor = self.layers(self.first(z).unflatten(1, (32, 2, 2)).relu())
        return x


def _critic(norm: str) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(32, 64, 3, 2, 1), norm_2d(norm, 64), nn.LeakyReLU(0.2),
        nn.Flatten(), nn.Linear(256, 1),
    )  # fmt: skip


@lru_cache(maxsize=1)
def _classifier() -> Convolutional:
    """One for all runs: 300 steps on digits, the random state of the caller untouched."""
    data = samples("digits", "image")
    network = Convolutional(1, CLASSES, 0, norm="BN")
    train(network, data, (0,), steps=300, batch=64, rate=0.03, momentum=0.9, probes=1)
    return network.eval()


@torch.no_grad()
def _judged(network: Convolutional, drawn: Tensor, real: Tensor) -> tuple[float, float]:
    """ln of the Fréchet distance (Heusel et al. 2017, eq. 6), and the entropy of the classes that are seen."""

    def features(x: Tensor) -> Tensor:
        for block in network.blocks:
            x = block(x)
        return x.mean((2, 3)).double()

    if not bool(drawn.isfinite().all()):
        return 10.0, 0.0
    a, b = features(drawn), features(real)
    of_a, of_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(of_a)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    common = torch.linalg.eigvalsh(root @ of_b @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + of_a.trace() + of_b.trace() - 2 * common
    shares = network.head(a.float()).softmax(1).mean(0)
    return float(distance.clamp(min=1e-9).log()), float(-(shares * shares.clamp(min=1e-12).log()).sum())


EXPERIMENT = Adversarial()

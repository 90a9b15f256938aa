"""Names and titles of all experiments, and the form in which one is registered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from normscope.lab.claims import claims_of
from normscope.records import Registration

__all__ = ["CATALOGUE", "register"]

# Every experiment that a claim may name. What has no file in `normscope.lab.experiments` yet is open.
CATALOGUE = {
    "A01": "The forward formula, for every normalizer",
    "A02": "The backward formula, term by term",
    "A03": "Batch statistics as estimates of the population's",
    "A04": "Inference: a fixed affine map, foldable, blind to companions",
    "A05": "Can γ and β restore what was normalized?",
    "A06": "The bias in front of Batch Normalization",
    "A07": "Weights of another scale",
    "A08": "The set S of every normalizer",
    "A09": "Parameters and state, counted",
    "A10": "Batches of one and of two",
    "A11": "Does normalizing make data Gaussian?",
    "A12": "Does normalizing remove correlation?",
    "A13": "What happens to an image's contrast",
    "A14": "What Batch Normalization computes: products, passes, time",
    "A15": "The price of whitening",
    "A16": "Where the sigmoid has a gradient",
    "A17": "Normalizing outside the gradient step",
    "B01": "MNIST with three layers of sigmoids: figure 1 at full size",
    "B02": "How stable are distributions?",
    "B03": "Larger learning rates, and fewer steps",
    "B04": "The scale of the initial weights",
    "B05": "Robustness to hyper-parameters",
    "B06": "Depth: vanishing, exploding, activation scale",
    "B07": "Sigmoid or ReLU under Batch Normalization",
    "B08": "Before or after the activation",
    "B09": "What γ and β are worth",
    "B10": "What regularises: normalizing, noise, dropout",
    "B11": "Weight penalties under normalization",
    "B12": "Does it need less data?",
    "B13": "Detached statistics in a network",
    "B14": "Noise after the normalization: is covariate shift the cause?",
    "B15": "Smoothness of the loss",
    "B16": "Batches of unequal distribution",
    "B17": "Shifted test data, and contrast",
    "B18": "Scaling, standardising and whitening the input",
    "C01": "The statistics batch, at a fixed batch of the optimizer",
    "C02": "Both batches together",
    "C03": "Shards and synchronised statistics",
    "C04": "Online learning",
    "C05": "Training and inference statistics, serving one at a time",
    "C06": "Fine-tuning with tiny batches",
    "C07": "Groups between LayerNorm and InstanceNorm",
    "D01": "Time per step, time to accuracy",
    "E01": "Recurrent networks: vertical, horizontal, γ₀",
    "E02": "Sequences of unequal length",
    "F01": "Super-resolution",
    "F02": "Denoising, and whether it differs from super-resolution",
    "F03": "Are the residuals independent and Gaussian?",
    "F04": "Learning the identity, and contrast maps",
    "F05": "Style transfer",
    "F06": "Generative adversarial networks",
    "G01": "Adversarial and noise robustness",
    "H01": "Tasks × normalizers, faults × normalizers",
    "H02": "Weight normalization",
    "H03": "Whitening inside the network",
}


def register(
    name: str, *, statement: str, source: str, confirms: str, refutes: str, thresholds: Mapping[str, float],
    design: str, cuts: Sequence[str] = (),
) -> Registration:  # fmt: skip
    """What is fixed before the first run of an experiment of the catalogue."""
    return Registration(
        name=name,
        title=CATALOGUE[name],
        statement=statement,
        source=source,
        claims=claims_of(name),
        confirms=confirms,
        refutes=refutes,
        thresholds=tuple((key, float(value)) for key, value in thresholds.items()),
        design=design,
        cuts=tuple(cuts),
    )

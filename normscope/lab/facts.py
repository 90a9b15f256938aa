"""Errors of fact in the five texts: what they say that no experiment needs to refute, and what is so."""

from __future__ import annotations

from normscope.records import Correction

__all__ = ["CORRECTIONS"]

CORRECTIONS = (
    Correction("R1", ("001-1",), "The paper is of 2014.", "arXiv 1502.03167, February 2015; ICML 2015.", "IS15"),
    Correction("R2", ("004-16",), "GroupNorm was proposed in 2017.", "arXiv 1803.08494, 2018; ECCV 2018.", "WH18"),
    Correction(
        "R3",
        ("001-6",),
        "The same accuracy in 14 times less time.",
        "14 times fewer steps, 2.1 against 31.0 million, with six further changes and five times the rate; alone it "
        "needed 13.3 million, 2.3 times fewer.",
        "IS15",
    ),
    Correction(
        "R4",
        ("001-23",),
        "Wu + b is distributed symmetrically and sparsely.",
        "The paper says symmetric and not sparse, hence more Gaussian; a translation lost the negation.",
        "IS15",
    ),
    Correction(
        "R5",
        ("000-10",),
        "The authors found sigmoid better than ReLU.",
        "69.8 % with sigmoid, 73.0 % with ReLU; the point was that sigmoid trains at all. CaffeNet: 0.475 and 0.499.",
        "IS15; MI16",
    ),
    Correction(
        "R6",
        ("000-8",),
        "It is slow because of many matrix products.",
        "It computes sums and element-wise maps and is bound by memory; Caffe's layer spreads means by calls of a "
        "matrix product, which is where the remark may come from.",
        "GG17; CAF",
    ),
    Correction(
        "R7",
        ("000-12",),
        "A layer stores three numbers.",
        "True of Caffe, whose γ and β are in a layer of their own; PyTorch stores running mean, running variance, a "
        "count of batches, γ and β.",
        "CAF",
    ),
    Correction(
        "R8",
        ("000-20",),
        "SRResNet's authors found it better without, and changed to an L1 loss.",
        "SRResNet uses it; EDSR, a later paper, took it out of SRResNet, trained with L1, saved 40 % of memory.",
        "ED17",
    ),
    Correction(
        "R9",
        ("002-11",),
        "The error decreases with the batch.",
        "The figure beside it shows 23.6, 23.7, 24.8, 27.3 and 34.7 % for 32, 16, 8, 4 and 2 images per GPU.",
        "WH18",
    ),
    Correction(
        "R10",
        ("002-16",),
        "YOLOv4 and Faster R-CNN are trained with batches of 64.",
        "YOLOv4's 64 are passed in 8 parts, so that 8 images share statistics, which it puts together across parts; "
        "the 64 of Faster R-CNN are regions, its images are one or two.",
        "the configuration of YOLOv4",
    ),
    Correction(
        "R11", ("003-10",), "γ and β are 2m parameters, m being the batch.",
        "Two per feature map, whatever the batch and the size of maps (see A09).", "IS15",
    ),
    Correction(
        "R12",
        ("002-3",),
        "Normalized data look Gaussian.",
        "An affine map leaves skewness, kurtosis and every other standardised moment as they were (see A11).",
        "",
    ),
    Correction(
        "R13", ("002-4",), "γ and β learn mean and covariance.",
        "Mean and scale of every feature; correlations stay (see A12).", "",
    ),
    Correction(
        "R14",
        ("001-28",),
        "The gradient of the sigmoid is large on [−5, 5].",
        "At 5 it is 2.7 % of its largest value, at 3 it is 18 %; above a tenth only within ±3.64 (see A16).",
        "",
    ),
    Correction("R15", ("000-13",), "Its parameters are fixed in influence.", "In inference: a slip of the pen.", ""),
    Correction(
        "R16", ("004-5",), "One divides by the standard deviation δ.", "By √(σ² + ε), never by σ alone.", "IS15 Alg. 1"
    ),
    Correction(
        "R17",
        ("004-15",),
        "InstanceNorm is impossible in recurrent networks.",
        "Impossible per time step, where it has one value; over the steps of a whole sequence it is defined, but looks "
        "ahead in time.",
        "",
    ),
    Correction(
        "R18",
        ("004-8", "000-28"),
        "Experiments with it in recurrent networks show no use.",
        "Permuted MNIST rose from 90.2 to 95.4 %, Penn Treebank fell from 1.38 to 1.32 bits per character.",
        "CO16",
    ),
    Correction(
        "R19",
        ("002-20",),
        "Nobody has studied whether it makes networks vulnerable.",
        "Galloway et al. 2019 and Benz et al. 2021 have; it remains contested.",
        "GA19; BZ21",
    ),
    Correction(
        "R20",
        ("003-7",),
        "It stands after the linear and before the fully connected layer.",
        "These are one and the same; what is meant is after the affine map and before the activation.",
        "IS15",
    ),
)  # fmt: skip

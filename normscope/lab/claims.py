"""The 118 claims that five texts make about Batch Normalization, each with the experiments that are to decide it.

The texts are tutorials, numbered 000 to 004; a claim is the text's number and a running one. The wording in claims.tsv
is ours. A claim without experiments is on record: it cannot be measured here, and its citation is all there is to say.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from importlib import resources

__all__ = ["CLAIMS", "SOURCES", "ClaimEntry", "claims_of"]

# Keys of the sources in claims.tsv.
SOURCES = {
    "BA16": "Ba, Kiros & Hinton 2016, Layer Normalization, arXiv 1607.06450",
    "BJ18": "Bjorck et al. 2018, Understanding Batch Normalization, arXiv 1806.02375",
    "BRN": "Ioffe 2017, Batch Renormalization, arXiv 1702.03275",
    "BZ21": "Benz et al. 2021, arXiv 2010.03316",
    "CAF": "batch_norm_layer.cpp of BVLC/caffe",
    "CH19": "Chiley et al. 2019, Online Normalization, arXiv 1905.05894",
    "CO16": "Cooijmans et al. 2016, Recurrent Batch Normalization, arXiv 1603.09025",
    "DN17": "Zhang et al. 2017, DnCNN, arXiv 1608.03981",
    "ED17": "Lim et al. 2017, EDSR, arXiv 1707.02921",
    "EN19": "Singh & Shrivastava 2019, EvalNorm",
    "FR21": "Frankle et al. 2021, Training BatchNorm and Only BatchNorm, arXiv 2003.00152",
    "GA19": "Galloway et al. 2019, arXiv 1905.02161",
    "GG17": "Gitman & Ginsburg 2017, arXiv 1709.08145",
    "HO17": "Hoffer et al. 2017, arXiv 1705.08741",
    "HU": "Huang et al. 2018 and 2019, Decorrelated Batch Normalization, IterNorm, arXiv 1904.03441",
    "IS15": "Ioffe & Szegedy 2015, Batch Normalization, arXiv 1502.03167",
    "JU19": "Jung et al. 2019, arXiv 1807.01702",
    "LA15": "Laurent et al. 2015, arXiv 1510.01378",
    "LC98": "LeCun et al. 1998, Efficient BackProp",
    "LI19": "Li et al. 2019, arXiv 1801.05134",
    "LU18": "Luo et al. 2018, arXiv 1809.00846",
    "MI16": "Mishkin 2016, caffenet-benchmark",
    "QI19": "Qiao et al. 2019, Weight Standardization, arXiv 1903.10520",
    "SA18": "Santurkar et al. 2018, How Does Batch Normalization Help Optimization?, arXiv 1805.11604",
    "SK16": "Salimans & Kingma 2016, Weight Normalization, arXiv 1602.07868",
    "SN18": "Luo et al. 2018, Switchable Normalization, its README",
    "SR+": "RepSR 2022, arXiv 2205.05671; AdaDM 2021",
    "TTA": "Schneider et al. 2020; AdaBN 2016; Tent 2021",
    "UL16": "Ulyanov et al. 2016, Instance Normalization, arXiv 1607.08022",
    "VL17": "van Laarhoven 2017, L2 Regularization versus Batch and Weight Normalization, arXiv 1706.05350",
    "WH18": "Wu & He 2018, Group Normalization, arXiv 1803.08494",
    "WJ21": "Wu & Johnson 2021, Rethinking “Batch” in BatchNorm, arXiv 2105.07576",
    "YA19": "Yang et al. 2019, A Mean Field Theory of Batch Normalization, arXiv 1902.08129",
}


@dataclass(frozen=True, slots=True)
class ClaimEntry:
    """A claim in the registry; `record` says what is known about one without experiments."""

    id: str
    text: str
    source: str
    experiments: tuple[str, ...]
    record: str


def _read() -> tuple[ClaimEntry, ...]:
    text = resources.files("normscope.lab").joinpath("claims.tsv").read_text(encoding="utf-8")
    rows = csv.DictReader(text.splitlines(), delimiter="\t", strict=True)
    return tuple(
        ClaimEntry(r["id"], r["claim"], r["source"], tuple(r["experiments"].split()), r["record"]) for r in rows
    )


CLAIMS = _read()


def claims_of(experiment: str) -> tuple[str, ...]:
    """The ids of the claims that an experiment is about."""
    return tuple(claim.id for claim in CLAIMS if experiment in claim.experiments)

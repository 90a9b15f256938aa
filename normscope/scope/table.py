"""The table of scopes: every published activation normalizer as one line.

To add a normalizer whose novelty is its set S, add a line. One that estimates its moments in another way
(running, renormalised, online …) is an estimator in `normscope.nn`, with one of these scopes.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SCOPES", "NamedScope"]


@dataclass(frozen=True)
class NamedScope:
    """A scope that the literature has named.

    Attributes:
        pattern: The notation; `[...]` stands for any number of space axes, none included.
        params: The axes that γ and β run over.
        paper: Where it was published.
        center: Whether the mean is subtracted.
    """

    pattern: str
    params: str
    paper: str
    center: bool = True


SCOPES = {
    "BatchNorm": NamedScope("[n] c [...]", "c", "Ioffe & Szegedy 2015, Algorithm 1 and §3.2"),
    "BatchNorm per time step": NamedScope("[n] t c", "c", "Cooijmans et al. 2016, eq. 6"),
    "GhostBatchNorm": NamedScope("(g [n]) c [...]", "c", "Hoffer et al. 2017, Algorithm 1"),
    "InstanceNorm": NamedScope("n c [...]", "c", "Ulyanov et al. 2016"),
    "GroupNorm": NamedScope("n (g [c]) [...]", "c", "Wu & He 2018"),
    "LayerNorm": NamedScope("... [c]", "c", "Ba et al. 2016, §3"),
    "LayerNorm over a CNN layer": NamedScope("n [c h w]", "c h w", "Ba et al. 2016, §6.7"),
    "LayerNorm2d": NamedScope("n [c] h w", "c", "Liu et al. 2022 (ConvNeXt); Li et al. 2019 (positional)"),
    "RMSNorm": NamedScope("... [c]", "c", "Zhang & Sennrich 2019", center=False),
}

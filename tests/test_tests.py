"""The laws themselves on trial: every broken implementation is caught, and every law catches one.

The implementation below is a third one, besides the oracle and the kernels, with one place for each flaw. Sound, it
obeys all laws. Sums and broadcasts go through float64, so that neither forward nor backward depends on their order.
"""

import math
from collections import namedtuple

import pytest
import torch
from cases import CASES
from laws import LAWS, Trial
from torch.nn import functional as F

from normscope.scope import parse

Moments = namedtuple("Moments", "mean var count")

ACTIVATIONS = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "mish": F.mish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
    "hardsigmoid": lambda z: (z / 6 + 0.5).clamp(0, 1),  # torch's backward divides by 6 in float32
}


def rounded(a):
    """The value rounded to bfloat16, the gradient untouched."""
    return a + (a.detach().bfloat16().to(a.dtype) - a.detach())


class Broken:
    """normalize and moments with one flaw, or none."""

    def __init__(self, flaw=None):
        self.flaw = flaw

    def has(self, *flaws):
        return self.flaw in flaws

    def spread(self, a):
        """Broadcast to x; the gradient is summed in float64."""
        return a.double().expand(self.parts).to(self.wide)

    def mean(self, a):
        if self.has("the tail of S is dropped") and a.numel():
            tail = torch.ones(self.parts)
            tail[tuple(-1 if i in self.S else slice(None) for i in range(len(self.parts)))] = 0
            a = a * tail
        if self.has("sums cut into a piece per thread", "sums in another order for a batch"):
            pieces = torch.get_num_threads() if self.has("sums cut into a piece per thread") else self.parts[0]
            return sum(
                piece.sum(self.S, keepdim=True)
                for piece in (a / self.m).tensor_split(1 if pieces < 2 else 2, self.S[0])
            )
        total = a.double().where(self.keep, 0).sum(self.S, keepdim=True)
        if self.has("sets leak") and a.numel():
            total = total + 0 * a.double().where(self.keep, 0).sum()
        return (total / self.m).to(self.wide)

    def see(self, x, pattern, mask, sizes):
        self.scope = parse(pattern).at(x.dim())
        self.parts, self.S = self.scope.unfold(x.shape, sizes), self.scope.inside
        self.shape, self.wide = x.shape, torch.float64 if x.dtype == torch.float64 else torch.float32
        mask = torch.ones((), dtype=torch.bool) if mask is None else mask
        if 0 < mask.dim() < x.dim():
            mask = mask.unsqueeze(self.scope.axis_of("c"))
            if self.has("a short mask read for the first sample only"):
                mask = mask[:1]
        self.keep = mask.expand(x.shape).reshape(self.parts)
        self.m = self.keep.sum(self.S, keepdim=True).clamp(min=1)
        if self.has("masked cells counted in m"):
            self.m = torch.full_like(self.m, math.prod(self.parts[i] for i in self.S))

    def statistics(self, x, center):
        if self.has("the mean subtracted from RMSNorm too"):
            center = True
        high = self.mean(x).detach() if center else torch.zeros_like(self.mean(x))
        if self.has("one shift for all sets") and center and x.numel():
            high = torch.full_like(high, x.detach().mean())
        low = self.mean(x - self.spread(high)) if center else torch.zeros_like(high)
        if self.has("the mean held in one float32"):
            high, low = high + low, torch.zeros_like(low)
        c = x - self.spread(high) - self.spread(low)
        var = self.mean(c * c)
        if self.has("one-pass variance"):
            var = self.mean(x * x) - (high + low) ** 2
        if self.has("unbiased variance"):
            var = var * self.m / (self.m - 1).clamp(min=1)
        return high, low, var

    def moments(self, x, pattern, *, center=True, mask=None, **sizes):
        self.see(x, pattern, mask, sizes)
        x = x.to(self.wide).reshape(self.parts).where(self.keep, 0)
        high, low, var = self.statistics(x, center)
        outside = [self.parts[i] for i in self.scope.outside]
        mean, count = high + low, self.keep.sum(self.S)
        if self.has("moments in x's own precision"):
            mean, var = rounded(mean), rounded(var)
        return Moments(mean.reshape(outside), var.reshape(outside), count)

    def param(self, a, params, flaw):
        axes = self.scope.param_axes(params)
        index = [
            torch.arange(n).reshape([-1 if k == axis else 1 for k in range(len(self.shape))])
            for axis, n in enumerate(self.shape)
        ]
        if self.has(flaw):
            axes = [(axis + 1) % len(self.shape) for axis in axes]
        full = a.double()[tuple(index[axis] % n for axis, n in zip(axes, a.shape, strict=True))]
        return full.expand(self.shape).reshape(self.parts).to(self.wide)

    def normalize(
        self, x, pattern, *, weight=None, bias=None, params="c", eps=1e-5, center=True, scale=True, mask=None,
        moments=None, activation=None, residual=None, **sizes,
    ):  # fmt: skip
        self.see(x, pattern, mask, sizes)
        dtype, strides, given = x.dtype, x.contiguous().stride() if x.numel() == 0 else x.stride(), x
        x = x.to(self.wide).reshape(self.parts).where(self.keep, 0)
        if self.has("NaN swallowed"):
            x = x.nan_to_num()
        if self.has("dx = 0"):
            x = x.detach() + 0 * x
        high, low, var = self.given(moments) if moments is not None else self.statistics(x, center)
        if not center and not self.has("the mean subtracted from RMSNorm too"):
            high, low = torch.zeros_like(high), torch.zeros_like(low)
        z = self.affine(self.xhat(x, high, low, var, eps, scale), weight, bias, params)
        if self.has("statistics rounded to bfloat16 for backward"):
            crude = self.affine(self.xhat(x, rounded(high + low), 0 * low, var, eps, scale), weight, bias, params)
            z = z.detach() + (crude - crude.detach())
        before = residual is not None and not self.has("residual after the activation")
        if before:
            z = z + residual.to(self.wide).reshape(self.parts).where(self.keep, 0)
        if activation is not None:
            exact = not self.has("gelu by its tanh formula") or activation != "gelu"
            z = ACTIVATIONS[activation if exact else "gelu_tanh"](z)
        if residual is not None and not before:
            z = z + residual.to(self.wide).reshape(self.parts).where(self.keep, 0)
        if not self.has("masked cells come out as β"):
            z = z.where(self.keep, 0)
        y = z.reshape(self.shape).to(dtype)
        if self.has("one NaN in y") and y.numel():
            y = y.where(torch.arange(y.numel()).reshape(y.shape) > 0, float("nan"))
        if self.has("NaN for no samples") and not y.numel() and weight is not None:
            y = y + 0 * given
            weight.register_hook(lambda g: g * float("nan"))
        if self.has("y always contiguous"):
            return y.contiguous()
        return torch.empty_strided(y.shape, strides, dtype=dtype).copy_(y) if self.dense(given) else y

    @staticmethod
    def dense(x):
        return x.numel() and torch.empty_like(x).stride() == x.stride()

    def given(self, moments):
        sizes = [1 if part.averaged else n for part, n in zip(self.scope.parts, self.parts, strict=True)]
        mean, var = (a.to(self.wide).reshape(sizes) for a in moments[:2])
        if self.has("given moments get no gradient"):
            mean, var = mean.detach() + 0 * mean, var.detach() + 0 * var
        return mean, torch.zeros_like(mean), var

    def xhat(self, x, high, low, var, eps, scale):
        if self.has("dx without the projection on x̂"):
            var = var.detach() + 0 * var
        r = (var + eps).rsqrt()
        if self.has("ε outside the root"):
            r = 1 / (var.sqrt() + eps)
        if self.has("ε forgotten"):
            r = var.rsqrt()
        if not scale and not self.has("scale=False ignored"):
            r = torch.ones_like(r)
        folded = self.has("folded into y = xα + β") or (
            self.has("folded where not contiguous") and not x.is_contiguous()
        )
        if folded:
            return x * self.spread(r) + self.spread(-(high + low) * r)
        return (x - self.spread(high) - self.spread(low)) * self.spread(r)

    def affine(self, xhat, weight, bias, params):
        if weight is not None:
            xhat = xhat * self.param(weight, params, "weight on the wrong axis")
        if bias is not None:
            full = self.param(bias, params, "bias on the wrong axis")
            if self.has("dβ not summed over the first axis"):
                full = torch.cat([full[:1], full[1:].detach()])
            xhat = xhat + full
        return xhat


# The laws that must catch each flaw, the one made for it first; others may too.
FLAWS = {
    "one-pass variance": "as_accurate_off_centre shifting_changes_nothing",
    "ε outside the root": "agrees_where_epsilon_decides scaling_scales_epsilon",
    "ε forgotten": "constant_input_is_defined agrees_without_params",
    "folded into y = xα + β": "as_accurate_off_centre shifting_changes_nothing",
    "folded where not contiguous": "as_accurate_off_centre",
    "dx = 0": "agrees_with_the_oracle",
    "dx without the projection on x̂": "gradients_sum_to_zero",
    "statistics rounded to bfloat16 for backward": "agrees_with_the_oracle gradients_sum_to_zero",
    "one NaN in y": "agrees_with_the_oracle output_has_the_moments_of_the_definition layouts_agree",
    "the mean held in one float32": "as_accurate_off_centre",
    "unbiased variance": "output_has_the_moments_of_the_definition moments_are_biased_and_wide",
    "weight on the wrong axis": "agrees_with_the_oracle",
    "bias on the wrong axis": "agrees_with_the_oracle",
    "masked cells counted in m": "agrees_under_a_mask",
    "masked cells come out as β": "agrees_under_a_mask",
    "a short mask read for the first sample only": "agrees_under_a_mask_that_broadcasts",
    "residual after the activation": "adds_the_residual_before_the_activation",
    "dβ not summed over the first axis": "agrees_with_the_oracle",
    "the tail of S is dropped": "permuting_a_set_permutes_the_output",
    "NaN swallowed": "nan_and_inf_stay_in_their_set",
    "one shift for all sets": "other_sets_do_not_matter",
    "sets leak": "nan_and_inf_stay_in_their_set",
    "moments in x's own precision": "moments_are_biased_and_wide",
    "sums cut into a piece per thread": "threads_do_not_matter",
    "sums in another order for a batch": "a_sample_does_not_depend_on_its_batch",
    "y always contiguous": "layouts_agree",
    "NaN for no samples": "empty_input_is_defined",
    "gelu by its tanh formula": "applies_every_activation",
    "given moments get no gradient": "agrees_with_given_moments moments_of_the_data_are_the_default",
    "scale=False ignored": "agrees_without_scale",
    "the mean subtracted from RMSNorm too": "agrees_with_the_oracle",
}

BY_NAME = {law.__name__: law for law in LAWS}
TRIED = [case for case in CASES if case.name in ("BatchNorm2d", "GroupNorm", "LayerNorm", "RMSNorm")]


def breaks(implementation, law):
    """Whether an implementation breaks a law in some case and layout."""
    dtype = torch.float32 if torch.float32 in LAWS[law] else torch.float64
    for case in TRIED:
        for layout in ("contiguous", "channels_last"):
            try:
                law(Trial(implementation, case, layout, dtype))
            except AssertionError:
                return True
    return False


@pytest.mark.parametrize(("flaw", "law"), [(flaw, law) for flaw, laws in FLAWS.items() for law in laws.split()])
def test_every_flaw_is_caught(flaw, law):
    assert breaks(Broken(flaw), BY_NAME[law])


@pytest.mark.parametrize("law", BY_NAME)
def test_a_sound_implementation_obeys_every_law(law):
    """Else a law that fails always would count as one that catches."""
    assert not breaks(Broken(), BY_NAME[law])


def test_every_law_catches_some_flaw():
    assert {law for laws in FLAWS.values() for law in laws.split()} == set(BY_NAME)

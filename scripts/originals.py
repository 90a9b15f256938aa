"""Layers of the field against their originals in other packages: the largest difference of outputs, gradients, buffers.

python scripts/originals.py

Needs timm and torchvision (`pip install timm`), detectron2, inplace_abn; those that are not there are left out, and
said to be.
"""

import contextlib
import sys

import torch

import normscope as ns

SHAPE = (4, 8, 6, 5)
_OPERATORS = (
    "nms", "qnms", "roi_align", "_roi_align_backward", "ps_roi_align", "_ps_roi_align_backward", "roi_pool",
    "_roi_pool_backward", "ps_roi_pool", "_ps_roi_pool_backward", "deform_conv2d", "_deform_conv2d_backward",
)  # fmt: skip


def import_torchvision():
    """Import torchvision, which timm needs, also where its build does not fit: its operators are then only declared.

    Returns what has to live as long as they are declared.
    """
    with contextlib.suppress(ImportError):
        try:
            import torchvision  # noqa: F401
        except RuntimeError:
            for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
                del sys.modules[name]
            library = torch.library.Library("torchvision", "DEF")
            for name in _OPERATORS:
                library.define(f"{name}(Tensor x) -> Tensor")
            return library
    return None


def randomized(theirs):
    """State that tells all its numbers apart."""
    with torch.no_grad():
        for name, t in theirs.state_dict().items():
            if name.endswith("var"):
                t.uniform_(0.5, 2)
            elif t.is_floating_point():
                t.normal_()
    return theirs


def copied(theirs, ours):
    """Load their state, whose names are ours."""
    state = {
        name: t.reshape(own.shape)
        for name, own in ours.state_dict().items()
        if (t := theirs.state_dict().get(name)) is not None
    }
    ours.load_state_dict(state, strict=False)
    return ours


def difference(theirs, ours, training, shape=SHAPE):
    """Two steps; the largest difference of outputs, input gradients, and buffers of the same name."""
    worst = 0.0
    for seed in range(2):
        results = []
        for layer in (theirs.train(training), ours.train(training)):
            generator = torch.Generator().manual_seed(seed)
            x = (torch.randn(shape, generator=generator) + 0.5).requires_grad_()
            y = layer(x.clone())  # which in-place layers write into
            (gradient,) = torch.autograd.grad(y, x, torch.randn(y.shape, generator=generator))
            results.append((y, gradient))
        for a, b in zip(*results, strict=True):
            worst = max(worst, float((a - b).detach().abs().max()))
    buffers = dict(ours.named_buffers())
    for name, b in theirs.named_buffers():
        if name in buffers and b.is_floating_point():
            worst = max(worst, float((b - buffers[name]).abs().max()))
    return worst


def timm_pairs():
    from timm.layers import evo_norm, filter_response_norm, grn
    from timm.layers import norm as timm_norm
    from timm.layers.norm_act import FrozenBatchNormAct2d

    yield "timm LayerNorm2d", timm_norm.LayerNorm2d(8), ns.nn.LayerNorm2d(8), SHAPE
    yield "timm EvoNorm2dB0", evo_norm.EvoNorm2dB0(8), ns.nn.EvoNormB0(8, eps=1e-3), SHAPE
    yield "timm EvoNorm2dS0", evo_norm.EvoNorm2dS0(8, groups=4), ns.nn.EvoNormS0(8, groups=4), SHAPE
    yield (
        "timm FilterResponseNormTlu2d", filter_response_norm.FilterResponseNormTlu2d(8),
        ns.nn.FilterResponseNorm(8, eps=1e-5), SHAPE,
    )  # fmt: skip
    yield "timm GlobalResponseNorm", grn.GlobalResponseNorm(8), ns.nn.GlobalResponseNorm(8), (4, 6, 5, 8)
    first = grn.GlobalResponseNorm(8, channels_last=False), ns.nn.GlobalResponseNorm(8, channels_last=False)
    yield "timm GlobalResponseNorm, channels first", *first, SHAPE
    for original in (
        evo_norm.EvoNorm2dB0(8), evo_norm.EvoNorm2dS0(8, groups=2), evo_norm.EvoNorm2dS0(8, group_size=2),
        filter_response_norm.FilterResponseNormTlu2d(8),
        filter_response_norm.FilterResponseNormTlu2d(8, apply_act=False),
        filter_response_norm.FilterResponseNormAct2d(8, act_layer=torch.nn.SiLU),
        grn.GlobalResponseNorm(8), FrozenBatchNormAct2d(8),
    ):  # fmt: skip
        yield taken_up("timm", original, (4, 6, 5, 8) if getattr(original, "channel_dim", 1) == -1 else SHAPE)


def taken_up(library, original, shape=SHAPE):
    """An original and what `ns.states.take_up` makes of it."""
    report = ns.states.take_up(original, copy=True)
    assert report.changed == ("",), report
    return f"{library} {type(original).__name__}, taken up", original, report.model, shape


def torchvision_pairs():
    from torchvision.ops import FrozenBatchNorm2d

    yield "torchvision FrozenBatchNorm2d", FrozenBatchNorm2d(8), ns.nn.FrozenBatchNorm(8), SHAPE
    yield taken_up("torchvision", FrozenBatchNorm2d(8, eps=1e-3))


def detectron2_pairs():
    from detectron2.layers.batch_norm import FrozenBatchNorm2d

    yield taken_up("detectron2", FrozenBatchNorm2d(8))


def inplace_abn_pairs():
    import inplace_abn

    yield taken_up("inplace_abn", inplace_abn.ABN(8))
    for activation, parameter in (("leaky_relu", 0.01), ("elu", 1.0), ("identity", 0.01)):
        original = inplace_abn.InPlaceABN(8, activation=activation, activation_param=parameter)
        yield taken_up("inplace_abn", randomized(original))


def torch_pairs():
    yield "torch BatchNorm2d, frozen", torch.nn.BatchNorm2d(8).eval(), ns.nn.FrozenBatchNorm(8), SHAPE
    yield "torch BatchNorm2d, one ghost", torch.nn.BatchNorm2d(8), ns.nn.GhostBatchNorm(8, 4), SHAPE
    yield "torch BatchNorm2d, renorm in evaluation", torch.nn.BatchNorm2d(8), ns.nn.BatchRenorm(8, momentum=0.1), SHAPE


def main():
    """Print the table."""
    declared = import_torchvision()  # noqa: F841
    print("| original | training | evaluation |\n|---|---:|---:|")
    for pairs in (torch_pairs, timm_pairs, torchvision_pairs, detectron2_pairs, inplace_abn_pairs):
        try:
            cases = list(pairs())
        except ImportError as error:
            print(f"| {pairs.__name__.removesuffix('_pairs')}: not installed ({error.name}) | | |")
            continue
        for name, theirs, ours, shape in cases:
            torch.manual_seed(0)
            if "InPlace" not in name:  # whose γ is another number than its weight
                copied(randomized(theirs), ours)
            training = (
                "" if "evaluation" in name or "frozen" in name else f"{difference(theirs, ours, True, shape):.0e}"
            )
            print(f"| {name} | {training} | {difference(theirs, ours, False, shape):.0e} |")


if __name__ == "__main__":
    main()

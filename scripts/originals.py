"""Layers of the field against their originals in other packages: the largest difference of outputs, gradients, buffers.

python scripts/originals.py

Needs timm and torchvision (`pip install timm`); those that are not there are left out, and said to be.
"""

import torch

import normscope as ns

SHAPE = (4, 8, 6, 5)


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
            y = layer(x)
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


def torchvision_pairs():
    from torchvision.ops import FrozenBatchNorm2d

    yield "torchvision FrozenBatchNorm2d", FrozenBatchNorm2d(8), ns.nn.FrozenBatchNorm(8), SHAPE


def torch_pairs():
    yield "torch BatchNorm2d, frozen", torch.nn.BatchNorm2d(8).eval(), ns.nn.FrozenBatchNorm(8), SHAPE
    yield "torch BatchNorm2d, one ghost", torch.nn.BatchNorm2d(8), ns.nn.GhostBatchNorm(8, 4), SHAPE
    yield "torch BatchNorm2d, renorm in evaluation", torch.nn.BatchNorm2d(8), ns.nn.BatchRenorm(8, momentum=0.1), SHAPE


def main():
    """Print the table."""
    print("| original | training | evaluation |\n|---|---:|---:|")
    for pairs in (torch_pairs, timm_pairs, torchvision_pairs):
        try:
            cases = list(pairs())
        except ImportError as error:
            print(f"| {pairs.__name__.removesuffix('_pairs')}: not installed ({error.name}) | | |")
            continue
        for name, theirs, ours, shape in cases:
            torch.manual_seed(0)
            copied(randomized(theirs), ours)
            training = (
                "" if "evaluation" in name or "frozen" in name else f"{difference(theirs, ours, True, shape):.0e}"
            )
            print(f"| {name} | {training} | {difference(theirs, ours, False, shape):.0e} |")


if __name__ == "__main__":
    main()

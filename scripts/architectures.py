"""What `ns.accelerate` does to the networks that people use: what it fuses, what it leaves, and how close it stays.

python scripts/architectures.py [names of models]

Models of timm and transformers are taken where these are installed (random weights, nothing is downloaded); a U-Net is
its own. Each is accelerated, and then compared with itself before, on 64 × 64 images or sequences of 24 tokens: outputs
in both modes, gradients, running statistics.

- *wiring*: the largest relative difference in float64, where rounding cannot hide anything;
- *torch*, *ours*: the largest relative error in float32 of the model before and after, against the model in float64. A
  value that rounding pushes across the kink of a ReLU changes a gradient by itself, in either of them.
"""

import copy
import importlib.util
import sys

import torch
from torch import nn

import normscope as ns
from normscope.surgery import find
from normscope.surgery.foreign import Foreign
from normscope.surgery.fused import programs_of

TIMM = (
    "resnet18", "resnet50", "mobilenetv2_100", "mobilenetv3_small_100", "efficientnet_b0", "densenet121", "vgg11_bn",
    "regnety_004", "convnext_tiny", "vit_small_patch16_224",
)  # fmt: skip
TRANSFORMERS = ("Llama", "Qwen3", "Gemma2", "T5Encoder", "Bert")


class DoubleConv(nn.Sequential):
    """Twice convolution, normalizer, ReLU."""

    def __init__(self, c_in, c_out):
        layers = [(nn.Conv2d(c, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU(True)) for c in (c_in, c_out)]
        super().__init__(*(layer for group in layers for layer in group))


class UNet(nn.Module):
    """Two steps down, two up, with skip connections."""

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList([DoubleConv(3, 16), DoubleConv(16, 32), DoubleConv(32, 64)])
        self.up = nn.ModuleList([nn.ConvTranspose2d(64, 32, 2, 2), nn.ConvTranspose2d(32, 16, 2, 2)])
        self.join = nn.ModuleList([DoubleConv(64, 32), DoubleConv(32, 16)])
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x):
        skips = []
        for block in self.down:
            x = block(nn.functional.max_pool2d(x, 2) if skips else x)
            skips.append(x)
        for up, join, skip in zip(self.up, self.join, skips[-2::-1], strict=True):
            x = join(torch.cat([up(x), skip], 1))
        return self.head(x)


def images(name):
    """A model of timm with its input."""
    import timm

    size = {"img_size": 64} if name.startswith("vit") else {}
    return timm.create_model(name, num_classes=10, **size), torch.randn(8, 3, 64, 64)


def tokens(name):
    """A small model of transformers with its input."""
    import transformers

    common = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
    extra = {"T5Encoder": {"d_model": 64, "num_layers": 2, "num_heads": 4, "d_kv": 16, "d_ff": 128, "vocab_size": 100}}
    if name in ("Llama", "Qwen3", "Gemma2"):
        common |= {"intermediate_size": 128, "num_key_value_heads": 2, "head_dim": 16}
    family = name.removesuffix("Encoder")
    config = getattr(transformers, f"{family}Config")(**extra.get(name, common))
    return getattr(transformers, f"{name}Model")(config), torch.randint(0, 100, (4, 24))


def everything(model, x, dtype):
    """Outputs in both modes, gradients and running statistics, in float64."""
    model = copy.deepcopy(model).to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    outputs = {}
    for mode in ("evaluation", "training"):
        torch.manual_seed(0)
        y = model.train(mode == "training")(x)
        y = y if isinstance(y, torch.Tensor) else y.last_hidden_state
        outputs[mode] = y.detach().clone()
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    buffers = {name: b for name, b in model.named_buffers() if b.is_floating_point()}
    return [{name: t.double() for name, t in part.items()} for part in (outputs, gradients, buffers)]


def distance(ones, others):
    """The largest ‖a − b‖ ⁄ ‖b‖ of any tensor; ‖b‖ counts as no less than 1e-3 of the largest of its kind.

    The gradient of a bias before a normalizer, for one, is nothing but rounding.
    """
    worst = 0.0
    for a, b in zip(ones, others, strict=True):
        least = 1e-3 * max(t.norm() for t in b.values()) if b else 0
        worst = max([worst, *(((a[k] - b[k]).norm() / b[k].norm().clamp(min=least)).item() for k in b)])
    return worst


def row(name, model, x):
    """One line of the table, and the reasons."""
    for p in model.parameters():
        p.data.add_(0.02 * torch.randn_like(p))  # γ = 1 and β = 0 would hide what they do
    before = copy.deepcopy(model)
    report = ns.accelerate(model)
    chains = [chain for module in model.modules() for p in programs_of(module)[:1] for chain in p.chains]
    inside = sum(isinstance(module, Foreign) and module.activation is not None for module in model.modules())
    counts = (
        len(find(before)),
        len(report.changed),
        inside + sum(" → " in chain and not chain.startswith("sum") for chain in chains),
        sum("+" in chain for chain in chains),
        sum(chain.startswith("sum") for chain in chains),
        len(report.skipped),
    )
    truth = everything(before, x, torch.float64)
    errors = (
        distance(everything(model, x, torch.float64), truth),
        distance(everything(before, x, torch.float32), truth),
        distance(everything(model, x, torch.float32), truth),
    )
    cells = [name, *map(str, counts), *(f"{error:.0e}" for error in errors)]
    return f"| {' | '.join(cells)} |", [f"{name}: {where or 'the model'}: {reason}" for where, reason in report.skipped]


def main(wanted):
    """Print the table."""
    torch.manual_seed(0)
    models = {"U-Net": lambda: (UNet(), torch.randn(8, 3, 32, 32))}
    for package, names, build in (("timm", TIMM, images), ("transformers", TRANSFORMERS, tokens)):
        if importlib.util.find_spec(package) is not None:
            models |= {name: lambda build=build, name=name: build(name) for name in names}
    head = ("model", "normalizers", "changed", "activations", "additions", "sums", "skipped", "wiring", "torch", "ours")
    print(f"| {' | '.join(head)} |\n|---|{'---:|' * (len(head) - 1)}")
    reasons = []
    for name, build in models.items():
        if not wanted or name in wanted:
            line, more = row(name, *build())
            print(line, flush=True)
            reasons += more
    print("", *reasons, sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])

"""The accuracy table of the README: the largest error of y against the float64 oracle, as the data move off centre.

python scripts/accuracy_table.py
"""

import numpy as np
import torch
from torch.nn import functional as F

import normscope as ns
from normscope import oracle

OFFSETS = (0, 100, 8000)
ROWS = (
    ("BatchNorm", "[n] c [h w]", {}, torch.contiguous_format),
    ("BatchNorm, channels_last", "[n] c [h w]", {}, torch.channels_last),
    ("GroupNorm, channels_last", "n (g [c]) [h w]", {"g": 8}, torch.channels_last),
    ("InstanceNorm", "n c [h w]", {}, torch.contiguous_format),
    ("LayerNorm", "n [c h w]", {}, torch.contiguous_format),
)
TORCH = {
    "[n] c [h w]": lambda x: F.batch_norm(x, None, None, training=True),
    "n (g [c]) [h w]": lambda x: F.group_norm(x, 8),
    "n c [h w]": F.instance_norm,
    "n [c h w]": lambda x: F.layer_norm(x, x.shape[1:]),
}


def errors(pattern, sizes, layout):
    """(ours, torch's) per offset; the data lie on a grid of 2⁻¹⁰, so that adding the offset is exact in float32."""
    torch.manual_seed(0)
    grid = (torch.randn(16, 32, 32, 32) * 1024).round() / 1024
    for offset in OFFSETS:
        x = (grid + offset).contiguous(memory_format=layout)
        truth = oracle.normalize(x.double().numpy(), pattern, **sizes)
        yield tuple(
            float(np.abs(y.double().numpy() - truth).max())
            for y in (ns.normalize(x, pattern, **sizes), TORCH[pattern](x))
        )


def main():
    """Print the table."""
    columns = [f"{who} at {offset} σ" for who in ("normscope", "torch") for offset in OFFSETS]
    print(f"| scope | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
    for name, pattern, sizes, layout in ROWS:
        ours, theirs = zip(*errors(pattern, sizes, layout), strict=True)
        print(f"| {name} | {' | '.join(f'{error:.0e}' for error in ours + theirs)} |")


if __name__ == "__main__":
    main()

"""The table of all normalizers, docs/normalizers.md, from the layers themselves and the records of their tests.

python scripts/normalizers.py          write the page
python scripts/normalizers.py --check  say whether it is up to date
"""

import inspect
import re
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "layers"))
from records import BATCH, LAYOUTS, RECORDS, RUNNING, Record, data, norm  # noqa: E402 - from the path above

PAGE = ROOT / "docs" / "normalizers.md"
TEXT = """# The normalizers

All of them are in `ns.nn`, for any number of axes where the paper's idea allows it. What each computes, when to use it
and when not, is in its docstring (`help(ns.nn.GhostBatchNorm)`). Moments are taken in float32 or wider; `mask=` leaves
cells out of them.

| layer | cells that share moments | in training | in evaluation | learned | sees the batch in training | source |
|---|---|---|---|---|---|---|
{rows}

The scope is in [the notation](notation.md). *Sees the batch* is measured: whether the output of one sample changes with
the other samples. Those that do not need no running statistics, and give the same result at every batch size.

- Batches of a few samples: `GroupNorm` or, in one with the activation, `EvoNormS0` and `FilterResponseNorm`. To keep a
  BatchNorm network: `BatchRenorm`, `CrossIterationBatchNorm`, `EvalNorm` (evaluation only), or `SyncBatchNorm` on
  several devices.
- Batches of one, streams: `OnlineNorm`, or any row that does not see the batch.
- Large batches that generalize worse: `GhostBatchNorm`.
- Several domains or call sites: `SplitBatchNorm`.
- A condition: `ConditionalBatchNorm` (class), `AdaIN` (style), `SPADE` (map of labels).
- A pretrained part that must not move: `ns.freeze` in a model that has BatchNorm; else build it with `FrozenBatchNorm`.

This page is made by `python scripts/normalizers.py` from the layers and the records of their tests.
"""


def drop_in(name, build, scope, training, inference, inputs=lambda rank, seed: (data(LAYOUTS[rank], seed),), rank=4):
    return Record(name, build, lambda *_: None, scope, training, inference, inputs=inputs, ranks=(rank,))


def last(rank, seed):
    return (data(LAYOUTS[rank], seed).movedim(1, -1),)


DROP_INS = (
    drop_in("BatchNorm2d", norm("BatchNorm2d", 6), "`[n] c [...]`", BATCH, RUNNING),
    drop_in("SyncBatchNorm", norm("SyncBatchNorm", 6), "`[n] c [...]`, all ranks", "the batch of all ranks", RUNNING),
    drop_in("InstanceNorm2d", norm("InstanceNorm2d", 6), "`n c [...]`", "the sample", "the sample"),
    drop_in("GroupNorm", norm("GroupNorm", 3, 6), "`n (g [c]) [...]`", "the sample", "the sample"),
    drop_in("LayerNorm", norm("LayerNorm", 6), "`... [c]`", "the vector", "the vector", last),
    drop_in("RMSNorm", norm("RMSNorm", 6), "`... [c]`, not centred", "the vector", "the vector", last),
)


def learned(record):
    """γ, β and whatever else the layer has parameters for."""
    letters = {"weight": "γ", "bias": "β", "tau": "τ", "alpha": "α", "g": "g", "v": "v"}
    names = [name for name, _ in record.build().named_parameters()]
    if record.name == "SplitBatchNorm":
        return "γ, β per domain"
    if record.name == "ConditionalBatchNorm":
        return "γ, β per class"
    if record.name == "SPADE":
        return "three convolutions"
    own = {"mean_weight": "weights of the means", "var_weight": "and of the variances"}
    return ", ".join(letters.get(name, own.get(name, name)) for name in names) or "nothing"


def sees_the_batch(record):
    """Whether the last sample's output changes when the first sample does."""
    torch.manual_seed(0)
    inputs = [t.float() if t.is_floating_point() else t for t in record.inputs(record.ranks[-1], 0)]
    other = [inputs[0].clone(), *inputs[1:]]
    other[0][0] *= 3
    outputs = [record.call(record.build(), *given)[-1] for given in (inputs, other)]
    return "no" if torch.equal(*outputs) else "yes"


def source(record):
    """The paragraph of the docstring that begins with Source."""
    match = re.search(r"Source: (.+?)(?:\n\n|\Z)", inspect.getdoc(record.cls) or "", re.DOTALL)
    return " ".join(match.group(1).split()).rstrip(".") if match else ""


def row(record):
    """One line of the table."""
    name = (
        f"`{record.cls.__name__}`".replace("Norm2d`", "Norm1d`, `2d`, `3d`")
        if record in DROP_INS
        else f"`{record.name}`"
    )
    cells = (
        name,
        record.scope,
        record.training,
        record.inference,
        learned(record),
        sees_the_batch(record),
        source(record),
    )
    return "| " + " | ".join(cells) + " |"


def page():
    """The text of the page."""
    return TEXT.format(rows="\n".join(row(r) for r in (*DROP_INS, *RECORDS) if r.documented))


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(
            0 if PAGE.exists() and PAGE.read_text(encoding="utf-8") == page() else "docs/normalizers.md is out of date"
        )
    PAGE.write_text(page(), encoding="utf-8")

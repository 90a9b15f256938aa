"""The table of features beside other packages, docs/features.md; every cell of our column names the tests behind it.

python scripts/features.py          write the page
python scripts/features.py --check  say whether it is up to date
python scripts/features.py --tests  the tests that are named, for pytest
"""

import sys
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "features.md"


@dataclass(frozen=True)
class Row:
    """A feature.

    Attributes:
        name: What is asked for.
        ours: What is here: "yes", "no", or what part.
        tests: What shows it: the beginnings of names of tests, as pytest prints them.
        others: The same for the other packages, in the order of the columns.
    """

    name: str
    ours: str
    tests: tuple[str, ...]
    others: tuple[str, ...]


def twin(*names: str) -> tuple[str, ...]:
    """The comparison of a layer with its NumPy twin."""
    return tuple(f"tests/layers/test_layers.py::test_agrees_with_its_twin[{name}-" for name in names)


def drop_in(*names: str) -> tuple[str, ...]:
    """The comparison of a layer with torch's."""
    return tuple(f"tests/test_torch_cases.py::test_layers[{name}-" for name in names)


RECURRENT = "tests/test_recurrent.py::test_is_the_papers["
MISSING = "tests/test_features.py::test_what_is_missing_is_missing"
TORCHS = "tests/test_parametrizations.py::test_torchs_are_re_exported"
NONE = ("no",) * 10

PYTORCH = (
    "torch 2.13", "timm", "apex", "Transformer Engine", "Liger", "quack", "inplace_abn", "detectron2, fvcore",
    "mmcv, mmengine", "others",
)  # fmt: skip
NORMALIZERS = (
    Row(
        "BatchNorm 1d, 2d, 3d", "yes", drop_in("BatchNorm1d", "BatchNorm2d", "BatchNorm3d"),
        ("yes", "2d with activation", "2d, NHWC, float16, channels in multiples of 8", "no", "no", "no", "any axes",
         "a wrapper", "by registry", "PyG"),
    ),
    Row(
        "lazy BatchNorm, lazy InstanceNorm", "yes", ("tests/test_torch_cases.py::test_lazy_layers[",),
        ("yes", *("no",) * 8, "einx, removed"),
    ),
    Row(
        "LayerNorm, trailing axes", "yes", drop_in("LayerNorm"),
        ("yes", "yes", "yes", "yes", "last axis, size limited by a block", "2-D, forward and backward functions", "no",
         "no", "yes", ""),
    ),
    Row(
        "LayerNorm, channels first", "yes", twin("LayerNorm2d"),
        ("no", "yes", "no", "no", "no", "no", "no", "yes", "in mmpretrain", "ConvNeXt"),
    ),
    Row(
        "LayerNorm over any axes", "`Norm` with a scope", ("tests/test_norm.py::test_equals_the_layer_it_describes",),
        (*NONE[:9], "Keras, Haiku, Flax"),
    ),
    Row(
        "GroupNorm", "yes", drop_in("GroupNorm"),
        ("yes", "yes, also by group size", "NHWC, listed sizes only", "no", "with restrictions", "no", "no",
         "by name, 32 groups", "yes", ""),
    ),
    Row(
        "InstanceNorm 1d, 2d, 3d", "yes", drop_in("InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"),
        ("yes", *("no",) * 7, "yes", "PyG"),
    ),
    Row(
        "RMSNorm", "yes", drop_in("RMSNorm"),
        ("yes", "1d and 2d", "yes", "yes", "with variants of language models", "with residual, per head", "no", "no",
         "no", "Hugging Face kernels"),
    ),
    Row(
        "GRN; SimpleNorm", "GRN", (*twin("GlobalResponseNorm"), MISSING),
        ("no", "yes", *("no",) * 6, "?", ""),
    ),
    Row(
        "SyncBatchNorm", "any device, uneven and empty ranks, masks",
        ("tests/test_sync.py::test_on_four_ranks[one_process_float64",
         "tests/test_sync.py::test_on_four_ranks[fully_sharded", "tests/test_sync.py::test_on_another_number_of_ranks"),
        ("GPU", "a subclass of torch's", "removed in 2025", "no", "no", "no", "yes", "4-D", "GPU", ""),
    ),
    Row(
        "BatchNorm over a group of ranks", "`process_group`", ("tests/test_sync.py::test_on_four_ranks[subgroups",),
        ("yes", "through torch", "one node", "no", "no", "no", "yes", "no", "yes", "Flax, Haiku"),
    ),
    Row(
        "Batch Renormalization", "any axes, the paper's schedule",
        (*twin("BatchRenorm"), "tests/layers/test_special.py::test_renorm_bounds_follow_the_papers_schedule"),
        (*NONE[:9], "TorchRL (1d), Keras"),
    ),
    Row(
        "ghost, virtual BatchNorm", "yes", twin("GhostBatchNorm"),
        ("no", "by splits with own statistics", *("no",) * 7, "Composer"),
    ),
    Row(
        "frozen BatchNorm", "a layer, and `freeze` for any",
        (*twin("FrozenBatchNorm"), "tests/test_surgery.py::test_frozen_survives_training_and_is_taken_back_exactly"),
        ("no", "2d", "no", "no", "no", "no", "no", "2d", "no", "torchvision (2d)"),
    ),
    Row(
        "statistics per domain or call", "yes",
        (*twin("SplitBatchNorm"), "tests/layers/test_special.py::test_split_statistics_by_call_and_by_attribute"),
        ("no", "by splits of the batch", "no", "no", "no", "no", "no", "by turns", "no", "PyG, by type"),
    ),
    Row(
        "Online Normalization", "yes",
        (*twin("OnlineNorm"), "tests/layers/test_special.py::test_online_norm_steers_its_gradient_as_the_paper_does"),
        (*NONE[:9], "Cerebras, until 2021"),
    ),
    Row(
        "Filter Response Normalization with TLU", "any axes", twin("FilterResponseNorm"),
        ("no", "2d", *("no",) * 7, ""),
    ),
    Row(
        "EvoNorm", "B0 and S0, any axes", (*twin("EvoNormB0", "EvoNormS0"), MISSING),
        ("no", "B0 to B2, S0 to S2, 2d", *("no",) * 7, ""),
    ),
    Row("Switchable Normalization", "any axes", twin("SwitchNorm"), (*NONE[:9], "its authors, until 2020")),
    Row(
        "whitening: DBN, IterNorm", "yes", twin("DecorrelatedBatchNorm", "IterNorm"),
        (*NONE[:9], "IterNorm's authors, until 2019"),
    ),
    Row("Cross-Iteration BatchNorm, EvalNorm", "yes", twin("CrossIterationBatchNorm", "EvalNorm"), ("?",) * 10),
    Row(
        "conditional BatchNorm, AdaIN, SPADE", "yes", twin("ConditionalBatchNorm", "AdaIN", "SPADE"),
        (*NONE[:4], "modulated RMSNorm", *("no",) * 4, "copies in repositories of GANs"),
    ),
    Row(
        "Dynamic Tanh", "yes", twin("DynamicTanh"), (*NONE[:4], "yes", *("no",) * 4, "its authors"),
    ),
    Row(
        "masks; weights of cells", "masks, in every layer that has statistics; no weights",
        ("tests/test_padding.py::test_padding_is_invisible[", "tests/test_padding.py::test_every_layer_with_a_mask",
         "tests/layers/test_layers.py::test_masked_cells_take_no_part[", MISSING),
        (*NONE[:9], "Flax, Keras (BatchNorm); PyG by graph"),
    ),
    Row(
        "activation in the normalizer", "fused; x is kept, so not in place",
        ("tests/test_drop_in.py::test_activation_and_residual[", MISSING),
        ("no", "through inplace_abn", "no", "no", "no", "no", "in place", "no", "no", ""),
    ),
    Row(
        "residual added in the normalizer", "in every layer but FRN, EvoNorm, GRN and Dynamic Tanh",
        ("tests/test_drop_in.py::test_activation_and_residual[",
         "tests/layers/test_layers.py::test_residual_and_activation["),
        ("?", "?", "?", "RMSNorm, in backward", "RMSNorm", "RMSNorm", "?", "?", "?", ""),
    ),
    Row(
        "PolyNorm; L2Norm", "L2Norm as `ScaleNorm`", (*twin("ScaleNorm"), MISSING),
        ("no", "no", "no", "L2Norm", "PolyNorm", *("no",) * 4, ""),
    ),
    Row(
        "LSTM with normalized terms; GRU", "BatchNorm and LayerNorm LSTM, LayerNorm GRU; packed and padded",
        (f"{RECURRENT}BatchNormLSTM-", f"{RECURRENT}LayerNormLSTM-", f"{RECURRENT}LayerNormGRU-",
         "tests/test_padding.py::test_padding_of_sequences_is_invisible"),
        ("?",) * 10,
    ),
)  # fmt: skip

JAX = ("Keras 3", "Flax NNX", "Haiku", "Equinox", "einx.nn, removed in March 2026")
OPTIONS = (
    Row(
        "BatchNorm's conventions", "torch's: momentum 0.1 of the new batch, ε 1e-5, unbiased running variance",
        ("tests/test_drop_in.py::test_constructor_is_torchs_plus_activation[",
         "tests/test_laws.py::test_running_statistics_are_the_oracles"),
        ("momentum 0.99 of the old, ε 1e-3, biased", "momentum 0.99 of the old, ε 1e-5, biased",
         "no clamp, no float32 inside", "only under vmap, with an axis name", "a decay rate"),
    ),
    Row("batch renormalization", "yes", twin("BatchRenorm"), ("yes", "no", "no", "no", "no")),
    Row("virtual batch", "yes", twin("GhostBatchNorm"), ("no", "no", "no", "no", "no")),
    Row(
        "synchronized", "yes", ("tests/test_sync.py::test_on_four_ranks[one_process_float64",),
        ("on TensorFlow", "yes", "yes", "yes", "–"),
    ),
    Row(
        "mask", "yes", ("tests/test_padding.py::test_padding_is_invisible[",),
        ("BatchNorm", "BatchNorm, LayerNorm, RMSNorm, GroupNorm, InstanceNorm", "no", "no", "no"),
    ),
    Row(
        "choice of axes", "by notation", ("tests/test_norm.py::test_equals_the_layer_it_describes",),
        ("yes", "yes", "yes", "no", "by notation"),
    ),
    Row(
        "LayerNorm, GroupNorm, RMSNorm", "yes", drop_in("LayerNorm", "GroupNorm", "RMSNorm"),
        ("yes", "yes", "yes", "yes", "yes"),
    ),
    Row(
        "InstanceNorm", "yes", drop_in("InstanceNorm2d"),
        ("as GroupNorm", "yes", "yes", "as GroupNorm", "yes"),
    ),
    Row("spectral norm", "torch's", (TORCHS,), ("yes", "yes", "yes", "yes", "no")),
    Row("weight norm", "torch's", (TORCHS,), ("no", "yes", "no", "yes", "no")),
    Row(
        "frozen", "yes", ("tests/test_surgery.py::test_frozen_computes_what_evaluation_computes",),
        ("trainable=False", "an argument", "an argument", "a flag", "–"),
    ),
    Row(
        "scale and offset at the call", "`ns.normalize`, `ConditionalBatchNorm`, `AdaIN`",
        twin("ConditionalBatchNorm, γ and β given", "AdaIN"),
        ("no", "no", "yes", "no", "no"),
    ),
)  # fmt: skip

WEIGHT_PACKAGES = ("torch", "timm", "mmcv", "Composer", "Keras / Flax / Haiku / Equinox")
WEIGHTS = (
    Row("weight norm", "torch's", (TORCHS,), ("yes", "no", "no", "no", "no / yes / no / yes")),
    Row("spectral norm", "torch's", (TORCHS,), ("yes", "no", "no", "no", "yes / yes / yes / yes")),
    Row(
        "weight standardization", "any convolution, and linear layers",
        ("tests/test_parametrizations.py::test_weight_standardization_is_the_papers[",),
        ("no", "convolutions of its own", "a convolution of its own", "yes", "no / no / no / no"),
    ),
    Row("orthogonal", "torch's", (TORCHS,), ("yes", "no", "no", "no", "?")),
    Row(
        "made a plain weight after training", "`bake(model)`, all at once",
        ("tests/test_parametrizations.py::test_bake_keeps_the_function_of_evaluation[",),
        ("one by one", "no", "no", "no", "?"),
    ),
)  # fmt: skip

TABLES = (
    ("Normalizers", PYTORCH, NORMALIZERS),
    ("Options, beside Keras and the libraries of JAX", JAX, OPTIONS),
    ("Normalizers of weights", WEIGHT_PACKAGES, WEIGHTS),
)

TEXT = """# Features, beside other packages

The column *normscope* is tested: the tests behind each of its cells are listed at the end of this page. The others were
read in the sources of these versions: torch 2.13.0, timm (2026-08-08), apex (2026-07-08), Transformer Engine
(2026-08-22), Liger-Kernel (2026-08-21), quack (2026-08-20), inplace_abn (2025-07-08), detectron2 (2026-06-06), fvcore
(2026-02-25), mmcv (2026-01-16), mmengine (2025-10-27), Composer (2026-04-29), PyG (2026-08-17), Keras (2026-08-21),
Flax (2026-07-02), Haiku (2026-07-09), Equinox (2026-06-27), einx before 0.4. They were not run. "no" means not found
there, "?" not looked for, "–" not that package's business.

{tables}

## What backs the column

{tests}

This page is made by `python scripts/features.py`. `python -m pytest $(python scripts/features.py --tests)` runs the
files of these tests.
"""


def table(title: str, packages: tuple[str, ...], rows: tuple[Row, ...]) -> str:
    """One table."""
    lines = [("", "normscope", *packages), ("---",) * (2 + len(packages))]
    lines += [(row.name, row.ours, *row.others) for row in rows]
    return f"## {title}\n\n" + "\n".join(f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in lines)


def page() -> str:
    """The text of the page."""
    tests = [f"- {row.name}: {', '.join(f'`{t}`' for t in row.tests)}" for _, _, rows in TABLES for row in rows]
    return TEXT.format(tables="\n\n".join(table(*one) for one in TABLES), tests="\n".join(tests))


def named() -> list[str]:
    """Every test that is named, once."""
    return sorted({test for _, _, rows in TABLES for row in rows for test in row.tests})


if __name__ == "__main__":
    if "--tests" in sys.argv:
        sys.stdout.write("\n".join(sorted({test.split("::")[0] for test in named()})) + "\n")
    elif "--check" in sys.argv:
        fresh = PAGE.exists() and PAGE.read_text(encoding="utf-8") == page()
        sys.exit(0 if fresh else "docs/features.md is out of date; run: python scripts/features.py")
    else:
        PAGE.write_text(page(), encoding="utf-8")

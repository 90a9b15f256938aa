"""What `import normscope` offers, and what it must not drag in."""

import importlib
import subprocess
import sys

import pytest

PUBLIC = {
    "normscope": [
        "ArgumentError", "DataError", "DegenerateScopeError", "DependencyError", "DtypeError", "FixReport",
        "Moments", "NormscopeError", "NotationError", "ProofError", "RecomputationError", "Report", "SelfTestReport",
        "ShapeError", "StateError", "Watcher", "watch",
        "StateNotRestoredError", "Thresholds", "UnhealthyError", "__version__", "assert_healthy", "backends",
        "check", "freeze", "functional", "load", "moments", "nn", "normalize", "plan", "recalibrate", "unfreeze",
        "SynchronizationError", "desynchronize", "optim", "parametrizations", "pause_statistics",
        "provisional_statistics", "states", "synchronize", "accelerate", "to_torch", "convert", "adapt", "fold",
        "split_statistics", "selftest",
    ],
    "normscope.functional": ["add_norm", "batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"],
    "normscope.nn": [
        "AdaIN", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "BatchRenorm", "ConditionalBatchNorm",
        "CrossIterationBatchNorm", "DecorrelatedBatchNorm", "DynamicTanh", "EvalNorm", "EvoNormB0", "EvoNormS0",
        "FilterResponseNorm", "FrozenBatchNorm", "GhostBatchNorm", "GlobalResponseNorm", "GroupNorm",
        "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d", "IterNorm", "LayerNorm", "LayerNorm2d",
        "LazyBatchNorm1d", "LazyBatchNorm2d", "LazyBatchNorm3d", "LazyInstanceNorm1d", "LazyInstanceNorm2d",
        "LazyInstanceNorm3d", "MeanOnlyBatchNorm", "Norm", "OnlineNorm", "PositionalNorm", "RMSNorm", "SPADE",
        "ScaleNorm", "SplitBatchNorm", "SwitchNorm",
        "BatchNormLSTM", "LayerNormGRU", "LayerNormLSTM", "RecurrentBatchNorm", "SyncBatchNorm",
    ],
}  # fmt: skip
HEAVY = (
    "matplotlib", "pandas", "triton", "ray", "sklearn", "rich", "click", "jinja2", "scipy", "torch._dynamo",
    "lightning", "pytorch_lightning", "transformers",
)  # fmt: skip


@pytest.mark.parametrize("module", PUBLIC)
def test_exports_are_pinned(module):
    exported = importlib.import_module(module)
    assert sorted(exported.__all__) == sorted(PUBLIC[module])
    assert all(hasattr(exported, name) for name in exported.__all__)


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


LOADED = "import sys; print(*[m for m in {heavy!r} if m in sys.modules])"


def test_import_is_light():
    before = set(run(f"import torch; {LOADED.format(heavy=HEAVY)}"))
    after = set(run(f"import torch, normscope; {LOADED.format(heavy=HEAVY)}"))
    assert after <= before


def test_the_light_import_test_can_fail():
    assert "matplotlib" in run(f"import torch, normscope, matplotlib; {LOADED.format(heavy=HEAVY)}")


def test_import_adds_at_most_300_ms():
    code = "import torch, time, sys\nstart = time.process_time(); import normscope; print(time.process_time() - start)"
    # Processor time, the best of three: the machine's other work is not ours.
    assert min(float(run(code)[0]) for _ in range(3)) < 0.3

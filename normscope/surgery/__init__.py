"""Surgery: edits of a model that lose nothing.

One mechanism under every edit: *find* the normalizers, *replace* by reference, *prove* on an example, *undo* bit for
bit. Every edit happens wholly or not at all, in place or on a copy, and returns a `Surgery`.
"""

from normscope.surgery.accelerate import accelerate, to_torch
from normscope.surgery.adapt import adapt
from normscope.surgery.convert import convert
from normscope.surgery.find import Call, Found, find, paths, trace
from normscope.surgery.fold import fold, refold
from normscope.surgery.forward import feed, quiet, switch
from normscope.surgery.freeze import freeze, is_frozen, unfreeze
from normscope.surgery.operation import Draft, Surgery, operate
from normscope.surgery.policy import pause_statistics, provisional_statistics
from normscope.surgery.prove import Proof
from normscope.surgery.recalibrate import recalibrate
from normscope.surgery.remedies import absorb_bias, copy_buffers, fed_by, keep_float32, set_eps, set_momentum
from normscope.surgery.replace import adopt, exchange, obstacle, replace
from normscope.surgery.split import split_statistics, use_domain
from normscope.surgery.state import Snapshot, reach, state_hash
from normscope.surgery.synchronize import desynchronize, synchronize
from normscope.surgery.traits import Trait

__all__ = [
    "Call",
    "Draft",
    "Found",
    "Proof",
    "Snapshot",
    "Surgery",
    "Trait",
    "absorb_bias",
    "accelerate",
    "adapt",
    "adopt",
    "convert",
    "copy_buffers",
    "desynchronize",
    "exchange",
    "fed_by",
    "feed",
    "find",
    "fold",
    "freeze",
    "is_frozen",
    "keep_float32",
    "obstacle",
    "operate",
    "paths",
    "pause_statistics",
    "provisional_statistics",
    "quiet",
    "reach",
    "recalibrate",
    "refold",
    "replace",
    "set_eps",
    "set_momentum",
    "split_statistics",
    "state_hash",
    "switch",
    "synchronize",
    "to_torch",
    "trace",
    "unfreeze",
    "use_domain",
]

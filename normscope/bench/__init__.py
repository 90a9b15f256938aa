"""How fast is it? Timings in interleaved rounds, against eager torch and against copying the tensor."""

from normscope.bench.run import FULL_SECONDS, QUICK_SECONDS, Settings, run

__all__ = ["FULL_SECONDS", "QUICK_SECONDS", "Settings", "run"]

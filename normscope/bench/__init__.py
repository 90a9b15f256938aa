"""How fast is it? Timings in interleaved rounds, against eager torch and against copying the tensor."""

from normscope.bench.run import Settings, run

__all__ = ["Settings", "run"]

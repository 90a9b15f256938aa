"""States and modules of other systems: Keras, Flax, Caffe, torchvision, detectron2, in-place ABN, timm.

`read` and `write` convert dictionaries, `load` puts one into a model; `take_up`, `to_batch_norm` and `to_frozen`
exchange modules. What the systems call their state is one table, `SYSTEMS`; momentum in either sense goes through
`complement`.
"""

from normscope.states.convert import layers, read, write
from normscope.states.modules import load, to_batch_norm, to_frozen
from normscope.states.systems import SYSTEMS, Kind, System, complement, options
from normscope.states.takeup import take_up

__all__ = [
    "SYSTEMS",
    "Kind",
    "System",
    "complement",
    "layers",
    "load",
    "options",
    "read",
    "take_up",
    "to_batch_norm",
    "to_frozen",
    "write",
]

"""Meaning: what each call computes, refuses and returns.

`core` sees a tensor through the parts of a scope, `autograd` differentiates the formula, `normalize` is the notation
applied to tensors, `torch_named` are torch's own signatures on top of it.
"""

from normscope.functional.torch_named import add_norm, batch_norm, group_norm, instance_norm, layer_norm, rms_norm

__all__ = ["add_norm", "batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"]

"""A way past the checks for calls that differ from an earlier one only in what their tensors hold.

What Python does before the operator takes 10 µs, and 60 to 170 where a tensor of some MB has just emptied the caches:
as long as normalizing 3 MB. So the first call with certain arguments, sizes and strides leaves its recipe behind a door
(`cpp/autograd.cpp`), and the next one enters there.
"""

from __future__ import annotations

from collections.abc import Hashable

from torch import Tensor

from normscope.functional import running as statistics_policy
from normscope.functional.autograd import is_plain
from normscope.functional.compiled import Recipe
from normscope.functional.running import Running
from normscope.kernels import cpu

__all__ = ["enter", "enter_sum", "learn"]

_MOST = 1024  # doors; more means arguments that never come back
_doors: dict[Hashable, cpu.Door] = {}


def enter(
    way: Hashable,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    momentum: float | Tensor = 0.0,
) -> Tensor | None:
    """y, or None where the checks have to run first.

    Args:
        way: The function and all its arguments but these tensors and the momentum.
        x: Normalized.
        weight: γ.
        bias: β.
        residual: Added before the activation.
        mean: Running mean, moved or used as the function does.
        var: Running variance.
        momentum: Weight of the batch in these.
    """
    if not is_plain():
        return None
    door = _doors.get(way)
    if door is None or type(momentum) is not float:
        return None
    return door.enter(x, weight, bias, residual, mean, var, momentum, statistics_policy.SKIP_NONFINITE)


def enter_sum(
    way: Hashable, x: Tensor, addend: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """What `enter` finds for x + addend, and x + addend, in one sweep; None where it has to be added first.

    Args:
        way: As in `enter`.
        x: The one.
        addend: The other.
        weight: γ.
        bias: β.
    """
    if not is_plain() or (door := _doors.get(way)) is None:
        return None
    found = door.enter_sum(x, addend, weight, bias)
    return (found[0], found[1]) if found else None


def learn(
    way: Hashable,
    recipe: Recipe,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running: Running | None,
    given: Tensor | None,
) -> None:
    """Remember what a call has led to, if the next one of its kind can go there straight.

    Args:
        way: As in `enter`.
        recipe: What was followed.
        x: As in `enter`.
        weight: As in `enter`.
        bias: As in `enter`.
        running: The buffers, where the kernels have moved them.
        given: The mean in place of the batch's: the running mean, one number per set.
    """
    if recipe.number is None or not recipe.natural or (given is not None and given.numel() != recipe.layout.set_count):
        return
    if way not in _doors:
        if len(_doors) >= _MOST:
            return
        _doors[way] = cpu.door()
    _doors[way].learn(x, weight, bias, running is not None, given is not None, recipe.number[given is not None])

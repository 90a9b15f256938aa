"""One case: ours, eager torch and both floors in one loop.

The floor of forward + backward is `x.clone()` and `x + g`, of the forward alone `x.clone()`: one read and one write,
then two reads and one write. Every alternative gets the same tensors, and drops its results the same way.
"""

from __future__ import annotations

import itertools
import math
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

import normscope as ns
from normscope.bench.cases import Case, Norm, State
from normscope.bench.check import check, gradients
from normscope.bench.timing import Call, clock_of, interleave
from normscope.records import NormSpeed, Timing

__all__ = ["compile_eager", "measure"]

Pairs = Sequence[tuple[Tensor, Tensor]]

# The calls of a sample go round through so many inputs and upstream gradients that together they exceed what the cores
# hold for themselves (L2), not the cache that they share: as in a model, where the layer before has just written x.
WORKING_SET = 4 << 20
MOST_PAIRS = 256


def measure(case: Case, seconds: float, device: torch.device, others: Mapping[str, Norm] | None = None) -> NormSpeed:
    """Check a case and time its alternatives.

    Args:
        case: What to time.
        seconds: For the check and the loop, which gets at least a fifth of it.
        device: Where.
        others: More alternatives by name: "compiled", "liger".
    """
    start = time.perf_counter()
    generator = torch.Generator(device).manual_seed(zlib.crc32(case.name.encode()))
    pairs = list(_pairs(case, generator))
    norms = {"ours": case.family.ours, "eager": case.family.eager, **(others or {})}
    states = {name: case.state(generator.manual_seed(0), training=True) for name in norms}
    error = check(case, *pairs[0], norms, states)
    alternatives = dict(_alternatives(case, pairs, norms, states, case.state(generator, training=False)))
    left = max(seconds / 5, seconds - (time.perf_counter() - start))
    rounds = interleave(alternatives, left, clock_of(device, ahead=case.part == "suite"))
    plan = ns.plan(pairs[0][0].detach(), case.family.pattern, **case.family.sizes)
    return NormSpeed(
        name=case.name,
        family=case.family.name,
        part=case.part,
        pattern=case.family.pattern,
        shape=case.shape,
        dtype=case.dtype,
        layout=case.layout or "contiguous",
        params=case.params,
        size=case.size,
        passes=plan.passes,
        kernel=plan.kernel.partition(":")[0],
        timings=tuple(Timing(name, rounds.time(name)) for name in alternatives),
        share=rounds.ratio("floor", "ours"),
        eager_share=rounds.ratio("floor", "eager"),
        speedup=rounds.ratio("eager", "ours"),
        eval_share=rounds.ratio("clone", "ours, eval"),
        eval_speedup=rounds.ratio("eager, eval", "ours, eval"),
        compiled=rounds.ratio("compiled", "ours") if "compiled" in norms else None,
        error=error,
        rounds=rounds.count,
        dropped=rounds.dropped,
        calm=rounds.calm,
    )


def _pairs(case: Case, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    working_set = WORKING_SET
    if generator.device.type == "cuda":
        working_set = 2 * torch.cuda.get_device_properties(generator.device).L2_cache_size
    for _ in range(min(MOST_PAIRS, math.ceil(working_set / (2 * case.size)))):
        yield case.tensor(generator, scale=2.0, shift=0.5).requires_grad_(), case.tensor(generator)


def _alternatives(
    case: Case, pairs: Pairs, norms: Mapping[str, Norm], states: Mapping[str, State], fixed: State
) -> Iterator[tuple[str, Call]]:
    for name, norm in norms.items():
        yield name, _over(pairs, partial(gradients, norm, states[name]))
    plain = [(x.detach(), g) for x, g in pairs]
    yield "floor", _over(plain, lambda x, g: (x.clone(), x + g))
    yield "ours, eval", _over(plain, lambda x, _: case.family.ours(x, fixed))
    yield "eager, eval", _over(plain, lambda x, _: case.family.eager(x, fixed))
    yield "clone", _over(plain, lambda x, _: x.clone())


def compile_eager(case: Case, device: torch.device) -> Norm:
    """torch.compile of the eager form, ready to run on this case's tensors."""
    torch.compiler.reset()  # one code object serves all shapes: compiled again, it would become one for any shape
    # Its best without CUDA graphs, which none of the alternatives gets.
    mode = "max-autotune-no-cudagraphs" if device.type == "cuda" else None
    compiled: Norm = torch.compile(case.family.eager, fullgraph=True, dynamic=False, mode=mode)
    generator = torch.Generator(device)
    x, g = case.tensor(generator).requires_grad_(), case.tensor(generator)
    gradients(compiled, case.state(generator, training=True), x, g)
    return compiled


def _over(pairs: Pairs, call: Callable[[Tensor, Tensor], object]) -> Call:
    """A call without arguments that takes the next pair each time."""
    feed = itertools.cycle(pairs)
    return lambda: call(*next(feed))

"""What Triton makes of the GPU kernels, without a GPU: registers, spills, and how wide every access to a tensor is.

    python scripts/triton_code.py [--select "BN 32x64*"] [--capability 90] [--markdown docs/kernels.md]

Compiles the bodies that the cases of the benchmark launch, forward and backward with a ReLU, and reads their PTX and
what the assembler says of them.
"""

from __future__ import annotations

import argparse
import math
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import MockTensor

from normscope.bench.cases import DTYPES, LAYOUTS, SUITE, Case, select
from normscope.functional.view import view_of
from normscope.kernels.formula import Formula
from normscope.kernels.triton import launches, layout_of

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
ACCESS = re.compile(r"(ld|st)\.global\S*?(?:\.v(\d))?\.[bfus](\d+) ")
MARKS = ("<!-- triton code -->", "<!-- end of triton code -->")


class Driver:
    """One that knows its GPU by name only."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_device(self):
        return 0

    def get_current_stream(self, _device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)


@dataclass(frozen=True)
class Code:
    """One compiled body.

    Attributes:
        body: Its name.
        tile: Tasks, rows and columns, and whether whole sets lie in it.
        programs: How many are launched.
        warps: Of each.
        accesses: How many loads and stores there are, by kind and width in bytes.
        registers: Per thread.
        spilled: Bytes of them that had to go to memory.
    """

    body: str
    tile: tuple[int, int, int]
    programs: int
    warps: int
    accesses: Counter
    registers: int
    spilled: int


def code_of(
    x, pattern, *, params="c", sizes=None, formula=None, residual=False, mask=False, moments=False, gated=False
):
    """The bodies that a forward and a backward pass launch for a tensor, of which only the memory format matters."""
    found = []
    view = view_of(x, pattern, sizes or {}, params)
    varies = tuple(part.axis in view.params for part in view.scope.parts)
    layout = layout_of(view.sizes, view.unfold(x).stride(), view.inside, varies)
    tile = layout.tile.tasks, layout.tile.rows, layout.tile.columns

    def compile_only(body, programs, warps, *arguments, **constants):
        given = [MockTensor(a.dtype) if isinstance(a, torch.Tensor) else a for a in arguments]
        asm = body.warmup(*given, **constants, num_warps=warps, enable_fp_fusion=True, grid=(programs,)).asm
        found.append(Code(body.__name__, tile, programs, warps, accesses(asm["ptx"]), *resources(asm["cubin"])))

    formula = Formula(view.inside, 1e-5, **(formula or {}))
    weight = x.new_empty([x.shape[axis] for axis in view.params], dtype=torch.float32).reshape(-1)
    mean = x.new_empty(layout.set_count, dtype=torch.float32) if moments else None
    residual, mask = x if residual else None, torch.empty_like(x, dtype=torch.bool) if mask else None
    launch, launches._launch = launches._launch, compile_only
    try:
        y, statistics = launches.forward(x, layout, formula, weight, weight, residual, mask, mean, mean)
        launches.backward(
            x, x, layout, formula, weight, weight, None if gated else residual, y if gated else None, mask, statistics,
            x, residual, moments, True,
        )  # fmt: skip
    finally:
        launches._launch = launch
    return found


def accesses(ptx):
    """How many loads and stores there are, by kind and width in bytes."""
    return Counter((kind, int(vector or 1) * int(bits) // 8) for kind, vector, bits in ACCESS.findall(ptx))


def resources(cubin):
    """Registers per thread, and bytes of them that had to go to memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        shown = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return tuple(int(re.search(rf"{what}:(\d+)", shown).group(1)) for what in ("REG", "STACK"))


def code_of_case(case: Case):
    """The bodies of a case of the benchmark, with a ReLU behind it."""
    x = torch.empty(case.shape, dtype=DTYPES[case.dtype], device="meta")
    x = x.contiguous(memory_format=LAYOUTS[case.layout])
    formula = {"center": case.family.bias, "activation": "relu"}
    return code_of(x, case.family.pattern, sizes=case.family.sizes, formula=formula)


# How often a body reads and writes tensors of x's size; `partial_moments` looks at its first tile twice.
TENSORS = {
    "forward_resident": (1, 1), "partial_moments": (1, 0), "apply": (1, 1),
    "backward_resident": (2, 1), "backward_sums": (2, 0), "backward_apply": (2, 1),
}  # fmt: skip
# Cases whose rows are multiples of 16 bytes; a 14x14 map of bfloat16 is one of 8.
CHECKED = ("BN 32x64x56x56", "LN 32x197x768")


def problems(case: Case):
    """Accesses to whole tensors that are narrower than 16 bytes, and registers that had to go to memory."""
    for code in code_of_case(case):
        reads, writes = TENSORS.get(code.body, (0, 0))
        cells = math.prod(code.tile) // (32 * code.warps)
        wide = max(1, cells * DTYPES[case.dtype].itemsize // 16)
        if code.accesses["ld", 16] < reads * wide or code.accesses["st", 16] < writes * wide or code.spilled:
            yield f"{case.name}: {code}"


def rows(cases):
    """A table in Markdown, one line per case and body."""
    yield "| case | body | x read + written | tile | programs × warps | registers | loads, by bytes | stores |"
    yield "|---|---|---|---|---|---|---|---|"
    for case in cases:
        for k, code in enumerate(code_of_case(case)):
            loads, stores = (
                ", ".join(f"{n} of {width}" for (what, width), n in sorted(code.accesses.items()) if what == kind)
                for kind in ("ld", "st")
            )
            spilled = f", {code.spilled} B spilled" if code.spilled else ""
            yield (
                f"| {'' if k else case.name} | {code.body} | {'{} + {}'.format(*TENSORS.get(code.body, (0, 0)))} "
                f"| {'×'.join(map(str, code.tile))} "
                f"| {code.programs} × {code.warps} | {code.registers}{spilled} | {loads} | {stores} |"
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, default=90, help="of the GPU; 90 is Hopper")
    parser.add_argument("--select", action="append", help="only what is named like this; repeat")
    parser.add_argument("--markdown", type=Path, help="put the table between its marks in this file")
    parser.add_argument("--check", action="store_true", help="only say where accesses are narrow or registers spilled")
    options = parser.parse_args()
    triton.runtime.driver.set_active(Driver(options.capability))
    names = [case.name for case in SUITE]
    if options.check:
        found = [p for case in SUITE if case.name.startswith(CHECKED) for p in problems(case)]
        print("\n".join(found))
        return int(bool(found))
    chosen = [case for case in SUITE if not options.select or case.name in select(names, options.select)]
    table = "\n".join(rows(chosen))
    if options.markdown is None:
        print(table)
        return 0
    text = options.markdown.read_text(encoding="utf-8")
    before, _, rest = text.partition(MARKS[0])
    options.markdown.write_text(before + f"{MARKS[0]}\n{table}\n" + MARKS[1] + rest.partition(MARKS[1])[2], "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The laws on normscope."""

import math

import laws
import numpy as np
import pytest
import torch
from cases import CASES, EDGES, LAYOUTS, RAGGED_CASES, Case
from laws import LAWS, Trial, agrees_where_epsilon_decides, agrees_with_the_oracle, close, layouts_agree, real
from torch.nn import functional as F

import normscope as ns
from normscope import oracle

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law, case):
    for dtype in LAWS[law]:
        for layout in LAYOUTS:
            law(Trial(ns, case, layout, dtype))


@pytest.mark.parametrize("case", [*EDGES, *RAGGED_CASES], ids=str)
def test_ragged_and_degenerate_sizes(case):
    if case.cells == 1 and case.center:
        with pytest.raises(ns.DegenerateScopeError):
            ns.normalize(torch.zeros(case.shape), case.pattern, **case.sizes)
        return
    for dtype in (torch.float32, torch.bfloat16):
        for layout in LAYOUTS:
            for law in (agrees_with_the_oracle, agrees_where_epsilon_decides, layouts_agree):
                law(Trial(ns, case, layout, dtype))

"""The laws on normscope, what follows from the scopes alone, and torch's own names against the oracle."""

import math

import numpy as np
import pytest
import torch
from cases import CASES, EDGES, LAYOUTS, RAGGED_CASES
from laws import LAWS, Trial, agrees_where_epsilon_decides, agrees_with_the_oracle, close, layouts_agree, real

import normscope as ns
from normscope import oracle
from normscope.functional import shortcut
from normscope.kernels import cpu


@pytest.fixture(params=["compiled", "eager"], autouse=True)
def kernels(request, monkeypatch):
    """Every test of this file runs on both backends; where nothing is compiled, twice on the eager one."""
    if request.param == "eager":
        monkeypatch.setattr(cpu, "missing", lambda: "switched off by a test")
        monkeypatch.setattr(shortcut, "_doors", {})  # where earlier tests have left the compiled way


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


# Two patterns, one S. With x̂ below √m and √m units of error from the statistics on both sides.
EQUAL = [
    ("a group is a layer", (3, 6, 4, 5), ("n (g [c]) [h w]", {"g": 1}), ("n [c h w]", {})),
    ("as many groups as channels are instances", (3, 6, 4, 5), ("n (g [c]) [h w]", {"g": 6}), ("n c [h w]", {})),
    ("a batch of one is an instance", (1, 6, 4, 5), ("[n] c [h w]", {}), ("n c [h w]", {})),
    ("ghosts of the whole batch", (4, 3, 2, 5), ("(g [n]) c [h w]", {"g": 1}), ("[n] c [h w]", {})),
    ("ghosts of one are instances", (4, 3, 2, 5), ("(g [n]) c [h w]", {"g": 4}), ("n c [h w]", {})),
    ("positions on a map of one", (4, 6, 1, 1), ("n [c] h w", {}), ("n [c h w]", {})),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "one", "other"), [row[1:] for row in EQUAL], ids=[row[0] for row in EQUAL])
def test_equal_sets_give_equal_results(shape, one, other, layout):
    torch.manual_seed(0)
    x, dy = (LAYOUTS[layout](torch.randn(shape)) for _ in range(2))
    outputs = []
    for pattern, sizes in (one, other):
        a = x.detach().requires_grad_()
        y = ns.normalize(a, pattern, **sizes)
        outputs.append((y, *torch.autograd.grad(y, a, dy)))
    m = x.numel()  # at least |S|
    error = 2 * torch.finfo(torch.float32).eps * (4 + math.sqrt(m)) * math.sqrt(m)
    for a, b in zip(*outputs, strict=True):
        close(a, real(b), error, "one against the other")


# torch's names: the oracle on the pattern that each name stands for.

NAMED = {
    "batch_norm": (lambda x, w, b: ns.functional.batch_norm(x, None, None, w, b, True), "[n] c [h w]", {}),
    "instance_norm": (lambda x, w, b: ns.functional.instance_norm(x, weight=w, bias=b), "n c [h w]", {}),
    "group_norm": (lambda x, w, b: ns.functional.group_norm(x, 3, w, b), "n (g [c]) [h w]", {"g": 3}),
    "layer_norm": (lambda x, w, b: ns.functional.layer_norm(x, x.shape[3:], w, b), "n h w [c]", {}),
    "rms_norm": (
        lambda x, w, b: ns.functional.rms_norm(x, x.shape[3:], w, 1e-5) + b, "n h w [c]", {"center": False},
    ),
    "add_norm": (
        lambda x, w, b: ns.functional.add_norm(x / 2, x / 2, x.shape[3:], w, b)[0], "n h w [c]", {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_torchs_names_are_scopes(name):
    call, pattern, options = NAMED[name]
    torch.manual_seed(0)
    x = torch.randn(4, 6, 3, 6, dtype=torch.float64) + 3
    w, b = torch.randn(2, 6, dtype=torch.float64)
    # 200 numbers below 10 in float64: 200 · 10 · 1.1e-16.
    close(call(x, w, b), oracle.normalize(real(x), pattern, γ=real(w), β=real(b), **options), 1e-12, "y")


@pytest.mark.parametrize("momentum", [0.1, 0.7])
@pytest.mark.parametrize("masked", [False, True])
def test_running_statistics_are_the_oracles(momentum, masked):
    torch.manual_seed(0)
    mean, var = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    E, Var = np.zeros(4), np.ones(4)
    for _ in range(3):
        x = torch.randn(5, 4, 2, dtype=torch.float64) * 2 + 1
        mask = torch.rand(5, 4, 2) < 0.5
        mask[:, 0] = False  # a channel of no cell stays where it is
        mask[:, 1] = False
        mask[2, 1, 1] = True  # one cell moves the mean alone
        mask = mask if masked else None
        ns.functional.batch_norm(x, mean, var, training=True, momentum=momentum, mask=mask)
        batch = oracle.moments(real(x), "[n] c [l]", mask=None if mask is None else mask.numpy())
        E, Var = oracle.running(E, Var, batch, momentum)
    close(mean, E, 1e-14, "running_mean")
    close(var, Var, 1e-14, "running_var")
    x = torch.randn(5, 4, 2, dtype=torch.float64)
    y = ns.functional.batch_norm(x, mean, var)
    close(y, oracle.normalize(real(x), "[n] c [l]", moments=(E, Var)), 1e-13, "y of the running statistics")

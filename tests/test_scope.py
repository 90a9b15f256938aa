"""The notation: what each pattern means, what each wrong one is told, and where the sets lie in memory."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normscope.errors import ArgumentError, NotationError, ShapeError
from normscope.scope import SCOPES, Part, make_plan, parse

# What the patterns mean.

# Pattern, rank: names of the parts with their axes, positions inside and outside S, axes of the params.
TABLE = {
    "BatchNorm2d": ("[n] c [h w]", 4, "n0 c1 h2 w3", (0, 2, 3), (1,), "c", (1,)),
    "BatchNorm1d": ("[n] c", 2, "n0 c1", (0,), (1,), "c", (1,)),
    "LayerNorm": ("... [c]", 3, "...00 ...11 c2", (2,), (0, 1), "c", (2,)),
    "LayerNorm of a vector": ("... [c]", 1, "c0", (0,), (), "c", (0,)),
    "LayerNorm over a CNN layer": ("n [c h w]", 4, "n0 c1 h2 w3", (1, 2, 3), (0,), "c h w", (1, 2, 3)),
    "channels-first LayerNorm": ("n [c] h w", 4, "n0 c1 h2 w3", (1,), (0, 2, 3), "c", (1,)),
    "InstanceNorm2d": ("n c [h w]", 4, "n0 c1 h2 w3", (2, 3), (0, 1), "c", (1,)),
    "GroupNorm": ("n (g [c]) [h w]", 4, "n0 g1 c1 h2 w3", (2, 3, 4), (0, 1), "c", (1,)),
    "ghost BatchNorm": ("(g [n]) c [h w]", 4, "g0 n0 c1 h2 w3", (1, 3, 4), (0, 2), "c", (1,)),
    "per-time-step BatchNorm": ("[n] t c", 3, "n0 t1 c2", (0,), (1, 2), "c", (2,)),
    "any space": ("[n] c [...]", 5, "n0 c1 ...02 ...13 ...24", (0, 2, 3, 4), (1,), "c", (1,)),
    "no space": ("[n] c [...]", 2, "n0 c1", (0,), (1,), "c", (1,)),
    "ellipsis amid": ("n [...] c", 4, "n0 ...01 ...12 c3", (1, 2), (0, 3), "c n", (3, 0)),
    "bracket around a split": ("[(g n) c] h", 3, "g0 n0 c1 h2", (0, 1, 2), (3,), "h g", (2, 0)),
    "no spaces needed": ("n(g[c])[h w]", 4, "n0 g1 c1 h2 w3", (2, 3, 4), (0, 1), "g", (1,)),
    "three factors": ("(a [b] c_1)", 1, "a0 b0 c_10", (1,), (0, 2), "c_1", (0,)),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_table(name):
    pattern, rank, parts, inside, outside, params, axes = TABLE[name]
    scope = parse(pattern).at(rank)
    assert [f"{part.name}{part.axis}" for part in scope.parts] == parts.split()
    assert (scope.inside, scope.outside, scope.rank) == (inside, outside, rank)
    assert scope.param_axes(params) == axes
    assert scope.splits == ("(" in pattern)
    assert all(
        scope.factors(axis) == tuple(i for i, p in enumerate(scope.parts) if p.axis == axis) for axis in range(rank)
    )


def test_published_scopes_are_the_ones_above():
    space = {"[...]": "[h w]"}
    published = {name: (named.pattern.replace("[...]", space["[...]"]), named.params) for name, named in SCOPES.items()}
    assert published == {
        "BatchNorm": ("[n] c [h w]", "c"),
        "BatchNorm per time step": ("[n] t c", "c"),
        "GhostBatchNorm": ("(g [n]) c [h w]", "c"),
        "InstanceNorm": ("n c [h w]", "c"),
        "GroupNorm": ("n (g [c]) [h w]", "c"),
        "LayerNorm": ("... [c]", "c"),
        "LayerNorm over a CNN layer": ("n [c h w]", "c h w"),
        "LayerNorm2d": ("n [c] h w", "c"),
        "RMSNorm": ("... [c]", "c"),
    }
    assert [name for name, named in SCOPES.items() if not named.center] == ["RMSNorm"]
    assert all(named.paper for named in SCOPES.values())


def test_a_part_remembers_its_column():
    assert parse("n (g [c])").parts == (
        Part("n", 0, False, 0), Part("g", 1, False, 3), Part("c", 1, True, 6),
    )  # fmt: skip


def test_names_of_axes():
    scope = parse("n (g [c]) ...").at(4)
    assert [scope.axis_of(name) for name in ("n", "g", "c", "...1", "h")] == [0, 1, 1, 3, None]


def test_params_may_name_none():
    assert parse("[n] c").at(2).param_axes("") == ()


UNFOLD = [
    ("n (g [c]) [h w]", (2, 6, 5, 3), {"g": 3}, (2, 3, 2, 5, 3)),
    ("n (g [c]) [h w]", (2, 6, 5, 3), {"c": 3}, (2, 2, 3, 5, 3)),
    ("n (g [c]) [h w]", (2, 6, 5, 3), {"g": 3, "c": 2, "h": 5}, (2, 3, 2, 5, 3)),
    ("(a b [c])", (12,), {"a": 2, "c": 3}, (2, 2, 3)),
    ("(g [n]) c", (0, 3), {"g": 4}, (4, 0, 3)),
    ("[n] c", (5, 0), {"n": 5}, (5, 0)),
    ("... [c]", (2, 3, 4), {}, (2, 3, 4)),
]


@pytest.mark.parametrize(("pattern", "shape", "sizes", "expected"), UNFOLD)
def test_unfold(pattern, shape, sizes, expected):
    assert parse(pattern).at(len(shape)).unfold(shape, sizes) == expected


# What wrong ones are told, to the letter.

IDENTIFIERS = "axis names are identifiers such as n, c, h, separated by spaces"
FACTORS = "write all factors of an axis in one pair of parentheses"

MALFORMED = [
    ("n c", "no axis is averaged over, so the scope is empty", 0,
     "put brackets around the axes that share one mean and variance, e.g. '[n] c [h w]'"),
    ("  n c", "no axis is averaged over, so the scope is empty", 2,
     "put brackets around the axes that share one mean and variance, e.g. '[n] c [h w]'"),
    ("n [c", "this bracket is never closed", 2, "close it with ']'"),
    ("n [", "this bracket is never closed", 2, "close it with ']'"),
    ("[n] c [h w", "this bracket is never closed", 6, "close it with ']'"),
    ("(g [c", "this bracket is never closed", 3, "close it with ']'"),
    ("[n] (g c", "this parenthesis is never closed", 4, "close it with ')'"),
    ("n c]", "there is no bracket to close here", 3, "open it with '[' or drop this one"),
    ("[n] c]", "there is no bracket to close here", 5, "open it with '[' or drop this one"),
    ("n g)", "there is no parenthesis to close here", 3, "open it with '(' or drop this one"),
    ("n [c [h]]", "brackets do not nest", 5, "close the first bracket before opening another"),
    ("[(g [c])]", "brackets do not nest", 4, "close the first bracket before opening another"),
    ("n [] c", "these brackets are empty", 2, "name the axes to average over, or drop the brackets"),
    ("(g [])", "these brackets are empty", 3, "name the axes to average over, or drop the brackets"),
    ("n (g (a b)) [c]", "splits do not nest", 5, FACTORS),
    ("n (c) [h]", "a split needs two factors or more", 2, "write e.g. (g [c]), or drop the parentheses"),
    ("n () [h]", "a split needs two factors or more", 2, "write e.g. (g [c]), or drop the parentheses"),
    ("n (g [c) h]", "the bracket opened inside this split is still open", 7, "close it with ']' first"),
    ("[n (g c] h)", "the parenthesis opened inside this bracket is still open", 7, "close it with ')' first"),
    ("[n] n", "axis 'n' is named twice", 4, "give every axis a name of its own"),
    ("(c [g]) c", "axis 'c' is named twice", 8, "give every axis a name of its own"),
    ("... [...]", "axis '...' is named twice", 5, "give every axis a name of its own"),
    ("[n] 2c", "'2c' is not an axis name", 4, IDENTIFIERS),
    ("[n] c-d", "'-d' is not an axis name", 5, IDENTIFIERS),
    ("[n] c, h", "',' is not an axis name", 5, IDENTIFIERS),
    ("[n] c.", "'.' is not an axis name", 5, IDENTIFIERS),
    ("[n] .. c", "'.' is not an axis name", 4, IDENTIFIERS),
    ("[n] ....", "'.' is not an axis name", 7, IDENTIFIERS),
    ("n {c}", "'{c}' is not an axis name", 2, IDENTIFIERS),
    ("(... g) [n]", "'...' stands for whole axes and cannot be a factor", 1, "name the factor"),
]  # fmt: skip


def caret(text, column, label="pattern"):
    lead = f"  {label}: "
    return f"{lead}{text}\n{' ' * (len(lead) + column)}^"


@pytest.mark.parametrize(("pattern", "sentence", "column", "cure"), MALFORMED)
def test_malformed_patterns(pattern, sentence, column, cure):
    with pytest.raises(NotationError) as error:
        parse(pattern)
    assert str(error.value) == f"{sentence}\n{caret(pattern, column)}\n  cure: {cure}"
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize("pattern", ["", "  "])
def test_empty_patterns(pattern):
    with pytest.raises(NotationError) as error:
        parse(pattern)
    assert str(error.value) == (
        f"the pattern is empty\n  pattern: {pattern!r}\n  cure: name the axes, e.g. '[n] c [h w]'"
    )


def test_a_pattern_is_a_string():
    with pytest.raises(NotationError) as error:
        parse(3)
    assert str(error.value) == "a scope is a pattern such as '[n] c [h w]', not 3"


def test_a_caret_written_out():
    """One message as a user sees it, so that `caret` above cannot err together with the package."""
    with pytest.raises(NotationError) as error:
        parse("[n] c [h w")
    assert str(error.value) == (
        "this bracket is never closed\n"
        "  pattern: [n] c [h w\n"
        "                 ^\n"
        "  cure: close it with ']'"
    )  # fmt: skip


AXES = "name every axis of the tensor in order, or write ... for the axes that need no name"


@pytest.mark.parametrize(
    ("pattern", "rank", "sentence"),
    [
        ("[n] c", 3, "the pattern '[n] c' is for tensors of 2 axes, this one has 3"),
        ("[n] c [h w]", 3, "the pattern '[n] c [h w]' is for tensors of 4 axes, this one has 3"),
        ("[n] ... c", 1, "the pattern '[n] ... c' is for tensors of 2 or more axes, this one has 1"),
        ("n (g [c])", 3, "the pattern 'n (g [c])' is for tensors of 2 axes, this one has 3"),
    ],
)
def test_wrong_ranks(pattern, rank, sentence):
    with pytest.raises(ShapeError) as error:
        parse(pattern).at(rank)
    assert str(error.value) == f"{sentence}\n  cure: {AXES}"
    assert isinstance(error.value, RuntimeError)


GROUPS = "n (g [c]) [h w]"


@pytest.mark.parametrize(
    ("kind", "pattern", "sizes", "message"),
    [
        (
            NotationError, GROUPS, {},
            f"the split (g [c]) needs the sizes of all its factors but one\n{caret(GROUPS, 3)}\n"
            "  cure: give all but one of g, c, e.g. g=32",
        ),
        (
            NotationError, "n (a b [c]) h w", {"b": 2},
            f"the split (a b [c]) needs the sizes of all its factors but one\n{caret('n (a b [c]) h w', 3)}\n"
            "  cure: give all but one of a, b, c, e.g. a=32",
        ),
        (
            NotationError, GROUPS, {"g": 2, "k": 4},
            "size k=4 was given, but the pattern has no axis 'k'\n"
            f"  pattern: {GROUPS}\n  cure: the pattern names n, g, c, h, w",
        ),
        (
            ShapeError, GROUPS, {"g": 4},
            f"axis 1 of size 6 does not fit (g [c]) with g=4\n{caret(GROUPS, 3)}\n"
            "  shape: (2, 6, 3, 3)\n  cure: the sizes of (g [c]) must multiply to 6",
        ),
        (
            ShapeError, GROUPS, {"g": 3, "c": 3},
            f"axis 1 of size 6 does not fit (g [c]) with g=3, c=3\n{caret(GROUPS, 3)}\n"
            "  shape: (2, 6, 3, 3)\n  cure: the sizes of (g [c]) must multiply to 6",
        ),
        (
            ShapeError, GROUPS, {"g": 3, "h": 4},
            f"axis 2 of size 3 does not fit [h] with h=4\n{caret(GROUPS, 11)}\n"
            "  shape: (2, 6, 3, 3)\n  cure: the sizes of [h] must multiply to 3",
        ),
        (ArgumentError, GROUPS, {"g": 0}, f"size g=0 must be at least 1\n  pattern: {GROUPS}"),
        (ArgumentError, GROUPS, {"g": -2}, f"size g=-2 must be at least 1\n  pattern: {GROUPS}"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit(kind, pattern, sizes, message):
    with pytest.raises(kind) as error:
        parse(pattern).at(4).unfold((2, 6, 3, 3), sizes)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            "c x",
            f"params names 'x', which is no axis of the pattern '{GROUPS}'\n{caret('c x', 2, 'params')}\n"
            "  cure: name one or more of n, g, c, h, w",
        ),
        (
            "h g c",
            f"params names axis 1 twice\n{caret('h g c', 4, 'params')}\n"
            "  cure: name each axis once; one factor of a split stands for the whole axis",
        ),
    ],
)
def test_params_that_do_not_fit(params, message):
    with pytest.raises(NotationError) as error:
        parse(GROUPS).at(4).param_axes(params)
    assert str(error.value) == message


# Read once.


def test_patterns_are_read_once():
    assert parse("[n] cached [h w]") is parse("[n] cached [h w]")
    assert parse("... [cached]").at(3) is parse("... [cached]").at(3)
    assert parse("... [cached]").at(3) is not parse("... [cached]").at(2)


# Where the sets lie: the seven integers against an enumeration of memory offsets.

# The set of every cell of a (4, 6, h, w) tensor, by hand-written labels that know nothing of the notation.
LABELS = {
    "[n] c [h w]": ({}, lambda n, c, h, w: c),
    "n [c h w]": ({}, lambda n, c, h, w: n),
    "n [c] h w": ({}, lambda n, c, h, w: (n, h, w)),
    "n c [h w]": ({}, lambda n, c, h, w: (n, c)),
    "n (g [c]) [h w]": ({"g": 2}, lambda n, c, h, w: (n, c // 3)),
    "n (k [c]) [h w]": ({"c": 2}, lambda n, c, h, w: (n, c // 2)),
    "n ([c] g) [h w]": ({"g": 2}, lambda n, c, h, w: (n, c % 2)),
    "(g [n]) c [h w]": ({"g": 2}, lambda n, c, h, w: (n // 2, c)),
    "([n] g) c [h w]": ({"g": 2}, lambda n, c, h, w: (n % 2, c)),
    "(g [n]) c": ({"g": 2}, lambda n, c: (n // 2, c)),
    "[n] t c": ({}, lambda n, t, c: (t, c)),
    "... [c]": ({}, lambda n, a, b, c: (n, a, b)),
    "[n c h w]": ({}, lambda n, c, h, w: 0),
    "[n] c [h] w": ({}, lambda n, c, h, w: (c, w)),
    "n [c] h [w]": ({}, lambda n, c, h, w: (n, h)),
    "[n] c h [w]": ({}, lambda n, c, h, w: (c, h)),
}
LAYOUTS = {
    "contiguous": lambda n, c, h, w: torch.empty(n, c, h, w),
    "channels_last": lambda n, c, h, w: torch.empty(n, h, w, c).permute(0, 3, 1, 2),
    "transposed": lambda n, c, h, w: torch.empty(c, n, w, h).permute(1, 0, 3, 2),
    "sliced channels": lambda n, c, h, w: torch.empty(n, c + 1, h, w)[:, 1:],
    "every second column": lambda n, c, h, w: torch.empty(n, c, h, 2 * w)[..., ::2],
    "every second row of channels_last": lambda n, c, h, w: torch.empty(n, 2 * h, w, c).permute(0, 3, 1, 2)[:, :, ::2],
}
SHAPES = [(4, 6, 3, 5), (4, 6, 1, 5), (4, 6, 2, 1), (4, 6, 1, 1)]


def sets_in_memory(x, label):
    sets = {}
    for cell in product(*map(range, x.shape)):
        offset = sum(i * stride for i, stride in zip(cell, x.stride(), strict=True))
        sets.setdefault(label(*cell), set()).add(offset)
    return {frozenset(offsets) for offsets in sets.values()}


def generated(integers):
    I, si, J, sj, P, sp, Q = integers  # noqa: E741
    return {
        frozenset(i * si + j * sj + p * sp + q for p in range(P) for q in range(Q)) for i in range(I) for j in range(J)
    }


def fits(offsets, strides):
    """Whether some rows × columns make { i·a + j·b } equal to the offsets, which start at 0, for (a, b) in strides."""
    n = len(offsets)
    return any(
        {i * a + j * b for i in range(rows) for j in range(n // rows)} == offsets
        for rows in range(1, n + 1) if n % rows == 0
        for a, b in strides
    )  # fmt: skip


def reducible(sets):
    """Whether seven integers exist at all.

    Every S(i, j) is a copy, moved by i·si + j·sj, of the set that starts at 0. No stride is negative, so the moves are
    the least offsets of the sets. The least positive element of { i·a + j·b } is one of its strides, the other is an
    element too: trying all elements is exhaustive.
    """
    moves = {min(s) for s in sets}
    copies = {frozenset(offset - min(s) for offset in s) for s in sets}
    if len(copies) > 1:
        return False
    (first,) = copies
    least = sorted(moves)[min(1, len(moves) - 1)]
    return fits(first, [(sp, 1) for sp in first]) and fits(moves, [(a, least) for a in moves])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pattern", LABELS)
def test_the_seven_integers_are_the_sets_in_memory(pattern, layout):
    sizes, label = LABELS[pattern]
    for n, c, h, w in SHAPES:
        x = LAYOUTS[layout](n, c, h, w)
        while x.dim() > label.__code__.co_argcount:
            x = x[..., 0]
        plan = make_plan(parse(pattern).at(x.dim()), x.shape, x.stride(), sizes)
        sets = sets_in_memory(x, label)
        assert (plan.sets, plan.cells) == (len(sets), len(next(iter(sets))))
        if plan.integers is None:
            assert not reducible(sets)
        else:
            assert generated(plan.integers) == sets


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", SCOPES)
def test_published_scopes_always_have_seven_integers(name, layout):
    pattern = SCOPES[name].pattern
    x = LAYOUTS[layout](4, 6, 3, 5)
    x = x[..., 0].contiguous() if pattern == "[n] t c" else x
    sizes = {"g": 2} if "g" in pattern else {}
    plan = make_plan(parse(pattern).at(x.dim()), x.shape, x.stride(), sizes)
    assert plan.integers is not None
    assert plan.order in ("along", "across")


def test_the_search_for_integers_finds_and_refuses():
    """`reducible` can say both: {0, 2, 5} is no sum of two progressions."""
    assert reducible({frozenset({0, 1, 4, 5}), frozenset({2, 3, 6, 7})})
    assert not reducible({frozenset({0, 2, 5}), frozenset({10, 12, 15})})
    assert not reducible({frozenset({i}) for i in (0, 2, 5)})


@pytest.mark.parametrize(
    ("pattern", "layout", "order"),
    [
        ("[n] c [h w]", "contiguous", "along"),
        ("[n] c [h w]", "channels_last", "across"),
        ("n [c] h w", "contiguous", "across"),
        ("n [c] h w", "channels_last", "along"),
        ("n c [h w]", "channels_last", "across"),
        ("n (g [c]) [h w]", "channels_last", "along"),
        ("[n] c [h] w", "contiguous", "strided"),
    ],
)
def test_the_order_of_the_loops(pattern, layout, order):
    x = LAYOUTS[layout](4, 6, 3, 5)
    sizes = {"g": 2} if "(" in pattern else {}
    assert make_plan(parse(pattern).at(4), x.shape, x.stride(), sizes).order == order


def test_a_plan_prints_what_will_happen():
    plan = make_plan(parse("n (g [c]) [h w]").at(4), (4, 6, 3, 5), (90, 15, 5, 1), {"g": 2})
    assert str(plan) == (
        "normalize 'n (g [c]) [h w]' over (4, 6, 3, 5)\n"
        "  sets    8 (one per n g) of 45 cells\n"
        "  memory  S(i, j) = {i·0 + j·45 + p·0 + q}, i < 1, j < 8, p < 1, q < 45\n"
        "  loop    along: 1 runs of 45 contiguous cells per set\n"
        "  kernel  none chosen\n"
        "  bytes   forward 2.88 KB (floor 2.88 KB), backward 4.32 KB (floor 4.32 KB)"
    )


# Random patterns: whatever can be written can be read back.

NAMES = ["n", "c", "h_1", "_w", "g2", "Tokens", "γ", "d"]


@st.composite
def written(draw):
    """A pattern, and what it says: per axis a list of (name, averaged, size)."""
    names = draw(st.permutations(NAMES))[: draw(st.integers(1, 7))]
    factors = [(n, draw(st.booleans()), draw(st.integers(1, 4))) for n in names]
    if not any(averaged for _, averaged, _ in factors):
        factors[0] = (factors[0][0], True, factors[0][2])
    axes = []
    while factors:
        take = draw(st.sampled_from([1, 1, 2, 3]))
        axes.append(factors[:take])
        factors = factors[take:]
    gap = draw(st.integers(0, len(axes)))
    items = [_write(axis) for axis in axes]
    ellipsis = draw(st.sampled_from([None, "...", "[...]"]))
    if ellipsis:
        items.insert(gap, ellipsis)
    space = draw(st.sampled_from([" ", "  "]))
    return space.join(items), axes, ellipsis, gap


def _write(axis):
    words = [f"[{n}]" if averaged else n for n, averaged, _ in axis]
    return words[0] if len(words) == 1 else f"({' '.join(words)})"


@settings(max_examples=200, deadline=None)
@given(written(), st.integers(0, 2))
def test_what_is_written_is_read(pattern, extra):
    text, axes, ellipsis, gap = pattern
    if ellipsis:
        axes = [*axes[:gap], *([(f"...{k}", ellipsis == "[...]", 3)] for k in range(extra)), *axes[gap:]]
    scope = parse(text).at(len(axes))
    expected = [(n, k, averaged) for k, axis in enumerate(axes) for n, averaged, _ in axis]
    assert [(part.name, part.axis, part.averaged) for part in scope.parts] == expected
    assert sorted(scope.inside + scope.outside) == list(range(len(expected)))
    shape = tuple(math.prod(size for *_, size in axis) for axis in axes)
    sizes = {n: size for axis in axes for n, _, size in axis[1:]}  # the first factor of each split is inferred
    assert scope.unfold(shape, sizes) == tuple(size for axis in axes for *_, size in axis)
    plan = make_plan(scope, shape, torch.empty(shape).stride(), sizes)
    assert plan.sets * plan.cells == math.prod(shape)
    with pytest.raises(ShapeError):
        parse(text).at(len(axes) - extra - 1)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="[]() .ncg2-", max_size=12))
def test_every_text_is_read_or_refused_with_a_caret(text):
    error = _refusal(text)
    if error is not None:
        assert str(error).count("^") == (1 if text.strip() else 0)


def _refusal(text):
    try:
        parse(text)
    except NotationError as error:
        return error
    return None

"""The bodies on a GPU, for the same plans as those of the CPU in `cpp/`.

Imported where a tensor on a GPU asks for it. Capital arguments are constants of the compiler, tensors that are None
vanish from the code.

Everything is float32. Statistics are shifted by a cell of the set itself, so that differences are exact near the mean,
and merged with Chan's formula. A lane that adds n terms around one of its own loses at most a factor 1 + n of
precision, whatever the data: the cell by which it is shifted counts among the squares.
"""

from __future__ import annotations

from normscope.errors import DependencyError

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise DependencyError("triton is not installed", cure="pip install 'normscope[gpu]'") from error

__all__ = [
    "apply", "backward_apply", "backward_merge", "backward_resident", "backward_sums", "forward_resident", "given",
    "merge_moments", "partial_moments", "update",
]  # fmt: skip


# Where things lie.


@triton.jit
def grid(T: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """The numbers of a tile's tasks, rows and columns, each along its own axis."""
    return tl.arange(0, T)[:, None, None], tl.arange(0, R)[None, :, None], tl.arange(0, C)[None, None, :]


@triton.jit
def cells(plan, t, r, k, ALIGN: tl.constexpr):
    """Offsets in x, and which of them exist; neighbours by multiples of ALIGN do together, as the compiler now sees."""
    c, ab = t % plan.tasks2, t // plan.tasks2
    b, a = ab % plan.tasks1, ab // plan.tasks1
    outer, inner = r // plan.inner_rows, r % plan.inner_rows
    task = a.to(tl.int64) * plan.task0 + b.to(tl.int64) * plan.task1 + c.to(tl.int64) * plan.task2
    row = outer.to(tl.int64) * plan.row0 + inner.to(tl.int64) * plan.row1
    return task + row + k, (t < plan.tasks) & (r < plan.rows) & (k < plan.length // ALIGN * ALIGN)


@triton.jit
def sets_of(plan, t, k, ACROSS: tl.constexpr):
    """The numbers of the sets of a tile, and which of them exist."""
    if ACROSS:
        return t * (plan.length // plan.fold) + k // plan.fold, (t < plan.tasks) & (k < plan.length)
    else:
        return t, t < plan.tasks


@triton.jit
def params_of(plan, t, r, k, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The numbers of the parameters of a tile, and which of them exist."""
    c, ab = t % plan.tasks2, t // plan.tasks2
    b, a = ab % plan.tasks1, ab // plan.tasks1
    index = a * plan.task0_param + b * plan.task1_param + c * plan.task2_param
    fits = t < plan.tasks
    if ROWS:
        index = index + (r // plan.inner_rows) * plan.row0_param + (r % plan.inner_rows) * plan.row1_param
        fits = fits & (r < plan.rows)
    if COLUMNS:
        index = index + (k // plan.fold) * plan.param_outer + (k % plan.fold) * plan.param_inner
        fits = fits & (k < plan.length)
    return index, fits


@triton.jit
def places(x, at, ALIGN: tl.constexpr):
    """Pointers to cells, of which ALIGN alone decides how wide an access is.

    Were it what Triton knows of a pointer, a sample's place in its batch would decide how its cells are dealt to the
    threads, and so in which order they are added up.
    """
    BYTES: tl.constexpr = ALIGN * ((x.dtype.element_ty.primitive_bitwidth + 7) // 8)
    return tl.multiple_of(x + at, [1, 1, BYTES])


@triton.jit
def read(x, at, fits, ALIGN: tl.constexpr):
    return tl.load(places(x, at, ALIGN), mask=fits, other=0.0).to(tl.float32)


@triton.jit
def kept(mask, at, fits, ALIGN: tl.constexpr):
    """Which cells count."""
    if mask is None:
        return fits
    else:
        return fits & (tl.load(places(mask, at, ALIGN), mask=fits, other=0) != 0)


@triton.jit
def total(x, ACROSS: tl.constexpr):
    """The sum over the cells of a set, in a tile that holds all of them, or all of a program's."""
    if not ACROSS:
        x = tl.sum(x, axis=2, keep_dims=True)
    return tl.sum(x, axis=1, keep_dims=True)


# Activations: the formulas of `cpp/elementary.h`. NaN passes through all of them.


@triton.jit
def tanh(x):
    s = x * x
    p = -6.155063270e-03 * s + 2.104556368e-02
    p = p * s - 5.386387907e-02
    p = p * s + 1.333289020e-01
    p = p * s - 3.333333139e-01
    # e^x is infinite far out, and 1 − 2/inf is 1.
    return tl.where(s < 0.390625, x + x * s * p, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))


@triton.jit
def expm1(x):
    t = tanh(x * 0.5)
    return tl.where((x > -1.0) & (x < 1.0), 2.0 * t / (1.0 - t), tl.exp(x) - 1.0)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def normal(x):
    """Φ."""
    return 0.5 * (1.0 + tl.erf(x * 0.70710678))


@triton.jit
def tanh_softplus(x):
    """tanh(ln(1 + e^x)) = w/(w + 2) with w = e^x (e^x + 2); 1 in float32 from 20 on."""
    e = tl.exp(tl.where(x > 20.0, 20.0, x))
    w = e * (e + 2.0)
    return w / (w + 2.0)


@triton.jit
def within(v, low, high):
    return tl.where(v < low, low, tl.where(v > high, high, v))


@triton.jit
def activate(z, ACT: tl.constexpr):
    if ACT == "relu":
        z = tl.where(z < 0.0, 0.0, z)
    elif ACT == "relu6":
        z = within(z, 0.0, 6.0)
    elif ACT == "leaky_relu":
        z = tl.where(z > 0.0, z, z * 0.01)
    elif ACT == "elu":
        z = tl.where(z > 0.0, z, expm1(z))
    elif ACT == "silu":
        z = z * sigmoid(z)
    elif ACT == "gelu":
        z = z * normal(z)
    elif ACT == "gelu_tanh":
        z = 0.5 * z * (1.0 + tanh(0.79788456 * (z + 0.044715 * z * z * z)))
    elif ACT == "mish":
        z = z * tanh_softplus(z)
    elif ACT == "sigmoid":
        z = sigmoid(z)
    elif ACT == "tanh":
        z = tanh(z)
    elif ACT == "hardswish":
        z = z * within(z + 3.0, 0.0, 6.0) / 6.0
    elif ACT == "hardsigmoid":
        z = within(z + 3.0, 0.0, 6.0) / 6.0
    return z


@triton.jit
def chained(g, z, ACT: tl.constexpr):
    """g · activation′(z)."""
    if ACT == "relu":
        g = tl.where(z <= 0.0, 0.0, g)
    elif ACT == "relu6":
        g = tl.where((z <= 0.0) | (z >= 6.0), 0.0, g)
    elif ACT == "leaky_relu":
        g = tl.where(z > 0.0, g, g * 0.01)
    elif ACT == "elu":
        g = tl.where(z > 0.0, g, g * tl.exp(z))
    elif ACT == "silu":
        s = sigmoid(z)
        g = g * (s * (1.0 + z * (1.0 - s)))
    elif ACT == "gelu":
        g = g * (normal(z) + z * 0.39894228 * tl.exp(-0.5 * z * z))
    elif ACT == "gelu_tanh":
        t = tanh(0.79788456 * (z + 0.044715 * z * z * z))
        g = g * (0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * 0.79788456 * (1.0 + 3 * 0.044715 * z * z))
    elif ACT == "mish":
        t = tanh_softplus(z)
        g = g * (t + z * (1.0 - t * t) * sigmoid(z))
    elif ACT == "sigmoid":
        s = sigmoid(z)
        g = g * (s * (1.0 - s))
    elif ACT == "tanh":
        t = tanh(z)
        g = g * (1.0 - t * t)
    elif ACT == "hardswish":
        g = g * tl.where(z <= -3.0, 0.0, tl.where(z < 3.0, z / 3.0 + 0.5, 1.0))
    elif ACT == "hardsigmoid":
        g = tl.where((z > -3.0) & (z < 3.0), g / 6.0, 0.0)
    return g


# Statistics: five rows of one number per set: high, low, variance, 1/√(σ² + ε), count.


@triton.jit
def inverse_root(var, eps, SCALE: tl.constexpr):
    if SCALE:
        return tl.div_rn(1.0, tl.sqrt_rn(var + eps))
    else:
        return tl.full(var.shape, 1.0, tl.float32)


@triton.jit
def write_statistics(statistics, sets, s, fits, high, low, m2, count, eps, SCALE: tl.constexpr):
    """All five rows; returns 1/√(σ² + ε)."""
    var = tl.div_rn(m2, tl.maximum(count, 1.0))
    var = tl.where(var < 0.0, 0.0, var)  # NaN passes
    rstd = inverse_root(var, eps, SCALE)
    tl.store(statistics + s, high, mask=fits)
    tl.store(statistics + sets + s, low, mask=fits)
    tl.store(statistics + 2 * sets + s, var, mask=fits)
    tl.store(statistics + 3 * sets + s, rstd, mask=fits)
    tl.store(statistics + 4 * sets + s, count, mask=fits)
    return rstd


@triton.jit
def read_statistics(statistics, sets, s, fits, CENTER: tl.constexpr):
    """high, low, 1/√(σ² + ε)."""
    rstd = tl.load(statistics + 3 * sets + s, mask=fits, other=0.0)
    if CENTER:
        high = tl.load(statistics + s, mask=fits, other=0.0)
        low = tl.load(statistics + sets + s, mask=fits, other=0.0)
    else:
        high, low = tl.zeros_like(rstd), tl.zeros_like(rstd)
    return high, low, rstd


@triton.jit
def merged(n, high, low, m2, ACROSS: tl.constexpr):
    """Count, mean in two parts and Σ(x − mean)² of all of a tile's samples together.

    Chan, Golub, LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979, for many
    samples at once: M₂ = Σ (M₂ᵢ + nᵢ (meanᵢ − mean)²), the means taken relative to a common shift first.
    """
    known = n > 0.0
    shift = total(tl.where(known, high, 0.0), ACROSS) / tl.maximum(total(tl.where(known, 1.0, 0.0), ACROSS), 1.0)
    away = tl.where(known, (high - shift) + low, 0.0)
    count = total(n, ACROSS)
    mean = total(n * away, ACROSS) / tl.maximum(count, 1.0)
    return count, shift, mean, total(m2 + n * (away - mean) * (away - mean), ACROSS)


@triton.jit
def partial_moments(
    x, mask, partials, plan, units, chunk,
    CENTER: tl.constexpr, ACROSS: tl.constexpr, R: tl.constexpr, C: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Four rows of one number per unit, a program's cells or each of its columns: count, mean in two parts, M₂."""
    column_blocks, chunks = tl.cdiv(plan.length, C), tl.cdiv(plan.rows, chunk)
    pid = tl.program_id(0)
    block, piece, task = pid % column_blocks, pid // column_blocks % chunks, pid // (column_blocks * chunks)
    t, r, k = grid(1, R, C)
    t, r, k = t + task, r + piece * chunk, k + block * C
    end = tl.minimum(piece * chunk + chunk, plan.rows)
    first = tl.zeros([1, R, C], tl.float32)
    second = tl.zeros([1, R, C], tl.float32)
    n = tl.zeros([1, R, C], tl.float32)
    shift = tl.zeros([1, R, C], tl.float32)
    if CENTER and mask is None:  # each lane's own first cell
        at, fits = cells(plan, t, r, k, ALIGN)
        shift = read(x, at, fits, ALIGN)
    if mask is None:
        steps = tl.maximum(end - r + R - 1, 0) // R
        n += tl.where(k < plan.length, steps, 0).to(tl.float32)
    for begin in range(piece * chunk, end, R):
        at, fits = cells(plan, t, begin + tl.arange(0, R)[None, :, None], k, ALIGN)
        v = read(x, at, fits, ALIGN)
        keep = kept(mask, at, fits, ALIGN)
        if mask is not None:
            if CENTER:
                shift = tl.where(keep & (n == 0.0), v, shift)
            n += tl.where(keep, 1.0, 0.0)
        d = tl.where(keep, v - shift, 0.0)
        first += d
        second += d * d
    if CENTER:
        low = first / tl.maximum(n, 1.0)
        count, high, low, m2 = merged(n, shift, low, second - first * low, ACROSS)
    else:
        count, m2 = total(n, ACROSS), total(second, ACROSS)
        high, low = tl.zeros_like(m2), tl.zeros_like(m2)
    if ACROSS:
        unit, fits = (t * chunks + piece) * plan.length + k, k < plan.length
    else:
        unit, fits = t * chunks * column_blocks + piece * column_blocks + block, t >= 0
    tl.store(partials + unit, count, mask=fits)
    tl.store(partials + units + unit, high, mask=fits)
    tl.store(partials + 2 * units + unit, low, mask=fits)
    tl.store(partials + 3 * units + unit, m2, mask=fits)


@triton.jit
def units_of(
    plan, sets, chunk, S: tl.constexpr, R: tl.constexpr, C: tl.constexpr, TC: tl.constexpr, ACROSS: tl.constexpr
):
    """The sets of a merging program, their units, and which of both exist; TC is the columns of the summing tiles."""
    s, r, k = grid(S, R, C)
    s = s + tl.program_id(0) * S
    chunks = tl.cdiv(plan.rows, chunk)
    if ACROSS:
        per_task = plan.length // plan.fold
        unit = (s // per_task * chunks + r) * plan.length + s % per_task * plan.fold + k
        fits = (s < sets) & (r < chunks) & (k < plan.fold)
    else:
        pieces = chunks * tl.cdiv(plan.length, TC)
        unit = s * pieces + k
        fits = (s < sets) & (k < pieces)
    return s, unit, fits


@triton.jit
def merge_moments(
    partials, statistics, plan, units, sets, chunk, eps,
    CENTER: tl.constexpr, SCALE: tl.constexpr, ACROSS: tl.constexpr,
    S: tl.constexpr, R: tl.constexpr, C: tl.constexpr, TC: tl.constexpr,
):  # fmt: skip
    """The statistics of S sets from their units."""
    s, unit, fits = units_of(plan, sets, chunk, S, R, C, TC, ACROSS)
    n = tl.load(partials + unit, mask=fits, other=0.0)
    high = tl.load(partials + units + unit, mask=fits, other=0.0)
    low = tl.load(partials + 2 * units + unit, mask=fits, other=0.0)
    m2 = tl.load(partials + 3 * units + unit, mask=fits, other=0.0)
    if CENTER:
        count, shift, mean, m2 = merged(n, high, low, m2, False)
        high = shift + mean  # rounded; what that loses, exactly (Knuth's two-sum)
        back = high - shift
        low = (shift - (high - back)) + (mean - back)
    else:
        count, m2 = total(n, False), total(m2, False)
        high, low = tl.zeros_like(m2), tl.zeros_like(m2)
    write_statistics(statistics, sets, s, s < sets, high, low, m2, count, eps, SCALE)


@triton.jit
def given(mean, var, statistics, sets, cells, eps, SCALE: tl.constexpr, C: tl.constexpr):
    """The statistics that given moments amount to."""
    s = tl.program_id(0) * C + tl.arange(0, C)
    fits = s < sets
    v = tl.load(var + s, mask=fits, other=0.0)
    tl.store(statistics + s, tl.load(mean + s, mask=fits, other=0.0), mask=fits)
    tl.store(statistics + sets + s, tl.zeros_like(v), mask=fits)
    tl.store(statistics + 2 * sets + s, v, mask=fits)
    tl.store(statistics + 3 * sets + s, inverse_root(v, eps, SCALE), mask=fits)
    tl.store(statistics + 4 * sets + s, tl.zeros_like(v) + cells, mask=fits)


@triton.jit
def update(statistics, mean, var, sets, momentum, correction, SKIP_NONFINITE: tl.constexpr, C: tl.constexpr):
    """running ← (1 − momentum)·running + momentum·batch."""
    s = tl.program_id(0) * C + tl.arange(0, C)
    fits = s < sets
    batch = tl.load(statistics + s, mask=fits, other=0.0) + tl.load(statistics + sets + s, mask=fits, other=0.0)
    spread = tl.load(statistics + 2 * sets + s, mask=fits, other=0.0) * correction
    if SKIP_NONFINITE:
        fits = fits & (tl.abs(batch + spread) < float("inf"))
    old_mean, old_var = tl.load(mean + s, mask=fits, other=0.0), tl.load(var + s, mask=fits, other=0.0)
    tl.store(mean + s, old_mean + momentum * (batch - old_mean), mask=fits)
    tl.store(var + s, old_var + momentum * (spread - old_var), mask=fits)


# Forward.


@triton.jit
def line(weight, bias, plan, t, r, k, low, rstd, ROW_PARAMS: tl.constexpr, COLUMN_PARAMS: tl.constexpr):
    """Factor and shift of z = (x − high)·factor + shift; backward computes z by the same operations."""
    factor = rstd
    if weight is not None:
        p, fits = params_of(plan, t, r, k, ROW_PARAMS, COLUMN_PARAMS)
        factor = rstd * tl.load(weight + p, mask=fits, other=0.0)
    shift = -low * factor
    if bias is not None:
        p, fits = params_of(plan, t, r, k, ROW_PARAMS, COLUMN_PARAMS)
        shift = shift + tl.load(bias + p, mask=fits, other=0.0)
    return factor, shift


@triton.jit
def write(y, residual, at, fits, keep, z, MASKED: tl.constexpr, ACT: tl.constexpr, ALIGN: tl.constexpr):
    """activation(z + residual), 0 where masked."""
    if residual is not None:
        z = z + read(residual, at, fits, ALIGN)
    z = activate(z, ACT)
    if MASKED:
        z = tl.where(keep, z, 0.0)
    tl.store(places(y, at, ALIGN), z.to(y.dtype.element_ty), mask=fits)


@triton.jit
def forward_resident(
    x, residual, mask, y, weight, bias, statistics, plan, sets, eps,
    CENTER: tl.constexpr, SCALE: tl.constexpr, ACT: tl.constexpr, ACROSS: tl.constexpr,
    ROW_PARAMS: tl.constexpr, COLUMN_PARAMS: tl.constexpr,
    T: tl.constexpr, R: tl.constexpr, C: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Statistics and y of whole sets, read once."""
    column_blocks = tl.cdiv(plan.length, C)
    t, r, k = grid(T, R, C)
    t, k = t + tl.program_id(0) // column_blocks * T, k + tl.program_id(0) % column_blocks * C
    at, fits = cells(plan, t, r, k, ALIGN)
    keep = kept(mask, at, fits, ALIGN)
    d = tl.where(keep, read(x, at, fits, ALIGN), 0.0)
    s, exist = sets_of(plan, t, k, ACROSS)
    if mask is not None:
        count = total(tl.where(keep, 1.0, 0.0), ACROSS)
    elif ACROSS:
        count = tl.where(exist, plan.rows, 0).to(tl.float32)
    else:
        count = tl.where(exist, plan.rows * plan.length, 0).to(tl.float32)
    least = tl.maximum(count, 1.0)
    if CENTER:
        high = total(d, ACROSS) / least
        d = tl.where(keep, d - high, 0.0)
        low = total(d, ACROSS) / least
        # |low| is a rounding error of the mean: nothing is lost where its square is subtracted.
        m2 = total(d * d, ACROSS) - count * low * low
    else:
        m2 = total(d * d, ACROSS)
        high, low = tl.zeros_like(m2), tl.zeros_like(m2)
    rstd = write_statistics(statistics, sets, s, exist, high, low, m2, count, eps, SCALE)
    factor, shift = line(weight, bias, plan, t, r, k, low, rstd, ROW_PARAMS, COLUMN_PARAMS)
    write(y, residual, at, fits, keep, d * factor + shift, mask is not None, ACT, ALIGN)


@triton.jit
def reversed_tile(plan, T: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """The tile of an applying program. The last first: what the sums have read last is still in cache."""
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    column_blocks, row_blocks = tl.cdiv(plan.length, C), tl.cdiv(plan.rows, R)
    t, r, k = grid(T, R, C)
    t = t + pid // (column_blocks * row_blocks) * T
    return t, r + pid // column_blocks % row_blocks * R, k + pid % column_blocks * C


@triton.jit
def apply(
    x, residual, mask, y, weight, bias, statistics, plan, sets,
    CENTER: tl.constexpr, ACT: tl.constexpr, ACROSS: tl.constexpr,
    ROW_PARAMS: tl.constexpr, COLUMN_PARAMS: tl.constexpr,
    T: tl.constexpr, R: tl.constexpr, C: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """y by statistics that are known."""
    t, r, k = reversed_tile(plan, T, R, C)
    at, fits = cells(plan, t, r, k, ALIGN)
    s, exist = sets_of(plan, t, k, ACROSS)
    high, low, rstd = read_statistics(statistics, sets, s, exist, CENTER)
    factor, shift = line(weight, bias, plan, t, r, k, low, rstd, ROW_PARAMS, COLUMN_PARAMS)
    z = (read(x, at, fits, ALIGN) - high) * factor + shift
    write(y, residual, at, fits, kept(mask, at, fits, ALIGN), z, mask is not None, ACT, ALIGN)


# Backward: dx = γ·g/√(σ² + ε) + (x − high)·b + c with two numbers per set, g the gradient of z.


@triton.jit
def gradient(
    gy, x, residual, y, mask, weight, bias, plan, t, r, k, high, low, rstd,
    ACT: tl.constexpr, ROW_PARAMS: tl.constexpr, COLUMN_PARAMS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Offsets, which of them exist, x − high and the gradient of z; both 0 where masked, whatever x holds there."""
    at, fits = cells(plan, t, r, k, ALIGN)
    keep = kept(mask, at, fits, ALIGN)
    d = tl.where(keep, read(x, at, fits, ALIGN) - high, 0.0)
    g = read(gy, at, fits, ALIGN)
    if y is not None:
        g = tl.where(read(y, at, fits, ALIGN) <= 0.0, 0.0, g)
    elif ACT is not None:
        factor, shift = line(weight, bias, plan, t, r, k, low, rstd, ROW_PARAMS, COLUMN_PARAMS)
        z = d * factor + shift
        if residual is not None:
            z = z + read(residual, at, fits, ALIGN)
        g = chained(g, z, ACT)
    return at, fits, d, tl.where(keep, g, 0.0)


@triton.jit
def weighted(g, weight, plan, t, r, k, ROW_PARAMS: tl.constexpr, COLUMN_PARAMS: tl.constexpr):
    """γ·g."""
    if weight is None:
        return g
    else:
        p, fits = params_of(plan, t, r, k, ROW_PARAMS, COLUMN_PARAMS)
        return g * tl.load(weight + p, mask=fits, other=0.0)


@triton.jit
def slopes(set_g, set_gd, low, rstd, count, CENTER: tl.constexpr, SCALE: tl.constexpr, FIXED: tl.constexpr):
    """b and c."""
    b, c = tl.zeros_like(set_g), tl.zeros_like(set_g)
    if not FIXED:
        each = tl.div_rn(1.0, tl.maximum(count, 1.0))
        if SCALE:
            b = -(set_gd - low * set_g) * rstd * each * rstd * rstd
        if CENTER:
            c = -set_g * each * rstd - b * low
    return b, c


@triton.jit
def write_gradients(dx, dresidual, mask, at, fits, d, g, gw, rstd, b, c, ALIGN: tl.constexpr):
    """dx and the residual's gradient, 0 where masked."""
    if dresidual is not None:
        tl.store(places(dresidual, at, ALIGN), g.to(dresidual.dtype.element_ty), mask=fits)
    if dx is not None:
        value = gw * rstd + (d * b + c)
        if mask is not None:  # d and g are 0 there, c is not
            value = tl.where(kept(mask, at, fits, ALIGN), value, 0.0)
        tl.store(places(dx, at, ALIGN), value.to(dx.dtype.element_ty), mask=fits)


@triton.jit
def write_params(
    param_sums, half, place, rows, columns, r, k, of_weight, of_bias, fits,
    ROW_PARAMS: tl.constexpr, COLUMN_PARAMS: tl.constexpr,
):  # fmt: skip
    """Partial gradients of weight and bias into (2, places, rows or 1, columns or 1)."""
    index = place.to(tl.int64)
    if ROW_PARAMS:
        index, fits = index * rows + r, fits & (r < rows)
    if COLUMN_PARAMS:
        index, fits = index * columns + k, fits & (k < columns)
    tl.store(param_sums + index, of_weight, mask=fits)
    tl.store(param_sums + half + index, of_bias, mask=fits)


@triton.jit
def gathered(x, ROW_PARAMS: tl.constexpr, COLUMN_PARAMS: tl.constexpr):
    """The sum over the axes of a tile along which no parameter varies."""
    if not COLUMN_PARAMS:
        x = tl.sum(x, axis=2, keep_dims=True)
    if not ROW_PARAMS:
        x = tl.sum(x, axis=1, keep_dims=True)
    return x


@triton.jit
def backward_resident(
    gy, x, residual, y, mask, dx, dresidual, weight, bias, statistics, param_sums, plan, sets, half, group,
    CENTER: tl.constexpr, SCALE: tl.constexpr, FIXED: tl.constexpr, ACT: tl.constexpr, ACROSS: tl.constexpr,
    ROW_PARAMS: tl.constexpr, COLUMN_PARAMS: tl.constexpr, SHARED_PARAMS: tl.constexpr,
    T: tl.constexpr, R: tl.constexpr, C: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """All gradients of whole sets, x and gy read once; where tasks share parameters, of `group` tiles of tasks."""
    PER_SET: tl.constexpr = not ROW_PARAMS and (ACROSS or not COLUMN_PARAMS)
    column_blocks = tl.cdiv(plan.length, C)
    block, first = tl.program_id(0) % column_blocks, tl.program_id(0) // column_blocks * group
    lanes, r, k = grid(T, R, C)
    k = k + block * C
    of_weight = tl.zeros([T, R, C], tl.float32)
    of_bias = tl.zeros([T, R, C], tl.float32)
    for tile in range(first, tl.minimum(first + group, tl.cdiv(plan.tasks, T))):
        t = lanes + tile * T
        s, exist = sets_of(plan, t, k, ACROSS)
        high, low, rstd = read_statistics(statistics, sets, s, exist, CENTER)
        at, fits, d, g = gradient(
            gy, x, residual, y, mask, weight, bias, plan, t, r, k, high, low, rstd,
            ACT, ROW_PARAMS, COLUMN_PARAMS, ALIGN,
        )  # fmt: skip
        gw = weighted(g, weight, plan, t, r, k, ROW_PARAMS, COLUMN_PARAMS)
        if PER_SET:
            sum_g, sum_gd = total(g, ACROSS), total(g * d, ACROSS)
            set_g = weighted(sum_g, weight, plan, t, r, k, ROW_PARAMS, COLUMN_PARAMS)
            set_gd = weighted(sum_gd, weight, plan, t, r, k, ROW_PARAMS, COLUMN_PARAMS)
            if param_sums is not None:
                of_w = gathered((sum_gd - low * sum_g) * rstd, ROW_PARAMS, COLUMN_PARAMS)
                of_b = gathered(sum_g, ROW_PARAMS, COLUMN_PARAMS)
        else:
            set_g, set_gd = total(gw, ACROSS), total(gw * d, ACROSS)
            if param_sums is not None:
                if SHARED_PARAMS:
                    of_weight += g * ((d - low) * rstd)
                    of_bias += g
                else:
                    of_w = gathered(g * ((d - low) * rstd), ROW_PARAMS, COLUMN_PARAMS)
                    of_b = gathered(g, ROW_PARAMS, COLUMN_PARAMS)
        if param_sums is not None and not SHARED_PARAMS:
            place = t
            if not COLUMN_PARAMS:
                place = t * column_blocks + block
            write_params(
                param_sums, half, place, plan.rows, plan.length, r, k, of_w, of_b, t < plan.tasks,
                ROW_PARAMS, COLUMN_PARAMS,
            )  # fmt: skip
        count = tl.load(statistics + 4 * sets + s, mask=exist, other=0.0)
        b, c = slopes(set_g, set_gd, low, rstd, count, CENTER, SCALE, FIXED)
        write_gradients(dx, dresidual, mask, at, fits, d, g, gw, rstd, b, c, ALIGN)
    if SHARED_PARAMS and param_sums is not None:
        of_w = tl.sum(gathered(of_weight, False, True), axis=0, keep_dims=True)
        of_b = tl.sum(gathered(of_bias, False, True), axis=0, keep_dims=True)
        place = tl.program_id(0) // column_blocks
        write_params(
            param_sums, half, place, plan.rows, plan.length, r, k, of_w, of_b, k >= 0, ROW_PARAMS, COLUMN_PARAMS
        )


@triton.jit
def backward_sums(
    gy, x, residual, y, mask, weight, bias, statistics, partials, param_sums, plan, sets, units, half, chunk, group,
    CENTER: tl.constexpr, ACT: tl.constexpr, ACROSS: tl.constexpr,
    ROW_PARAMS: tl.constexpr, COLUMN_PARAMS: tl.constexpr, SHARED_PARAMS: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Σ γ·g and Σ γ·g·(x − high) by unit, as `partial_moments`, and partial gradients of the parameters."""
    PER_SET: tl.constexpr = not ROW_PARAMS and (ACROSS or not COLUMN_PARAMS)
    column_blocks, chunks = tl.cdiv(plan.length, C), tl.cdiv(plan.rows, chunk)
    pid = tl.program_id(0)
    block, piece = pid % column_blocks, pid // column_blocks % chunks
    task_group = pid // (column_blocks * chunks)
    lane, lanes, k = grid(1, R, C)
    k = k + block * C
    of_weight = tl.zeros([1, R, C], tl.float32)
    of_bias = tl.zeros([1, R, C], tl.float32)
    for task in range(task_group * group, tl.minimum(task_group * group + group, plan.tasks)):
        t = lane + task
        s, exist = sets_of(plan, t, k, ACROSS)
        high, low, rstd = read_statistics(statistics, sets, s, exist, CENTER)
        first = tl.zeros([1, R, C], tl.float32)
        second = tl.zeros([1, R, C], tl.float32)
        for begin in range(piece * chunk, tl.minimum(piece * chunk + chunk, plan.rows), R):
            r = lanes + begin
            _, _, d, g = gradient(
                gy, x, residual, y, mask, weight, bias, plan, t, r, k, high, low, rstd,
                ACT, ROW_PARAMS, COLUMN_PARAMS, ALIGN,
            )  # fmt: skip
            if PER_SET:
                first += g
                second += g * d
            else:
                gw = weighted(g, weight, plan, t, r, k, ROW_PARAMS, COLUMN_PARAMS)
                first += gw
                second += gw * d
                if param_sums is not None:
                    xg = g * ((d - low) * rstd)
                    if ROW_PARAMS:
                        place = t
                        if not COLUMN_PARAMS:
                            place = t * column_blocks + block
                        of_w, of_b = gathered(xg, True, COLUMN_PARAMS), gathered(g, True, COLUMN_PARAMS)
                        write_params(
                            param_sums, half, place, plan.rows, plan.length, r, k, of_w, of_b, t >= 0,
                            ROW_PARAMS, COLUMN_PARAMS,
                        )  # fmt: skip
                    else:
                        of_weight += xg
                        of_bias += g
        set_g, set_gd = total(first, ACROSS), total(second, ACROSS)
        if param_sums is not None:
            if PER_SET:
                place = t * chunks + piece
                if not COLUMN_PARAMS:
                    place = place * column_blocks + block
                of_w = gathered((set_gd - low * set_g) * rstd, ROW_PARAMS, COLUMN_PARAMS)
                of_b = gathered(set_g, ROW_PARAMS, COLUMN_PARAMS)
                write_params(
                    param_sums,
                    half,
                    place,
                    plan.rows,
                    plan.length,
                    lanes,
                    k,
                    of_w,
                    of_b,
                    t >= 0,
                    ROW_PARAMS,
                    COLUMN_PARAMS,
                )
            elif not ROW_PARAMS and not SHARED_PARAMS:
                write_params(
                    param_sums, half, t * chunks + piece, plan.rows, plan.length, lanes, k,
                    gathered(of_weight, False, True), gathered(of_bias, False, True), t >= 0, False, True,
                )  # fmt: skip
                of_weight = tl.zeros([1, R, C], tl.float32)
                of_bias = tl.zeros([1, R, C], tl.float32)
        if PER_SET:
            set_g = weighted(set_g, weight, plan, t, lanes, k, ROW_PARAMS, COLUMN_PARAMS)
            set_gd = weighted(set_gd, weight, plan, t, lanes, k, ROW_PARAMS, COLUMN_PARAMS)
        if ACROSS:
            unit, exist = (t * chunks + piece) * plan.length + k, k < plan.length
        else:
            unit, exist = t * chunks * column_blocks + piece * column_blocks + block, t >= 0
        tl.store(partials + unit, set_g, mask=exist)
        tl.store(partials + units + unit, set_gd, mask=exist)
    if SHARED_PARAMS and param_sums is not None:
        write_params(
            param_sums, half, lane + task_group * chunks + piece, plan.rows, plan.length, lanes, k,
            gathered(of_weight, False, True), gathered(of_bias, False, True), k >= 0, False, True,
        )  # fmt: skip


@triton.jit
def backward_merge(
    partials, statistics, out, plan, units, sets, chunk,
    CENTER: tl.constexpr, SCALE: tl.constexpr, ACROSS: tl.constexpr,
    S: tl.constexpr, R: tl.constexpr, C: tl.constexpr, TC: tl.constexpr,
):  # fmt: skip
    """b and c of S sets from their units."""
    s, unit, fits = units_of(plan, sets, chunk, S, R, C, TC, ACROSS)
    set_g = total(tl.load(partials + unit, mask=fits, other=0.0), False)
    set_gd = total(tl.load(partials + units + unit, mask=fits, other=0.0), False)
    exist = s < sets
    low = tl.load(statistics + sets + s, mask=exist, other=0.0)
    rstd = tl.load(statistics + 3 * sets + s, mask=exist, other=0.0)
    count = tl.load(statistics + 4 * sets + s, mask=exist, other=0.0)
    b, c = slopes(set_g, set_gd, low, rstd, count, CENTER, SCALE, False)
    tl.store(out + s, b, mask=exist)
    tl.store(out + sets + s, c, mask=exist)


@triton.jit
def backward_apply(
    gy, x, residual, y, mask, dx, dresidual, weight, bias, statistics, slope, plan, sets,
    CENTER: tl.constexpr, ACT: tl.constexpr, ACROSS: tl.constexpr,
    ROW_PARAMS: tl.constexpr, COLUMN_PARAMS: tl.constexpr,
    T: tl.constexpr, R: tl.constexpr, C: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """The gradients of x and the residual; without `slope` the moments do not depend on x."""
    t, r, k = reversed_tile(plan, T, R, C)
    s, exist = sets_of(plan, t, k, ACROSS)
    high, low, rstd = read_statistics(statistics, sets, s, exist, CENTER)
    at, fits, d, g = gradient(
        gy, x, residual, y, mask, weight, bias, plan, t, r, k, high, low, rstd, ACT, ROW_PARAMS, COLUMN_PARAMS, ALIGN
    )
    gw = weighted(g, weight, plan, t, r, k, ROW_PARAMS, COLUMN_PARAMS)
    b, c = tl.zeros_like(rstd), tl.zeros_like(rstd)
    if slope is not None:
        b = tl.load(slope + s, mask=exist, other=0.0)
        c = tl.load(slope + sets + s, mask=exist, other=0.0)
    write_gradients(dx, dresidual, mask, at, fits, d, g, gw, rstd, b, c, ALIGN)

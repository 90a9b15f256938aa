// The innermost axis lies outside S: neighbouring cells are columns of different sets, summed row by row.
//
// Included by bodies.h inside the namespace of an instruction set and of a Number. Columns are taken in tiles, a tile's numbers per column
// (shift, factor, sums …) in the order of the steps. Where rows are short and lie end to end, several are taken as one:
// a row of 64 columns pays more for its loop than for its cells.

constexpr int64_t kBlockRows = 128;  // rows of a block, summed in float
constexpr int64_t kSpan = 512;       // columns that the rows of a block pass together
constexpr int64_t kFewRows = 16;     // the first level of these sums, as in run_squares

template <class T>
struct Across {
  const Plan& p;
  int64_t repeat = merged_rows();  // rows taken as one
  int64_t tile = repeat > 1 ? p.length : p.tile(), tiles = (p.length + tile - 1) / tile;
  int64_t columns = repeat * tile, pitch = padded(columns);
  int64_t rows = p.row_count() / repeat, blocks = (rows + kBlockRows - 1) / kBlockRows;
  int64_t units = p.task_count() * tiles;  // independent slabs: a task's columns, tile by tile
  Buffer<int32_t> slots = slot_table();    // of a unit's columns, set by set

  int64_t merged_rows() const {
    const Axis& inner = p.rows[1];
    if (p.row_params() || inner.stride != p.length || p.length > 256) return 1;
    for (int64_t k = 512 / p.length; k > 1; --k)
      if (inner.size % k == 0) return k;
    return 1;
  }
  Buffer<int32_t> slot_table() const {
    auto table = buffer<int32_t>(columns);
    const int64_t sets = tile / p.fold;
    int32_t* to = table.get();
    for (int64_t s = 0; s < sets; ++s)
      for (int64_t i = 0; i < p.fold; ++i)
        for (int64_t r = 0; r < repeat; ++r) *to++ = static_cast<int32_t>(slot<T>(r * p.length + s * p.fold + i));
    return table;
  }
  int64_t stride = p.rows[1].stride * repeat;  // from row to row
  int64_t first(int64_t u) const { return (u % tiles) * tile; }
  int64_t width(int64_t u) const { return repeat > 1 ? columns : std::min(tile, p.length - first(u)); }
  int64_t sets(int64_t u) const { return (repeat > 1 ? p.length : width(u)) / p.fold; }
  int64_t set(int64_t u) const { return u / tiles * p.sets_per_task() + first(u) / p.fold; }
  int64_t param_base(int64_t u) const { return p.task(u / tiles).param; }
  int64_t most_sets() const { return columns / group(); }
  int64_t group() const { return p.fold * repeat; }  // columns of a set
  bool ordered() const { return repeat == 1 && !std::is_same_v<T, BF16>; }  // slots lie set by set

  // Numbers per column → their sums per set, and the other way: a set's number for all its columns.
  void fold(const Number* numbers, int64_t count, double* out) const {
    const int64_t n = group();
    if (n == 1) {
      for (int64_t s = 0; s < count; ++s) out[s] = numbers[ordered() ? s : slots[s]];
      return;
    }
    for (int64_t s = 0; s < count; ++s) {
      const int32_t* k = slots.get() + s * n;
      out[s] = ordered() ? sum_of(n, [&](int64_t i) { return numbers[*k + i]; }) : sum_of(n, [&](int64_t i) { return numbers[k[i]]; });
    }
  }
  void spread(const Number* by_set, int64_t count, Number* numbers) const {
    const int64_t n = group();
    if (ordered() && n == 1) std::memcpy(numbers, by_set, static_cast<size_t>(count) * sizeof(Number));
    else if (ordered())
      for (int64_t s = 0; s < count; ++s) std::fill_n(numbers + slots[s * n], n, by_set[s]);
    else
      for (int64_t s = 0; s < count; ++s)
        for (int64_t i = 0; i < n; ++i) {
          NORMSCOPE_ONE_BY_ONE;
          numbers[slots[s * n + i]] = by_set[s];
        }
  }

  // Whole steps of a unit's columns whose numbers stay in the nearest cache while the rows of a block pass: six numbers
  // per column, backward.
  int64_t span(int64_t u) const {
    const int64_t n = width(u), pieces = (n + kSpan - 1) / kSpan;
    return padded((n + pieces - 1) / pieces);
  }
  // body(offset in x, offset of the row's parameter) for each row of a block.
  template <class F>
  NORMSCOPE_INLINE void block(int64_t u, int64_t b, F&& body) const {
    const int64_t base = p.task(u / tiles).stride + first(u), begin = b * kBlockRows, end = std::min(rows, begin + kBlockRows);
    const int64_t inner = p.rows[1].size / repeat;
    int64_t outer = begin / inner, i = begin % inner;
    for (int64_t r = begin; r < end; ++r) {
      body(base + outer * p.rows[0].stride + i * stride, outer * p.rows[0].param + i * p.rows[1].param);
      if (++i == inner) i = 0, ++outer;
    }
  }
  // body(offset in x, first column, columns, offset of the row's parameter) for each row of a block, span by span.
  template <class F>
  NORMSCOPE_INLINE void spans(int64_t u, int64_t b, F&& body) const {
    const int64_t n = width(u), each = span(u);
    for (int64_t j = 0; j < n; j += each)
      block(u, b, [&](int64_t offset, int64_t param) { body(offset + j, j, std::min(each, n - j), param); });
  }

  // The same by groups of kTogether rows, then one by one: a group reads and writes the sums per column once.
  static constexpr int kTogether = 4;
  template <class F>
  NORMSCOPE_INLINE void row_groups(int64_t u, int64_t b, F&& body) const {
    const int64_t n = width(u), each = span(u);
    for (int64_t j = 0; j < n; j += each) {
      const int64_t cells = std::min(each, n - j);
      int64_t offsets[kTogether];
      int waiting = 0;
      block(u, b, [&](int64_t offset, int64_t) {
        offsets[waiting] = offset + j;
        if (++waiting == kTogether) waiting = 0, body(std::integral_constant<int, kTogether>{}, offsets, j, cells);
      });
      for (int i = 0; i < waiting; ++i) body(std::integral_constant<int, 1>{}, offsets + i, j, cells);
    }
  }

  // body(slot, parameter relative to the task's) for the columns of the s-th set of a unit.
  template <class F>
  NORMSCOPE_INLINE void set_columns(int64_t u, int64_t s, F&& body) const {
    int64_t at = (first(u) / p.fold + s) * p.param_outer;
    const int32_t* k = slots.get() + s * p.fold * repeat;
    for (int64_t i = 0; i < p.fold; ++i, at += p.param_inner)
      for (int64_t r = 0; r < repeat; ++r) {
        NORMSCOPE_ONE_BY_ONE;
        body(*k++, at);
      }
  }
};

// Per set: Σ(x − shift), Σ(x − shift)² and the kept cells of a block; out has three pieces of `most_sets`.
template <bool masked, class T>
void column_squares(const Across<T>& a, const T* x, const uint8_t* mask, int64_t u, int64_t b, const Number* shift, double* out) {
  alignas(64) Number first[kSegment], second[kSegment], kept[kSegment], few_first[kSegment], few_second[kSegment];
  const int64_t sets = a.sets(u);
  const size_t bytes = static_cast<size_t>(a.pitch) * sizeof(Number);
  for (Number* sums : {first, second, few_first, few_second}) std::memset(sums, 0, bytes);
  if (masked) std::memset(kept, 0, bytes);
  int64_t rows = 0, span = 0;
  auto flush = [&](int64_t from, int64_t count) {
    for (int64_t k = from; k < from + count; ++k) {
      first[k] += few_first[k];
      second[k] += few_second[k];
      few_first[k] = few_second[k] = 0;
    }
  };
  a.row_groups(u, b, [&](auto group, const int64_t* offsets, int64_t j, int64_t n) {
    if (j != span) span = j, rows = 0;
    Number *sums = few_first + j, *squares = few_second + j, *counts = kept + j;
    const Number* centre = shift + j;
    const int64_t ahead = group * a.stride;
    steps<T>(n, [&](int64_t i, auto cells) __attribute__((always_inline)) {
      W sum = get(sums + i), square = get(squares + i);
      const W high = get(centre + i);
      for (int r = 0; r < group; ++r) {
        fetch<2>(x + offsets[r] + ahead + i);
        W d = cells.load(x + offsets[r] + i) - high;
        if constexpr (masked) {
          const M m = cells.mask(mask + offsets[r] + i);
          d = d & m;
          put(counts + i, get(counts + i) + (step(1) & m));
        }
        sum += d;
        square += d * d;
      }
      put(sums + i, sum);
      put(squares + i, square);
    });
    rows += group;
    if (rows % kFewRows == 0) flush(j, padded(n));
  });
  flush(0, a.pitch);
  a.fold(first, sets, out);
  a.fold(second, sets, out + a.most_sets());
  if (masked) a.fold(kept, sets, out + 2 * a.most_sets());
  else std::fill_n(out + 2 * a.most_sets(), sets, static_cast<double>(rows * a.group()));
}

// A first guess of the means, of the first rows: some 32 cells per set, or the eighth of them.
template <class T>
void column_guess(const Across<T>& a, const T* x, const uint8_t* mask, int64_t u, Number* shift) {
  alignas(64) Number sum[kSegment], kept[kSegment], by_set[kSegment];
  alignas(64) double sums[kSegment], counts[kSegment];
  const int64_t n = a.width(u), sets = a.sets(u);
  const size_t bytes = static_cast<size_t>(a.pitch) * sizeof(Number);
  std::memset(sum, 0, bytes);
  if (mask) std::memset(kept, 0, bytes);
  const int64_t enough = std::min<int64_t>(kFewRows, (31 + a.group()) / a.group());
  const int64_t few = std::clamp<int64_t>(a.rows / 8, 1, enough);
  int64_t rows = 0;
  a.block(u, 0, [&](int64_t offset, int64_t) {
    if (rows >= few) return;
    ++rows;
    steps<T>(n, [&](int64_t i, auto cells) __attribute__((always_inline)) {
      W v = cells.load(x + offset + i);
      if (mask) {
        const M m = cells.mask(mask + offset + i);
        v = v & m;
        put(kept + i, get(kept + i) + (step(1) & m));
      }
      put(sum + i, get(sum + i) + v);
    });
  });
  a.fold(sum, sets, sums);
  if (mask) a.fold(kept, sets, counts);
  else std::fill_n(counts, sets, static_cast<double>(rows * a.group()));
  for (int64_t s = 0; s < sets; ++s) by_set[s] = static_cast<Number>(sums[s] / (counts[s] > 0 ? counts[s] : 1.0));
  std::memset(shift, 0, bytes);
  a.spread(by_set, sets, shift);
}

template <class F>
auto each_unit(F& finish) {
  return [&finish](int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; ++u) finish(u);
  };
}

// Per column: z = (x − high)·factor + shift.
struct Columns {
  Buffer<Number> high, factor, shift;
  explicit Columns(int64_t n) : high(buffer<Number>(n)), factor(buffer<Number>(n)), shift(buffer<Number>(n)) {}
};

template <class F, class T>
void fill_columns(const F& f, const Across<T>& a, int64_t u, Columns& columns) {
  const int64_t base = a.param_base(u), set = a.set(u), c = u * a.pitch, sets = a.sets(u);
  Number *high = columns.high.get() + c, *factor = columns.factor.get() + c, *shift = columns.shift.get() + c;
  const Number *weight = f.plan.row_params() ? nullptr : f.weight, *bias = f.plan.row_params() ? nullptr : f.bias;
  if (a.width(u) < a.pitch)
    for (Number* numbers : {high, factor, shift}) std::fill(numbers, numbers + a.pitch, Number(0));
  if (a.p.param_inner == 0 || (!weight && !bias)) {  // all columns of a set have the same parameters
    alignas(64) Number highs[kSegment], factors[kSegment], shifts[kSegment];
    const int64_t at = base + a.first(u) / a.p.fold * a.p.param_outer, step = a.p.param_outer;
    const Number *lows = f.low + set, *rstds = f.rstd + set, *means = f.high + set;
    for (int64_t s = 0; s < sets; ++s) {
      const Line l = line(means[s], lows[s], rstds[s], f.center, weight ? weight[at + s * step] : Number(1), bias ? bias[at + s * step] : Number(0));
      highs[s] = l.high, factors[s] = l.factor, shifts[s] = l.shift;
    }
    a.spread(highs, sets, high), a.spread(factors, sets, factor), a.spread(shifts, sets, shift);
    return;
  }
  for (int64_t s = 0; s < sets; ++s)
    a.set_columns(u, s, [&](int64_t k, int64_t at) {
      const Line l = line(f.high[set + s], f.low[set + s], f.rstd[set + s], f.center, weight ? weight[base + at] : Number(1),
                          bias ? bias[base + at] : Number(0));
      high[k] = l.high, factor[k] = l.factor, shift[k] = l.shift;
    });
}

template <class T>
void forward_across(const Forward<Number>& f) {
  const Plan& p = f.plan;
  const Across<T> a{p};
  const ForwardTensors<T> tensors(f);
  const bool row = p.row_params();
  const int64_t most = a.most_sets();
  auto partial = buffer<double>(f.given ? 0 : a.units * a.blocks * 3 * most);
  auto shifts = buffer<Number>(a.units * a.pitch);
  Columns columns(a.units * a.pitch);
  auto at = [&](int64_t u, int64_t b) { return partial.get() + (u * a.blocks + b) * 3 * most; };

  auto guess = [&](int64_t u) {
    Number* shift = shifts.get() + u * a.pitch;
    if (!f.given && f.center) column_guess(a, tensors.x, tensors.mask, u, shift);
    else std::fill(shift, shift + a.pitch, Number(0));
  };
  auto statistics = [&](int64_t u, int64_t b) {
    const Number* shift = shifts.get() + u * a.pitch;
    if (f.given) return;
    if (tensors.mask) column_squares<true>(a, tensors.x, tensors.mask, u, b, shift, at(u, b));
    else column_squares<false>(a, tensors.x, tensors.mask, u, b, shift, at(u, b));
  };
  // Per set the mean of x − shift and of its square, and the cells behind them.
  auto totals = [&](int64_t u, double* first, double* second, double* count) {
    std::memcpy(first, at(u, 0), static_cast<size_t>(a.sets(u)) * sizeof(double));
    std::memcpy(second, at(u, 0) + most, static_cast<size_t>(a.sets(u)) * sizeof(double));
    std::memcpy(count, at(u, 0) + 2 * most, static_cast<size_t>(a.sets(u)) * sizeof(double));
    for (int64_t b = 1; b < a.blocks; ++b) {
      const double* s = at(u, b);
      for (int64_t k = 0; k < a.sets(u); ++k) first[k] += s[k], second[k] += s[most + k], count[k] += s[2 * most + k];
    }
    for (int64_t k = 0; k < a.sets(u); ++k) {
      const double n = count[k] > 1 ? count[k] : 1.0;
      first[k] /= n;
      second[k] /= n;
    }
  };
  auto statistics_of_sets = [&](int64_t u) {
    alignas(64) double first[kSegment], second[kSegment], count[kSegment];
    alignas(64) Number by_set[kSegment];
    Number* shift = shifts.get() + u * a.pitch;
    const int64_t sets = a.sets(u), set = a.set(u);
    const int32_t* slot = a.slots.get();
    totals(u, first, second, count);
    if (f.center) {
      bool again = false;
      for (int64_t s = 0; s < sets; ++s) again |= off_centre(first[s], second[s]);
      if (again) {
        for (int64_t s = 0; s < sets; ++s) by_set[s] = static_cast<Number>(shift[slot[s * a.group()]] + first[s]);
        a.spread(by_set, sets, shift);
        for (int64_t b = 0; b < a.blocks; ++b) statistics(u, b);
        totals(u, first, second, count);
      }
    }
    for (int64_t s = 0; s < sets; ++s) by_set[s] = shift[slot[s * a.group()]];
    Number *high = f.high + set, *low = f.low + set, *var = f.var + set, *rstd = f.rstd + set, *cells = f.count + set;
    for (int64_t s = 0; s < sets; ++s) {  // in vectors: there may be as many sets as a map has cells
      const double spread = f.center ? second[s] - first[s] * first[s] : second[s];
      const Moments m = moments(count[s] > 0 ? by_set[s] : 0, f.center ? first[s] : 0.0, spread, f.eps, f.scale);
      high[s] = m.high, low[s] = m.low, var[s] = m.var, rstd[s] = m.rstd, cells[s] = static_cast<Number>(count[s]);
    }
  };
  auto finish_unit = [&](int64_t u) {
    if (f.given) {
      for (int64_t set = a.set(u); set < a.set(u) + a.sets(u); ++set) {
        const Moments m = moments(f.high[set], 0, f.var[set], f.eps, f.scale);
        f.low[set] = m.low, f.rstd[set] = m.rstd;
      }
    } else {
      statistics_of_sets(u);
    }
    fill_columns(f, a, u, columns);
  };
  auto finish = each_unit(finish_unit);
  with_loop<T>(f, [&](auto loop) {
    auto apply = [&](int64_t u, int64_t b) {
      const int64_t base = a.param_base(u), c = u * a.pitch;
      a.spans(u, b, [&](int64_t offset, int64_t j, int64_t n, int64_t param) {
        const Number *high = columns.high.get() + c + j, *factor = columns.factor.get() + c + j, *shift = columns.shift.get() + c + j;
        const T *x = tensors.x + offset, *next = x + a.stride;
        if (row) {
          const W weight = step(f.weight ? f.weight[base + param] : Number(1)), bias = step(f.bias ? f.bias[base + param] : Number(0));
          write_run<loop.value>(f, tensors, offset, n, [=](int64_t i, auto cells) __attribute__((always_inline)) {
            fetch(next + i);
            return ((cells.load(x + i) - get(high + i)) * get(factor + i) + get(shift + i)) * weight + bias;
          });
        } else {
          write_run<loop.value>(f, tensors, offset, n, [=](int64_t i, auto cells) __attribute__((always_inline)) {
            fetch(next + i);
            return (cells.load(x + i) - get(high + i)) * get(factor + i) + get(shift + i);
          });
        }
      });
    };
    sweep(p, a.units, a.blocks, a.rows * a.columns, f.given, guess, statistics, finish, apply);
  });
}

template <class T>
void backward_across(const Backward<Number>& f) {
  const Plan& p = f.plan;
  const Across<T> a{p};
  const BackwardTensors<T> tensors(f);
  const bool row = p.row_params(), learns = f.dweight || f.dbias;
  Columns columns(a.units * a.pitch), slopes(a.units * a.pitch);
  // All columns of a set have the same parameters: its sums are all that is needed of them.
  const Number* weight = row ? nullptr : f.weight;
  const bool own = !row && learns, shared = row || p.param_inner == 0 || (!weight && !own);
  const int64_t most = shared ? a.most_sets() : a.pitch;
  auto partial = buffer<double>(a.units * a.blocks * 2 * most);
  // Two blocks of one slab may touch the same parameter, so each has an accumulator of its own.
  const int64_t per_unit = row ? a.blocks : 1;
  ParamSums sums(a.units * per_unit, p.params_per_task(), learns);
  auto at = [&](int64_t u, int64_t b) { return partial.get() + (u * a.blocks + b) * 2 * most; };

  auto with_z = [&](int64_t u, int64_t j, int64_t param, auto&& body) {
    const int64_t base = a.param_base(u), c = u * a.pitch + j;
    const Number *high = columns.high.get() + c, *factor = columns.factor.get() + c, *shift = columns.shift.get() + c;
    auto d_of = [=](int, int64_t i, const W& x) __attribute__((always_inline)) { return x - get(high + i); };
    if (row) {
      const W weight = step(f.weight ? f.weight[base + param] : Number(1)), bias = step(f.bias ? f.bias[base + param] : Number(0));
      body(d_of, [=](int, int64_t i, const W& d) __attribute__((always_inline)) { return (d * get(factor + i) + get(shift + i)) * weight + bias; });
    } else {
      body(d_of, [=](int, int64_t i, const W& d) __attribute__((always_inline)) { return d * get(factor + i) + get(shift + i); });
    }
  };
  auto prepare = [&](int64_t u) { fill_columns(f, a, u, columns); };
  auto finish_unit = [&](int64_t u) {
    alignas(64) double first[kSegment], second[kSegment];
    const int64_t count = shared ? a.sets(u) : a.pitch;
    std::memcpy(first, at(u, 0), static_cast<size_t>(count) * sizeof(double));
    std::memcpy(second, at(u, 0) + most, static_cast<size_t>(count) * sizeof(double));
    for (int64_t b = 1; b < a.blocks; ++b) {
      const double* s = at(u, b);
      for (int64_t k = 0; k < count; ++k) first[k] += s[k], second[k] += s[most + k];
    }
    const int64_t base = a.param_base(u), set = a.set(u), c = u * a.pitch;
    Number *sa = slopes.high.get() + c, *sb = slopes.factor.get() + c, *sc = slopes.shift.get() + c;
    const Number *lows = f.low + set, *rstds = f.rstd + set, *counts = f.count + set;
    const double all = 1.0 / static_cast<double>(p.cells());
    if (shared) {
      alignas(64) Number as[kSegment], bs[kSegment], cs[kSegment];
      const int64_t one = a.first(u) / p.fold * p.param_outer, step = p.param_outer;
      Number *dweight = own ? sums.weight.get() + u * sums.size + one : nullptr, *dbias = own ? sums.bias.get() + u * sums.size + one : nullptr;
      for (int64_t s = 0; s < a.sets(u); ++s) {
        const double low = f.center ? lows[s] : 0, rstd = rstds[s];
        const double g = first[s], gx = (second[s] - low * g) * rstd, w = weight ? weight[base + one + s * step] : 1.0;
        const Slope l = slope(f, low, rstd, g * w, gx * w, f.mask ? 1.0 / std::max(counts[s], Number(1)) : all);
        as[s] = l.a * static_cast<Number>(w), bs[s] = l.b, cs[s] = l.c;
        first[s] = g, second[s] = gx;
      }
      if (own)
        for (int64_t s = 0; s < a.sets(u); ++s) {
          NORMSCOPE_ONE_BY_ONE;
          dweight[s * step] += static_cast<Number>(second[s]);
          dbias[s * step] += static_cast<Number>(first[s]);
        }
      a.spread(as, a.sets(u), sa), a.spread(bs, a.sets(u), sb), a.spread(cs, a.sets(u), sc);
      return;
    }
    for (int64_t s = 0; s < a.sets(u); ++s) {
      const double low = f.center ? lows[s] : 0, rstd = rstds[s];
      double set_g = 0, set_gx = 0;
      a.set_columns(u, s, [&](int64_t k, int64_t column) {
        const double gx = (second[k] - low * first[k]) * rstd, w = weight ? weight[base + column] : 1.0;
        if (own) {
          sums.weight[u * sums.size + column] += static_cast<Number>(gx);
          sums.bias[u * sums.size + column] += static_cast<Number>(first[k]);
        }
        set_g += first[k] * w;
        set_gx += gx * w;
      });
      const Slope l = slope(f, low, rstd, set_g, set_gx, f.mask ? 1.0 / std::max(counts[s], Number(1)) : all);
      a.set_columns(u, s, [&](int64_t k, int64_t column) {
        sa[k] = l.a * (weight ? weight[base + column] : Number(1));
        sb[k] = l.b;
        sc[k] = l.c;
      });
    }
  };
  auto finish = each_unit(finish_unit);
  with_loop<T>(f, [&](auto loop) {
    auto reduce = [&](int64_t u, int64_t b) {
      alignas(64) Number first[kSegment], second[kSegment];
      std::memset(first, 0, static_cast<size_t>(a.pitch) * sizeof(Number));
      std::memset(second, 0, static_cast<size_t>(a.pitch) * sizeof(Number));
      const int64_t base = a.param_base(u), unit = u * a.blocks + b;
      if (!row) {
        a.row_groups(u, b, [&](auto group, const int64_t* offsets, int64_t j, int64_t n) {
          Number *to_first = first + j, *to_second = second + j;
          const T *x = tensors.x + group * a.stride, *gy = tensors.gy + group * a.stride;
          with_z(u, j, 0, [&](auto d_of, auto z_of) {
            read_runs<loop.value, group.value>(f, tensors, offsets, n, d_of, z_of, [&](int64_t i, auto, auto&& visit) __attribute__((always_inline)) {
              W sum = get(to_first + i), products = get(to_second + i);
              for (int r = 0; r < group; ++r) fetch<2>(x + offsets[r] + i), fetch<2>(gy + offsets[r] + i);
              for (int r = 0; r < group; ++r)
                visit(r, [&](const W& d, const W& g) __attribute__((always_inline)) {
                  sum += g;
                  products += g * d;
                });
              put(to_first + i, sum);
              put(to_second + i, products);
            });
          });
        });
      } else {
        a.spans(u, b, [&](int64_t offset, int64_t j, int64_t n, int64_t param) {
          const Number *factor = columns.factor.get() + u * a.pitch + j, *shift = columns.shift.get() + u * a.pitch + j;
          Number *to_first = first + j, *to_second = second + j;
          const T *x = tensors.x + offset + a.stride, *gy = tensors.gy + offset + a.stride;
          with_z(u, j, param, [&](auto d_of, auto z_of) {
            const W weight = step(f.weight ? f.weight[base + param] : Number(1));
            W row_g = step(0), row_gx = step(0);
            read_run<loop.value>(f, tensors, offset, n, d_of, z_of, [&](int64_t i, auto, const W& d, const W& g) __attribute__((always_inline)) {
              fetch(x + i), fetch(gy + i);
              const W gw = g * weight;
              row_g += g;
              row_gx += g * (d * get(factor + i) + get(shift + i));
              put(to_first + i, get(to_first + i) + gw);
              put(to_second + i, get(to_second + i) + gw * d);
            });
            if (learns) {
              sums.weight[unit * sums.size + param] += static_cast<Number>(sum(row_gx));
              sums.bias[unit * sums.size + param] += static_cast<Number>(sum(row_g));
            }
          });
        });
      }
      double* out = at(u, b);
      if (shared) {
        a.fold(first, a.sets(u), out);
        a.fold(second, a.sets(u), out + most);
      } else {
        for (int64_t k = 0; k < a.pitch; ++k) out[k] = first[k], out[most + k] = second[k];
      }
    };
    auto apply = [&](int64_t u, int64_t b) {
      if (!f.dx && !f.dresidual) return;
      const int64_t base = a.param_base(u), c = u * a.pitch;
      a.spans(u, b, [&](int64_t offset, int64_t j, int64_t n, int64_t param) {
        const Number *sa = slopes.high.get() + c + j, *sb = slopes.factor.get() + c + j, *sc = slopes.shift.get() + c + j;
        const T *x = tensors.x + offset + a.stride, *gy = tensors.gy + offset + a.stride;
        with_z(u, j, param, [&](auto d_of, auto z_of) {
          if (row) {
            const W weight = step(f.weight ? f.weight[base + param] : Number(1));
            write_gradients<loop.value>(f, tensors, offset, n, d_of, z_of, [=](int64_t i, const W& d, const W& g) __attribute__((always_inline)) {
              fetch(x + i), fetch(gy + i);
              return g * weight * get(sa + i) + (d * get(sb + i) + get(sc + i));
            });
          } else {
            write_gradients<loop.value>(f, tensors, offset, n, d_of, z_of, [=](int64_t i, const W& d, const W& g) __attribute__((always_inline)) {
              fetch(x + i), fetch(gy + i);
              return g * get(sa + i) + (d * get(sb + i) + get(sc + i));
            });
          }
        });
      });
    };
    sweep(p, a.units, a.blocks, a.rows * a.columns, false, prepare, reduce, finish, apply);
  });
  sums.into(f, p.param_count(), p.param_count(), [&](int64_t unit) { return a.param_base(unit / per_unit); }, [](int64_t j) { return j; });
}

// The innermost axis lies outside S: neighbouring cells are columns of different sets, summed row by row.
//
// Included inside the namespace of an instruction set by bodies.h. Columns are taken in tiles, a tile's numbers per column
// (shift, factor, sums …) in the order of the steps. Where rows are short and lie end to end, several are taken as one:
// a row of 64 columns pays more for its loop than for its cells.

constexpr int64_t kBlockRows = 128;  // rows of a block, summed in float
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
  int64_t first(int64_t u) const { return (u % tiles) * tile; }
  int64_t width(int64_t u) const { return repeat > 1 ? columns : std::min(tile, p.length - first(u)); }
  int64_t sets(int64_t u) const { return (repeat > 1 ? p.length : width(u)) / p.fold; }
  int64_t set(int64_t u) const { return u / tiles * p.sets_per_task() + first(u) / p.fold; }
  int64_t param_base(int64_t u) const { return p.task(u / tiles).param; }
  bool simple() const { return p.fold == 1 && repeat == 1; }  // every column is a set
  int64_t group() const { return p.fold * repeat; }             // columns of a set
  bool ordered() const { return repeat == 1 && !std::is_same_v<T, BF16>; }  // slots lie set by set

  // Numbers per slot, set by set.
  void sort(double* numbers) const {
    if (ordered()) return;
    alignas(64) double sorted[kSegment];
    for (int64_t i = 0; i < columns; ++i) sorted[i] = numbers[slots[i]];
    std::memcpy(numbers, sorted, static_cast<size_t>(columns) * sizeof(double));
  }
  void fill(float* numbers, int64_t s, float value) const {  // for all columns of the s-th set
    const int32_t* k = slots.get() + s * group();
    if (ordered()) std::fill_n(numbers + *k, group(), value);
    else
      for (int64_t i = 0; i < group(); ++i) numbers[k[i]] = value;
  }

  // body(offset in x, offset of the row's parameter) for each row of a block.
  template <class F>
  NORMSCOPE_INLINE void block(int64_t u, int64_t b, F&& body) const {
    const int64_t base = p.task(u / tiles).stride + first(u), begin = b * kBlockRows, end = std::min(rows, begin + kBlockRows);
    const int64_t inner = p.rows[1].size / repeat, step = p.rows[1].stride * repeat;
    int64_t outer = begin / inner, i = begin % inner;
    for (int64_t r = begin; r < end; ++r) {
      body(base + outer * p.rows[0].stride + i * step, outer * p.rows[0].param + i * p.rows[1].param);
      if (++i == inner) i = 0, ++outer;
    }
  }

  // The same by groups of kTogether rows, then one by one: a group reads and writes the sums per column once.
  static constexpr int kTogether = 4;
  template <class F>
  NORMSCOPE_INLINE void row_groups(int64_t u, int64_t b, F&& body) const {
    int64_t offsets[kTogether], params[kTogether];
    int waiting = 0;
    block(u, b, [&](int64_t offset, int64_t param) {
      offsets[waiting] = offset, params[waiting] = param;
      if (++waiting == kTogether) waiting = 0, body(std::integral_constant<int, kTogether>{}, offsets, params);
    });
    for (int i = 0; i < waiting; ++i) body(std::integral_constant<int, 1>{}, offsets + i, params + i);
  }

  // body(slot, parameter relative to the task's) for the columns of the s-th set of a unit.
  template <class F>
  NORMSCOPE_INLINE void set_columns(int64_t u, int64_t s, F&& body) const {
    int64_t at = (first(u) / p.fold + s) * p.param_outer;
    const int32_t* k = slots.get() + s * p.fold * repeat;
    for (int64_t i = 0; i < p.fold; ++i, at += p.param_inner)
      for (int64_t r = 0; r < repeat; ++r) body(*k++, at);
  }
};

// Per column: Σ(x − shift), Σ(x − shift)² and, with a mask, the kept cells of a block; out has three pieces of `pitch`.
template <class T>
void column_squares(const Across<T>& a, const T* x, const uint8_t* mask, int64_t u, int64_t b, const float* shift, double* out) {
  alignas(64) float first[kSegment], second[kSegment], kept[kSegment], few_first[kSegment], few_second[kSegment];
  const int64_t n = a.width(u);
  for (float* sums : {first, second, kept, few_first, few_second}) std::memset(sums, 0, static_cast<size_t>(a.pitch) * sizeof(float));
  auto flush = [&] {
    for (int64_t k = 0; k < a.pitch; ++k) {
      first[k] += few_first[k];
      second[k] += few_second[k];
      few_first[k] = few_second[k] = 0;
    }
  };
  int64_t rows = 0;
  auto add = [&](auto group, const int64_t* offsets) __attribute__((always_inline)) {
    steps<T>(n, [&](int64_t i, auto cells) __attribute__((always_inline)) {
      W sum = get(few_first + i), squares = get(few_second + i);
      for (int r = 0; r < group; ++r) {
        W d = cells.load(x + offsets[r] + i) - get(shift + i);
        if (mask) {
          const M m = cells.mask(mask + offsets[r] + i);
          d = d & m;
          put(kept + i, get(kept + i) + (step(1) & m));
        }
        sum += d;
        squares += d * d;
      }
      put(few_first + i, sum);
      put(few_second + i, squares);
    });
    rows += group;
    if (rows % kFewRows == 0) flush();
  };
  a.row_groups(u, b, [&](auto group, const int64_t* offsets, const int64_t*) { add(group, offsets); });
  flush();
  for (int64_t k = 0; k < a.pitch; ++k) {
    out[k] = first[k];
    out[a.pitch + k] = second[k];
    out[2 * a.pitch + k] = mask ? kept[k] : static_cast<double>(rows);
  }
}

template <class T>
void column_guess(const Across<T>& a, const T* x, const uint8_t* mask, int64_t u, float* shift) {
  alignas(64) float kept[kSegment];
  const int64_t n = a.width(u);
  std::memset(shift, 0, static_cast<size_t>(a.pitch) * sizeof(float));
  std::memset(kept, 0, static_cast<size_t>(a.pitch) * sizeof(float));
  const int64_t few = std::clamp<int64_t>(a.rows / 8, 1, kFewRows);
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
      put(shift + i, get(shift + i) + v);
    });
  });
  for (int64_t k = 0; k < a.pitch; ++k) shift[k] /= mask ? (kept[k] > 0 ? kept[k] : 1.f) : static_cast<float>(rows);
}

// Per column: z = (x − high)·factor + shift.
struct Columns {
  Buffer<float> high, factor, shift;
  explicit Columns(int64_t n) : high(buffer<float>(n)), factor(buffer<float>(n)), shift(buffer<float>(n)) {}
};

template <class F, class T>
void fill_columns(const F& f, const Across<T>& a, int64_t u, Columns& columns) {
  const int64_t base = a.param_base(u), set = a.set(u), c = u * a.pitch;
  float *high = columns.high.get() + c, *factor = columns.factor.get() + c, *shift = columns.shift.get() + c;
  const float *weight = f.plan.row_params() ? nullptr : f.weight, *bias = f.plan.row_params() ? nullptr : f.bias;
  for (float* numbers : {high, factor, shift}) std::fill(numbers, numbers + a.pitch, 0.f);
  const bool shared = a.p.param_inner == 0 || (!weight && !bias);  // all columns of a set have the same parameters
  for (int64_t s = 0; s < a.sets(u); ++s) {
    if (shared) {
      const int64_t at = base + (a.first(u) / a.p.fold + s) * a.p.param_outer;
      const Line l = line(f.high[set + s], f.low[set + s], f.rstd[set + s], f.center, weight ? weight[at] : 1.f, bias ? bias[at] : 0.f);
      a.fill(high, s, l.high), a.fill(factor, s, l.factor), a.fill(shift, s, l.shift);
      continue;
    }
    a.set_columns(u, s, [&](int64_t k, int64_t at) {
      const Line l = line(f.high[set + s], f.low[set + s], f.rstd[set + s], f.center, weight ? weight[base + at] : 1.f,
                          bias ? bias[base + at] : 0.f);
      high[k] = l.high, factor[k] = l.factor, shift[k] = l.shift;
    });
  }
}

template <class T>
void forward_across(const Forward& f) {
  const Plan& p = f.plan;
  const Across<T> a{p};
  const ForwardTensors<T> tensors(f);
  const bool row = p.row_params();
  auto partial = buffer<double>(f.given ? 0 : a.units * a.blocks * 3 * a.pitch);
  auto shifts = buffer<float>(a.units * a.pitch);
  Columns columns(a.units * a.pitch);
  auto at = [&](int64_t u, int64_t b) { return partial.get() + (u * a.blocks + b) * 3 * a.pitch; };

  auto guess = [&](int64_t u) {
    float* shift = shifts.get() + u * a.pitch;
    if (!f.given && f.center) column_guess(a, tensors.x, tensors.mask, u, shift);
    else std::fill(shift, shift + a.pitch, 0.f);
  };
  auto statistics = [&](int64_t u, int64_t b) {
    if (!f.given) column_squares(a, tensors.x, tensors.mask, u, b, shifts.get() + u * a.pitch, at(u, b));
  };
  // Per column the mean of x − shift and of its square, and the cells behind them.
  auto totals = [&](int64_t u, double* first, double* second, double* count) {
    std::fill(first, first + a.pitch, 0.0);
    std::fill(second, second + a.pitch, 0.0);
    std::fill(count, count + a.pitch, 0.0);
    for (int64_t b = 0; b < a.blocks; ++b) {
      const double* s = at(u, b);
      for (int64_t k = 0; k < a.pitch; ++k) {
        first[k] += s[k];
        second[k] += s[a.pitch + k];
        count[k] += s[2 * a.pitch + k];
      }
    }
    for (int64_t k = 0; k < a.pitch; ++k) {
      const double n = count[k] > 1 ? count[k] : 1.0;
      first[k] /= n;
      second[k] /= n;
    }
  };
  auto statistics_of_sets = [&](int64_t u) {
    alignas(64) double first[kSegment], second[kSegment], count[kSegment];
    float* shift = shifts.get() + u * a.pitch;
    totals(u, first, second, count);
    if (f.center) {
      bool again = false;
      for (int64_t k = 0; k < a.pitch; ++k) again |= off_centre(first[k], second[k]);
      if (again) {
        for (int64_t k = 0; k < a.pitch; ++k) shift[k] = static_cast<float>(shift[k] + first[k]);
        for (int64_t b = 0; b < a.blocks; ++b) column_squares(a, tensors.x, tensors.mask, u, b, shift, at(u, b));
        totals(u, first, second, count);
      }
    }
    const int64_t set = a.set(u);
    if (a.simple()) {  // in vectors: there may be as many sets as a map has cells
      alignas(64) double rstd[kSegment];
      for (int64_t k = 0; k < a.pitch; ++k) {
        const double var = f.center ? second[k] - first[k] * first[k] : second[k];
        first[k] = f.center ? shift[k] + first[k] : 0.0;
        second[k] = var < 0 ? 0.0 : var;
        rstd[k] = f.scale ? 1 / std::sqrt(second[k] + f.eps) : 1.0;
      }
      for (int64_t s = 0; s < a.sets(u); ++s) {
        const int32_t k = a.slots[s];
        const float high = static_cast<float>(first[k]);
        f.high[set + s] = high;
        f.low[set + s] = std::isfinite(high) ? static_cast<float>(first[k] - high) : 0.f;
        f.var[set + s] = static_cast<float>(second[k]);
        f.rstd[set + s] = static_cast<float>(rstd[k]);
        f.count[set + s] = static_cast<float>(count[k]);
      }
      return;
    }
    // Columns of one set: the mean of their means, the variances and the spread of the means, weighted by their cells.
    for (int64_t k = 0; k < a.pitch; ++k) {
      const double var = f.center ? second[k] - first[k] * first[k] : second[k];
      first[k] = f.center ? shift[k] + first[k] : 0.0;
      second[k] = var;
    }
    for (double* numbers : {first, second, count}) a.sort(numbers);
    const int64_t group = a.group();
    for (int64_t s = 0; s < a.sets(u); ++s) {
      const double *mean = first + s * group, *var = second + s * group, *kept = count + s * group;
      const double cells = sum_of(group, [&](int64_t i) { return kept[i]; }), n = std::max(cells, 1.0);
      const double centre = sum_of(group, [&](int64_t i) { return kept[i] * mean[i]; }) / n;
      const double spread = sum_of(group, [&](int64_t i) { return kept[i] * (var[i] + (mean[i] - centre) * (mean[i] - centre)); });
      const Moments m = moments(centre, spread / n, f.eps, f.scale);
      f.high[set + s] = m.high, f.low[set + s] = m.low, f.var[set + s] = m.var, f.rstd[set + s] = m.rstd;
      f.count[set + s] = static_cast<float>(cells);
    }
  };
  auto finish = [&](int64_t u) {
    if (f.given) {
      for (int64_t set = a.set(u); set < a.set(u) + a.sets(u); ++set) {
        const Moments m = moments(f.high[set], f.var[set], f.eps, f.scale);
        f.low[set] = m.low, f.rstd[set] = m.rstd;
      }
    } else {
      statistics_of_sets(u);
    }
    fill_columns(f, a, u, columns);
  };
  with_act<T>(f.activation, [&](auto act) {
    auto apply = [&](int64_t u, int64_t b) {
      const int64_t n = a.width(u), base = a.param_base(u), c = u * a.pitch;
      const float *high = columns.high.get() + c, *factor = columns.factor.get() + c, *shift = columns.shift.get() + c;
      a.block(u, b, [&](int64_t offset, int64_t param) {
        const T* x = tensors.x + offset;
        if (row) {
          const W weight = step(f.weight ? f.weight[base + param] : 1.f), bias = step(f.bias ? f.bias[base + param] : 0.f);
          write_run<act.value>(f, tensors, offset, n, [&](int64_t i, auto cells) __attribute__((always_inline)) {
            return ((cells.load(x + i) - get(high + i)) * get(factor + i) + get(shift + i)) * weight + bias;
          });
        } else {
          write_run<act.value>(f, tensors, offset, n, [&](int64_t i, auto cells) __attribute__((always_inline)) {
            return (cells.load(x + i) - get(high + i)) * get(factor + i) + get(shift + i);
          });
        }
      });
    };
    sweep(p, a.units, a.blocks, a.rows * a.columns, guess, statistics, finish, apply);
  });
}

template <class T>
void backward_across(const Backward& f) {
  const Plan& p = f.plan;
  const Across<T> a{p};
  const BackwardTensors<T> tensors(f);
  const bool row = p.row_params(), learns = f.dweight || f.dbias;
  Columns columns(a.units * a.pitch), slopes(a.units * a.pitch);
  auto partial = buffer<double>(a.units * a.blocks * 2 * a.pitch);
  // Two blocks of one slab may touch the same parameter, so each has an accumulator of its own.
  const int64_t per_unit = row ? a.blocks : 1;
  ParamSums sums(a.units * per_unit, p.params_per_task(), learns);
  auto at = [&](int64_t u, int64_t b) { return partial.get() + (u * a.blocks + b) * 2 * a.pitch; };

  auto with_z = [&](int64_t u, int64_t param, auto&& body) {
    const int64_t base = a.param_base(u), c = u * a.pitch;
    const float *high = columns.high.get() + c, *factor = columns.factor.get() + c, *shift = columns.shift.get() + c;
    if (row) {
      const W weight = step(f.weight ? f.weight[base + param] : 1.f), bias = step(f.bias ? f.bias[base + param] : 0.f);
      body([=](int64_t i, const W& x) __attribute__((always_inline)) {
        return ((x - get(high + i)) * get(factor + i) + get(shift + i)) * weight + bias;
      });
    } else {
      body([=](int64_t i, const W& x) __attribute__((always_inline)) { return (x - get(high + i)) * get(factor + i) + get(shift + i); });
    }
  };
  auto prepare = [&](int64_t u) { fill_columns(f, a, u, columns); };
  auto finish = [&](int64_t u) {
    alignas(64) double first[kSegment], second[kSegment];
    std::fill(first, first + a.pitch, 0.0);
    std::fill(second, second + a.pitch, 0.0);
    for (int64_t b = 0; b < a.blocks; ++b) {
      const double* s = at(u, b);
      for (int64_t k = 0; k < a.pitch; ++k) first[k] += s[k], second[k] += s[a.pitch + k];
    }
    const int64_t base = a.param_base(u), c = u * a.pitch, group = a.group();
    const float* weight = row ? nullptr : f.weight;
    const bool own = !row && learns, shared = row || p.param_inner == 0 || (!weight && !own);
    if (shared) a.sort(first), a.sort(second);
    for (int64_t s = 0; s < a.sets(u); ++s) {
      const int64_t set = a.set(u) + s, one = (a.first(u) / p.fold + s) * p.param_outer;
      const double low = f.center ? f.low[set] : 0, rstd = f.rstd[set];
      const double cells = f.mask ? std::max(f.count[set], 1.f) : static_cast<double>(p.cells());
      if (shared) {
        const double g = sum_of(group, [&](int64_t i) { return first[s * group + i]; });
        const double gx = (sum_of(group, [&](int64_t i) { return second[s * group + i]; }) - low * g) * rstd;
        const double w = weight ? weight[base + one] : 1.0;
        if (own) {
          sums.weight[u * sums.size + one] += static_cast<float>(gx);
          sums.bias[u * sums.size + one] += static_cast<float>(g);
        }
        const Slope l = slope(f, low, rstd, g * w, gx * w, cells);
        a.fill(slopes.high.get() + c, s, l.a * static_cast<float>(w));
        a.fill(slopes.factor.get() + c, s, l.b);
        a.fill(slopes.shift.get() + c, s, l.c);
        continue;
      }
      double set_g = 0, set_gx = 0;
      a.set_columns(u, s, [&](int64_t k, int64_t column) {
        const double gx = (second[k] - low * first[k]) * rstd, w = weight ? weight[base + column] : 1.0;
        if (own) {
          sums.weight[u * sums.size + column] += static_cast<float>(gx);
          sums.bias[u * sums.size + column] += static_cast<float>(first[k]);
        }
        set_g += first[k] * w;
        set_gx += gx * w;
      });
      const Slope l = slope(f, low, rstd, set_g, set_gx, cells);
      a.set_columns(u, s, [&](int64_t k, int64_t column) {
        slopes.high[c + k] = l.a * (weight ? weight[base + column] : 1.f);
        slopes.factor[c + k] = l.b;
        slopes.shift[c + k] = l.c;
      });
    }
  };
  with_act<T>(f.activation, [&](auto act) {
    auto reduce = [&](int64_t u, int64_t b) {
      alignas(64) float first[kSegment], second[kSegment];
      std::memset(first, 0, static_cast<size_t>(a.pitch) * sizeof(float));
      std::memset(second, 0, static_cast<size_t>(a.pitch) * sizeof(float));
      const int64_t n = a.width(u), base = a.param_base(u), unit = u * a.blocks + b;
      const float *high = columns.high.get() + u * a.pitch, *factor = columns.factor.get() + u * a.pitch, *shift = columns.shift.get() + u * a.pitch;
      if (!row) {
        a.row_groups(u, b, [&](auto group, const int64_t* offsets, const int64_t*) {
          with_z(u, 0, [&](auto&& z_of) {
            read_runs<act.value, group.value>(f, tensors, offsets, n, z_of, [&](int64_t i, auto, auto&& visit) __attribute__((always_inline)) {
              const W centre = get(high + i);
              W sum = get(first + i), products = get(second + i);
              for (int r = 0; r < group; ++r)
                visit(r, [&](const W& x, const W& g) __attribute__((always_inline)) {
                  sum += g;
                  products += g * (x - centre);
                });
              put(first + i, sum);
              put(second + i, products);
            });
          });
        });
      } else {
        a.block(u, b, [&](int64_t offset, int64_t param) {
          with_z(u, param, [&](auto&& z_of) {
            const W weight = step(f.weight ? f.weight[base + param] : 1.f);
            W row_g = step(0), row_gx = step(0);
            read_run<act.value>(f, tensors, offset, n, z_of, [&](int64_t i, auto, const W& x, const W& g) __attribute__((always_inline)) {
              const W d = x - get(high + i), gw = g * weight;
              row_g += g;
              row_gx += g * (d * get(factor + i) + get(shift + i));
              put(first + i, get(first + i) + gw);
              put(second + i, get(second + i) + gw * d);
            });
            if (learns) {
              sums.weight[unit * sums.size + param] += static_cast<float>(sum(row_gx));
              sums.bias[unit * sums.size + param] += static_cast<float>(sum(row_g));
            }
          });
        });
      }
      double* out = at(u, b);
      for (int64_t k = 0; k < a.pitch; ++k) out[k] = first[k], out[a.pitch + k] = second[k];
    };
    auto apply = [&](int64_t u, int64_t b) {
      if (!f.dx && !f.dresidual) return;
      const int64_t n = a.width(u), base = a.param_base(u), c = u * a.pitch;
      const float* high = columns.high.get() + c;
      const float *sa = slopes.high.get() + c, *sb = slopes.factor.get() + c, *sc = slopes.shift.get() + c;
      a.block(u, b, [&](int64_t offset, int64_t param) {
        with_z(u, param, [&](auto&& z_of) {
          if (row) {
            const W weight = step(f.weight ? f.weight[base + param] : 1.f);
            write_gradients<act.value>(f, tensors, offset, n, z_of, [&](int64_t i, const W& x, const W& g) __attribute__((always_inline)) {
              return g * weight * get(sa + i) + ((x - get(high + i)) * get(sb + i) + get(sc + i));
            });
          } else {
            write_gradients<act.value>(f, tensors, offset, n, z_of, [&](int64_t i, const W& x, const W& g) __attribute__((always_inline)) {
              return g * get(sa + i) + ((x - get(high + i)) * get(sb + i) + get(sc + i));
            });
          }
        });
      });
    };
    sweep(p, a.units, a.blocks, a.rows * a.columns, prepare, reduce, finish, apply);
  });
  sums.into(f, p.param_count(), p.param_count(), [&](int64_t unit) { return a.param_base(unit / per_unit); }, [](int64_t j) { return j; });
}

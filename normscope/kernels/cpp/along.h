// The innermost axis lies inside S: a set is `rows` runs of neighbouring cells.
//
// Included by bodies.h inside the namespace of an instruction set and of a Number.

template <class T>
struct Along {
  const Plan& p;
  int64_t rows = p.row_count(), segments = (p.length + kSegment - 1) / kSegment, pieces = rows * segments;
  int64_t per_block = std::max<int64_t>(1, 8 * kSegment / std::min(p.length, kSegment));
  int64_t blocks = (pieces + per_block - 1) / per_block;
  // Where runs lie apart, how far the next one is, of which memory is asked meanwhile: processors see no further than a page.
  int64_t ahead = rows > 1 && p.rows[1].stride > p.length ? p.rows[1].stride : 0;

  // body(offset in x, first cell of the run, cells, offset of the row's parameter) for each piece of a block.
  template <class F>
  NORMSCOPE_INLINE void block(int64_t b, F&& body) const {
    const int64_t end = std::min(pieces, (b + 1) * per_block);
    int64_t r = b * per_block / segments, s = b * per_block % segments;
    Axis row = p.row(r);
    for (int64_t i = b * per_block; i < end; ++i) {
      const int64_t j = s * kSegment;
      body(row.stride + j, j, std::min(kSegment, p.length - j), row.param);
      if (++s == segments) s = 0, row = ++r < rows ? p.row(r) : row;
    }
  }
};

// Weight and bias along the run: copies in the order of the steps, a padded piece per run of parameters.
template <class T>
struct RunParams {
  int64_t length, pitch;
  Buffer<Number> weight, bias;
  RunParams(const Plan& p, const Number* w, const Number* b, bool on) : length(p.length), pitch(padded(length)) {
    if (!on) return;
    const int64_t runs = std::max<int64_t>(1, p.param_count() / length);  // one of ones where there are no parameters
    weight = zeros<Number>(runs * pitch);
    bias = zeros<Number>(runs * pitch);
    for (int64_t r = 0; r < runs; ++r)
      for (int64_t j = 0; j < length; ++j) {
        const int64_t to = r * pitch + slot<T>(j);
        weight[to] = w ? quiet(w[r * length + j]) : Number(1);
        if (b) bias[to] = quiet(b[r * length + j]);
      }
  }
  int64_t place(int64_t param) const { return param / length * pitch; }  // of a run's first parameter
};

// Σ(x − shift), Σ(x − shift)² of a run, in two levels: where the data lie on a grid, the roundings of one long float sum
// all point the same way (2.6e-7 of the variance after 64 terms); after 8 terms and 8 sums they do not show. What lies
// `ahead` is asked for, if anything.
template <bool masked, class T>
NORMSCOPE_INLINE void run_squares(const T* x, const uint8_t* mask, int64_t n, Number shift, int64_t ahead, W& first, W& second) {
  const W s = step(shift);
  W a, b;
  auto add = [&](int64_t i, auto cells) __attribute__((always_inline)) {
    if (ahead) fetch<2>(x + ahead + i);
    W d = cells.keep(cells.load(x + i) - s);
    if constexpr (masked) d = d & cells.mask(mask + i);
    a += d;
    b += d * d;
  };
  int64_t i = 0;
  first = second = step(0);
  for (; i + 8 * kStep <= n; i += 8 * kStep) {
    a = b = step(0);
    for (int u = 0; u < 8; ++u) add(i + u * kStep, Whole<T>{});
    first += a;
    second += b;
  }
  a = b = step(0);
  for (; i + kStep <= n; i += kStep) add(i, Whole<T>{});
  if (i < n) add(i, Rest<T>{static_cast<int>(n - i)});
  first += a;
  second += b;
}
template <class T>
Sums run_squares(const T* x, const uint8_t* mask, int64_t n, Number shift, int64_t ahead) {
  W first, second;
  mask ? run_squares<true>(x, mask, n, shift, ahead, first, second) : run_squares<false>(x, mask, n, shift, ahead, first, second);
  int64_t count = n;
  if (mask) {
    count = 0;
    for (int64_t j = 0; j < n; ++j) count += mask[j] != 0;
  }
  return {sum(first), sum(second), static_cast<double>(count)};
}

// A first guess of a set's mean: of its first cells.
template <class T>
Number run_guess(const T* x, const uint8_t* mask, int64_t n) {
  if (mask) {
    const Sums s = run_squares(x, mask, std::min<int64_t>(n, 64), Number(0), 0);
    return s.count > 0 ? static_cast<Number>(s.first / s.count) : Number(0);
  }
  if (n < kStep) return rough_sum(Rest<T>{static_cast<int>(n)}.load(x)) / static_cast<Number>(n);
  W cells = read(x);
  const int64_t few = n < 1024 ? kStep : std::max<int64_t>(kStep, 64);
  for (int64_t i = kStep; i < few; i += kStep) cells += read(x + i);
  return rough_sum(cells) / static_cast<Number>(few);
}

template <class T>
void forward_along(const Forward<Number>& f) {
  const Plan& p = f.plan;
  const Plan joined = p.joined();
  const Along<T> along{p}, whole{joined};
  const ForwardTensors<T> tensors(f);
  const int64_t tasks = p.task_count();
  const bool inner = p.param_inner;
  const RunParams<T> params(p, f.weight, f.bias, inner && (f.weight || f.bias));
  const bool counts = f.mask != nullptr;
  const int64_t blocks = std::max(along.blocks, whole.blocks), partials = f.given ? 0 : tasks * blocks;
  auto first = buffer<double>(partials), second = buffer<double>(partials), kept = buffer<double>(counts ? partials : 0);
  auto shifts = buffer<Number>(tasks);

  auto squares = [&](int64_t t, int64_t b) {
    const int64_t base = p.task(t).stride;
    Sums sums;
    whole.block(b, [&](int64_t offset, int64_t, int64_t n, int64_t) {
      offset += base;
      sums += run_squares(tensors.x + offset, counts ? tensors.mask + offset : nullptr, n, shifts[t], whole.ahead);
    });
    first[t * blocks + b] = sums.first, second[t * blocks + b] = sums.second;
    if (counts) kept[t * blocks + b] = sums.count;
  };
  auto guess = [&](int64_t t) {
    shifts[t] = 0;
    if (f.addend)
      for (int64_t b = 0; b < whole.blocks; ++b)
        whole.block(b, [&](int64_t offset, int64_t, int64_t n, int64_t) { tensors.add(p.task(t).stride + offset, n); });
    if (!f.given && f.center) {
      const int64_t base = p.task(t).stride;
      shifts[t] = run_guess(tensors.x + base, counts ? tensors.mask + base : nullptr, joined.length);
    }
  };
  auto statistics = [&](int64_t t, int64_t b) {
    if (!f.given) squares(t, b);
  };
  auto close = [&](int64_t t, double mean, double square) __attribute__((always_inline)) {
    const double var = f.center ? square - mean * mean : square;
    const Moments m = moments(shifts[t], f.center ? mean : 0.0, var, f.eps, f.scale);
    f.high[t] = m.high, f.low[t] = m.low, f.var[t] = m.var, f.rstd[t] = m.rstd;
  };
  auto close_slowly = [&](int64_t t) {  // all blocks, counted cells, and again where the guess was bad
    for (bool again = false;; again = true) {
      Sums s;
      for (int64_t b = 0; b < blocks; ++b)
        s += Sums{first[t * blocks + b], second[t * blocks + b], counts ? kept[t * blocks + b] : 0.0};
      const double count = counts ? s.count : static_cast<double>(p.cells()), n = std::max(count, 1.0);
      const double mean = s.first / n, square = s.second / n;
      f.count[t] = static_cast<Number>(count);
      if (again || !f.center || !off_centre(mean, square)) return close(t, mean, square);
      shifts[t] = static_cast<Number>(shifts[t] + mean);
      for (int64_t b = 0; b < blocks; ++b) squares(t, b);
    }
  };
  auto finish = [&](int64_t begin, int64_t end) {
    if (f.given) {
      for (int64_t t = begin; t < end; ++t) {
        const Moments m = moments(f.high[t], 0, f.var[t], f.eps, f.scale);
        f.low[t] = m.low, f.rstd[t] = m.rstd;
      }
    } else if (counts || blocks > 1) {
      for (int64_t t = begin; t < end; ++t) close_slowly(t);
    } else {  // short sets: the roots and divisions of several at once
      const double each = 1.0 / static_cast<double>(p.cells());
      int off = 0;
      for (int64_t t = begin; t < end; ++t) {
        const double mean = first[t] * each, square = second[t] * each;
        off |= off_centre(mean, square);
        f.count[t] = static_cast<Number>(p.cells());
        close(t, mean, square);
      }
      if (f.center && off)
        for (int64_t t = begin; t < end; ++t)
          if (off_centre(first[t] * each, second[t] * each)) close_slowly(t);
    }
  };
  with_loop<T>(f, [&](auto loop) {
    auto write = [&](int64_t t, const Axis& task, int64_t offset, int64_t j, int64_t n, int64_t row) __attribute__((always_inline)) {
      offset += task.stride;
      const int64_t at = task.param + row;
      const T* x = tensors.x + offset;
      const Line l = line(f.high[t], f.low[t], f.rstd[t], f.center, !inner && f.weight ? f.weight[at] : Number(1),
                          !inner && f.bias ? f.bias[at] : Number(0));
      const W high = step(l.high), factor = step(l.factor), shift = step(l.shift);
      if (params.weight) {
        const Number *weight = params.weight.get() + params.place(at) + j, *bias = params.bias.get() + params.place(at) + j;
        write_run<loop.value>(f, tensors, offset, n, [=](int64_t i, auto cells) __attribute__((always_inline)) {
          return ((cells.load(x + i) - high) * factor + shift) * get(weight + i) + get(bias + i);
        });
      } else {
        write_run<loop.value>(f, tensors, offset, n, [=](int64_t i, auto cells) __attribute__((always_inline)) {
          return (cells.load(x + i) - high) * factor + shift;
        });
      }
    };
    auto apply = [&](int64_t t, int64_t b) {
      const Axis task = p.task(t);
      along.block(b, [&](int64_t offset, int64_t j, int64_t n, int64_t row) { write(t, task, offset, j, n, row); });
    };
    if (f.given && along.rows > 1 && p.rows[1].stride > p.tasks[2].stride) {  // no slab to keep: in the order of memory
      finish(0, tasks);
      auto in_order = [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const Axis row = p.row(i / tasks), task = p.task(i % tasks);
          for (int64_t j = 0; j < p.length; j += kSegment)
            write(i % tasks, task, row.stride + j, j, std::min(kSegment, p.length - j), row.param);
        }
        finish_streams();
      };
      parallel_for(tasks * along.rows, std::max<int64_t>(1, kGrain / p.length), in_order);
      return;
    }
    sweep(p, tasks, blocks, p.cells(), f.given, guess, statistics, finish, apply);
  });
}

template <class T>
void backward_along(const Backward<Number>& f) {
  const Plan& p = f.plan;
  const Along<T> along{p};
  const BackwardTensors<T> tensors(f);
  const int64_t tasks = p.task_count();
  const bool inner = p.param_inner, learns = f.dweight || f.dbias;
  const RunParams<T> params(p, f.weight, f.bias, inner);
  // Places of the accumulators: as the padded runs where the parameters vary along the run, else as the parameters.
  const int64_t pitch = params.pitch, per_task = p.params_per_task();
  auto place = [&](int64_t param) { return inner ? params.place(param) : param; };
  // One accumulator per task would be as large as x where the parameters vary along the run: tasks share by groups.
  const bool grouped = p.tasks_share_params() && along.blocks == 1;
  const int64_t most = std::min<int64_t>(64, std::max<int64_t>(1, p.numel() / (64 * std::max<int64_t>(1, per_task))));
  const int64_t group = grouped ? (tasks + most - 1) / most : 1, groups = (tasks + group - 1) / group;
  // Blocks of one row touch different parameters; blocks of several rows need an accumulator each.
  const int64_t per_group = inner && along.rows == 1 ? 1 : along.blocks;
  ParamSums sums(groups * per_group, inner ? per_task / p.length * pitch : per_task, learns);
  auto partial = buffer<Sums>(tasks * along.blocks);
  auto slopes = buffer<Slope>(tasks);

  // γ·x̂ + β as the forward pass computes it, to the bit: the gate of a ReLU must open for the same cells.
  auto with_z = [&](int64_t t, int64_t at, int64_t j, auto&& body) {
    const Line l = line(f.high[t], f.low[t], f.rstd[t], f.center, !inner && f.weight ? f.weight[at] : Number(1),
                        !inner && f.bias ? f.bias[at] : Number(0));
    const W high = step(l.high), factor = step(l.factor), shift = step(l.shift);
    auto d_of = [=](int, int64_t, const W& x) __attribute__((always_inline)) { return x - high; };
    if (inner && (f.weight || f.bias)) {
      const Number *weight = params.weight.get() + params.place(at) + j, *bias = params.bias.get() + params.place(at) + j;
      body(d_of, [=](int, int64_t i, const W& d) __attribute__((always_inline)) { return (d * factor + shift) * get(weight + i) + get(bias + i); });
    } else {
      body(d_of, [=](int, int64_t, const W& d) __attribute__((always_inline)) { return d * factor + shift; });
    }
  };
  auto finish = [&](int64_t begin, int64_t end) {
    const double all = 1.0 / static_cast<double>(p.cells());
    for (int64_t t = begin; t < end; ++t) {
      Sums s;
      for (int64_t b = 0; b < along.blocks; ++b) s += partial[t * along.blocks + b];
      slopes[t] = slope(f, f.low[t], f.rstd[t], s.first, s.second, f.mask ? 1.0 / std::max(f.count[t], Number(1)) : all);
    }
  };
  with_loop<T>(f, [&](auto loop) {
    auto reduce = [&](int64_t t, int64_t b) {
      const Axis task = p.task(t);
      const Number low = f.center ? f.low[t] : Number(0), rstd = f.rstd[t];
      const int64_t unit = (t / group) * per_group + (per_group == 1 ? 0 : b);
      Number *dw = learns ? sums.weight.get() + unit * sums.size : nullptr, *db = learns ? sums.bias.get() + unit * sums.size : nullptr;
      const W scale = step(rstd), rest = step(-low * rstd);
      Sums set;
      Totals totals, products;
      int64_t params_of[kTogether], waiting = 0;
      auto settle = [&] {
        alignas(64) double g[kTogether], gd[kTogether];
        totals.into(g, 1);
        products.into(gd, 1);
        for (int64_t r = 0; r < waiting; ++r) {
          const double gx = (gd[r] - low * g[r]) * rstd, weight = !inner && f.weight ? f.weight[task.param + params_of[r]] : 1.0;
          if (!inner && dw) dw[params_of[r]] += static_cast<Number>(gx), db[params_of[r]] += static_cast<Number>(g[r]);
          set += Sums{g[r] * weight, gx * weight, 0};
        }
        waiting = 0;
      };
      along.block(b, [&](int64_t offset, int64_t j, int64_t n, int64_t row) {
        const int64_t at = task.param + row;
        W first = step(0), second = step(0);
        const int64_t ahead = along.ahead;
        const T *x = tensors.x + offset + task.stride + ahead, *gy = tensors.gy + offset + task.stride + ahead;
        with_z(t, at, j, [&](auto d_of, auto z_of) {
          if (inner) {
            const Number* weight = params.weight.get() + params.place(at) + j;
            Number *pw = dw ? dw + params.place(row) + j : nullptr, *pb = dw ? db + params.place(row) + j : nullptr;
            read_run<loop.value>(f, tensors, offset + task.stride, n, d_of, z_of, [&](int64_t i, auto, const W& d, const W& g) __attribute__((always_inline)) {
              if (ahead) fetch<2>(x + i), fetch<2>(gy + i);
              if (pw) {
                put(pw + i, get(pw + i) + g * (d * scale + rest));
                put(pb + i, get(pb + i) + g);
              }
              const W gw = g * get(weight + i);
              first += gw;
              second += gw * d;
            });
          } else {
            read_run<loop.value>(f, tensors, offset + task.stride, n, d_of, z_of, [&](int64_t i, auto, const W& d, const W& g) __attribute__((always_inline)) {
              if (ahead) fetch<2>(x + i), fetch<2>(gy + i);
              first += g;
              second += g * d;
            });
          }
        });
        totals.put(waiting, first), products.put(waiting, second), params_of[waiting] = row;
        if (++waiting == kTogether) settle();
      });
      settle();
      partial[t * along.blocks + b] = set;
    };
    auto apply = [&](int64_t t, int64_t b) {
      if (!f.dx && !f.dresidual) return;
      const Axis task = p.task(t);
      const W sb = step(slopes[t].b), sc = step(slopes[t].c);
      along.block(b, [&](int64_t offset, int64_t j, int64_t n, int64_t row) {
        const int64_t at = task.param + row;
        with_z(t, at, j, [&](auto d_of, auto z_of) {
          if (inner) {
            const Number* weight = params.weight.get() + params.place(at) + j;
            const W sa = step(slopes[t].a);
            write_gradients<loop.value>(f, tensors, offset + task.stride, n, d_of, z_of, [=](int64_t i, const W& d, const W& g) __attribute__((always_inline)) {
              return g * get(weight + i) * sa + (d * sb + sc);
            });
          } else {
            const W sa = step(slopes[t].a * (f.weight ? f.weight[at] : Number(1)));
            write_gradients<loop.value>(f, tensors, offset + task.stride, n, d_of, z_of, [=](int64_t, const W& d, const W& g) __attribute__((always_inline)) {
              return g * sa + (d * sb + sc);
            });
          }
        });
      });
    };
    auto nothing = [](int64_t) {};
    if (group == 1) {
      sweep(p, tasks, along.blocks, p.cells(), false, nothing, reduce, finish, apply);
    } else {  // whole groups, so that two threads never add to one accumulator
      auto body = [&](int64_t begin, int64_t end) {
        sweep_in_cache(begin * group, std::min(tasks, end * group), 1, p.cells(), nothing, reduce, finish, apply);
      };
      parallel_for(groups, std::max<int64_t>(1, kGrain / ((p.cells() + kSetCells) * group)), body);
    }
  });
  sums.into(f, p.param_count(), inner ? p.param_count() / p.length * pitch : p.param_count(),
            [&](int64_t unit) { return place(p.task(unit / per_group * group).param); },
            [&](int64_t j) { return inner ? params.place(j) + slot<T>(j % p.length) : j; });
}

// Every set is one run that stays in the nearest cache, and all share their parameters: LayerNorm and RMSNorm.
//
// Included by bodies.h inside the namespace of an instruction set and of a Number. What `along` spends on a run before its first cell, and
// on waiting for its sums, roots and divisions, is as much as some hundred cells take; so several runs go together.

constexpr int kBeside = 4;         // runs whose gradients are added to the parameters' sums at once

template <class Call>
bool by_rows(const Call& f) {
  const Plan& p = f.plan;
  const bool shared = (!f.weight && !f.bias) || (p.param_inner && p.tasks_share_params());
  return !p.across && !f.mask && p.row_count() == 1 && p.length <= kSegment && shared;
}

template <class T>
void forward_rows(const Forward<Number>& f) {
  const Plan& p = f.plan;
  const ForwardTensors<T> tensors(f);
  const int64_t n = p.length;
  const RunParams<T> params(p, f.weight, f.bias, f.weight || f.bias);
  const double each = 1.0 / static_cast<double>(n);
  auto statistics = [&](int64_t begin, int64_t end) {
    alignas(64) double guess[kTogether], mean[kTogether] = {}, square[kTogether];
    alignas(64) Number shift[kTogether] = {};
    Totals first, second;
    const int64_t count = end - begin, few = std::min<int64_t>(n, kStep);
    const T* x = tensors.x + begin * n;
    if (f.addend) tensors.add(begin * n, count * n);
    auto squares = [&](int64_t r) __attribute__((always_inline)) {
      W deviation, squared;
      run_squares<false>(x + r * n, nullptr, n, shift[r], 0, deviation, squared);
      first.put(r, deviation);
      second.put(r, squared);
    };
    if (f.center) {
      for (int64_t r = 0; r < count; ++r)
        steps<T>(few, [&](int64_t, auto cells) __attribute__((always_inline)) { first.put(r, cells.load(x + r * n)); });
      first.into(guess, 1.0 / static_cast<double>(few));
      for (int64_t r = 0; r < kTogether; ++r) shift[r] = static_cast<Number>(guess[r]);
    }
    for (int64_t r = 0; r < count; ++r) squares(r);
    for (bool again = f.center;; again = false) {
      if (f.center) first.into(mean, each);
      second.into(square, each);
      if (!again) break;
      int off = 0;
      for (int64_t r = 0; r < kTogether; ++r) off |= off_centre(mean[r], square[r]);
      if (!off) break;
      for (int64_t r = 0; r < count; ++r)
        if (off_centre(mean[r], square[r])) {
          shift[r] = static_cast<Number>(shift[r] + mean[r]);
          squares(r);
        }
    }
    alignas(64) Number high[kTogether], low[kTogether], var[kTogether], rstd[kTogether];
    for (int64_t r = 0; r < kTogether; ++r) {
      const Moments m = moments(shift[r], mean[r], square[r] - mean[r] * mean[r], f.eps, f.scale);
      high[r] = m.high, low[r] = m.low, var[r] = m.var, rstd[r] = m.rstd;
    }
    for (int64_t r = 0; r < count; ++r) {
      f.high[begin + r] = high[r], f.low[begin + r] = low[r], f.var[begin + r] = var[r];
      f.rstd[begin + r] = rstd[r], f.count[begin + r] = static_cast<Number>(n);
    }
  };
  with_loop<T>(f, [&](auto loop) {
    auto body = [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        if ((t - begin) % kTogether == 0) statistics(t, std::min(end, t + kTogether));
        const Line l = line(f.high[t], f.low[t], f.rstd[t], f.center, Number(1), Number(0));
        const W high = step(l.high), factor = step(l.factor), shift = step(l.shift);
        const T* x = tensors.x + t * n;
        if (params.weight) {
          const Number *weight = params.weight.get(), *bias = params.bias.get();
          write_run<loop.value>(f, tensors, t * n, n, [=](int64_t i, auto cells) __attribute__((always_inline)) {
            return ((cells.load(x + i) - high) * factor + shift) * get(weight + i) + get(bias + i);
          });
        } else {
          write_run<loop.value>(f, tensors, t * n, n, [=](int64_t i, auto cells) __attribute__((always_inline)) {
            return (cells.load(x + i) - high) * factor + shift;
          });
        }
      }
      finish_streams();
    };
    parallel_for(p.task_count(), std::max<int64_t>(1, kGrain / n), body);
  });
}

template <class T>
void backward_rows(const Backward<Number>& f) {
  const Plan& p = f.plan;
  const BackwardTensors<T> tensors(f);
  const int64_t n = p.length, tasks = p.task_count();
  const bool learns = f.dweight || f.dbias, has_params = f.weight || f.bias;
  const RunParams<T> params(p, f.weight, f.bias, true);
  const Number *weight = params.weight.get(), *bias = params.bias.get();
  // Accumulators by groups of runs, cut by shape alone; as many as share the work and are small against x.
  const int64_t most = std::min<int64_t>(64, std::max<int64_t>(1, tasks / 32)), group = (tasks + most - 1) / most;
  const int64_t groups = (tasks + group - 1) / group;
  ParamSums sums(groups, params.pitch, learns);
  auto unused = zeros<Number>(learns ? 0 : 2 * params.pitch);
  const double each = 1.0 / static_cast<double>(n);

  with_loop<T>(f, [&](auto loop) {
    // γ·x̂ + β as the forward pass computes it, to the bit: the gate of a ReLU must open for the same cells.
    auto z_from = [=](const Line& l, int64_t i, const W& d) __attribute__((always_inline)) {
      const W z = d * step(l.factor) + step(l.shift);
      return has_params ? z * get(weight + i) + get(bias + i) : z;
    };
    auto reduce = [&](auto beside, int64_t t, Number* dw, Number* db, Totals& first, Totals& second, int64_t at) __attribute__((always_inline)) {
      constexpr int rows = beside;
      Line lines[rows];
      int64_t offsets[rows];
      W gw[rows], gwd[rows];
      const T *x = tensors.x + rows * n, *gy = tensors.gy + rows * n;
      for (int r = 0; r < rows; ++r) {
        lines[r] = line(f.high[t + r], f.low[t + r], f.rstd[t + r], f.center, Number(1), Number(0));
        offsets[r] = (t + r) * n;
        gw[r] = gwd[r] = step(0);
      }
      read_runs<loop.value, rows>(f, tensors, offsets, n, [&](int r, int64_t, const W& x) __attribute__((always_inline)) { return x - step(lines[r].high); },
        [&](int r, int64_t i, const W& d) __attribute__((always_inline)) { return z_from(lines[r], i, d); },
        [&](int64_t i, auto, auto&& visit) __attribute__((always_inline)) {
          const W w = get(weight + i);
          for (int r = 0; r < rows; ++r) fetch<2>(x + offsets[r] + i), fetch<2>(gy + offsets[r] + i);
          W sum_w = get(dw + i), sum_b = get(db + i);
          for (int r = 0; r < rows; ++r)
            visit(r, [&](const W& d, const W& g) __attribute__((always_inline)) {
              sum_w += g * (d * step(lines[r].factor) + step(lines[r].shift));
              sum_b += g;
              const W v = g * w;
              gw[r] += v;
              gwd[r] += v * d;
            });
          put(dw + i, sum_w);
          put(db + i, sum_b);
        });
      for (int r = 0; r < rows; ++r) first.put(at + r, gw[r]), second.put(at + r, gwd[r]);
    };
    auto gradients = [&](int64_t begin, int64_t end, Number* dw, Number* db) {
      Totals first, second;
      alignas(64) double set_g[kTogether], set_gd[kTogether];
      Slope slopes[kTogether];
      const int64_t count = end - begin;
      int64_t r = 0;
      for (; r + kBeside <= count; r += kBeside) reduce(std::integral_constant<int, kBeside>{}, begin + r, dw, db, first, second, r);
      for (; r < count; ++r) reduce(std::integral_constant<int, 1>{}, begin + r, dw, db, first, second, r);
      first.into(set_g, 1);
      second.into(set_gd, 1);
      for (r = 0; r < count; ++r) {
        const double low = f.low[begin + r], rstd = f.rstd[begin + r];
        slopes[r] = slope(f, low, rstd, set_g[r], (set_gd[r] - low * set_g[r]) * rstd, each);
      }
      if (!f.dx && !f.dresidual) return;
      for (r = 0; r < count; ++r) {
        const int64_t t = begin + r;
        const Line l = line(f.high[t], f.low[t], f.rstd[t], f.center, Number(1), Number(0));
        const W high = step(l.high), sa = step(slopes[r].a), sb = step(slopes[r].b), sc = step(slopes[r].c);
        write_gradients<loop.value>(f, tensors, t * n, n, [=](int, int64_t, const W& x) __attribute__((always_inline)) { return x - high; },
          [=](int, int64_t i, const W& d) __attribute__((always_inline)) { return z_from(l, i, d); },
          [=](int64_t i, const W& d, const W& g) __attribute__((always_inline)) {
            return g * get(weight + i) * sa + (d * sb + sc);
          });
      }
    };
    auto body = [&](int64_t begin, int64_t end) {
      for (int64_t u = begin; u < end; ++u) {
        Number* dw = learns ? sums.weight.get() + u * sums.size : unused.get();
        Number* db = learns ? sums.bias.get() + u * sums.size : unused.get() + params.pitch;
        const int64_t last = std::min(tasks, (u + 1) * group);
        for (int64_t t = u * group; t < last; t += kTogether) gradients(t, std::min(last, t + kTogether), dw, db);
      }
      finish_streams();
    };
    parallel_for(groups, std::max<int64_t>(1, kGrain / (n * group)), body);
  });
  sums.into(f, p.param_count(), params.pitch, [](int64_t) { return 0; }, [](int64_t j) { return slot<T>(j); });
}

template <class T>
void forward(const Forward<Number>& f) {
  f.plan.across ? forward_across<T>(f) : !f.given && by_rows(f) ? forward_rows<T>(f) : forward_along<T>(f);
}

template <class T>
void backward(const Backward<Number>& f) {
  f.plan.across ? backward_across<T>(f) : by_rows(f) ? backward_rows<T>(f) : backward_along<T>(f);
}

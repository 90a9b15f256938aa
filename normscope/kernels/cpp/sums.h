// What both loop orders share: memory, moments, the line of the forward pass, the slope of the backward pass.
//
// Included by bodies.h inside the namespace of an instruction set and of a Number.

constexpr int64_t kSegment = 2048;  // cells per inner loop: 8 KB, three of them in L1

struct Free {
#ifdef _WIN32
  void operator()(void* p) const { _aligned_free(p); }
#else
  void operator()(void* p) const { std::free(p); }
#endif
};
template <class T>
using Buffer = std::unique_ptr<T[], Free>;

template <class T>
Buffer<T> buffer(int64_t count) {  // on a cache line's boundary: vectors never straddle two
  const size_t bytes = (static_cast<size_t>(std::max<int64_t>(count, 1)) * sizeof(T) + 63) & ~size_t{63};
#ifdef _WIN32
  return Buffer<T>(static_cast<T*>(_aligned_malloc(bytes, 64)));
#else
  return Buffer<T>(static_cast<T*>(std::aligned_alloc(64, bytes)));
#endif
}
template <class T>
Buffer<T> zeros(int64_t count) {
  auto b = buffer<T>(count);
  std::memset(b.get(), 0, static_cast<size_t>(std::max<int64_t>(count, 0)) * sizeof(T));
  return b;
}

// What a loop over cells has to look at. All but the last are written without a question per cell: with them, a step of a
// ReLU was 50 to 60 instructions instead of 16, and fewer of memory's answers were waited for at once.
enum class Loop {
  plain,     // y = z
  relu,      // y = max(z, 0); its gate is computed again from x
  sum,       // y = z + residual; backward as plain
  residual,  // y = max(z + residual, 0), which is the gate; both gradients are wanted
  any,       // whatever there is: a mask, a function over a run of z in cache …
};

template <class F>
void map(Number* __restrict z, int64_t n) {
  for (int64_t i = 0; i < n; ++i) z[i] = F::value(z[i]);
}
template <class F>
void chain(const Number* __restrict z, Number* __restrict g, int64_t n) {
  for (int64_t i = 0; i < n; ++i) g[i] *= F::slope(z[i]);
}

template <>
inline void chain<Relu>(const Number* __restrict z, Number* __restrict g, int64_t n) {
  for (int64_t i = 0; i < n; ++i) g[i] = z[i] <= 0 ? 0 : g[i];  // 0 of an infinite gradient, too
}

struct Function {
  void (*map)(Number* z, int64_t n);                    // z ← f(z)
  void (*chain)(const Number* z, Number* g, int64_t n);  // g ← g · f′(z)
};

inline void keep(Number*, int64_t) {}
inline void keep(const Number*, Number*, int64_t) {}

// In the order of `FUSED` in cpu.py; the first is no activation.
constexpr Function kActivations[] = {
    {keep, keep},
    {map<Relu>, chain<Relu>},
    {map<Relu6>, chain<Relu6>},
    {map<LeakyRelu>, chain<LeakyRelu>},
    {map<Elu>, chain<Elu>},
    {map<Silu>, chain<Silu>},
    {map<Gelu>, chain<Gelu>},
    {map<GeluTanh>, chain<GeluTanh>},
    {map<Mish>, chain<Mish>},
    {map<Sigmoid>, chain<Sigmoid>},
    {map<Tanh>, chain<Tanh>},
    {map<Hardswish>, chain<Hardswish>},
    {map<Hardsigmoid>, chain<Hardsigmoid>},
};
static_assert(sizeof(kActivations) / sizeof(kActivations[0]) == kActivationCount);

inline Loop loop_of(const Forward<Number>& f) {
  if (f.mask || f.activation > 1) return Loop::any;
  return f.residual ? f.activation == 1 ? Loop::residual : Loop::sum : f.activation == 1 ? Loop::relu : Loop::plain;
}
inline Loop loop_of(const Backward<Number>& f) {
  if (f.mask || f.activation > 1) return Loop::any;
  if (f.dresidual) return f.activation == 1 && f.y && f.dx ? Loop::residual : Loop::any;
  return f.activation == 0 ? Loop::plain : f.residual || f.y ? Loop::any : Loop::relu;
}

// Calls body with the kind of loop as a constant; float16 and float64, rare in training on a CPU, have one for all.
template <class T, class Pass, class F>
void with_loop(const Pass& f, F&& body) {
  if constexpr (std::is_same_v<T, F16> || std::is_same_v<T, double>) return body(std::integral_constant<Loop, Loop::any>{});
  else switch (loop_of(f)) {
    case Loop::plain: return body(std::integral_constant<Loop, Loop::plain>{});
    case Loop::relu: return body(std::integral_constant<Loop, Loop::relu>{});
    case Loop::residual: return body(std::integral_constant<Loop, Loop::residual>{});
    case Loop::sum:
      if constexpr (std::is_same_v<Pass, Forward<Number>>) return body(std::integral_constant<Loop, Loop::sum>{});
      [[fallthrough]];
    case Loop::any: return body(std::integral_constant<Loop, Loop::any>{});
  }
}

struct Sums {
  double first = 0, second = 0, count = 0;
  void operator+=(const Sums& o) { first += o.first, second += o.second, count += o.count; }
};

constexpr int64_t kTogether = 16;  // runs whose sums are added up in the same vectors

// Sums of several runs: four numbers each, then of all of them at once.
struct Totals {
  alignas(64) Number quarters[4 * kTogether] = {};
  void put(int64_t run, const W& sums) { put_quarter(quarters + 4 * run, sums); }
  void into(double* __restrict total, double each) const {
    const Number* q = quarters;
    for (int64_t r = 0; r < kTogether; ++r)
      total[r] = ((static_cast<double>(q[4 * r]) + q[4 * r + 1]) + (static_cast<double>(q[4 * r + 2]) + q[4 * r + 3])) * each;
  }
};

struct Moments {
  Number high, low, var, rstd;
};

// The mean is shift + rest: one number that cells were compared with, and what they lie off it on average.
inline Moments moments(double shift, double rest, double var, double eps, bool scale) {
  var = var < 0 ? 0 : var;  // NaN passes
  const Number high = static_cast<Number>(shift + rest);
  const Number low = high - high == 0 ? static_cast<Number>(shift - high + rest) : Number(0);  // finite
  return {high, low, static_cast<Number>(var), scale ? static_cast<Number>(1 / std::sqrt(var + eps)) : Number(1)};
}

// A first guess of the mean that lies outside by many σ costs digits of the variance: sum again from the mean found.
inline bool off_centre(double mean, double square) { return mean * mean > 4 * (square - mean * mean); }

struct Line {  // z = (x − high)·factor + shift
  Number high, factor, shift;
};

inline Line line(Number high, Number low, Number rstd, bool center, Number weight, Number bias) {
  const Number factor = rstd * weight;
  return {center ? quiet(high) : Number(0), quiet(factor), quiet((center ? -low * factor : Number(0)) + bias)};
}

struct Slope {  // dx = g·a + (x − high)·b + c
  Number a, b, c;
};

// `each` is 1/|S|.
inline Slope slope(const Backward<Number>& f, double low, double rstd, double set_g, double set_gx, double each) {
  if (f.fixed) return {static_cast<Number>(rstd), 0, 0};
  const double b = f.scale ? -set_gx * each * rstd * rstd : 0;
  const double c = f.center ? -set_g * each * rstd - b * low : 0;
  return {static_cast<Number>(rstd), static_cast<Number>(b), static_cast<Number>(c)};
}

// Σ value(i) over i < n, in lanes.
template <class F>
NORMSCOPE_INLINE double sum_of(int64_t n, F&& value) {
  double lanes[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int64_t j = 0; j < 8; ++j) lanes[j] += value(i + j);
  for (int64_t j = 0; i + j < n; ++j) lanes[j] += value(i + j);
  return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
}

// Partial gradients of the parameters, added up in order at the end.
struct ParamSums {
  int64_t units, size;
  Buffer<Number> weight, bias;
  ParamSums(int64_t u, int64_t n, bool on) : units(on ? u : 0), size(n), weight(zeros<Number>(units * n)), bias(zeros<Number>(units * n)) {}

  // base(unit) is the place of a unit's first number among `total`, and place(parameter) that of a parameter.
  template <class Base, class Place>
  void into(const Backward<Number>& f, int64_t params, int64_t total, Base&& base, Place&& place) const {
    if (!units) return;
    auto w = zeros<double>(total), b = zeros<double>(total);
    for (int64_t u = 0; u < units; ++u) {
      const int64_t at = base(u), n = std::min(size, total - at);
      const Number *from_w = weight.get() + u * size, *from_b = bias.get() + u * size;
      double *__restrict to_w = w.get() + at, *__restrict to_b = b.get() + at;
      for (int64_t j = 0; j < n; ++j) to_w[j] += from_w[j], to_b[j] += from_b[j];
    }
    for (int64_t j = 0; j < params; ++j) {
      if (f.dweight) f.dweight[j] = static_cast<Number>(w[place(j)]);
      if (f.dbias) f.dbias[j] = static_cast<Number>(b[place(j)]);
    }
  }
};

// One thread's share of tasks whose slabs stay in cache. Small ones go together, so that the roots and divisions of one
// overlap with those of the next; the second sweep goes backwards: what the first has read last is still in cache.
template <class Prepare, class Statistics, class Finish, class Apply>
void sweep_in_cache(int64_t begin, int64_t end, int64_t blocks, int64_t cells, Prepare& prepare, Statistics& statistics,
                    Finish& finish, Apply& apply) {
  const int64_t together = std::clamp<int64_t>(4 * kSegment / std::max<int64_t>(cells, 1), 1, 64);
  for (int64_t first = begin; first < end; first += together) {
    const int64_t last = std::min(end, first + together);
    for (int64_t t = first; t < last; ++t) prepare(t);
    for (int64_t t = first; t < last; ++t)
      for (int64_t b = 0; b < blocks; ++b) statistics(t, b);
    finish(first, last);
    for (int64_t t = first; t < last; ++t)
      for (int64_t b = blocks - 1; b >= 0; --b) apply(t, b);
  }
  finish_streams();
}

// Runs prepare, statistics, finish and apply so that a task whose slab stays in cache is finished by one thread, and a
// large one is shared. Moments that are given leave nothing to prepare and to sum.
template <class Prepare, class Statistics, class Finish, class Apply>
void sweep(const Plan& p, int64_t tasks, int64_t blocks, int64_t cells, bool given, Prepare&& prepare, Statistics&& statistics,
           Finish&& finish, Apply&& apply) {
  if (p.fused(tasks, cells)) {
    auto body = [&](int64_t begin, int64_t end) { sweep_in_cache(begin, end, blocks, cells, prepare, statistics, finish, apply); };
    parallel_for(tasks, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, cells + (given ? 0 : kSetCells))), body);
    return;
  }
  const int64_t grain = std::max<int64_t>(1, kGrain * blocks / std::max<int64_t>(cells, 1));
  auto before = [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) prepare(t);
  };
  auto first = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) statistics(i / blocks, i % blocks);
  };
  auto middle = [&](int64_t begin, int64_t end) { finish(begin, end); };
  auto last = [&](int64_t begin, int64_t end) {
    for (int64_t i = end - 1; i >= begin; --i) apply(i / blocks, i % blocks);
    finish_streams();
  };
  // What precedes and follows the sums reads some rows or columns of a slab: a second thread pays for many slabs only.
  const int64_t few = std::max<int64_t>(1, kGrain / std::clamp<int64_t>(cells / blocks, 1, 2 * kSegment));
  if (!given) {
    parallel_for(tasks, few, before);
    parallel_for(tasks * blocks, grain, first);
  }
  parallel_for(tasks, few, middle);
  parallel_for(tasks * blocks, grain, last);
}

// Whether y, of so many bytes, is written past the caches: worth it where it would push out what is still to be read,
// not on fresh pages, which the kernel has just put into the cache (mappings from 32 MB on).
inline bool streams(int64_t bytes) { return bytes >= kStreamFrom && bytes < (int64_t{32} << 20); }
// Whole lines only: past the caches a line that is shared with other stores is written twice (14x14 maps of float32).
template <class T>
bool whole_lines(const T* p, int64_t n) {
  return reinterpret_cast<uintptr_t>(p) % 64 == 0 && n * static_cast<int64_t>(sizeof(T)) % 64 == 0;
}

// What of x, upstream gradient and residual lies at some offset.
template <class T>
struct ForwardTensors {
  const T *x, *residual;
  const uint8_t* mask;
  T* y;
  bool streamed;
  const T *own, *addend;
  T* total;
  explicit ForwardTensors(const Forward<Number>& f)
      : x(static_cast<const T*>(f.addend ? f.total : f.x)), residual(static_cast<const T*>(f.residual)), mask(f.mask), y(static_cast<T*>(f.y)),
        streamed(!std::is_same_v<T, F16> && streams(f.plan.numel() * static_cast<int64_t>(sizeof(T)))),
        own(static_cast<const T*>(f.x)), addend(static_cast<const T*>(f.addend)), total(static_cast<T*>(f.total)) {}

  void add(int64_t offset, int64_t n) const {  // before anything reads x there
    steps<T>(n, [&](int64_t i, auto cells) __attribute__((always_inline)) {
      cells.store(total + offset + i, cells.load(own + offset + i) + cells.load(addend + offset + i), false);
    });
  }
};
template <class T>
struct BackwardTensors {
  const T *x, *gy, *residual, *y, *passed;
  const uint8_t* mask;
  T *dx, *dresidual;
  bool streamed;
  explicit BackwardTensors(const Backward<Number>& f)
      : x(static_cast<const T*>(f.x)), gy(static_cast<const T*>(f.gy)), residual(static_cast<const T*>(f.residual)),
        y(static_cast<const T*>(f.y)), passed(static_cast<const T*>(f.passed)), mask(f.mask), dx(static_cast<T*>(f.dx)), dresidual(static_cast<T*>(f.dresidual)),
        streamed(!std::is_same_v<T, F16> && streams(f.plan.numel() * static_cast<int64_t>(sizeof(T)))) {}
};

// y of one run: z(first cell, cells) computes γ·x̂ + β of a step.
template <Loop loop, class T, class Z>
NORMSCOPE_INLINE void write_run(const Forward<Number>& f, const ForwardTensors<T>& t, int64_t offset, int64_t n, Z&& z_of) {
  T* y = t.y + offset;
  const bool streamed = t.streamed && whole_lines(y, n);
  const T* residual = t.residual ? t.residual + offset : nullptr;
  if constexpr (loop == Loop::any) {
    const uint8_t* mask = t.mask ? t.mask + offset : nullptr;
    alignas(64) Number z[kSegment];
    steps<T>(n, [&](int64_t i, auto cells) __attribute__((always_inline)) {
      W v = z_of(i, cells);
      if (residual) v += cells.load(residual + i);
      put(z + i, v);
    });
    kActivations[f.activation].map(z, padded(n));
    steps<T>(n, [&](int64_t i, auto cells) __attribute__((always_inline)) {
      const W v = get(z + i);
      cells.store(y + i, mask ? v & cells.mask(mask + i) : v, streamed);
    });
    return;
  }
  auto write = [&](auto past) __attribute__((always_inline)) {
    steps<T>(n, [&](int64_t i, auto cells) __attribute__((always_inline)) {
      W z = z_of(i, cells);
      if constexpr (loop == Loop::sum || loop == Loop::residual) z += cells.load(residual + i);
      if constexpr (loop == Loop::relu || loop == Loop::residual) z = relu(z);
      cells.store(y + i, z, past.value);
    });
  };
  streamed ? write(std::true_type{}) : write(std::false_type{});
}

// Deviation and gradient of z of some runs side by side, step by step: each(first cell, cells, visit), where visit(row, body)
// calls body(d, g); d_of(row, first cell, x) is x − high, and z_of(row, first cell, d) is z but for the residual.
template <Loop loop, int rows, class T, class D, class Z, class Each>
NORMSCOPE_INLINE void read_runs(const Backward<Number>& f, const BackwardTensors<T>& t, const int64_t* offsets, int64_t n, D&& d_of, Z&& z_of, Each&& each_step) {
  const T *x = t.x, *gy = t.gy, *residual = t.residual, *y = t.y;
  if constexpr (loop == Loop::any) {
    const uint8_t* mask = t.mask;
    // A masked cell may hold anything; 0·NaN is NaN, so both factors are cleared.
    auto masked = [&](int64_t at, auto cells, const T* p) __attribute__((always_inline)) {
      const W v = cells.load(p + at);
      return mask ? v & cells.mask(mask + at) : v;
    };
    alignas(64) Number z[kSegment], g[rows][kSegment];
    for (int r = 0; r < rows; ++r) {
      steps<T>(n, [&](int64_t i, auto cells) __attribute__((always_inline)) {
        const int64_t at = offsets[r] + i;
        W v;
        if (y) v = cells.load(y + at);
        else {
          v = z_of(r, i, d_of(r, i, masked(at, cells, x)));
          if (residual) v += masked(at, cells, residual);
        }
        put(z + i, v);
        put(g[r] + i, masked(at, cells, gy));
      });
      kActivations[f.activation].chain(z, g[r], padded(n));
    }
    steps<T>(n, [&](int64_t i, auto cells) __attribute__((always_inline)) {
      each_step(i, cells, [&](int r, auto&& body) __attribute__((always_inline)) { body(d_of(r, i, masked(offsets[r] + i, cells, x)), get(g[r] + i)); });
    });
    return;
  }
  steps<T>(n, [&](int64_t i, auto cells) __attribute__((always_inline)) {
    each_step(i, cells, [&](int r, auto&& body) __attribute__((always_inline)) {
      const int64_t at = offsets[r] + i;
      const W d = d_of(r, i, cells.load(x + at));
      W g = cells.load(gy + at);
      if constexpr (loop == Loop::relu) g = gate(g, z_of(r, i, d));
      if constexpr (loop == Loop::residual) g = gate(g, cells.load(y + at));
      body(d, g);
    });
  });
}

// The same of one run: each(first cell, cells, d, g).
template <Loop loop, class T, class D, class Z, class Each>
NORMSCOPE_INLINE void read_run(const Backward<Number>& f, const BackwardTensors<T>& t, int64_t offset, int64_t n, D&& d_of, Z&& z_of, Each&& each_step) {
  read_runs<loop, 1>(f, t, &offset, n, d_of, z_of, [&](int64_t i, auto cells, auto&& visit) __attribute__((always_inline)) {
    visit(0, [&](const W& d, const W& g) __attribute__((always_inline)) { each_step(i, cells, d, g); });
  });
}

// dx and the residual's gradient of one run: dx_of(first cell, d, g) computes dx of a step.
template <Loop loop, class T, class D, class Z, class Dx>
NORMSCOPE_INLINE void write_gradients(const Backward<Number>& f, const BackwardTensors<T>& t, int64_t offset, int64_t n, D&& d_of, Z&& z_of, Dx&& dx_of) {
  T *dx = t.dx ? t.dx + offset : nullptr, *dresidual = t.dresidual ? t.dresidual + offset : nullptr;
  const uint8_t* mask = t.mask ? t.mask + offset : nullptr;
  const bool streamed = t.streamed && dx && !t.passed && whole_lines(dx, n);
  auto write = [&](auto past) __attribute__((always_inline)) {
    read_run<loop>(f, t, offset, n, d_of, z_of, [=](int64_t i, auto cells, const W& d, const W& g) __attribute__((always_inline)) {
      if constexpr (loop == Loop::any) {
        if (dresidual) cells.store(dresidual + i, g, false);
        if (!dx) return;
        const W v = dx_of(i, d, g);
        cells.store(dx + i, mask ? v & cells.mask(mask + i) : v, streamed);
      } else {
        if constexpr (loop == Loop::residual) cells.store(dresidual + i, g, false);
        cells.store(dx + i, dx_of(i, d, g), past.value);
      }
    });
  };
  if (loop != Loop::any && streamed) write(std::true_type{});
  else write(std::false_type{});
  if (dx && t.passed)
    steps<T>(n, [&](int64_t i, auto cells) __attribute__((always_inline)) {
      cells.store(dx + i, cells.load(dx + i) + cells.load(t.passed + offset + i), false);
    });
}

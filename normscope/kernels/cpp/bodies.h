// The bodies: {statistics, apply, backward reduce, backward apply} × {along, across}, compiled once per instruction set.
//
// Work is cut into blocks by shape alone, never by thread, and block sums are added in order: results do not depend on
// the number of threads. Sums run in float lanes over at most a block, then in double. The mean travels as high + low.

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "plan.h"

namespace normscope {
namespace NORMSCOPE_ISA_NAMESPACE {
namespace {

#include "elementary.h"

constexpr int64_t kSegment = 2048;    // cells per inner loop: 8 KB, three of them in L1
constexpr int64_t kBlockRows = 128;   // rows of an across block that are summed in float
constexpr int kLanes = 32;

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free>;

template <class T>
Buffer<T> buffer(int64_t count) {  // 64-byte aligned: vectors never straddle cache lines
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
  std::memset(b.get(), 0, static_cast<size_t>(count) * sizeof(T));
  return b;
}

struct BF16 {
  uint16_t bits;
};

// n cells as float: float itself is read in place.
inline const float* load(const float* p, int64_t, float*) { return p; }
inline const float* load(const BF16* p, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t wide = static_cast<uint32_t>(p[i].bits) << 16;
    std::memcpy(out + i, &wide, 4);
  }
  return out;
}
// Where to compute n cells of output, and how to put them there.
inline float* target(float* p, float*) { return p; }
inline float* target(BF16*, float* scratch) { return scratch; }
inline void store(float*, const float*, int64_t) {}
inline void store(BF16* p, const float* v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, v + i, 4);
    const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);  // to nearest, ties to even
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    p[i].bits = static_cast<uint16_t>(nan ? (bits >> 16) | 0x40u : rounded >> 16);
  }
}

template <class F>
void map(float* __restrict z, int64_t n) {
  for (int64_t i = 0; i < n; ++i) z[i] = F::value(z[i]);
}
template <class F>
void chain(const float* __restrict z, float* __restrict g, int64_t n) {
  for (int64_t i = 0; i < n; ++i) g[i] *= F::slope(z[i]);
}

struct Function {
  void (*map)(float* z, int64_t n);                     // z ← f(z)
  void (*chain)(const float* z, float* g, int64_t n);   // g ← g · f′(z)
};

// In the order of `FUSED` in cpu.py; the first is no activation.
constexpr Function kActivations[] = {
    {nullptr, nullptr},
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

void activate(int64_t activation, float* z, int64_t n) {
  if (activation) kActivations[activation].map(z, n);
}
void differentiate(int64_t activation, const float* z, float* g, int64_t n) { kActivations[activation].chain(z, g, n); }

struct Sums {
  double first = 0, second = 0;
  void operator+=(const Sums& o) { first += o.first; second += o.second; }
};

inline Sums horizontal(const float* a, const float* b) {
  Sums s;
  for (int j = 0; j < kLanes; ++j) s.first += a[j], s.second += b[j];
  return s;
}

// Σ(x − shift), Σ(x − shift)², in two levels: where the data lie on a grid, the roundings of one long float sum all point
// the same way (2.6e-7 of the variance after 64 terms); after 8 terms and 8 sums they do not show.
Sums sum_squares(const float* __restrict x, int64_t n, float shift) {
  alignas(64) float a[kLanes] = {}, b[kLanes] = {};
  int64_t i = 0;
  for (; i + 8 * kLanes <= n; i += 8 * kLanes) {
    alignas(64) float first[kLanes] = {}, second[kLanes] = {};
    for (int u = 0; u < 8; ++u)
      for (int j = 0; j < kLanes; ++j) {
        const float d = x[i + u * kLanes + j] - shift;
        first[j] += d;
        second[j] += d * d;
      }
    for (int j = 0; j < kLanes; ++j) a[j] += first[j], b[j] += second[j];
  }
  for (; i + kLanes <= n; i += kLanes)
    for (int j = 0; j < kLanes; ++j) {
      const float d = x[i + j] - shift;
      a[j] += d;
      b[j] += d * d;
    }
  for (int j = 0; i < n; ++i, ++j) {
    const float d = x[i] - shift;
    a[j] += d;
    b[j] += d * d;
  }
  return horizontal(a, b);
}

// Σg, Σg·(x − shift).
Sums sum_products(const float* __restrict g, const float* __restrict x, int64_t n, float shift) {
  alignas(64) float a[kLanes] = {}, b[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int j = 0; j < kLanes; ++j) {
      a[j] += g[i + j];
      b[j] += g[i + j] * (x[i + j] - shift);
    }
  for (int j = 0; i < n; ++i, ++j) {
    a[j] += g[i];
    b[j] += g[i] * (x[i] - shift);
  }
  return horizontal(a, b);
}

struct Moments {
  float high, low, var, rstd;
};

Moments moments(double mean, double var, double eps, bool scale) {
  var = var < 0 ? 0 : var;  // NaN passes
  const float high = static_cast<float>(mean);
  const float low = std::isfinite(high) ? static_cast<float>(mean - high) : 0.f;
  return {high, low, static_cast<float>(var), scale ? static_cast<float>(1 / std::sqrt(var + eps)) : 1.f};
}

// A first guess of the mean that lies outside by many σ costs digits of the variance: sum again from the mean found.
bool off_centre(double mean, double square) { return mean * mean > 4 * (square - mean * mean); }

// ------------------------------------------------------------------------------------------------------------ along

template <class T>
struct Along {
  const Plan& p;
  int64_t rows = p.row_count(), segments = (p.length + kSegment - 1) / kSegment, pieces = rows * segments;
  int64_t per_block = std::max<int64_t>(1, 32 * kSegment / std::min(p.length, kSegment));
  int64_t blocks = (pieces + per_block - 1) / per_block;

  // body(offset in x, first j, cells, offset of the row's parameter) for each piece of a block.
  template <class F>
  void block(int64_t b, F&& body) const {
    const int64_t end = std::min(pieces, (b + 1) * per_block);
    for (int64_t i = b * per_block; i < end; ++i) {
      const Axis row = p.row(i / segments);
      const int64_t j = (i % segments) * kSegment;
      body(row.stride + j, j, std::min(kSegment, p.length - j), row.param);
    }
  }

  Sums block_squares(const T* x, int64_t b, float shift, float* scratch) const {
    Sums sums;
    block(b, [&](int64_t offset, int64_t, int64_t n, int64_t) {
      sums += sum_squares(load(x + offset, n, scratch), n, shift);
    });
    return sums;
  }

  float guess(const T* x, float* scratch) const {
    const int64_t n = std::min<int64_t>(p.length, 64);
    const Sums s = sum_squares(load(x, n, scratch), n, 0);
    return static_cast<float>(s.first / static_cast<double>(n));
  }
};

// Runs body(task, block) so that a task whose slab stays in cache is finished by one thread, and a large one is shared.
template <class Statistics, class Finish, class Apply>
void sweep(const Plan& p, int64_t tasks, int64_t blocks, int64_t cells, bool statistics, Statistics& stat,
           Finish& finish, Apply& apply) {
  if (p.fused(tasks, cells)) {
    auto body = [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        if (statistics)
          for (int64_t b = 0; b < blocks; ++b) stat(t, b);
        finish(t);
        for (int64_t b = 0; b < blocks; ++b) apply(t, b);
      }
    };
    parallel_for(tasks, std::max<int64_t>(1, kGrain / std::max<int64_t>(cells, 1)), body);
    return;
  }
  const int64_t grain = std::max<int64_t>(1, kGrain * blocks / std::max<int64_t>(cells, 1));
  auto first = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) stat(i / blocks, i % blocks);
  };
  auto middle = [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) finish(t);
  };
  auto last = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) apply(i / blocks, i % blocks);
  };
  if (statistics) parallel_for(tasks * blocks, grain, first);
  parallel_for(tasks, 1, middle);
  parallel_for(tasks * blocks, grain, last);
}

struct Line {  // z = (x − high)·factor + shift, then ·weight + bias where the parameters vary along the run
  float high, factor, shift;
};

Line line(float high, float low, float rstd, bool center, float weight, float bias) {
  const float factor = rstd * weight;
  return {center ? high : 0.f, factor, (center ? -low * factor : 0.f) + bias};
}

void affine(const float* __restrict x, float* __restrict z, int64_t n, const Line& l, const float* __restrict weight,
            const float* __restrict bias) {
  if (!weight && !bias) {
    for (int64_t i = 0; i < n; ++i) z[i] = (x[i] - l.high) * l.factor + l.shift;
  } else if (weight && bias) {
    for (int64_t i = 0; i < n; ++i) z[i] = ((x[i] - l.high) * l.factor + l.shift) * weight[i] + bias[i];
  } else if (weight) {
    for (int64_t i = 0; i < n; ++i) z[i] = ((x[i] - l.high) * l.factor + l.shift) * weight[i];
  } else {
    for (int64_t i = 0; i < n; ++i) z[i] = (x[i] - l.high) * l.factor + l.shift + bias[i];
  }
}

template <class T>
void add(const T* residual, float* __restrict z, int64_t n, float* scratch) {
  if (!residual) return;
  const float* __restrict r = load(residual, n, scratch);
  for (int64_t i = 0; i < n; ++i) z[i] += r[i];
}

template <class T>
void forward_along(const Forward& f) {
  const Plan& p = f.plan;
  const Along<T> along{p};
  const int64_t tasks = p.task_count(), cells = p.cells();
  const T *x = static_cast<const T*>(f.x), *residual = static_cast<const T*>(f.residual);
  T* y = static_cast<T*>(f.y);
  const bool inner = p.param_inner;
  auto partial = buffer<Sums>(f.given ? 0 : tasks * along.blocks);
  auto shifts = buffer<float>(tasks);

  auto statistics = [&](int64_t t, int64_t b) {
    alignas(64) float scratch[kSegment];
    const T* base = x + p.task(t).stride;
    const float shift = f.center ? along.guess(base, scratch) : 0.f;
    if (b == 0) shifts[t] = shift;
    partial[t * along.blocks + b] = along.block_squares(base, b, shift, scratch);
  };
  auto total = [&](int64_t t) {
    Sums s;
    for (int64_t b = 0; b < along.blocks; ++b) s += partial[t * along.blocks + b];
    return Sums{s.first / static_cast<double>(cells), s.second / static_cast<double>(cells)};
  };
  auto finish = [&](int64_t t) {
    Moments m;
    if (f.given) {
      m = moments(f.high[t], f.var[t], f.eps, f.scale);
    } else {
      Sums s = total(t);
      double shift = shifts[t];
      if (f.center && off_centre(s.first, s.second)) {
        alignas(64) float scratch[kSegment];
        shift = static_cast<float>(shift + s.first);
        for (int64_t b = 0; b < along.blocks; ++b)
          partial[t * along.blocks + b] =
              along.block_squares(x + p.task(t).stride, b, static_cast<float>(shift), scratch);
        s = total(t);
      }
      m = f.center ? moments(shift + s.first, s.second - s.first * s.first, f.eps, f.scale)
                   : moments(0, s.second, f.eps, f.scale);
      f.high[t] = m.high;
      f.var[t] = m.var;
    }
    f.low[t] = m.low;
    f.rstd[t] = m.rstd;
  };
  auto apply = [&](int64_t t, int64_t b) {
    alignas(64) float in[kSegment], out[kSegment];
    const Axis task = p.task(t);
    along.block(b, [&](int64_t offset, int64_t j, int64_t n, int64_t row) {
      offset += task.stride;
      const int64_t at = task.param + row;
      const bool constant = !inner;
      const Line l = line(f.high[t], f.low[t], f.rstd[t], f.center, constant && f.weight ? f.weight[at] : 1.f,
                          constant && f.bias ? f.bias[at] : 0.f);
      float* z = target(y + offset, out);
      affine(load(x + offset, n, in), z, n, l, inner && f.weight ? f.weight + at + j : nullptr,
             inner && f.bias ? f.bias + at + j : nullptr);
      add(residual ? residual + offset : nullptr, z, n, in);
      activate(f.activation, z, n);
      store(y + offset, z, n);
    });
  };
  sweep(p, tasks, along.blocks, cells, !f.given, statistics, finish, apply);
}

// The gradient of z in g, and x, of n cells; z is recomputed where the activation needs it.
template <class T>
struct Upstream {
  const Backward& f;
  alignas(64) float xs[kSegment], gs[kSegment], zs[kSegment], rs[kSegment];
  const float *x, *g;

  template <class Z>  // z_of(x, z) computes γ·x̂ + β
  void read(int64_t offset, int64_t n, Z&& z_of) {
    x = load(static_cast<const T*>(f.x) + offset, n, xs);
    g = load(static_cast<const T*>(f.gy) + offset, n, gs);
    if (!f.activation) return;
    z_of(x, zs);
    add(f.residual ? static_cast<const T*>(f.residual) + offset : nullptr, zs, n, rs);
    if (g != gs) std::memcpy(gs, g, static_cast<size_t>(n) * sizeof(float));
    differentiate(f.activation, zs, gs, n);
    g = gs;
  }
  explicit Upstream(const Backward& b) : f(b) {}
};

struct Slope {  // dx = g·a + (x − high)·b + c; a without the weight where that varies along the run
  float a, b, c;
};

Slope slope(const Backward& f, int64_t set, double set_g, double set_gx, double cells) {
  const double rstd = f.rstd[set];
  if (f.fixed) return {f.rstd[set], 0, 0};
  const double b = f.scale ? -set_gx / cells * rstd * rstd : 0;
  const double c = f.center ? -set_g / cells * rstd - b * f.low[set] : 0;
  return {f.rstd[set], static_cast<float>(b), static_cast<float>(c)};
}

void slope_apply(const float* __restrict g, const float* __restrict x, float* __restrict dx, int64_t n, float high,
                 const Slope& s, const float* __restrict weight) {
  if (weight) {
    for (int64_t i = 0; i < n; ++i) dx[i] = g[i] * weight[i] * s.a + ((x[i] - high) * s.b + s.c);
  } else {
    for (int64_t i = 0; i < n; ++i) dx[i] = g[i] * s.a + ((x[i] - high) * s.b + s.c);
  }
}

// Partial gradients of the parameters, added up in order at the end.
struct ParamSums {
  int64_t units, size;
  Buffer<float> weight, bias;
  ParamSums(int64_t u, int64_t n, bool on) : units(on ? u : 0), size(n) {
    weight = zeros<float>(units * size);
    bias = zeros<float>(units * size);
  }
  template <class Base>
  void into(const Backward& f, int64_t params, Base&& base) const {
    if (!units) return;
    auto w = zeros<double>(params), b = zeros<double>(params);
    for (int64_t u = 0; u < units; ++u) {
      const int64_t at = base(u), n = std::min(size, params - at);
      for (int64_t j = 0; j < n; ++j) {
        w[at + j] += weight[u * size + j];
        b[at + j] += bias[u * size + j];
      }
    }
    for (int64_t j = 0; j < params; ++j) {
      if (f.dweight) f.dweight[j] = static_cast<float>(w[j]);
      if (f.dbias) f.dbias[j] = static_cast<float>(b[j]);
    }
  }
};

template <class T>
void write_residual(const Backward& f, int64_t offset, const float* g, int64_t n) {
  if (!f.dresidual) return;
  T* out = static_cast<T*>(f.dresidual) + offset;
  if constexpr (sizeof(T) == 4)
    std::memcpy(out, g, static_cast<size_t>(n) * sizeof(float));
  else
    store(out, g, n);
}

template <class T>
void backward_along(const Backward& f) {
  const Plan& p = f.plan;
  const Along<T> along{p};
  const int64_t tasks = p.task_count(), cells = p.cells();
  const bool inner = p.param_inner, params = f.dweight || f.dbias;
  T* dx = static_cast<T*>(f.dx);
  // One accumulator per task would be as large as x where the parameters vary along the run: tasks share by groups.
  const int64_t group = p.tasks_share_params() && along.blocks == 1 ? std::max<int64_t>(1, (tasks + 63) / 64) : 1;
  const int64_t groups = (tasks + group - 1) / group;
  // Blocks of one row touch different parameters; blocks of several rows need an accumulator each.
  const int64_t per_task = inner && along.rows == 1 ? 1 : along.blocks;
  ParamSums sums(groups * per_task, p.params_per_task(), params);
  auto partial = buffer<Sums>(tasks * along.blocks);

  auto lines = [&](int64_t t, int64_t at) {
    const bool constant = !inner;
    return line(f.high[t], f.low[t], f.rstd[t], f.center, constant && f.weight ? f.weight[at] : 1.f,
                constant && f.bias ? f.bias[at] : 0.f);
  };
  auto reduce = [&](int64_t t, int64_t b) {
    Upstream<T> up(f);
    const Axis task = p.task(t);
    const float high = f.center ? f.high[t] : 0.f, low = f.center ? f.low[t] : 0.f, rstd = f.rstd[t];
    const int64_t unit = (t / group) * per_task + (per_task == 1 ? 0 : b);
    float *dw = params ? sums.weight.get() + unit * sums.size : nullptr;
    float *db = params ? sums.bias.get() + unit * sums.size : nullptr;
    Sums set;
    along.block(b, [&](int64_t offset, int64_t j, int64_t n, int64_t row) {
      const int64_t at = task.param + row;
      const float *w = inner && f.weight ? f.weight + at + j : nullptr, *bias = inner && f.bias ? f.bias + at + j : nullptr;
      up.read(offset + task.stride, n, [&](const float* v, float* z) { affine(v, z, n, lines(t, at), w, bias); });
      const float *__restrict g = up.g, *__restrict x = up.x;
      if (inner) {
        const float c = -low * rstd;
        float *__restrict pw = dw ? dw + row + j : nullptr, *__restrict pb = db ? db + row + j : nullptr;
        if (pw)
          for (int64_t i = 0; i < n; ++i) {
            pw[i] += g[i] * ((x[i] - high) * rstd + c);
            pb[i] += g[i];
          }
        if (w) {
          for (int64_t i = 0; i < n; ++i) up.zs[i] = g[i] * w[i];
          g = up.zs;
        }
        const Sums s = sum_products(g, x, n, high);
        set += Sums{s.first, (s.second - low * s.first) * rstd};
      } else {
        const Sums s = sum_products(g, x, n, high);
        const double gx = (s.second - low * s.first) * rstd, weight = f.weight ? f.weight[at] : 1.0;
        if (dw) dw[row] += static_cast<float>(gx), db[row] += static_cast<float>(s.first);
        set += Sums{s.first * weight, gx * weight};
      }
    });
    partial[t * along.blocks + b] = set;
  };
  auto slopes = buffer<Slope>(tasks);
  auto finish = [&](int64_t t) {
    Sums s;
    for (int64_t b = 0; b < along.blocks; ++b) s += partial[t * along.blocks + b];
    slopes[t] = slope(f, t, s.first, s.second, static_cast<double>(cells));
  };
  auto apply = [&](int64_t t, int64_t b) {
    Upstream<T> up(f);
    alignas(64) float out[kSegment];
    const Axis task = p.task(t);
    along.block(b, [&](int64_t offset, int64_t j, int64_t n, int64_t row) {
      const int64_t at = task.param + row;
      const float *w = inner && f.weight ? f.weight + at + j : nullptr, *bias = inner && f.bias ? f.bias + at + j : nullptr;
      offset += task.stride;
      up.read(offset, n, [&](const float* v, float* z) { affine(v, z, n, lines(t, at), w, bias); });
      write_residual<T>(f, offset, up.g, n);
      if (!dx) return;
      Slope s = slopes[t];
      if (!inner && f.weight) s.a *= f.weight[at];
      float* to = target(dx + offset, out);
      slope_apply(up.g, up.x, to, n, f.center ? f.high[t] : 0.f, s, w);
      store(dx + offset, to, n);
    });
  };
  const bool second = dx || f.dresidual;
  auto nothing = [](int64_t, int64_t) {};
  if (group == 1) {
    if (second) sweep(p, tasks, along.blocks, cells, true, reduce, finish, apply);
    else sweep(p, tasks, along.blocks, cells, true, reduce, finish, nothing);
  } else {  // whole groups, so that two threads never add to one accumulator
    auto body = [&](int64_t begin, int64_t end) {
      for (int64_t t = begin * group; t < std::min(tasks, end * group); ++t) {
        reduce(t, 0);
        finish(t);
        if (second) apply(t, 0);
      }
    };
    parallel_for(groups, std::max<int64_t>(1, kGrain / std::max<int64_t>(cells * group, 1)), body);
  }
  sums.into(f, p.param_count(), [&](int64_t unit) { return p.task(unit / per_task * group).param; });
}

// ----------------------------------------------------------------------------------------------------------- across

struct Across {
  const Plan& p;
  int64_t rows = p.row_count();
  int64_t tile = p.tile(), tiles = p.tiles(), blocks = (rows + kBlockRows - 1) / kBlockRows;
  int64_t units = p.task_count() * tiles;  // independent slabs: a task's columns, tile by tile

  int64_t first(int64_t u) const { return (u % tiles) * tile; }
  int64_t width(int64_t u) const { return std::min(tile, p.length - first(u)); }
  int64_t set(int64_t u) const { return u / tiles * p.sets_per_task() + first(u) / p.fold; }
  int64_t column_param(int64_t k) const { return k / p.fold * p.param_outer + k % p.fold * p.param_inner; }

  template <class F>
  void block(int64_t u, int64_t b, F&& body) const {  // body(offset in x, offset of the row's parameter)
    const int64_t base = p.task(u / tiles).stride + first(u), end = std::min(rows, (b + 1) * kBlockRows);
    for (int64_t r = b * kBlockRows; r < end; ++r) {
      const Axis row = p.row(r);
      body(base + row.stride, row.param);
    }
  }
};

template <class T>
void column_squares(const Across& a, const T* x, int64_t u, int64_t b, const float* __restrict shift,
                    double* __restrict out) {
  alignas(64) float scratch[kSegment], first[kSegment] = {}, second[kSegment] = {};
  const int64_t n = a.width(u);
  std::fill(out, out + n, 0.0);
  std::fill(out + a.tile, out + a.tile + n, 0.0);
  int64_t rows = 0;
  auto flush = [&] {
    for (int64_t k = 0; k < n; ++k) out[k] += first[k], out[a.tile + k] += second[k];
    std::fill(first, first + n, 0.f);
    std::fill(second, second + n, 0.f);
  };
  a.block(u, b, [&](int64_t offset, int64_t) {
    const float* __restrict v = load(x + offset, n, scratch);
    for (int64_t k = 0; k < n; ++k) {
      const float d = v[k] - shift[k];
      first[k] += d;
      second[k] += d * d;
    }
    if (++rows % 16 == 0) flush();  // in two levels, as sum_squares
  });
  flush();
}

template <class T>
void column_guess(const Across& a, const T* x, int64_t u, float* __restrict shift) {
  alignas(64) float scratch[kSegment];
  const int64_t n = a.width(u), rows = std::min<int64_t>(a.rows, 16), base = a.p.task(u / a.tiles).stride + a.first(u);
  std::fill(shift, shift + n, 0.f);
  for (int64_t r = 0; r < rows; ++r) {
    const float* __restrict v = load(x + base + a.p.row(r).stride, n, scratch);
    for (int64_t k = 0; k < n; ++k) shift[k] += v[k];
  }
  for (int64_t k = 0; k < n; ++k) shift[k] /= static_cast<float>(rows);
}

struct Columns {  // per column: z = (x − high)·factor + shift
  Buffer<float> high, factor, shift;
  explicit Columns(int64_t n) : high(buffer<float>(n)), factor(buffer<float>(n)), shift(buffer<float>(n)) {}
};

template <class F>
void fill_columns(const F& f, const Across& a, int64_t u, float* high, float* factor, float* shift) {
  const Plan& p = f.plan;
  const int64_t base = p.task(u / a.tiles).param, n = a.width(u);
  for (int64_t k = 0; k < n; ++k) {
    const int64_t set = a.set(u) + k / p.fold, at = base + a.column_param(a.first(u) + k);
    const bool own = !p.row_params();
    const Line l = line(f.high[set], f.low[set], f.rstd[set], f.center, own && f.weight ? f.weight[at] : 1.f,
                        own && f.bias ? f.bias[at] : 0.f);
    high[k] = l.high, factor[k] = l.factor, shift[k] = l.shift;
  }
}

void affine_columns(const float* __restrict x, float* __restrict z, int64_t n, const float* __restrict high,
                    const float* __restrict factor, const float* __restrict shift, bool row, float weight, float bias) {
  if (row) {
    for (int64_t k = 0; k < n; ++k) z[k] = ((x[k] - high[k]) * factor[k] + shift[k]) * weight + bias;
  } else {
    for (int64_t k = 0; k < n; ++k) z[k] = (x[k] - high[k]) * factor[k] + shift[k];
  }
}

template <class T>
void forward_across(const Forward& f) {
  const Plan& p = f.plan;
  const Across a{p};
  const T *x = static_cast<const T*>(f.x), *residual = static_cast<const T*>(f.residual);
  T* y = static_cast<T*>(f.y);
  const bool row = p.row_params();
  auto partial = buffer<double>(f.given ? 0 : a.units * a.blocks * 2 * a.tile);
  auto shifts = buffer<float>(a.units * a.tile);
  Columns columns(a.units * a.tile);
  auto at = [&](int64_t u, int64_t b) { return partial.get() + (u * a.blocks + b) * 2 * a.tile; };

  auto statistics = [&](int64_t u, int64_t b) {
    alignas(64) float shift[kSegment] = {};
    if (f.center) column_guess(a, x, u, shift);
    if (b == 0) std::copy(shift, shift + a.width(u), shifts.get() + u * a.tile);
    column_squares(a, x, u, b, shift, at(u, b));
  };
  auto finish = [&](int64_t u) {
    const int64_t n = a.width(u);
    alignas(64) double first[kSegment], second[kSegment];
    float* shift = shifts.get() + u * a.tile;
    auto total = [&] {
      std::fill(first, first + n, 0.0);
      std::fill(second, second + n, 0.0);
      for (int64_t b = 0; b < a.blocks; ++b) {
        const double* s = at(u, b);
        for (int64_t k = 0; k < n; ++k) first[k] += s[k], second[k] += s[a.tile + k];
      }
      for (int64_t k = 0; k < n; ++k) {
        first[k] /= static_cast<double>(a.rows);
        second[k] /= static_cast<double>(a.rows);
      }
    };
    if (!f.given) {
      total();
      bool again = false;
      for (int64_t k = 0; k < n && f.center; ++k) again |= off_centre(first[k], second[k]);
      if (again) {
        for (int64_t k = 0; k < n; ++k) shift[k] = static_cast<float>(shift[k] + first[k]);
        for (int64_t b = 0; b < a.blocks; ++b) column_squares(a, x, u, b, shift, at(u, b));
        total();
      }
    }
    for (int64_t k = 0; k < n; k += p.fold) {
      const int64_t set = a.set(u) + k / p.fold;
      Moments m;
      if (f.given) {
        m = moments(f.high[set], f.var[set], f.eps, f.scale);
      } else {
        // Columns of one set: the mean of their means, the variances and the spread of the means.
        double mean = 0, var = 0;
        for (int64_t i = k; i < k + p.fold; ++i) mean += f.center ? shift[i] + first[i] : 0.0;
        mean /= static_cast<double>(p.fold);
        for (int64_t i = k; i < k + p.fold; ++i) {
          const double off = f.center ? shift[i] + first[i] - mean : 0.0;
          var += f.center ? second[i] - first[i] * first[i] + off * off : second[i];
        }
        m = moments(mean, var / static_cast<double>(p.fold), f.eps, f.scale);
        f.high[set] = m.high;
        f.var[set] = m.var;
      }
      f.low[set] = m.low;
      f.rstd[set] = m.rstd;
    }
    fill_columns(f, a, u, columns.high.get() + u * a.tile, columns.factor.get() + u * a.tile,
                 columns.shift.get() + u * a.tile);
  };
  auto apply = [&](int64_t u, int64_t b) {
    alignas(64) float in[kSegment], out[kSegment];
    const int64_t n = a.width(u), base = p.task(u / a.tiles).param, c = u * a.tile;
    a.block(u, b, [&](int64_t offset, int64_t param) {
      float* z = target(y + offset, out);
      affine_columns(load(x + offset, n, in), z, n, columns.high.get() + c, columns.factor.get() + c,
                     columns.shift.get() + c, row, row && f.weight ? f.weight[base + param] : 1.f,
                     row && f.bias ? f.bias[base + param] : 0.f);
      add(residual ? residual + offset : nullptr, z, n, in);
      activate(f.activation, z, n);
      store(y + offset, z, n);
    });
  };
  sweep(p, a.units, a.blocks, a.rows * a.tile, !f.given, statistics, finish, apply);
}

template <class T>
void backward_across(const Backward& f) {
  const Plan& p = f.plan;
  const Across a{p};
  const bool row = p.row_params(), params = f.dweight || f.dbias;
  T* dx = static_cast<T*>(f.dx);
  Columns columns(a.units * a.tile);
  auto slope_a = buffer<float>(a.units * a.tile), slope_b = buffer<float>(a.units * a.tile),
       slope_c = buffer<float>(a.units * a.tile);
  auto partial = buffer<double>(a.units * a.blocks * 2 * a.tile);
  // Two blocks of one slab may touch the same parameter, so each has an accumulator of its own.
  ParamSums sums(a.units * (row ? a.blocks : 1), p.params_per_task(), params);
  auto at = [&](int64_t u, int64_t b) { return partial.get() + (u * a.blocks + b) * 2 * a.tile; };
  for (int64_t u = 0; u < a.units; ++u)
    fill_columns(f, a, u, columns.high.get() + u * a.tile, columns.factor.get() + u * a.tile,
                 columns.shift.get() + u * a.tile);

  auto reduce = [&](int64_t u, int64_t b) {
    Upstream<T> up(f);
    alignas(64) float first[kSegment] = {}, second[kSegment] = {}, weighted[kSegment];
    const int64_t n = a.width(u), base = p.task(u / a.tiles).param;
    const float *high = columns.high.get() + u * a.tile, *factor = columns.factor.get() + u * a.tile,
                *shift = columns.shift.get() + u * a.tile;
    a.block(u, b, [&](int64_t offset, int64_t param) {
      const float weight = row && f.weight ? f.weight[base + param] : 1.f;
      const float bias = row && f.bias ? f.bias[base + param] : 0.f;
      up.read(offset, n, [&](const float* v, float* z) { affine_columns(v, z, n, high, factor, shift, row, weight, bias); });
      const float *__restrict g = up.g, *__restrict x = up.x;
      if (row) {
        if (params) {
          for (int64_t k = 0; k < n; ++k) weighted[k] = (x[k] - high[k]) * factor[k] + shift[k];  // x̂
          const Sums s = sum_products(g, weighted, n, 0);
          const int64_t unit = u * a.blocks + b;
          sums.weight[unit * sums.size + param] += static_cast<float>(s.second);
          sums.bias[unit * sums.size + param] += static_cast<float>(s.first);
        }
        for (int64_t k = 0; k < n; ++k) weighted[k] = g[k] * weight;
        g = weighted;
      }
      for (int64_t k = 0; k < n; ++k) {
        first[k] += g[k];
        second[k] += g[k] * (x[k] - high[k]);
      }
    });
    double* out = at(u, b);
    for (int64_t k = 0; k < n; ++k) out[k] = first[k], out[a.tile + k] = second[k];
  };
  auto finish = [&](int64_t u) {
    const int64_t n = a.width(u), base = p.task(u / a.tiles).param;
    for (int64_t k = 0; k < n; k += p.fold) {
      const int64_t set = a.set(u) + k / p.fold;
      const double low = f.center ? f.low[set] : 0, rstd = f.rstd[set];
      double set_g = 0, set_gx = 0;
      for (int64_t i = k; i < k + p.fold; ++i) {
        double g = 0, gd = 0;
        for (int64_t b = 0; b < a.blocks; ++b) g += at(u, b)[i], gd += at(u, b)[a.tile + i];
        const double gx = (gd - low * g) * rstd;
        const int64_t column = a.column_param(a.first(u) + i);
        const double weight = !row && f.weight ? f.weight[base + column] : 1.0;
        if (!row && params) {
          sums.weight[u * sums.size + column] += static_cast<float>(gx);
          sums.bias[u * sums.size + column] += static_cast<float>(g);
        }
        set_g += g * weight;
        set_gx += gx * weight;
      }
      const Slope s = slope(f, set, set_g, set_gx, static_cast<double>(p.cells()));
      for (int64_t i = k; i < k + p.fold; ++i) {
        const int64_t column = a.column_param(a.first(u) + i);
        slope_a[u * a.tile + i] = s.a * (!row && f.weight ? f.weight[base + column] : 1.f);
        slope_b[u * a.tile + i] = s.b;
        slope_c[u * a.tile + i] = s.c;
      }
    }
  };
  auto apply = [&](int64_t u, int64_t b) {
    Upstream<T> up(f);
    alignas(64) float out[kSegment];
    const int64_t n = a.width(u), base = p.task(u / a.tiles).param, c = u * a.tile;
    const float *high = columns.high.get() + c;
    const float *__restrict sa = slope_a.get() + c, *__restrict sb = slope_b.get() + c, *__restrict sc = slope_c.get() + c;
    a.block(u, b, [&](int64_t offset, int64_t param) {
      const float weight = row && f.weight ? f.weight[base + param] : 1.f;
      const float bias = row && f.bias ? f.bias[base + param] : 0.f;
      up.read(offset, n, [&](const float* v, float* z) {
        affine_columns(v, z, n, high, columns.factor.get() + c, columns.shift.get() + c, row, weight, bias);
      });
      write_residual<T>(f, offset, up.g, n);
      if (!dx) return;
      const float *__restrict g = up.g, *__restrict x = up.x;
      float* __restrict to = target(dx + offset, out);
      for (int64_t k = 0; k < n; ++k) to[k] = g[k] * weight * sa[k] + ((x[k] - high[k]) * sb[k] + sc[k]);
      store(dx + offset, to, n);
    });
  };
  sweep(p, a.units, a.blocks, a.rows * a.tile, true, reduce, finish, apply);
  const int64_t per_slab = row ? a.blocks : 1;
  sums.into(f, p.param_count(), [&](int64_t unit) { return p.task(unit / per_slab / a.tiles).param; });
}

template <class T>
void forward(const Forward& f) {
  f.plan.across ? forward_across<T>(f) : forward_along<T>(f);
}

template <class T>
void backward(const Backward& f) {
  f.plan.across ? backward_across<T>(f) : backward_along<T>(f);
}

}  // namespace
}  // namespace NORMSCOPE_ISA_NAMESPACE

const Kernels& NORMSCOPE_ISA_TABLE() {
  using namespace NORMSCOPE_ISA_NAMESPACE;
  static const Kernels table = {{forward<float>, forward<BF16>}, {backward<float>, backward<BF16>}};
  return table;
}

}  // namespace normscope

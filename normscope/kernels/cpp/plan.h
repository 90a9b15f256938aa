// What a kernel knows: the order of the loops and where sets and parameters change. Never the name of a normalizer.
//
// A dense tensor is a nest of axes in memory order. Each axis lies inside or outside the scope S, and the parameters
// (weight, bias) vary along it or not. The innermost axis decides the loop order:
//
//   along   it lies inside S: a set is `rows` runs of `length` contiguous cells
//   across  it lies outside S: `length` neighbours belong to `length / fold` different sets
//
// The axes further out are rows (inside S) or tasks (outside S). Tasks share nothing but parameters.
#pragma once

#include <cmath>
#include <cstdint>

namespace normscope {

struct Axis {
  int64_t size, stride, param;  // stride in elements of x, param in elements of weight
};

constexpr int64_t kGrain = 1 << 15;       // cells below which a second thread costs more than it brings
constexpr int64_t kSetCells = 96;         // as many cells take as long as what a set costs beside them
constexpr int64_t kStreamFrom = 4 << 20;  // bytes from which an output is written past the caches

struct Plan {
  bool across;
  int64_t length;
  int64_t fold;                      // across: neighbouring columns that fold into one set
  int64_t param_outer, param_inner;  // index of the parameter: along, j·inner; across, k/fold·outer + k%fold·inner
  Axis rows[2], tasks[3];

  int64_t row_count() const { return rows[0].size * rows[1].size; }
  int64_t task_count() const { return tasks[0].size * tasks[1].size * tasks[2].size; }
  int64_t cells() const { return row_count() * (across ? fold : length); }
  int64_t sets_per_task() const { return across ? length / fold : 1; }
  bool row_params() const { return rows[0].param || rows[1].param; }
  bool inner_params() const { return param_outer || param_inner; }

  Axis row(int64_t r) const {  // stride and param hold the offsets of row r
    if (rows[0].size == 1) return {1, r * rows[1].stride, r * rows[1].param};  // without divisions
    const int64_t outer = r / rows[1].size, inner = r % rows[1].size;
    return {1, outer * rows[0].stride + inner * rows[1].stride, outer * rows[0].param + inner * rows[1].param};
  }
  Axis task(int64_t t) const {
    if (tasks[0].size == 1 && tasks[1].size == 1) return {1, t * tasks[2].stride, t * tasks[2].param};
    const int64_t c = t % tasks[2].size, ab = t / tasks[2].size, b = ab % tasks[1].size, a = ab / tasks[1].size;
    return {1, a * tasks[0].stride + b * tasks[1].stride + c * tasks[2].stride,
            a * tasks[0].param + b * tasks[1].param + c * tasks[2].param};
  }
  // How many parameters lie between the first and the last that one task touches, plus one.
  int64_t params_per_task() const {
    int64_t last = (rows[0].size - 1) * rows[0].param + (rows[1].size - 1) * rows[1].param;
    last += across ? (length / fold - 1) * param_outer + (fold - 1) * param_inner : (length - 1) * param_inner;
    return last + 1;
  }
  // Whether a slab, the cells that one thread sweeps twice, stays in its cache in between (1 MB): memory is then read
  // once. Few large slabs are shared among the threads instead.
  bool fused(int64_t slabs, int64_t slab_cells) const {
    return slab_cells <= (1 << 18) && (slabs >= 8 || slab_cells * slabs <= kGrain);
  }
  bool fused() const { return across ? fused(task_count() * tiles(), row_count() * tile()) : fused(task_count(), cells()); }
  // Columns that are swept together: whole sets, and whole steps of 32 where few sets make some (a 7x7 map: 32 of them);
  // a ragged end of each row costs 10 to 18 %.
  int64_t tile() const {
    int64_t sets = 512 / fold > 1 ? 512 / fold : 1;
    for (int64_t even = 32; even >= 1; even /= 2)
      if (fold % even == 0) {
        const int64_t step = 32 / even;
        if (step * fold <= 2048) sets = (sets + step - 1) / step * step;
        break;
      }
    return length < sets * fold ? length : sets * fold;
  }
  // The same sets, where runs that lie end to end are one: for sums over cells, which know no parameters.
  Plan joined() const {
    Plan p = *this;
    if (!across && rows[1].stride == length) p.length *= rows[1].size, p.rows[1] = {1, 0, 0};
    return p;
  }
  int64_t set_count() const { return task_count() * sets_per_task(); }
  int64_t numel() const { return task_count() * row_count() * length; }
  int64_t tiles() const { return (length + tile() - 1) / tile(); }
  int64_t param_count() const {
    int64_t last = params_per_task() - 1;
    for (const Axis& a : tasks) last += (a.size - 1) * a.param;
    return last + 1;
  }
  bool tasks_share_params() const { return !(tasks[0].param || tasks[1].param || tasks[2].param); }
};

constexpr int64_t kActivationCount = 13;  // none, then the table in bodies.h

// Number: what weights, biases and statistics are, and what is computed in; double for Number64, else Number.
template <class Number>
struct Forward {
  Plan plan;
  const void *x, *residual;          // residual may be null
  void* y;
  const uint8_t* mask;               // of x's layout, not 0 where a cell counts; may be null
  const Number *weight, *bias;        // may be null
  Number *high, *low, *var, *rstd, *count;  // one number per set, in memory order of the axes outside S
  bool given;                        // high and var hold given moments; else all five are written
  bool center, scale;
  double eps;
  int64_t activation;
  const void* addend = nullptr;      // along: x + addend is normalized, and left in total
  void* total = nullptr;
};

template <class Number>
struct Backward {
  Plan plan;
  const void *gy, *x, *residual, *y;  // y: a ReLU's gate where its z is not to be computed again; may be null
  void *dx, *dresidual;              // either may be null
  const uint8_t* mask;
  const Number *weight, *bias, *high, *low, *rstd, *count;
  Number *dweight, *dbias;            // may be null
  bool fixed, center, scale;         // fixed: the moments do not depend on x
  int64_t activation;
  const void* passed = nullptr;      // the gradient that reaches x past the normalization; may be null
};

// running ← (1 − momentum)·running + momentum·batch, the variance with the correction m/(m − 1) of a centred one.
template <class Number>
void move(const Number* statistics, Number* mean, Number* var, int64_t sets, double momentum, double correction, bool skip_nonfinite) {
  const Number weight = static_cast<Number>(momentum), scale = static_cast<Number>(correction);
  for (int64_t i = 0; i < sets; ++i) {
    const Number batch = statistics[i] + statistics[sets + i], spread = statistics[2 * sets + i] * scale;
    if (skip_nonfinite && !std::isfinite(batch + spread)) continue;  // an exponential average never loses infinity again
    mean[i] += weight * (batch - mean[i]);
    var[i] += weight * (spread - var[i]);
  }
}

// One table per instruction set; dtype 0 is float32, 1 bfloat16, 2 float16.
struct Kernels {
  void (*forward[3])(const Forward<float>&);
  void (*backward[3])(const Backward<float>&);
  void (*forward_double)(const Forward<double>&);
  void (*backward_double)(const Backward<double>&);
  void run(size_t dtype, const Forward<float>& f) const { forward[dtype](f); }
  void run(size_t dtype, const Backward<float>& f) const { backward[dtype](f); }
  void run(size_t, const Forward<double>& f) const { forward_double(f); }
  void run(size_t, const Backward<double>& f) const { backward_double(f); }
};

// torch's thread pool, handed in so that the bodies need no header of torch.
using Range = void (*)(int64_t begin, int64_t end, void* context);
void parallel(int64_t count, int64_t grain, Range range, void* context);

template <class F>
void parallel_for(int64_t count, int64_t grain, F& body) {
  parallel(count, grain, [](int64_t b, int64_t e, void* c) { (*static_cast<F*>(c))(b, e); }, &body);
}

const Kernels& kernels_baseline();
const Kernels& kernels_v3();
const Kernels& kernels_v4();

}  // namespace normscope

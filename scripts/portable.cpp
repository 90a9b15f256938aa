// The baseline bodies on a machine that need have neither Python nor torch: `make portable`.
//
// Forward against the formula written out in double; backward by one derivative along a random direction of all inputs,
// taken from that formula by central differences. Every loop order, dtype and activation, ragged sizes.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <numeric>
#include <random>
#include <vector>

#include "plan.h"

namespace normscope {
void parallel(int64_t count, int64_t, Range range, void* context) { range(0, count, context); }
}  // namespace normscope

using namespace normscope;
using Doubles = std::vector<double>;

namespace {

const double kEps = 1e-5;
std::mt19937_64 engine(0);

Doubles random(int64_t n, double scale = 1, double shift = 0) {
  std::normal_distribution<double> normal(shift, scale);
  Doubles v(static_cast<size_t>(n));
  for (double& x : v) x = normal(engine);
  return v;
}

double activated(int64_t activation, double z) {
  const double e = std::exp(-std::fabs(z)), sigmoid = z < 0 ? e / (1 + e) : 1 / (1 + e);
  const double clipped = std::fmin(std::fmax(z + 3, 0), 6);
  switch (activation) {
    case 1: return std::fmax(z, 0);
    case 2: return std::fmin(std::fmax(z, 0), 6);
    case 3: return z > 0 ? z : 0.01 * z;
    case 4: return z > 0 ? z : std::expm1(z);
    case 5: return z * sigmoid;
    case 6: return 0.5 * z * (1 + std::erf(z / std::sqrt(2)));
    case 7: return 0.5 * z * (1 + std::tanh(std::sqrt(2 / M_PI) * (z + 0.044715 * z * z * z)));
    case 8: return z * std::tanh(std::log1p(std::exp(z)));
    case 9: return sigmoid;
    case 10: return std::tanh(z);
    case 11: return z * clipped / 6;
    case 12: return clipped / 6;
  }
  return z;
}

// f(cell, its set, its parameter) over the plan's loops.
template <class F>
void cells(const Plan& p, F&& f) {
  for (int64_t t = 0; t < p.task_count(); ++t)
    for (int64_t r = 0; r < p.row_count(); ++r) {
      const Axis task = p.task(t), row = p.row(r);
      for (int64_t i = 0; i < p.length; ++i) {
        const int64_t param = p.across ? i / p.fold * p.param_outer + i % p.fold * p.param_inner : i * p.param_inner;
        f(task.stride + row.stride + i, t * p.sets_per_task() + (p.across ? i / p.fold : 0), task.param + row.param + param);
      }
    }
}

struct Inputs {
  Doubles x, weight, bias, residual;
};

Doubles formula(const Plan& p, const Inputs& in, int64_t activation) {
  const size_t sets = static_cast<size_t>(p.set_count());
  Doubles count(sets), mean(sets), var(sets), y(in.x.size());
  cells(p, [&](int64_t at, int64_t set, int64_t) { count[set] += 1, mean[set] += in.x[at]; });
  for (size_t s = 0; s < sets; ++s) mean[s] /= count[s];
  cells(p, [&](int64_t at, int64_t set, int64_t) { var[set] += (in.x[at] - mean[set]) * (in.x[at] - mean[set]) / count[set]; });
  cells(p, [&](int64_t at, int64_t set, int64_t param) {
    const double scaled = (in.x[at] - mean[set]) / std::sqrt(var[set] + kEps);
    y[at] = activated(activation, scaled * in.weight[param] + in.bias[param] + in.residual[at]);
  });
  return y;
}

// Numbers as they are stored, and back: float32, bfloat16, float16 for numbers of ordinary size, and float64.
uint16_t narrowed(int dtype, double v) {
  float f = static_cast<float>(v);
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if (dtype == 1) return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size < 0x38800000) return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::lrint(std::fabs(v) * 0x1p24)));
  return static_cast<uint16_t>(sign | (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13);
}
double widened(int dtype, uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  if (dtype == 1) return f;
  const int exponent = half >> 10 & 31, fraction = half & 1023;
  const double size = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
  return half & 0x8000 ? -size : size;
}

constexpr int kDouble = 3;

struct Stored {
  int dtype;
  std::vector<float> single;
  std::vector<uint16_t> half;
  Doubles wide;
  Stored(int type, int64_t n) : dtype(type), single(type ? 0 : n), half(type == 1 || type == 2 ? n : 0), wide(type == kDouble ? n : 0) {}
  Stored(int type, Doubles& v) : Stored(type, static_cast<int64_t>(v.size())) {  // rounds the doubles, too
    for (size_t i = 0; i < v.size(); ++i)
      if (type == kDouble) wide[i] = v[i];
      else if (type) half[i] = narrowed(type, v[i]), v[i] = widened(type, half[i]);
      else single[i] = static_cast<float>(v[i]), v[i] = single[i];
  }
  void* data() {
    if (dtype == kDouble) return wide.data();
    return dtype ? static_cast<void*>(half.data()) : static_cast<void*>(single.data());
  }
  double at(size_t i) const { return dtype == kDouble ? wide[i] : dtype ? widened(dtype, half[i]) : single[i]; }
};

// Where the slope of an activation jumps, neither rounding nor the difference would be small. The residual moves z alone.
void away_from_kinks(Inputs& in, const Doubles& z) {
  for (size_t i = 0; i < z.size(); ++i)
    for (double kink : {-3.0, 0.0, 3.0, 6.0})
      if (std::fabs(z[i] - kink) < 0.02) in.residual[i] += 0.25;
}

double dot(const Doubles& a, const Doubles& b) { return std::inner_product(a.begin(), a.end(), b.begin(), 0.0); }

// The largest error of the forward pass and that of the derivative, each as a share of what rounding allows.
template <class Number>
double worst(const Plan& p, int dtype, int64_t activation) {
  const int64_t n = p.numel(), params = p.param_count(), sets = p.set_count();
  Inputs in{random(n, 2, 0.5), random(params), random(params), random(n)};
  Doubles gy = random(n);
  const int numbers = dtype == kDouble ? kDouble : 0;
  Stored x(dtype, in.x), weight(numbers, in.weight), bias(numbers, in.bias), g(dtype, gy);
  away_from_kinks(in, formula(p, in, 0));
  Stored residual(dtype, in.residual), y(dtype, n), dx(dtype, n), dresidual(dtype, n), dweight(numbers, params), dbias(numbers, params);
  std::vector<Number> s(static_cast<size_t>(5 * sets));
  Number *high = s.data(), *low = high + sets, *var = low + sets, *rstd = var + sets, *count = rstd + sets;
  auto *w = static_cast<Number*>(weight.data()), *b = static_cast<Number*>(bias.data());

  kernels_baseline().run(dtype, Forward<Number>{p, x.data(), residual.data(), y.data(), nullptr, w, b, high, low, var, rstd, count,
                                                false, true, true, kEps, activation});
  kernels_baseline().run(dtype, Backward<Number>{p, g.data(), x.data(), residual.data(), nullptr, dx.data(), dresidual.data(),
                                                 nullptr, w, b, high, low, rstd, count, static_cast<Number*>(dweight.data()),
                                                 static_cast<Number*>(dbias.data()), false, true, true, activation});

  const double last = dtype == kDouble ? 0x1p-53 : 0x1p-24;
  const double unit = dtype == kDouble ? last : dtype == 0 ? 0x1p-24 : dtype == 1 ? 0x1p-8 : 0x1p-11;  // half a unit of the last place
  const Doubles truth = formula(p, in, activation);
  const double terms = dtype == kDouble ? 1000 : 200;  // the formula errs as much: its sums are double, too
  double error = 0;
  for (size_t i = 0; i < truth.size(); ++i)
    error = std::fmax(error, std::fabs(y.at(i) - truth[i]) / (unit * std::fabs(truth[i]) + terms * last));

  const Inputs v{random(n), random(params), random(params), random(n)};
  const auto moved = [&](double h) {
    Inputs to = in;
    for (auto [field, way] : {std::pair{&to.x, &v.x}, {&to.weight, &v.weight}, {&to.bias, &v.bias}, {&to.residual, &v.residual}})
      for (size_t i = 0; i < field->size(); ++i) (*field)[i] += h * (*way)[i];
    return dot(gy, formula(p, to, activation));
  };
  const double h = 1e-6, expected = (moved(h) - moved(-h)) / (2 * h);
  double got = 0, squares = 0;
  for (auto [gradient, way] : {std::pair{&dx, &v.x}, {&dweight, &v.weight}, {&dbias, &v.bias}, {&dresidual, &v.residual}})
    for (size_t i = 0; i < way->size(); ++i) {
      got += gradient->at(i) * (*way)[i];
      squares += std::pow(gradient->at(i) * (*way)[i], 2);
    }
  // Independent roundings add up in squares; six times that, and what the difference itself errs by.
  return std::fmax(error, std::fabs(got - expected) / ((6 * unit + 1e-6) * std::sqrt(squares) + 1e-5));
}

}  // namespace

int main() {
  const Axis one{1, 0, 0};
  const auto plan = [&](bool across, int64_t length, int64_t fold, int64_t outer, int64_t inner, Axis row, Axis task, Axis also) {
    return Plan{across, length, fold, outer, inner, {one, row}, {one, also, task}};
  };
  const struct {
    const char* name;
    Plan plan;
  } cases[] = {
      {"along: BatchNorm of 5 × 3 × 2115", plan(false, 2115, 1, 0, 0, {5, 6345, 0}, {3, 2115, 1}, one)},
      {"along: GroupNorm of 2 × 24 × 323, 4 groups", plan(false, 323, 1, 0, 0, {6, 323, 1}, {4, 1938, 6}, {2, 7752, 0})},
      {"along: LayerNorm of 20 × 301", plan(false, 301, 1, 0, 1, one, {20, 301, 0}, one)},
      {"along: one run of 20001", plan(false, 20001, 1, 0, 1, one, one, one)},
      {"across: BatchNorm of 140 × 521", plan(true, 521, 1, 1, 0, {140, 521, 0}, one, one)},
      {"across: InstanceNorm of 3 × 137 × 19", plan(true, 19, 1, 1, 0, {137, 19, 0}, {3, 2603, 0}, one)},
      {"across: channels-first LayerNorm of 2 × 33 × 599", plan(true, 599, 1, 0, 0, {33, 599, 1}, {2, 19767, 0}, one)},
      {"folded: GroupNorm of 2 × 135 × 66, 6 groups", plan(true, 66, 11, 11, 1, {135, 66, 0}, {2, 8910, 0}, one)},
      {"folded: BatchNorm of 9 × 30 × 49", plan(true, 1470, 49, 1, 0, {9, 1470, 0}, one, one)},
  };
  int failed = 0, passed = 0;
  for (const auto& c : cases)
    for (int dtype = 0; dtype <= kDouble; ++dtype)
      for (int64_t activation = 0; activation < kActivationCount; ++activation) {
        const double share = dtype == kDouble ? worst<double>(c.plan, dtype, activation) : worst<float>(c.plan, dtype, activation);
        if (share <= 1) ++passed;
        else ++failed, std::printf("%s, dtype %d, activation %d: %.2g times what rounding allows\n", c.name, dtype, int(activation), share);
      }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed != 0;
}

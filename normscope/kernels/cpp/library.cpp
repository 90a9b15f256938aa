// The operators, through PyTorch's stable ABI: one shared object for every Python and every torch from 2.10 on.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <deque>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "plan.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

namespace normscope {

void parallel(int64_t count, int64_t grain, Range range, void* context) {
  if (count <= grain || torch::stable::get_num_threads() == 1) {
    range(0, count, context);
    return;
  }
  torch::stable::parallel_for(0, count, grain, [&](int64_t b, int64_t e) { range(b, e, context); });
}

namespace {

struct InstructionSet {
  const char* name;
  bool usable;
  const Kernels& (*table)();
};

// NORMSCOPE_ISA forces one, for tests; otherwise the widest that the processor has.
const InstructionSet& instruction_set() {
  static const InstructionSet chosen = [] {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const InstructionSet all[] = {{"avx512", v4, kernels_v4}, {"avx2", v3, kernels_v3}, {"baseline", true, kernels_baseline}};
#else
    const InstructionSet all[] = {{"baseline", true, kernels_baseline}};
#endif
    const char* wanted = std::getenv("NORMSCOPE_ISA");
    for (const InstructionSet& isa : all)
      if (isa.usable && (!wanted || !*wanted || std::string(wanted) == isa.name)) return isa;
    return all[sizeof(all) / sizeof(all[0]) - 1];
  }();
  return chosen;
}

int64_t isa_level() {
  const std::string name = instruction_set().name;
  return name == "avx512" ? 2 : name == "avx2" ? 1 : 0;
}

Plan read_plan(const std::vector<int64_t>& v) {
  STD_TORCH_CHECK(v.size() == 20, "a plan has 20 integers");
  Plan p;
  p.across = v[0];
  p.length = v[1];
  p.fold = v[2];
  p.param_outer = v[3];
  p.param_inner = v[4];
  Axis* axes[] = {&p.rows[0], &p.rows[1], &p.tasks[0], &p.tasks[1], &p.tasks[2]};
  for (int i = 0; i < 5; ++i) *axes[i] = {v[5 + 3 * i], v[6 + 3 * i], v[7 + 3 * i]};
  return p;
}

size_t dtype_of(const Tensor& x) {  // a place in the tables of what is computed in float
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "float64, float32, bfloat16 or float16 only");
  return type == ScalarType::Float ? 0 : type == ScalarType::BFloat16 ? 1 : 2;
}
bool is_double(const Tensor& x) { return x.scalar_type() == ScalarType::Double; }

// The stable API checks nothing: a tensor of another size or dtype would be read past its end.
void* data(const Tensor& t, const Tensor& x) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == x.scalar_type() && t.numel() == x.numel(), "a tensor does not match x");
  return t.data_ptr();
}
void* data(const Optional& t, const Tensor& x) { return t ? data(*t, x) : nullptr; }
const uint8_t* booleans(const Optional& t, const Tensor& x) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->is_cpu() && t->scalar_type() == ScalarType::Bool && t->numel() == x.numel(), "a mask does not match x");
  return static_cast<const uint8_t*>(t->data_ptr());
}
template <class Number>
Number* numbers(const Tensor& t, int64_t count) {
  const ScalarType type = sizeof(Number) == 8 ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == type && t.numel() == count && t.is_contiguous(),
                  "numbers must be contiguous, of the right count, and float64 for float64, else float32");
  return static_cast<Number*>(t.data_ptr());
}
template <class Number>
Number* numbers(const Optional& t, int64_t count) {
  return t ? numbers<Number>(*t, count) : nullptr;
}

int64_t activation_of(int64_t number) {
  STD_TORCH_CHECK(number >= 0 && number < kActivationCount, "no such activation");
  return number;
}

// Plans by number: a call hands over one integer instead of twenty.
std::mutex plans_mutex;
std::deque<Plan> plans;  // grows without moving what is there
std::map<std::vector<int64_t>, int64_t> plan_numbers;

int64_t plan_number(std::vector<int64_t> numbers) {
  const std::lock_guard<std::mutex> lock(plans_mutex);
  const auto [place, added] = plan_numbers.try_emplace(numbers, static_cast<int64_t>(plans.size()));
  if (added) plans.push_back(read_plan(numbers));
  return place->second;
}
Plan plan_of(int64_t number) {
  const std::lock_guard<std::mutex> lock(plans_mutex);
  STD_TORCH_CHECK(number >= 0 && number < static_cast<int64_t>(plans.size()), "no such plan");
  return plans[static_cast<size_t>(number)];
}

bool fused(int64_t plan) { return plan_of(plan).fused(); }

// Where autograd.cpp finds them: what it calls between two layers does not go through the dispatcher.
int64_t plan_address(int64_t number) {
  const std::lock_guard<std::mutex> lock(plans_mutex);
  STD_TORCH_CHECK(number >= 0 && number < static_cast<int64_t>(plans.size()), "no such plan");
  return reinterpret_cast<int64_t>(&plans[static_cast<size_t>(number)]);
}
int64_t kernels_address() { return reinterpret_cast<int64_t>(&instruction_set().table()); }

void check(const Plan& p, const Tensor& x) {
  STD_TORCH_CHECK(p.task_count() * p.row_count() * p.length == x.numel() && x.numel() > 0, "the plan does not match x");
}

// The numbers of a call in one integer: centre, scale, given moments that do not depend on x, activation.
struct Flags {
  bool center, scale, fixed;
  int64_t activation;
  explicit Flags(int64_t bits) : center(bits & 1), scale(bits & 2), fixed(bits & 4), activation(activation_of(bits >> 3)) {}
};

template <class Number>
void forward_in(const Tensor& x, const Optional& residual, const Optional& mask, const Tensor& y, const Optional& weight,
                const Optional& bias, const Optional& mean, const Optional& var, const Tensor& statistics, int64_t plan,
                int64_t bits, double eps) {
  const Flags flags(bits);
  Forward<Number> f;
  f.plan = plan_of(plan);
  check(f.plan, x);
  const int64_t sets = f.plan.set_count(), count = f.plan.param_count();
  Number* s = numbers<Number>(statistics, 5 * sets);
  f.x = data(x, x), f.residual = data(residual, x), f.y = data(y, x), f.mask = booleans(mask, x);
  f.weight = numbers<Number>(weight, count), f.bias = numbers<Number>(bias, count);
  f.high = s, f.low = s + sets, f.var = s + 2 * sets, f.rstd = s + 3 * sets, f.count = s + 4 * sets;
  f.given = flags.fixed, f.center = flags.center, f.scale = flags.scale, f.eps = eps, f.activation = flags.activation;
  if (f.given) {
    STD_TORCH_CHECK(mean && var, "given moments are a mean and a variance");
    std::copy_n(numbers<Number>(mean, sets), sets, f.high);
    std::copy_n(numbers<Number>(var, sets), sets, f.var);
  }
  instruction_set().table().run(sizeof(Number) == 8 ? 0 : dtype_of(x), f);
}

void forward(Tensor x, Optional residual, Optional mask, Tensor y, Optional weight, Optional bias, Optional mean, Optional var,
             Tensor statistics, int64_t plan, int64_t bits, double eps) {
  const auto in = is_double(x) ? forward_in<double> : forward_in<float>;
  in(x, residual, mask, y, weight, bias, mean, var, statistics, plan, bits, eps);
}

template <class Number>
void backward_in(const Tensor& gy, const Tensor& x, const Optional& residual, const Optional& y, const Optional& mask,
                 const Optional& dx, const Optional& dresidual, const Optional& weight, const Optional& bias,
                 const Tensor& statistics, const Optional& dweight, const Optional& dbias, int64_t plan, int64_t bits) {
  const Flags flags(bits);
  Backward<Number> f;
  f.plan = plan_of(plan);
  check(f.plan, x);
  const int64_t sets = f.plan.set_count(), count = f.plan.param_count();
  const Number* s = numbers<Number>(statistics, 5 * sets);
  f.gy = data(gy, x), f.x = data(x, x), f.residual = data(residual, x), f.y = data(y, x), f.mask = booleans(mask, x);
  f.dx = data(dx, x), f.dresidual = data(dresidual, x);
  f.weight = numbers<Number>(weight, count), f.bias = numbers<Number>(bias, count);
  f.dweight = numbers<Number>(dweight, count), f.dbias = numbers<Number>(dbias, count);
  f.high = s, f.low = s + sets, f.rstd = s + 3 * sets, f.count = s + 4 * sets;
  f.fixed = flags.fixed, f.center = flags.center, f.scale = flags.scale, f.activation = flags.activation;
  instruction_set().table().run(sizeof(Number) == 8 ? 0 : dtype_of(x), f);
}

void backward(Tensor gy, Tensor x, Optional residual, Optional y, Optional mask, Optional dx, Optional dresidual, Optional weight,
              Optional bias, Tensor statistics, Optional dweight, Optional dbias, int64_t plan, int64_t bits) {
  const auto in = is_double(x) ? backward_in<double> : backward_in<float>;
  in(gy, x, residual, y, mask, dx, dresidual, weight, bias, statistics, dweight, dbias, plan, bits);
}

template <class Number>
void update_in(const Tensor& statistics, const Tensor& mean, const Tensor& var, double momentum, double correction, bool skip_nonfinite) {
  const int64_t sets = mean.numel();
  move(numbers<Number>(statistics, 5 * sets), numbers<Number>(mean, sets), numbers<Number>(var, sets), sets, momentum, correction,
       skip_nonfinite);
}

void update(Tensor statistics, Tensor running_mean, Tensor running_var, double momentum, double correction, bool skip_nonfinite) {
  const auto in = is_double(statistics) ? update_in<double> : update_in<float>;
  in(statistics, running_mean, running_var, momentum, correction, skip_nonfinite);
}

}  // namespace
}  // namespace normscope

STABLE_TORCH_LIBRARY(normscope, m) {
  m.def(
      "forward(Tensor x, Tensor? residual, Tensor? mask, Tensor(a!) y, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, "
      "Tensor(b!) statistics, int plan, int flags, float eps) -> ()");
  m.def(
      "backward(Tensor gy, Tensor x, Tensor? residual, Tensor? y, Tensor? mask, Tensor(a!)? dx, Tensor(b!)? dresidual, "
      "Tensor? weight, Tensor? bias, Tensor statistics, Tensor(c!)? dweight, Tensor(d!)? dbias, int plan, int flags) -> ()");
  m.def(
      "update(Tensor statistics, Tensor(a!) running_mean, Tensor(b!) running_var, float momentum, float correction, "
      "bool skip_nonfinite) -> ()");
  m.def("plan(int[] numbers) -> int");
  m.def("fused(int plan) -> bool");
  m.def("isa() -> int");
  m.def("plan_address(int plan) -> int");
  m.def("kernels_address() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(normscope, CPU, m) {
  m.impl("forward", TORCH_BOX(&normscope::forward));
  m.impl("backward", TORCH_BOX(&normscope::backward));
  m.impl("update", TORCH_BOX(&normscope::update));
}

STABLE_TORCH_LIBRARY_IMPL(normscope, CompositeExplicitAutograd, m) {
  m.impl("plan", TORCH_BOX(&normscope::plan_number));
  m.impl("fused", TORCH_BOX(&normscope::fused));
  m.impl("isa", TORCH_BOX(&normscope::isa_level));
  m.impl("plan_address", TORCH_BOX(&normscope::plan_address));
  m.impl("kernels_address", TORCH_BOX(&normscope::kernels_address));
}

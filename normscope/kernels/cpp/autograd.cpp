// Autograd between the kernels without Python: one operator that normalizes and leaves a node for backward.
//
// PyTorch's stable ABI has no autograd, so this object, unlike the kernels, is built for one version of torch and is
// loaded by no other; without it the same steps are taken in Python (functional/compiled.py).

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <deque>
#include <map>
#include <mutex>
#include <string>
#include <tuple>

namespace normscope {
namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <class Signature>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

void run_forward(const Tensor& x, const Optional& residual, const Optional& mask, const Tensor& y, const Optional& weight,
                 const Optional& bias, const Optional& mean, const Optional& var, const Tensor& statistics, int64_t plan,
                 int64_t flags, double eps) {
  static const auto kernel =
      find<void(const Tensor&, const Optional&, const Optional&, const Tensor&, const Optional&, const Optional&,
                const Optional&, const Optional&, const Tensor&, int64_t, int64_t, double)>("normscope::forward");
  kernel.call(x, residual, mask, y, weight, bias, mean, var, statistics, plan, flags, eps);
}

void run_backward(const Tensor& gy, const Tensor& x, const Optional& residual, const Optional& y, const Optional& mask,
                  const Optional& dx, const Optional& dresidual, const Optional& weight, const Optional& bias,
                  const Tensor& statistics, const Optional& dweight, const Optional& dbias, int64_t plan, int64_t flags) {
  static const auto kernel =
      find<void(const Tensor&, const Tensor&, const Optional&, const Optional&, const Optional&, const Optional&,
                const Optional&, const Optional&, const Optional&, const Tensor&, const Optional&, const Optional&, int64_t,
                int64_t)>("normscope::backward");
  kernel.call(gy, x, residual, y, mask, dx, dresidual, weight, bias, statistics, dweight, dbias, plan, flags);
}

void run_update(const Tensor& statistics, const Tensor& mean, const Tensor& var, double momentum, double correction,
                bool skip_nonfinite) {
  static const auto kernel =
      find<void(const Tensor&, const Tensor&, const Tensor&, double, double, bool)>("normscope::update");
  kernel.call(statistics, mean, var, momentum, correction, skip_nonfinite);
}

// Contiguous float32, as the kernels read weights, biases and moments.
Optional numbers(const Optional& t) {
  if (!t) return t;
  return t->to(at::kFloat).contiguous();
}

// With x's dtype and strides.
Tensor like(const Tensor& t, const Tensor& x) {
  if (t.scalar_type() == x.scalar_type() && t.strides() == x.strides()) return t;
  return at::empty_like(x).copy_(t);
}
Optional like(const Optional& t, const Tensor& x) { return t ? Optional(like(*t, x)) : t; }

// How one formula is computed on tensors seen one way: known by a number, so that a call hands over one integer.
struct Recipe {
  int64_t plan, sets, flags;
  double eps, correction;
  std::string origin;  // from which Python finds view and formula again
  bool operator<(const Recipe& other) const {
    return std::tie(plan, sets, flags, eps, correction, origin) <
           std::tie(other.plan, other.sets, other.flags, other.eps, other.correction, other.origin);
  }
};

std::mutex recipes_mutex;
std::map<Recipe, int64_t> recipe_numbers;
std::deque<const Recipe*> recipes;

int64_t recipe_number(int64_t plan, int64_t sets, int64_t flags, double eps, double correction, c10::string_view origin) {
  const std::lock_guard<std::mutex> lock(recipes_mutex);
  const auto [place, added] = recipe_numbers.try_emplace({plan, sets, flags, eps, correction, std::string(origin)},
                                                         static_cast<int64_t>(recipes.size()));
  if (added) recipes.push_back(&place->first);
  return place->second;
}
const Recipe& recipe_of(int64_t number) {
  const std::lock_guard<std::mutex> lock(recipes_mutex);
  TORCH_CHECK(number >= 0 && number < static_cast<int64_t>(recipes.size()), "no such recipe");
  return *recipes[static_cast<size_t>(number)];
}

std::pair<Tensor, Tensor> normalize(const Tensor& x, const Optional& weight, const Optional& bias, const Optional& residual,
                                    const Optional& mask, const Optional& mean, const Optional& var, const Recipe& recipe) {
  at::AutoDispatchBelowADInplaceOrView below;
  const Tensor y = at::empty_like(x), statistics = at::empty({5, recipe.sets}, x.options().dtype(at::kFloat));
  run_forward(x, like(residual, x), mask, y, numbers(weight), numbers(bias), numbers(mean), numbers(var), statistics, recipe.plan,
              recipe.flags, recipe.eps);
  return {y, statistics};
}

constexpr int64_t kFixed = 4, kRelu = 1;

// Which tensors the node keeps, in the order in which they are saved.
enum Saved { kX, kWeight, kBias, kResidual, kMask, kY, kStatistics, kSavedCount };

class Normalize : public torch::autograd::Function<Normalize> {
 public:
  static variable_list forward(AutogradContext* context, const Tensor& x, const Optional& weight, const Optional& bias,
                               const Optional& residual, const Optional& mask, const Optional& mean, const Optional& var,
                               int64_t number) {
    const Recipe& recipe = recipe_of(number);
    const auto [y, statistics] = normalize(x, weight, bias, residual, mask, mean, var, recipe);
    // A residual serves only to compute z again; for the gate of a ReLU y does, which the next layer keeps anyway.
    // (float16 has one kind of loop for all activations, which reads z.)
    const int64_t activation = recipe.flags >> 3;
    const bool gated = residual && activation == kRelu && x.scalar_type() != at::kHalf;
    variable_list saved(kSavedCount);
    saved[kX] = x, saved[kWeight] = weight.value_or(Tensor()), saved[kBias] = bias.value_or(Tensor());
    if (residual && activation && !gated) saved[kResidual] = *residual;
    if (gated) saved[kY] = y;
    saved[kMask] = mask.value_or(Tensor()), saved[kStatistics] = statistics;
    context->save_for_backward(std::move(saved));
    context->set_materialize_grads(false);
    context->mark_non_differentiable({statistics});
    context->saved_data["recipe"] = number;
    context->saved_data["residual"] = residual.has_value();
    return {y, statistics};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    variable_list found(8);  // one per argument of forward
    if (!grads[0].defined()) return found;
    const variable_list saved = context->get_saved_variables();  // once: checkpoints allow no more
    const bool has_weight = saved[kWeight].defined(), has_bias = saved[kBias].defined();
    size_t edge = 0;
    const bool x = context->needs_input_grad(edge++);
    const bool weight = has_weight && context->needs_input_grad(edge++);
    const bool bias = has_bias && context->needs_input_grad(edge++);
    const bool residual = context->saved_data["residual"].toBool() && context->needs_input_grad(edge++);
    const std::array<bool, 4> needs = {x, weight, bias, residual};
    const Recipe& recipe = recipe_of(context->saved_data["recipe"].toInt());
    if (at::GradMode::is_enabled())  // under create_graph the gradient itself must be differentiable
      differentiable(grads[0], saved, recipe, needs, found);
    else
      compute(grads[0], saved, recipe, needs, found);
    return found;
  }

 private:
  static Optional given(const Tensor& t) { return t.defined() ? Optional(t) : std::nullopt; }

  static void compute(const Tensor& gy, const variable_list& saved, const Recipe& recipe, const std::array<bool, 4>& needs,
                      variable_list& found) {
    at::AutoDispatchBelowADInplaceOrView below;
    const Tensor& x = saved[kX];
    const Optional weight = numbers(given(saved[kWeight])), bias = numbers(given(saved[kBias]));
    Optional dx, dresidual, dweight, dbias;
    if (needs[0]) dx = at::empty_like(x);
    if (needs[3]) dresidual = at::empty_like(x);
    if ((needs[1] || needs[2]) && weight) dweight = at::empty_like(*weight);
    if ((needs[1] || needs[2]) && bias) dbias = at::empty_like(*bias);
    run_backward(like(gy, x), x, like(given(saved[kResidual]), x), given(saved[kY]), given(saved[kMask]), dx, dresidual, weight,
                 bias, saved[kStatistics], dweight, dbias, recipe.plan, recipe.flags);
    if (dx) found[0] = *dx;
    if (needs[1]) found[1] = dweight->view(saved[kWeight].sizes()).to(saved[kWeight].scalar_type());
    if (needs[2]) found[2] = dbias->view(saved[kBias].sizes()).to(saved[kBias].scalar_type());
    if (dresidual) found[3] = *dresidual;
  }

  // In Python, with torch operators.
  static void differentiable(const Tensor& gy, const variable_list& saved, const Recipe& recipe,
                             const std::array<bool, 4>& needs, variable_list& found) {
    static const auto python = find<std::vector<Tensor>(const Tensor&, const Tensor&, const Optional&, const Optional&,
                                                        const Optional&, const Optional&, const Optional&, const Tensor&,
                                                        c10::string_view, bool, std::array<bool, 4>)>("normscope::gradients");
    const std::vector<Tensor> all =
        python.call(gy, saved[kX], given(saved[kWeight]), given(saved[kBias]), given(saved[kResidual]), given(saved[kMask]),
                    given(saved[kY]), saved[kStatistics], recipe.origin, (recipe.flags & kFixed) != 0, needs);
    for (size_t i = 0, k = 0; i < needs.size(); ++i)
      if (needs[i]) found[i] = all[k++];
  }
};

std::tuple<Tensor, Tensor> normalize_and_track(const Tensor& x, const Optional& weight, const Optional& bias,
                                               const Optional& residual, const Optional& mask, const Optional& mean,
                                               const Optional& var, const Optional& running_mean, const Optional& running_var,
                                               double momentum, bool skip_nonfinite, int64_t number) {
  const Recipe& recipe = recipe_of(number);
  Tensor y, statistics;
  if (at::GradMode::is_enabled()) {
    variable_list both = Normalize::apply(x, weight, bias, residual, mask, mean, var, number);
    y = both[0], statistics = both[1];
  } else {
    std::tie(y, statistics) = normalize(x, weight, bias, residual, mask, mean, var, recipe);
  }
  if (running_mean && running_var) {
    run_update(statistics, *running_mean, *running_var, momentum, recipe.correction, skip_nonfinite);
    running_mean->unsafeGetTensorImpl()->bump_version();
    running_var->unsafeGetTensorImpl()->bump_version();
  }
  return {y, statistics};
}

}  // namespace
}  // namespace normscope

TORCH_LIBRARY_FRAGMENT(normscope, m) {
  m.def("recipe(int plan, int sets, int flags, float eps, float correction, str origin) -> int", &normscope::recipe_number);
  m.def(
      "normalize(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mask, Tensor? mean, Tensor? var, "
      "Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum, bool skip_nonfinite, int recipe) "
      "-> (Tensor, Tensor)",
      &normscope::normalize_and_track);
}

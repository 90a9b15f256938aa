// Autograd between the kernels without Python: one operator that normalizes and leaves a node for backward.
//
// PyTorch's stable ABI has no autograd, so this object, unlike the kernels, is built for one version of torch and is
// loaded by no other; without it the same steps are taken in Python (functional/compiled.py).

#include <ATen/EmptyTensor.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <deque>
#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

#include "plan.h"

namespace normscope {
namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

template <class Signature>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// What the kernels compute tensors like x in.
at::ScalarType numbers_of(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// Contiguous, as the kernels read weights, biases and moments.
Optional as_numbers(const Optional& t, const Tensor& x) {
  if (!t) return t;
  return t->to(numbers_of(x)).contiguous();
}

// Past the dispatcher: x is dense, and nothing watches.
Tensor fresh(const Tensor& x) { return at::detail::empty_strided_cpu(x.sizes(), x.strides(), x.options()); }
Tensor fresh_numbers(at::IntArrayRef sizes, const Tensor& x) { return at::detail::empty_cpu(sizes, at::TensorOptions(numbers_of(x))); }

// With x's dtype and strides.
Tensor like(const Tensor& t, const Tensor& x) {
  if (t.scalar_type() == x.scalar_type() && t.strides() == x.strides()) return t;
  return at::empty_like(x).copy_(t);
}
Optional like(const Optional& t, const Tensor& x) { return t ? Optional(like(*t, x)) : t; }

// How one formula is computed on tensors seen one way: known by a number, so that a call hands over one integer.
struct Recipe {
  const Plan* plan;
  int64_t sets, flags;
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

const Kernels& kernels() {
  static const auto* found = reinterpret_cast<const Kernels*>(find<int64_t()>("normscope::kernels_address").call());
  return *found;
}

int64_t recipe_number(int64_t number, int64_t sets, int64_t flags, double eps, double correction, c10::string_view origin) {
  const auto* plan = reinterpret_cast<const Plan*>(find<int64_t(int64_t)>("normscope::plan_address").call(number));
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

// The memory of tensors of x's strides and of numbers; the kernels check nothing.
template <class Cell = void>
Cell* data(const Optional& t, const Tensor& x) {
  if (!t) return nullptr;
  TORCH_CHECK(t->is_cpu() && t->numel() == x.numel(), "a tensor does not match x");
  return static_cast<Cell*>(t->data_ptr());
}
template <class Number>
Number* numbers(const Optional& t, int64_t count) {
  if (!t) return nullptr;
  TORCH_CHECK(t->is_cpu() && t->numel() == count && t->element_size() == sizeof(Number), "numbers do not match the plan");
  return static_cast<Number*>(t->data_ptr());
}
size_t dtype_of(const Tensor& x) {
  const at::ScalarType type = x.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf, "float64, float32, bfloat16 or float16 only");
  return type == at::kFloat ? 0 : type == at::kBFloat16 ? 1 : 2;
}

// f with a number of the kind that x is computed in.
template <class F>
auto in_numbers_of(const Tensor& x, F&& f) {
  return x.scalar_type() == at::kDouble ? f(double{}) : f(float{});
}

template <class Pass>
void common(Pass& pass, const Recipe& recipe, const Tensor& x) {
  pass.plan = *recipe.plan;
  pass.center = recipe.flags & 1, pass.scale = recipe.flags & 2, pass.activation = recipe.flags >> 3;
  TORCH_CHECK(x.is_cpu() && pass.plan.numel() == x.numel(), "the plan does not match x");
}

template <class Number>
std::pair<Tensor, Tensor> normalize(const Tensor& x, const Optional& weight, const Optional& bias, const Optional& residual,
                                    const Optional& mask, const Optional& mean, const Optional& var, const Recipe& recipe,
                                    const Optional& addend = std::nullopt, const Optional& total = std::nullopt) {
  at::AutoDispatchBelowADInplaceOrView below;
  Tensor y = fresh(x), statistics = fresh_numbers({5, recipe.sets}, x);
  const Optional w = as_numbers(weight, x), b = as_numbers(bias, x), m = as_numbers(mean, x), v = as_numbers(var, x);
  const Optional r = like(residual, x);
  Forward<Number> f;
  common(f, recipe, x);
  const int64_t sets = recipe.sets, count = f.plan.param_count();
  TORCH_CHECK(sets == f.plan.set_count() && m.has_value() == v.has_value(), "the recipe does not match the plan");
  Number* s = numbers<Number>(statistics, 5 * sets);
  f.x = x.data_ptr(), f.residual = data(r, x), f.y = y.data_ptr(), f.mask = data<uint8_t>(mask, x);
  f.weight = numbers<Number>(w, count), f.bias = numbers<Number>(b, count);
  f.high = s, f.low = s + sets, f.var = s + 2 * sets, f.rstd = s + 3 * sets, f.count = s + 4 * sets;
  f.given = m.has_value(), f.eps = recipe.eps;
  if (f.given) {
    std::copy_n(numbers<Number>(m, sets), sets, f.high);
    std::copy_n(numbers<Number>(v, sets), sets, f.var);
  }
  f.addend = data(addend, x), f.total = data(total, x);
  kernels().run(sizeof(Number) == 8 ? 0 : dtype_of(x), f);
  return {y, statistics};
}

constexpr int64_t kFixed = 4, kRelu = 1;

// Which tensors the node keeps.
enum Saved { kX, kWeight, kBias, kResidual, kMask, kY, kStatistics, kSavedCount };
// Whose gradients it computes, the edges of its graph: x, weight, bias, residual; and what was added to x, as x's.
constexpr size_t kEdges = 4, kAddend = 4;

// Nodes count their references themselves from some version of torch on.
template <class Node>
auto made() {
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, Node>) return c10::make_intrusive<Node>();
  else return std::shared_ptr<Node>(new Node, [](Node* node) { deleteNode(node); });
}

class Normalize : public torch::autograd::Node {
 public:
  // The node behind y; torch's own node, not its `Function`, which costs 8 us more in a small layer.
  static void follow(Tensor& y, const Tensor& x, const Optional& weight, const Optional& bias, const Optional& residual,
                     const Optional& mask, const Tensor& statistics, const Recipe& recipe,
                     const Optional& addend = std::nullopt, Optional total = std::nullopt) {
    auto node = made<Normalize>();
    node->set_next_edges(addend ? torch::autograd::collect_next_edges(x, weight, bias, residual, *addend)
                                : torch::autograd::collect_next_edges(x, weight, bias, residual));
    node->recipe_ = &recipe;
    torch::autograd::set_history(y, node);
    if (total) torch::autograd::set_history(*total, node);
    node->sum_ = total.has_value();
    auto keep = [&](Saved place, const Tensor& t) { node->saved_[place] = SavedVariable(t, place == kY || (place == kX && total)); };
    keep(kX, total ? *total : x), keep(kStatistics, statistics);
    if (weight) keep(kWeight, *weight);
    if (bias) keep(kBias, *bias);
    if (mask) keep(kMask, *mask);
    // A residual serves only to compute z again; for the gate of a ReLU y does, which the next layer keeps anyway.
    // (float16 and float64 have one kind of loop for all activations, which reads z.)
    const int64_t activation = recipe.flags >> 3;
    const bool one_loop = x.scalar_type() == at::kHalf || x.scalar_type() == at::kDouble;
    if (residual && activation == kRelu && !one_loop) keep(kY, y);
    else if (residual && activation) keep(kResidual, *residual);
  }

  std::string name() const override { return "NormalizeBackward"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable& t : saved_) t.reset_data();
  }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    variable_list found(sum_ ? kEdges + 1 : kEdges);
    const Tensor passed = sum_ ? grads[1] : Tensor();
    if (!grads[0].defined()) {
      if (sum_) found[0] = found[kAddend] = passed;
      return found;
    }
    Tensors saved;  // unpacked once: checkpoints allow no more
    for (size_t i = 0; i < kSavedCount; ++i) saved[i] = saved_[i].unpack(i == kY || (i == kX && sum_) ? getptr() : nullptr);
    std::array<bool, kEdges> needs;
    for (size_t i = 0; i < kEdges; ++i) needs[i] = task_should_compute_output(i);
    if (sum_) needs[0] = needs[0] || task_should_compute_output(kAddend);
    // Under create_graph the gradient itself must be differentiable; and a batch of gradients is no plain memory.
    if (at::GradMode::is_enabled() || at::isTensorSubclassLike(grads[0]) || (passed.defined() && at::isTensorSubclassLike(passed))) {
      differentiable(grads[0], saved, *recipe_, needs, found);
      if (needs[0] && passed.defined()) found[0] = at::add(found[0], passed);
    } else {
      in_numbers_of(saved[kX], [&](auto number) { compute<decltype(number)>(grads[0], passed, saved, *recipe_, needs, found); });
    }
    if (sum_) found[kAddend] = found[0];
    return found;
  }

 private:
  using Tensors = std::array<Tensor, kSavedCount>;
  std::array<SavedVariable, kSavedCount> saved_;
  const Recipe* recipe_ = nullptr;
  bool sum_ = false;  // x is a sum, and the node's second output

  static Optional given(const Tensor& t) { return t.defined() ? Optional(t) : std::nullopt; }
  static Tensor as(const Tensor& numbers, const Tensor& t) {
    return numbers.scalar_type() == t.scalar_type() && numbers.sizes() == t.sizes() ? numbers : numbers.view(t.sizes()).to(t.scalar_type());
  }

  template <class Number>
  static void compute(const Tensor& gy, const Tensor& passed, const Tensors& saved, const Recipe& recipe, const std::array<bool, kEdges>& needs,
                      variable_list& found) {
    at::AutoDispatchBelowADInplaceOrView below;
    const Tensor& x = saved[kX];
    const Optional weight = as_numbers(given(saved[kWeight]), x), bias = as_numbers(given(saved[kBias]), x);
    const Optional residual = like(given(saved[kResidual]), x), g = like(gy, x), past = like(given(passed), x);
    Optional dx, dresidual, dweight, dbias;
    if (needs[0]) dx = fresh(x);
    if (needs[3]) dresidual = fresh(x);
    if ((needs[1] || needs[2]) && weight) dweight = fresh_numbers(weight->sizes(), x);
    if ((needs[1] || needs[2]) && bias) dbias = fresh_numbers(bias->sizes(), x);
    Backward<Number> f;
    common(f, recipe, x);
    const int64_t sets = recipe.sets, count = f.plan.param_count();
    const Number* s = numbers<Number>(saved[kStatistics], 5 * sets);
    f.gy = data(g, x), f.x = x.data_ptr(), f.residual = data(residual, x), f.y = data(given(saved[kY]), x);
    f.mask = data<uint8_t>(given(saved[kMask]), x), f.dx = data(dx, x), f.dresidual = data(dresidual, x);
    f.weight = numbers<Number>(weight, count), f.bias = numbers<Number>(bias, count);
    f.dweight = numbers<Number>(dweight, count), f.dbias = numbers<Number>(dbias, count);
    f.high = s, f.low = s + sets, f.rstd = s + 3 * sets, f.count = s + 4 * sets, f.fixed = recipe.flags & kFixed;
    f.passed = data(past, x);
    kernels().run(sizeof(Number) == 8 ? 0 : dtype_of(x), f);
    if (dx) found[0] = std::move(*dx);
    if (needs[1]) found[1] = as(*dweight, saved[kWeight]);
    if (needs[2]) found[2] = as(*dbias, saved[kBias]);
    if (dresidual) found[3] = std::move(*dresidual);
  }

  // In Python, with torch operators.
  static void differentiable(const Tensor& gy, const Tensors& saved, const Recipe& recipe,
                             const std::array<bool, kEdges>& needs, variable_list& found) {
    static const auto python = find<std::vector<Tensor>(const Tensor&, const Tensor&, const Optional&, const Optional&,
                                                        const Optional&, const Optional&, const Optional&, const Tensor&,
                                                        c10::string_view, bool, std::array<bool, kEdges>)>("normscope::gradients");
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
  auto [y, statistics] = in_numbers_of(x, [&](auto number) {
    return normalize<decltype(number)>(x, weight, bias, residual, mask, mean, var, recipe);
  });
  if (torch::autograd::compute_requires_grad(x, weight, bias, residual))
    Normalize::follow(y, x, weight, bias, residual, mask, statistics, recipe);
  if (running_mean && running_var) {
    in_numbers_of(x, [&, &statistics = statistics](auto number) {
      using Number = decltype(number);
      move(numbers<Number>(statistics, 5 * recipe.sets), numbers<Number>(running_mean, recipe.sets),
           numbers<Number>(running_var, recipe.sets), recipe.sets, momentum, recipe.correction, skip_nonfinite);
    });
    running_mean->unsafeGetTensorImpl()->bump_version();
    running_var->unsafeGetTensorImpl()->bump_version();
  }
  return {y, statistics};
}

// What a call with the same arguments but for its tensors has led to before. Python's checks and its search for a recipe
// cost 60 to 150 µs where the tensor has emptied the caches; sizes, strides and dtype that have passed them pass again.
struct Way {
  int64_t recipe;
  bool tracked, given;  // the running statistics are moved, or stand in for the batch's
};
struct Known {
  std::vector<int64_t> x, strides, weight, bias;  // sizes; {-1} where there is none
  at::ScalarType dtype;
  Way way;
};

constexpr size_t kMostKnown = 64;  // per door; more means sizes that never come back
std::mutex doors_mutex;
std::deque<std::vector<Known>> doors;

at::IntArrayRef sizes_of(const Optional& t) {
  static const int64_t none = -1;
  return t ? t->sizes() : at::IntArrayRef(&none, 1);
}
bool same(at::IntArrayRef a, const std::vector<int64_t>& b) { return a == at::IntArrayRef(b); }

int64_t new_door() {
  const std::lock_guard<std::mutex> lock(doors_mutex);
  doors.emplace_back();
  return static_cast<int64_t>(doors.size()) - 1;
}

// With the lock held.
std::vector<Known>& behind(int64_t door) {
  TORCH_CHECK(door >= 0 && door < static_cast<int64_t>(doors.size()), "no such door");
  return doors[static_cast<size_t>(door)];
}
const Known* find_known(const std::vector<Known>& known, const Tensor& x, const Optional& weight, const Optional& bias, bool running) {
  for (const Known& k : known)
    if (k.dtype == x.scalar_type() && same(x.sizes(), k.x) && same(x.strides(), k.strides) && same(sizes_of(weight), k.weight) &&
        same(sizes_of(bias), k.bias) && (k.way.tracked || k.way.given) == running)
      return &k;
  return nullptr;
}

void learn(int64_t door, const Tensor& x, const Optional& weight, const Optional& bias, bool tracked, bool given, int64_t recipe) {
  const std::lock_guard<std::mutex> lock(doors_mutex);
  std::vector<Known>& known = behind(door);
  if (find_known(known, x, weight, bias, tracked || given)) return;  // refused for more than its sizes: a broadcast residual
  if (known.size() >= kMostKnown) known.clear();
  known.push_back({x.sizes().vec(), x.strides().vec(), sizes_of(weight).vec(), sizes_of(bias).vec(), x.scalar_type(),
                   {recipe, tracked, given}});
}

// The kernels read plain memory of the CPU.
bool readable(const Optional& t) { return !t || (t->is_cpu() && t->layout() == at::kStrided && !at::isTensorSubclassLike(*t)); }
bool buffer(const Optional& t, int64_t count, const Tensor& x) {
  return t && readable(t) && t->numel() == count && t->scalar_type() == numbers_of(x) && t->is_contiguous() && !t->requires_grad();
}

std::optional<Way> way_of(int64_t door, const Tensor& x, const Optional& weight, const Optional& bias, bool running) {
  const std::lock_guard<std::mutex> lock(doors_mutex);
  const Known* known = find_known(behind(door), x, weight, bias, running);
  return known ? std::optional<Way>(known->way) : std::nullopt;
}

// y, or nothing where Python has to look first.
Optional enter(int64_t door, const Tensor& x, const Optional& weight, const Optional& bias, const Optional& residual,
               const Optional& running_mean, const Optional& running_var, double momentum, bool skip_nonfinite) {
  const bool running = running_mean || running_var;
  const std::optional<Way> way = way_of(door, x, weight, bias, running);
  if (!way || !readable(x) || !readable(weight) || !readable(bias) || !readable(residual)) return std::nullopt;
  if (residual && residual->sizes() != x.sizes()) return std::nullopt;
  const int64_t sets = recipe_of(way->recipe).sets;
  if (running && !(buffer(running_mean, sets, x) && buffer(running_var, sets, x))) return std::nullopt;
  const Optional none;
  const bool moves = way->tracked && torch::autograd::get_current_graph_task_id() < 0;  // not what a checkpoint computes again
  return std::get<0>(normalize_and_track(x, weight, bias, residual, none, way->given ? running_mean : none,
                                         way->given ? running_var : none, moves ? running_mean : none,
                                         moves ? running_var : none, momentum, skip_nonfinite, way->recipe));
}

// Normalized sum and sum, or nothing where Python has to look first. The gradient past the normalization joins the other
// in the kernel, so that neither way the sum is swept by itself.
std::vector<Tensor> enter_sum(int64_t door, const Tensor& x, const Tensor& addend, const Optional& weight, const Optional& bias) {
  const std::optional<Way> way = way_of(door, x, weight, bias, false);
  if (!way || !readable(x) || !readable(addend) || !readable(weight) || !readable(bias)) return {};
  const Recipe& recipe = recipe_of(way->recipe);
  if (recipe.plan->across || addend.scalar_type() != x.scalar_type() || addend.sizes() != x.sizes() || addend.strides() != x.strides())
    return {};
  const Optional none;
  Tensor total = [&] {
    at::AutoDispatchBelowADInplaceOrView below;
    return fresh(x);
  }();
  auto [y, statistics] = in_numbers_of(x, [&](auto number) {
    return normalize<decltype(number)>(x, weight, bias, none, none, none, none, recipe, addend, total);
  });
  if (torch::autograd::compute_requires_grad(x, weight, bias, addend))
    Normalize::follow(y, x, weight, bias, none, none, statistics, recipe, addend, total);
  return {y, total};
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
  m.def("door() -> int", &normscope::new_door);
  m.def("learn(int door, Tensor x, Tensor? weight, Tensor? bias, bool tracked, bool given, int recipe) -> ()", &normscope::learn);
  m.def(
      "enter(int door, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, float momentum, bool skip_nonfinite) -> Tensor?",
      &normscope::enter);
  m.def("enter_sum(int door, Tensor x, Tensor addend, Tensor? weight, Tensor? bias) -> Tensor[]", &normscope::enter_sum);
}

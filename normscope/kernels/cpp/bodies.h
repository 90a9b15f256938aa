// The bodies: {statistics, apply, backward reduce, backward apply} × {along, across}, compiled once per instruction set.
//
// Work is cut into blocks by shape alone, never by thread, and block sums are added in order: results do not depend on
// the number of threads. Sums run in float lanes over at most a block, then in double. The mean travels as high + low.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "plan.h"

namespace normscope {
namespace NORMSCOPE_ISA_NAMESPACE {
namespace {

#include "elementary.h"
#include "vector.h"
#include "sums.h"
#include "along.h"
#include "across.h"
#include "rows.h"

template <class T>
void forward(const Forward& f) {
  f.plan.across ? forward_across<T>(f) : !f.given && by_rows(f) ? forward_rows<T>(f) : forward_along<T>(f);
}

template <class T>
void backward(const Backward& f) {
  f.plan.across ? backward_across<T>(f) : by_rows(f) ? backward_rows<T>(f) : backward_along<T>(f);
}

}  // namespace
}  // namespace NORMSCOPE_ISA_NAMESPACE

const Kernels& NORMSCOPE_ISA_TABLE() {
  using namespace NORMSCOPE_ISA_NAMESPACE;
  static const Kernels table = {{forward<float>, forward<BF16>, forward<F16>}, {backward<float>, backward<BF16>, backward<F16>}};
  return table;
}

}  // namespace normscope

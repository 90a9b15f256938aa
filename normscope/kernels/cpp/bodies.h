// The bodies: {statistics, apply, backward reduce, backward apply} × {along, across}, compiled once per instruction set,
// and in it for float, which float32, bfloat16 and float16 are computed in, and for double.
//
// Work is cut into blocks by shape alone, never by thread, and block sums are added in order: results do not depend on
// the number of threads. Sums run in lanes of the Number over at most a block, then in double. The mean travels as high + low.

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

#define NORMSCOPE_INLINE inline __attribute__((always_inline))

// In a loop that writes to places out of a table: vectors of them (AVX-512's scatter) took four times as long.
#define NORMSCOPE_ONE_BY_ONE __asm__ volatile("")

namespace normscope {
namespace NORMSCOPE_ISA_NAMESPACE {
namespace {

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

namespace in_float {
using Number = float;
#include "elementary.h"
#include "vector.h"
#include "sixteen.h"
#include "steps.h"
#include "sums.h"
#include "along.h"
#include "across.h"
#include "rows.h"
}  // namespace in_float

namespace in_double {
using Number = double;
#include "elementary.h"
#include "vector.h"
#include "steps.h"
#include "sums.h"
#include "along.h"
#include "across.h"
#include "rows.h"
}  // namespace in_double

}  // namespace
}  // namespace NORMSCOPE_ISA_NAMESPACE

const Kernels& NORMSCOPE_ISA_TABLE() {
  using namespace NORMSCOPE_ISA_NAMESPACE;
  static const Kernels table = {{in_float::forward<float>, in_float::forward<BF16>, in_float::forward<F16>},
                                {in_float::backward<float>, in_float::backward<BF16>, in_float::backward<F16>},
                                in_double::forward<double>,
                                in_double::backward<double>};
  return table;
}

}  // namespace normscope

// Two vectors of the instruction set at once: how cells are read, written and summed.
//
// Included by bodies.h inside the namespace of an instruction set and of a Number, float or double. GCC's and Clang's
// vector types, no intrinsics but for what they lack.

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kLanes = kBytes / sizeof(Number);
// Two vectors: what a load of bfloat16 gives, and few enough that a loop keeps five such numbers in 16 registers.
constexpr int kParts = 2, kStep = kParts * kLanes;

constexpr bool kSingle = sizeof(Number) == 4;
using Word = std::conditional_t<sizeof(Number) == 4, int32_t, int64_t>;
typedef Number V __attribute__((vector_size(kBytes)));
typedef Word VI __attribute__((vector_size(kBytes)));
typedef std::make_unsigned_t<Word> VU __attribute__((vector_size(kBytes)));
typedef Number VAnywhere __attribute__((vector_size(kBytes), aligned(sizeof(Number)), may_alias));
typedef uint16_t HalvesAnywhere __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));
typedef uint8_t BytesAnywhere __attribute__((vector_size(kLanes), aligned(1), may_alias));

template <class Part>
struct Step {
  Part part[kParts];
};
using W = Step<V>;   // numbers
using M = Step<VI>;  // masks, all bits set where a cell counts

template <class Part, class F>
NORMSCOPE_INLINE Step<Part> each(F&& f) {
  return [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
    return Step<Part>{{f(std::integral_constant<int, i>{})...}};
  }(std::make_integer_sequence<int, kParts>{});
}
#define NORMSCOPE_EACH(Part, expression) \
  each<Part>([&](auto i) __attribute__((always_inline)) { return expression; })

NORMSCOPE_INLINE V splat(Number v) { return v - V{}; }
NORMSCOPE_INLINE W step(Number v) { return NORMSCOPE_EACH(V, splat(v)); }
NORMSCOPE_INLINE W operator+(const W& a, const W& b) { return NORMSCOPE_EACH(V, a.part[i] + b.part[i]); }
NORMSCOPE_INLINE W operator-(const W& a, const W& b) { return NORMSCOPE_EACH(V, a.part[i] - b.part[i]); }
NORMSCOPE_INLINE W operator*(const W& a, const W& b) { return NORMSCOPE_EACH(V, a.part[i] * b.part[i]); }
NORMSCOPE_INLINE void operator+=(W& a, const W& b) { a = a + b; }
NORMSCOPE_INLINE W operator&(const W& a, const M& m) {  // 0 where the mask is not set, NaN included
  return NORMSCOPE_EACH(V, (V)((VI)a.part[i] & m.part[i]));
}
NORMSCOPE_INLINE W relu(const W& z) {  // NaN passes: of (0, NaN) the processor's maximum is the second
  return each<V>([&](auto i) __attribute__((always_inline)) {
#if defined(__AVX512F__)
    if constexpr (kSingle) return (V)_mm512_max_ps(_mm512_setzero_ps(), (__m512)z.part[i]);
#elif defined(__AVX2__)
    if constexpr (kSingle) return (V)_mm256_max_ps(_mm256_setzero_ps(), (__m256)z.part[i]);
#endif
    return (V)((VI)z.part[i] & ~(VI)(z.part[i] < 0));
  });
}
NORMSCOPE_INLINE W gate(const W& g, const W& z) {  // g where z > 0; NaN passes
  return NORMSCOPE_EACH(V, (V)((VI)g.part[i] & ~(VI)(z.part[i] <= 0)));
}

// Numbers of our own, in the order of the steps and padded to whole ones.
NORMSCOPE_INLINE W get(const Number* p) { return NORMSCOPE_EACH(V, *(const VAnywhere*)(p + i * kLanes)); }
NORMSCOPE_INLINE void put(Number* p, const W& v) {
  for (int i = 0; i < kParts; ++i) *(VAnywhere*)(p + i * kLanes) = v.part[i];
}

// By halves: eight lanes, four, two. A template, so that each width has its types.
template <class Cell, int n>
NORMSCOPE_INLINE Cell folded(const Cell* p) {
  typedef Cell Half __attribute__((vector_size(n / 2 * sizeof(Cell)), aligned(sizeof(Cell)), may_alias));
  if constexpr (n == 2) {
    return p[0] + p[1];
  } else {
    const Half half = *(const Half*)p + *(const Half*)(p + n / 2);
    return folded<Cell, n / 2>((const Cell*)&half);
  }
}
NORMSCOPE_INLINE V both(const W& w) {
  V v = w.part[0];
  for (int i = 1; i < kParts; ++i) v += w.part[i];
  return v;
}
NORMSCOPE_INLINE Number rough_sum(const W& w) {
  const V v = both(w);
  return folded<Number, kLanes>((const Number*)&v);
}
NORMSCOPE_INLINE double sum(const W& w) {
  if constexpr (kSingle) {
    typedef float Half __attribute__((vector_size(kBytes / 2)));
    typedef double Doubles __attribute__((vector_size(kBytes)));
    const V v = both(w);
    const Half* halves = (const Half*)&v;
    const Doubles d = __builtin_convertvector(halves[0], Doubles) + __builtin_convertvector(halves[1], Doubles);
    return folded<double, kLanes / 2>((const double*)&d);
  }
  return rough_sum(w);
}
NORMSCOPE_INLINE void put_quarter(Number* p, const W& w) {  // four numbers of the same sum
  if constexpr (kLanes < 4) return put(p, w);
  typedef Number Quarter __attribute__((vector_size(4 * sizeof(Number))));
  const V v = both(w);
  const Number* lanes = (const Number*)&v;
  Quarter q{}, more;
  for (int i = 0; i + 4 <= kLanes; i += 4) {
    std::memcpy(&more, lanes + i, sizeof more);
    q += more;
  }
  std::memcpy(p, &q, sizeof q);
}

NORMSCOPE_INLINE void stream(Number* p, V v) {  // past the caches; p lies on a vector's boundary
#if defined(__AVX512F__)
  _mm512_stream_si512((__m512i*)p, (__m512i)v);
#elif defined(__AVX2__)
  _mm256_stream_si256((__m256i*)p, (__m256i)v);
#elif defined(__SSE2__)
  _mm_stream_si128((__m128i*)p, (__m128i)v);
#else
  *(V*)p = v;
#endif
}
inline void finish_streams() {  // other threads must not see older data than we have written
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// ---- cells in, cells out: a whole step, or its first cells, of which the others are read as zeros

NORMSCOPE_INLINE W read(const Number* p) { return get(p); }
NORMSCOPE_INLINE void write(Number* p, const W& v, bool streamed) {
  if (streamed)
    for (int i = 0; i < kParts; ++i) stream(p + i * kLanes, v.part[i]);
  else
    put(p, v);
}
inline Number quiet(Number v) { return v == v ? v : std::numeric_limits<Number>::quiet_NaN(); }

#if defined(__AVX512BW__)
NORMSCOPE_INLINE uint32_t bits(int count) {  // of the first cells of a step
  return count <= 0 ? 0u : count >= 32 ? ~0u : (1u << count) - 1u;
}
NORMSCOPE_INLINE W read_first(const Number* p, int count) {
  return each<V>([&](auto i) __attribute__((always_inline)) {
    const uint32_t cells = bits(count - i * kLanes);
    if constexpr (kSingle) return (V)_mm512_maskz_loadu_ps(static_cast<__mmask16>(cells), p + i * kLanes);
    else return (V)_mm512_maskz_loadu_pd(static_cast<__mmask8>(cells), p + i * kLanes);
  });
}
NORMSCOPE_INLINE void write_first(Number* p, const W& v, int count) {
  for (int i = 0; i < kParts; ++i) {
    const uint32_t cells = bits(count - i * kLanes);
    if constexpr (kSingle) _mm512_mask_storeu_ps(p + i * kLanes, static_cast<__mmask16>(cells), (__m512)v.part[i]);
    else _mm512_mask_storeu_pd(p + i * kLanes, static_cast<__mmask8>(cells), (__m512d)v.part[i]);
  }
}
#endif

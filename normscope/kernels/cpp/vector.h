// Two float vectors of the instruction set at once: how cells are read, written and summed.
//
// Included inside the namespace of an instruction set by bodies.h. GCC's and Clang's vector types, no intrinsics but for
// what they lack. A step of bfloat16 is split into its even and odd cells: each is one mask or shift away from float,
// where keeping the order would cost a shuffle. Sums do not care; numbers per column are laid out in the same order.

#define NORMSCOPE_INLINE inline __attribute__((always_inline))

// In a loop that writes to places out of a table: vectors of them (AVX-512's scatter) took four times as long.
#define NORMSCOPE_ONE_BY_ONE __asm__ volatile("")

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
// Two vectors: what a load of bfloat16 gives, and few enough that a loop keeps five such numbers in 16 registers.
constexpr int kParts = 2, kStep = kParts * kLanes;

typedef float V __attribute__((vector_size(kLanes * 4)));
typedef int32_t VI __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VU __attribute__((vector_size(kLanes * 4)));
typedef float VAnywhere __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint32_t VUAnywhere __attribute__((vector_size(kLanes * 4), aligned(2), may_alias));
typedef uint16_t HalvesAnywhere __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));
typedef uint8_t BytesAnywhere __attribute__((vector_size(kLanes), aligned(1), may_alias));

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

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

NORMSCOPE_INLINE V splat(float v) { return v - V{}; }
NORMSCOPE_INLINE W step(float v) { return NORMSCOPE_EACH(V, splat(v)); }
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
    return (V)_mm512_max_ps(_mm512_setzero_ps(), (__m512)z.part[i]);
#elif defined(__AVX2__)
    return (V)_mm256_max_ps(_mm256_setzero_ps(), (__m256)z.part[i]);
#else
    return (V)((VI)z.part[i] & ~(VI)(z.part[i] < 0.f));
#endif
  });
}
NORMSCOPE_INLINE W gate(const W& g, const W& z) {  // g where z > 0; NaN passes
  return NORMSCOPE_EACH(V, (V)((VI)g.part[i] & ~(VI)(z.part[i] <= 0.f)));
}

// Numbers of our own, in the order of the steps and padded to whole ones.
NORMSCOPE_INLINE W get(const float* p) { return NORMSCOPE_EACH(V, *(const VAnywhere*)(p + i * kLanes)); }
NORMSCOPE_INLINE void put(float* p, const W& v) {
  for (int i = 0; i < kParts; ++i) *(VAnywhere*)(p + i * kLanes) = v.part[i];
}

// By halves: eight lanes, four, two. A template, so that each width has its types.
template <class Number, int n>
NORMSCOPE_INLINE Number folded(const Number* p) {
  typedef Number Half __attribute__((vector_size(n / 2 * sizeof(Number)), aligned(sizeof(Number)), may_alias));
  if constexpr (n == 2) {
    return p[0] + p[1];
  } else {
    const Half half = *(const Half*)p + *(const Half*)(p + n / 2);
    return folded<Number, n / 2>((const Number*)&half);
  }
}
NORMSCOPE_INLINE double sum(const W& w) {
  typedef float Half __attribute__((vector_size(kLanes * 2)));
  typedef double Doubles __attribute__((vector_size(kLanes * 4)));
  V v = w.part[0];
  for (int i = 1; i < kParts; ++i) v += w.part[i];
  const Half* halves = (const Half*)&v;
  const Doubles d = __builtin_convertvector(halves[0], Doubles) + __builtin_convertvector(halves[1], Doubles);
  return folded<double, kLanes / 2>((const double*)&d);
}
NORMSCOPE_INLINE void put_quarter(float* p, const W& w) {  // four numbers of the same sum
  typedef float Quarter __attribute__((vector_size(16)));
  V v = w.part[0];
  for (int i = 1; i < kParts; ++i) v += w.part[i];
  const Quarter* quarters = (const Quarter*)&v;
  Quarter q = quarters[0];
  for (int i = 1; i < kLanes / 4; ++i) q += quarters[i];
  std::memcpy(p, &q, sizeof q);
}
NORMSCOPE_INLINE float rough_sum(const W& w) {
  V v = w.part[0];
  for (int i = 1; i < kParts; ++i) v += w.part[i];
  return folded<float, kLanes>((const float*)&v);
}

NORMSCOPE_INLINE void stream(float* p, V v) {  // past the caches; p lies on a vector's boundary
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, (__m256)v);
#elif defined(__SSE2__)
  _mm_stream_ps(p, (__m128)v);
#else
  *(V*)p = v;
#endif
}
inline void finish_streams() {  // other threads must not see older data than we have written
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// ---- the three dtypes: position of a cell in its step, a step in, a step out

template <class T>
constexpr int position(int cell) {
  if constexpr (std::is_same_v<T, BF16>) {
    const int pair = cell / (2 * kLanes), in = cell % (2 * kLanes);
    return pair * 2 * kLanes + (in % 2) * kLanes + in / 2;
  }
  return cell;
}

template <class T>
constexpr auto kCellOf = [] {  // the other way
  std::array<int, kStep> cells{};
  for (int cell = 0; cell < kStep; ++cell) cells[static_cast<size_t>(position<T>(cell))] = cell;
  return cells;
}();

NORMSCOPE_INLINE W read(const float* p) { return get(p); }
NORMSCOPE_INLINE W split(VU pairs) { return {{(V)(pairs << 16), (V)(pairs & 0xffff0000u)}}; }
NORMSCOPE_INLINE W read(const BF16* p) { return split(*(const VUAnywhere*)p); }
NORMSCOPE_INLINE W read(const F16* p) {
  return each<V>([&](auto i) __attribute__((always_inline)) {
#if defined(__AVX512F__)
    return (V)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(p + i * kLanes)));
#elif defined(__F16C__)
    return (V)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + i * kLanes)));
#else
    const VU h = __builtin_convertvector(*(const HalvesAnywhere*)(p + i * kLanes), VU);
    const V number = (V)((h & 0x7fffu) << 13) * splat(0x1p112f);  // the exponents' offsets, subnormals included
    const VU special = (VU)((h & 0x7c00u) == 0x7c00u) & 0x7f800000u;
    return (V)((VU)number | special | (h & 0x8000u) << 16);
#endif
  });
}

NORMSCOPE_INLINE void write(float* p, const W& v, bool streamed) {
  if (streamed)
    for (int i = 0; i < kParts; ++i) stream(p + i * kLanes, v.part[i]);
  else
    for (int i = 0; i < kParts; ++i) *(VAnywhere*)(p + i * kLanes) = v.part[i];
}
// To nearest, ties to even, in the upper half. A NaN stays one: its lower half is zero, since all that is computed here
// comes from bfloat16 and from numbers that `quiet` has seen; the sum could carry into the sign only from there.
NORMSCOPE_INLINE VU rounded(V v) {
  const VU bits = (VU)v;
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}
inline float quiet(float v) { return v == v ? v : std::numeric_limits<float>::quiet_NaN(); }
NORMSCOPE_INLINE VU joined(const W& v) {
#if defined(__AVX512BF16__)
  alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)v.part[1], (__m512)v.part[0]);
  return (VU)_mm512_permutexvar_epi16(_mm512_load_si512(kOrder), both);
#else
  return (rounded(v.part[0]) >> 16) | (rounded(v.part[1]) & 0xffff0000u);
#endif
}
NORMSCOPE_INLINE void write(BF16* p, const W& v, bool streamed) {
  if (streamed) stream((float*)p, (V)joined(v));
  else *(VUAnywhere*)p = joined(v);
}
NORMSCOPE_INLINE void write(F16* p, const W& v, bool) {
  for (int i = 0; i < kParts; ++i) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)(p + i * kLanes), _mm512_cvtps_ph((__m512)v.part[i], _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    _mm_storeu_si128((__m128i*)(p + i * kLanes), _mm256_cvtps_ph((__m256)v.part[i], _MM_FROUND_TO_NEAREST_INT));
#else
    const VU bits = (VU)v.part[i], sign = bits & 0x80000000u, size = bits ^ sign;
    const VU nan = (VU)(v.part[i] != v.part[i]), small = (VU)(size < 0x38800000u), large = (VU)(size >= 0x47800000u);
    // Below 2^-14 the halves are 2^-24 apart, as the floats are from 0.5 on: the adder rounds.
    const VU tiny = (VU)((V)size + splat(0.5f)) - (VU)splat(0.5f);
    const VU normal = (size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13;
    VU half = (tiny & small) | (normal & ~small);
    half = (half & ~large) | (large & 0x7c00u);
    half = (half & ~nan) | (nan & 0x7e00u);
    *(HalvesAnywhere*)(p + i * kLanes) = __builtin_convertvector(half | sign >> 16, HalvesAnywhere);
#endif
  }
}

// A boolean per cell.
template <class T>
NORMSCOPE_INLINE M read_mask(const uint8_t* p) {
  if constexpr (std::is_same_v<T, BF16>)
    return each<VI>([&](auto i) __attribute__((always_inline)) {
      const VU pair = __builtin_convertvector(*(const HalvesAnywhere*)(p + i / 2 * 2 * kLanes), VU);
      return (VI)((i % 2 ? pair >> 8 : pair & 0xffu) != 0u);
    });
  return NORMSCOPE_EACH(VI, (VI)(__builtin_convertvector(*(const BytesAnywhere*)(p + i * kLanes), VU) != 0u));
}

// ---- a whole step, and the cells that are left at the end of a run

template <class T>
struct Whole {
  NORMSCOPE_INLINE W load(const T* p) const { return read(p); }
  NORMSCOPE_INLINE void store(T* p, const W& v, bool streamed) const { write(p, v, streamed); }
  NORMSCOPE_INLINE W keep(const W& v) const { return v; }
  NORMSCOPE_INLINE M mask(const uint8_t* p) const { return read_mask<T>(p); }
};

// The first cells of a step; zeros beyond them are read, and nothing is written there. With AVX-512 a mask does both. Else
// vector by vector as far as they are full: through the stack it takes longer than several whole steps.
template <class T>
struct Rest {
  static constexpr int kFull = std::is_same_v<T, BF16> ? 2 * kLanes : kLanes;  // cells that move at once
  int count;
#if defined(__AVX512BW__)
  NORMSCOPE_INLINE uint32_t cells(int first = 0) const {  // a bit each, from some cell of the step on
    const int left = count - first;
    return left <= 0 ? 0u : left >= 32 ? ~0u : (1u << left) - 1u;
  }
  NORMSCOPE_INLINE W load(const T* p) const {
    if constexpr (std::is_same_v<T, float>) {
      return NORMSCOPE_EACH(V, (V)_mm512_maskz_loadu_ps(static_cast<__mmask16>(cells(i * kLanes)), p + i * kLanes));
    } else if constexpr (std::is_same_v<T, BF16>) {
      return split((VU)_mm512_maskz_loadu_epi16(cells(), p));
    } else {
      alignas(64) T step[kStep];
      _mm512_store_si512(step, _mm512_maskz_loadu_epi16(cells(), p));
      return read(step);
    }
  }
  NORMSCOPE_INLINE void store(T* p, const W& v, bool) const {
    if constexpr (std::is_same_v<T, float>) {
      for (int i = 0; i < kParts; ++i)
        _mm512_mask_storeu_ps(p + i * kLanes, static_cast<__mmask16>(cells(i * kLanes)), (__m512)v.part[i]);
    } else if constexpr (std::is_same_v<T, BF16>) {
      _mm512_mask_storeu_epi16(p, cells(), (__m512i)joined(v));
    } else {
      alignas(64) T step[kStep];
      write(step, v, false);
      _mm512_mask_storeu_epi16(p, cells(), _mm512_load_si512(step));
    }
  }
  NORMSCOPE_INLINE M mask(const uint8_t* p) const {
    alignas(32) uint8_t step[kStep];
    _mm256_store_si256((__m256i*)step, _mm256_maskz_loadu_epi8(cells(), p));
    return read_mask<T>(step);
  }
#else
  template <class Cell>
  NORMSCOPE_INLINE void fetch(const Cell* p, Cell* cells) const {
    int i = 0;
    for (; i + kFull <= count; i += kFull) std::memcpy(cells + i, p + i, kFull * sizeof(Cell));
    for (; i < count; ++i) cells[i] = p[i];
  }
  NORMSCOPE_INLINE W load(const T* p) const {
    alignas(64) T cells[kStep] = {};
    fetch(p, cells);
    return read(cells);
  }
  NORMSCOPE_INLINE void store(T* p, const W& v, bool) const {
    alignas(64) T cells[kStep];
    write(cells, v, false);
    int i = 0;
    for (; i + kFull <= count; i += kFull) std::memcpy(p + i, cells + i, kFull * sizeof(T));
    for (; i < count; ++i) p[i] = cells[i];
  }
  NORMSCOPE_INLINE M mask(const uint8_t* p) const {
    alignas(64) uint8_t cells[kStep] = {};
    fetch(p, cells);
    return read_mask<T>(cells);
  }
#endif
  NORMSCOPE_INLINE W keep(const W& v) const {
    return v & each<VI>([&](auto part) __attribute__((always_inline)) {
      VI cell;
      for (int j = 0; j < kLanes; ++j) cell[j] = kCellOf<T>[part * kLanes + j];
      return (VI)(cell < count);
    });
  }
};

// f(first cell, how to reach the cells) for each step of a run.
template <class T, class F>
NORMSCOPE_INLINE void steps(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) f(i, Whole<T>{});
  if (i < n) f(i, Rest<T>{static_cast<int>(n - i)});
}

inline int64_t padded(int64_t n) { return (n + kStep - 1) / kStep * kStep; }
template <class T>
int64_t slot(int64_t cell) {  // where a column's number lies
  return cell / kStep * kStep + position<T>(static_cast<int>(cell % kStep));
}

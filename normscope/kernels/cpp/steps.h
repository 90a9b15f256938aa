// A run of cells step by step: whole steps, and the cells that are left at its end.
//
// Included by bodies.h behind the dtypes that the namespace has.

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
  NORMSCOPE_INLINE W load(const T* p) const { return read_first(p, count); }
  NORMSCOPE_INLINE void store(T* p, const W& v, bool) const { write_first(p, v, count); }
  NORMSCOPE_INLINE M mask(const uint8_t* p) const {
    alignas(32) uint8_t step[32];
    _mm256_store_si256((__m256i*)step, _mm256_maskz_loadu_epi8(bits(count), p));
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

// Asks for a step's lines of memory before they are needed: into the nearest cache (3), or the one behind it (2).
template <int level = 3, class T>
NORMSCOPE_INLINE void fetch(const T* p) {
  for (int64_t i = 0; i < kStep * static_cast<int64_t>(sizeof(T)); i += 64) __builtin_prefetch(reinterpret_cast<const char*>(p) + i, 0, level);
}

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

// bfloat16 and float16, in and out.
//
// Included by bodies.h where the Number is float. A step of bfloat16 is split into its even and odd cells: each is one
// mask or shift away from float, where keeping the order would cost a shuffle. Sums do not care; numbers per column are
// laid out in the same order.

typedef uint32_t VUAnywhere __attribute__((vector_size(kBytes), aligned(2), may_alias));

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

// To nearest, ties to even, in the upper half. A NaN stays one: its lower half is zero, since all that is computed here
// comes from bfloat16 and from numbers that `quiet` has seen; the sum could carry into the sign only from there.
NORMSCOPE_INLINE VU rounded(V v) {
  const VU bits = (VU)v;
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}
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

#if defined(__AVX512BW__)
NORMSCOPE_INLINE W read_first(const BF16* p, int count) { return split((VU)_mm512_maskz_loadu_epi16(bits(count), p)); }
NORMSCOPE_INLINE W read_first(const F16* p, int count) {
  alignas(64) F16 step[kStep];
  _mm512_store_si512(step, _mm512_maskz_loadu_epi16(bits(count), p));
  return read(step);
}
NORMSCOPE_INLINE void write_first(BF16* p, const W& v, int count) { _mm512_mask_storeu_epi16(p, bits(count), (__m512i)joined(v)); }
NORMSCOPE_INLINE void write_first(F16* p, const W& v, int count) {
  alignas(64) F16 step[kStep];
  write(step, v, false);
  _mm512_mask_storeu_epi16(p, bits(count), _mm512_load_si512(step));
}
#endif

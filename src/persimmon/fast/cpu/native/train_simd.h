// What the kernels of training need beyond simd.h: powers of two, maxima, bfloat16, and products of small matrices.
#pragma once
#include "simd.h"
#include "train.h"

namespace persimmon {
namespace PERSIMMON_ISA {

#if defined(__AVX512F__)
INLINE f32x16 sub(f32x16 a, f32x16 b) { return _mm512_sub_ps(a, b); }
INLINE f32x16 maximum(f32x16 a, f32x16 b) { return _mm512_max_ps(a, b); }
INLINE float max_lanes(f32x16 a) {
  return max_lanes(maximum(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1)));
}
INLINE f32x16 round_even(f32x16 a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE f32x16 scale_by_power(f32x16 a, f32x16 n) { return _mm512_scalef_ps(a, n); }
INLINE f32x16 keep_positive(f32x16 test, f32x16 a) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(test, _mm512_setzero_ps(), _CMP_GT_OQ), a);
}
INLINE void store_bf16x16(uint16_t* p, f32x16 a) {  // nearest, ties to even
  __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  bits = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(bits));
}
INLINE void count_positive(const f32x16 a, int32_t* counts) {
  const __mmask16 positive = _mm512_cmp_ps_mask(a, _mm512_setzero_ps(), _CMP_GT_OQ);
  const __m512i before = _mm512_loadu_si512(counts);
  _mm512_storeu_si512(counts, _mm512_mask_add_epi32(before, positive, before, _mm512_set1_epi32(1)));
}
#else
INLINE f32x16 sub(f32x16 a, f32x16 b) { return {sub(a.lo, b.lo), sub(a.hi, b.hi)}; }
INLINE f32x16 maximum(f32x16 a, f32x16 b) { return {maximum(a.lo, b.lo), maximum(a.hi, b.hi)}; }
INLINE float max_lanes(f32x16 a) { return max_lanes(maximum(a.lo, a.hi)); }
INLINE f32x16 round_even(f32x16 a) { return {round_even(a.lo), round_even(a.hi)}; }
INLINE f32x16 scale_by_power(f32x16 a, f32x16 n) {
  return {mul(a.lo, exp2_integer(n.lo)), mul(a.hi, exp2_integer(n.hi))};
}
template <class F>
INLINE f32x16 each16(f32x16 a, f32x16 b, F f) {
  float x[16], y[16];
  store16(x, a), store16(y, b);
  for (int i = 0; i < 16; i++) x[i] = f(x[i], y[i]);
  return load16(x);
}
INLINE f32x16 keep_positive(f32x16 test, f32x16 a) {
  return each16(test, a, [](float t, float x) { return t > 0 ? x : 0.0f; });
}
INLINE void store_bf16x16(uint16_t* p, f32x16 a) {
  float x[16];
  store16(x, a);
  for (int i = 0; i < 16; i++) {
    const uint32_t bits = read_unaligned<uint32_t>(x + i);
    p[i] = static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
  }
}
INLINE void count_positive(const f32x16 a, int32_t* counts) {
  float x[16];
  store16(x, a);
  for (int i = 0; i < 16; i++) counts[i] += x[i] > 0;
}
#endif

// 2^x for x <= 0 (a little above is fine): 2^n e^(r ln 2), |r| <= 1/2, by Taylor's terms: degree 6 leaves 2e-7 relative, 4 leaves 4e-5.
// Below kLeastPower the result is 2^kLeastPower, of no weight in a sum that holds a one, and far enough from the smallest normal
// number that its products are normal too: arithmetic with others is many times slower.
constexpr float kLeastPower = -80;
constexpr float kTaylor[] = {1.0f, 6.9314718056e-1f, 2.4022650696e-1f, 5.5504108665e-2f, 9.6181291076e-3f, 1.3333558146e-3f, 1.5403530393e-4f};
template <int kDegree = 6>
INLINE f32x16 exp2_nonpositive(f32x16 x) {
  x = maximum(x, set16(kLeastPower));
  const f32x16 n = round_even(x), r = sub(x, n);
  f32x16 p = set16(kTaylor[kDegree]);
  for (int i = kDegree - 1; i >= 0; i--) p = fma(p, r, set16(kTaylor[i]));
  return scale_by_power(p, n);
}

// ---- outer tensors: float32 or bfloat16 ----------------------------------------------------------------------------------

INLINE f32x16 read16(const float* p) { return load16(p); }
INLINE f32x16 read16(const uint16_t* p) { return load_bf16x16(p); }
INLINE void write16(float* p, f32x16 a) { store16(p, a); }
INLINE void write16(uint16_t* p, f32x16 a) { store_bf16x16(p, a); }
INLINE float read1(const float* p) { return *p; }
INLINE float read1(const uint16_t* p) { return bf16_to_float(*p); }
INLINE void write1(float* p, float a) { *p = a; }
INLINE void write1(uint16_t* p, float a) {
  const uint32_t bits = read_unaligned<uint32_t>(&a);
  *p = static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// x[0 .. n) as floats, zeros up to the padded length.
template <class T>
INLINE void read_padded(const T* x, int n, int padded, float* out) {
  int i = 0;
  for (; i + 16 <= n; i += 16) store16(out + i, read16(x + i));
  for (; i < n; i++) out[i] = read1(x + i);
  for (; i < padded; i++) out[i] = 0;
}

template <class T>
INLINE void write_unpadded(const float* x, int n, T* out) {
  int i = 0;
  for (; i + 16 <= n; i += 16) write16(out + i, load16(x + i));
  for (; i < n; i++) write1(out + i, x[i]);
}

}  // namespace PERSIMMON_ISA
}  // namespace persimmon

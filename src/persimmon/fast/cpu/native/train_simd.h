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
INLINE f32x16 add_to_exponent(f32x16 a, f32x16 n) {  // a 2^n, with n in the lowest bits of a float
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_slli_epi32(_mm512_castps_si512(n), 23)));
}
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
INLINE f32x8 add_to_exponent(f32x8 a, f32x8 n) {  // a 2^n, with n in the lowest bits of a float
#if defined(__AVX2__)
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), _mm256_slli_epi32(_mm256_castps_si256(n), 23)));
#else
  return each8(a, n, [](float x, float y) {
    return from_bits(read_unaligned<uint32_t>(&x) + (read_unaligned<uint32_t>(&y) << 23));
  });
#endif
}
INLINE f32x16 add_to_exponent(f32x16 a, f32x16 n) { return {add_to_exponent(a.lo, n.lo), add_to_exponent(a.hi, n.hi)}; }
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

// 2^x for x <= 0 (a little above is fine): 2^n 2^r, |r| <= 1/2, by the polynomial that is exact at 0 and else nearest: degree 6 leaves
// 2e-9 relative, less than float32 rounds, 3 leaves 1e-4. Below kLeastPower the result is 2^kLeastPower, of no weight in a
// sum that holds a one, and far enough from the smallest normal number that its products are normal too: arithmetic with
// others is many times slower. NaN stays NaN.
constexpr float kLeastPower = -80;
constexpr float kRounding = 12582912;  // 1.5 2^23: numbers of this size are whole, and the integer lies in their lowest bits
constexpr float kPowers6[] = {1.0f, 6.9314718e-1f, 2.40226477e-1f, 5.55033237e-2f, 9.61843692e-3f, 1.33988751e-3f, 1.5353362e-4f};
constexpr float kPowers3[] = {1.0f, 6.93282902e-1f, 2.42210969e-1f, 5.50089292e-2f};
template <int kDegree = 6, int kCount>
INLINE void exp2_nonpositive(f32x16 (&x)[kCount]) {  // step by step for all, so that none waits for its own step before
  constexpr const float* powers = kDegree == 6 ? kPowers6 : kPowers3;
  static_assert(kDegree == 6 || kDegree == 3);
  f32x16 shifted[kCount], p[kCount];
#pragma GCC unroll 8
  for (int v = 0; v < kCount; v++) x[v] = maximum(set16(kLeastPower), x[v]);
#pragma GCC unroll 8
  for (int v = 0; v < kCount; v++) shifted[v] = add(x[v], set16(kRounding));
#pragma GCC unroll 8
  for (int v = 0; v < kCount; v++) x[v] = sub(x[v], sub(shifted[v], set16(kRounding)));
#pragma GCC unroll 8
  for (int v = 0; v < kCount; v++) p[v] = set16(powers[kDegree]);
#pragma GCC unroll 6
  for (int i = kDegree - 1; i >= 0; i--)
#pragma GCC unroll 8
    for (int v = 0; v < kCount; v++) p[v] = fma(p[v], x[v], set16(powers[i]));
#pragma GCC unroll 8
  for (int v = 0; v < kCount; v++) x[v] = add_to_exponent(p[v], shifted[v]);
}
template <int kDegree = 6>
INLINE f32x16 exp2_nonpositive(f32x16 x) {
  f32x16 one[1] = {x};
  exp2_nonpositive<kDegree>(one);
  return one[0];
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

// Eight and sixteen float lanes for the instruction set this file is compiled for.
//
// Only operations that IEEE 754 fixes to the last bit are offered (add, multiply, fused multiply-add, maximum, exact
// conversions, and division and square root on scalars), and sums across lanes have one fixed order. So a kernel written
// with them gives the same bits on every instruction set: tests compare them with ==.
// Everything is in a namespace of its own per instruction set and always inlined: the linker must never keep an AVX2 copy
// for a portable caller.
#pragma once
#include <cstdint>
#include <cstring>

#include "layout.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline))

namespace persimmon {
namespace PERSIMMON_ISA {

template <class T>
INLINE T read_unaligned(const void* p) {
  T value;
  memcpy(&value, p, sizeof value);
  return value;
}

INLINE float from_bits(uint32_t bits) { return read_unaligned<float>(&bits); }
INLINE float bf16_to_float(uint16_t bits) { return from_bits(static_cast<uint32_t>(bits) << 16); }

INLINE float half_to_float(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023;
  if (exponent == 31) return from_bits(sign | 0x7F800000u | mantissa << 13);
  if (exponent) return from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
  const float tiny = static_cast<float>(mantissa) * 0x1p-24f;  // subnormal: exact
  return sign ? -tiny : tiny;
#endif
}

INLINE float fma1(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
INLINE float max1(float a, float b) { return a > b ? a : b; }
INLINE int min_int(int a, int b) { return a < b ? a : b; }

// ---- eight lanes -----------------------------------------------------------------------------------------------------

#if defined(__AVX2__)

using f32x8 = __m256;
INLINE f32x8 zero8() { return _mm256_setzero_ps(); }
INLINE f32x8 set8(float a) { return _mm256_set1_ps(a); }
INLINE f32x8 load8(const float* p) { return _mm256_loadu_ps(p); }
INLINE void store8(float* p, f32x8 a) { _mm256_storeu_ps(p, a); }
INLINE f32x8 add(f32x8 a, f32x8 b) { return _mm256_add_ps(a, b); }
INLINE f32x8 sub(f32x8 a, f32x8 b) { return _mm256_sub_ps(a, b); }
INLINE f32x8 mul(f32x8 a, f32x8 b) { return _mm256_mul_ps(a, b); }
INLINE f32x8 fma(f32x8 a, f32x8 b, f32x8 c) { return _mm256_fmadd_ps(a, b, c); }
INLINE f32x8 maximum(f32x8 a, f32x8 b) { return _mm256_max_ps(a, b); }
INLINE f32x8 minimum(f32x8 a, f32x8 b) { return _mm256_min_ps(a, b); }
INLINE f32x8 magnitude(f32x8 a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
INLINE f32x8 round_even(f32x8 a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE f32x8 load_half8(const void* p) { return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
INLINE f32x8 load_bf16x8(const uint16_t* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
INLINE f32x8 load_int8x8(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
INLINE f32x8 load_bytes8(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
// 2^n for integral n in -126 .. 127.
INLINE f32x8 exp2_integer(f32x8 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
INLINE float sum_lanes(f32x8 a) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
INLINE float max_lanes(f32x8 a) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

#else

// Two vectors of four: what SSE2 and NEON hold in a register.
typedef float f32x4 __attribute__((vector_size(16)));
typedef int32_t i32x4 __attribute__((vector_size(16)));
struct f32x8 {
  f32x4 lo, hi;
};
INLINE f32x4 fma4(f32x4 a, f32x4 b, f32x4 c) {
#if defined(__aarch64__)
  return (f32x4)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  for (int i = 0; i < 4; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#endif
}
INLINE f32x8 set8(float a) { return {f32x4{a, a, a, a}, f32x4{a, a, a, a}}; }
INLINE f32x8 zero8() { return set8(0.0f); }
INLINE f32x8 load8(const float* p) { return read_unaligned<f32x8>(p); }
INLINE void store8(float* p, f32x8 a) { memcpy(p, &a, sizeof a); }
INLINE f32x8 add(f32x8 a, f32x8 b) { return {a.lo + b.lo, a.hi + b.hi}; }
INLINE f32x8 sub(f32x8 a, f32x8 b) { return {a.lo - b.lo, a.hi - b.hi}; }
INLINE f32x8 mul(f32x8 a, f32x8 b) { return {a.lo * b.lo, a.hi * b.hi}; }
INLINE f32x8 fma(f32x8 a, f32x8 b, f32x8 c) { return {fma4(a.lo, b.lo, c.lo), fma4(a.hi, b.hi, c.hi)}; }
template <class F>
INLINE f32x8 each8(f32x8 a, f32x8 b, F f) {
  for (int i = 0; i < 4; i++) a.lo[i] = f(a.lo[i], b.lo[i]), a.hi[i] = f(a.hi[i], b.hi[i]);
  return a;
}
INLINE f32x8 maximum(f32x8 a, f32x8 b) {
  return each8(a, b, [](float x, float y) { return x > y ? x : y; });
}
INLINE f32x8 minimum(f32x8 a, f32x8 b) {
  return each8(a, b, [](float x, float y) { return x < y ? x : y; });
}
INLINE f32x8 magnitude(f32x8 a) {
  return each8(a, a, [](float x, float) { return __builtin_fabsf(x); });
}
INLINE f32x8 round_even(f32x8 a) {
  return each8(a, a, [](float x, float) { return __builtin_nearbyintf(x); });
}
template <class F>
INLINE f32x8 gather8(F f) {
  return {f32x4{f(0), f(1), f(2), f(3)}, f32x4{f(4), f(5), f(6), f(7)}};
}
INLINE f32x8 load_half8(const void* p) {
  return gather8([p](int i) { return half_to_float(read_unaligned<uint16_t>(static_cast<const char*>(p) + 2 * i)); });
}
INLINE f32x8 load_bf16x8(const uint16_t* p) {
  return gather8([p](int i) { return bf16_to_float(p[i]); });
}
INLINE f32x8 load_int8x8(const int8_t* p) {
  return gather8([p](int i) { return static_cast<float>(p[i]); });
}
INLINE f32x8 load_bytes8(const uint8_t* p) {
  return gather8([p](int i) { return static_cast<float>(p[i]); });
}
INLINE f32x8 exp2_integer(f32x8 n) {
  return each8(n, n, [](float x, float) { return from_bits(static_cast<uint32_t>(static_cast<int>(x) + 127) << 23); });
}
INLINE float sum_lanes(f32x8 a) {
  const f32x4 four = a.lo + a.hi;
  return (four[0] + four[2]) + (four[1] + four[3]);
}
INLINE float max_lanes(f32x8 a) {
  float best = a.lo[0];
  for (int i = 0; i < 4; i++) best = max1(max1(best, a.lo[i]), a.hi[i]);
  return best;
}

#endif

// ---- sixteen lanes: one register with AVX-512, else two of eight ---------------------------------------------------------

#if defined(__AVX512F__)

using f32x16 = __m512;
INLINE f32x16 zero16() { return _mm512_setzero_ps(); }
INLINE f32x16 set16(float a) { return _mm512_set1_ps(a); }
INLINE f32x16 load16(const float* p) { return _mm512_loadu_ps(p); }
INLINE void store16(float* p, f32x16 a) { _mm512_storeu_ps(p, a); }
INLINE f32x16 add(f32x16 a, f32x16 b) { return _mm512_add_ps(a, b); }
INLINE f32x16 mul(f32x16 a, f32x16 b) { return _mm512_mul_ps(a, b); }
INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return _mm512_fmadd_ps(a, b, c); }
INLINE f32x16 minimum(f32x16 a, f32x16 b) { return _mm512_min_ps(a, b); }
INLINE f32x16 load_half16(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p))); }
INLINE f32x16 load_bf16x16(const uint16_t* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
INLINE f32x16 load_int8x16(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
INLINE f32x8 fold(f32x16 a) { return add(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1)); }

#else

struct f32x16 {
  f32x8 lo, hi;
};
INLINE f32x16 zero16() { return {zero8(), zero8()}; }
INLINE f32x16 set16(float a) { return {set8(a), set8(a)}; }
INLINE f32x16 load16(const float* p) { return {load8(p), load8(p + 8)}; }
INLINE void store16(float* p, f32x16 a) { store8(p, a.lo), store8(p + 8, a.hi); }
INLINE f32x16 add(f32x16 a, f32x16 b) { return {add(a.lo, b.lo), add(a.hi, b.hi)}; }
INLINE f32x16 mul(f32x16 a, f32x16 b) { return {mul(a.lo, b.lo), mul(a.hi, b.hi)}; }
INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return {fma(a.lo, b.lo, c.lo), fma(a.hi, b.hi, c.hi)}; }
INLINE f32x16 minimum(f32x16 a, f32x16 b) { return {minimum(a.lo, b.lo), minimum(a.hi, b.hi)}; }
INLINE f32x16 load_half16(const void* p) { return {load_half8(p), load_half8(static_cast<const char*>(p) + 16)}; }
INLINE f32x16 load_bf16x16(const uint16_t* p) { return {load_bf16x8(p), load_bf16x8(p + 8)}; }
INLINE f32x16 load_int8x16(const int8_t* p) { return {load_int8x8(p), load_int8x8(p + 8)}; }
INLINE f32x8 fold(f32x16 a) { return add(a.lo, a.hi); }

#endif

INLINE float sum_lanes(f32x16 a) { return sum_lanes(fold(a)); }

// sum_lanes of eight vectors at once: three operations for each instead of eight.
INLINE void sum_lanes_of_8(const f32x16* a, float* out) {
#if defined(__AVX512F__)
  __m512 half[4], quarter[2];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++)  // eight lanes each of a[2 i] and a[2 i + 1]
    half[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0x44), _mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0xEE));
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++)  // four lanes each of a[4 i] .. a[4 i + 3]
    quarter[i] = _mm512_add_ps(_mm512_shuffle_f32x4(half[2 * i], half[2 * i + 1], 0x88),
                               _mm512_shuffle_f32x4(half[2 * i], half[2 * i + 1], 0xDD));
  const __m512d low = _mm512_castps_pd(quarter[0]), high = _mm512_castps_pd(quarter[1]);
  const __m512 pair = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)), _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
  const __m512 sum = _mm512_add_ps(pair, _mm512_movehdup_ps(pair));  // in even lanes: 0 4 1 5 2 6 3 7
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 2, 6, 10, 14, 0, 0, 0, 0, 0, 0, 0, 0);
  _mm256_storeu_ps(out, _mm512_castps512_ps256(_mm512_permutexvar_ps(order, sum)));
#else
  for (int i = 0; i < 8; i++) out[i] = sum_lanes(a[i]);
#endif
}

// Ask for the cache lines of [p, p + bytes), into the second-level cache: the few line buffers of the first are what limits
// one core's reading, and requests for the second hold them for a shorter time (docs/LOG.md, 2026-11-26).
INLINE void prefetch(const void* p, int bytes) {
  for (int i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i, 0, 2);
}

// The same for a stream that has come to p: from memory into the second level early, from there into the first late.
constexpr int kStreamAhead = 4096, kStreamSoon = 1024;  // bytes
INLINE void prefetch_stream(const void* p, int bytes) {
  for (int i = 0; i < bytes; i += 64) {
    __builtin_prefetch(static_cast<const char*>(p) + kStreamAhead + i, 0, 2);
    __builtin_prefetch(static_cast<const char*>(p) + kStreamSoon + i, 0, 3);
  }
}

// e^x for x <= 0: 2^n e^r with |r| <= ln 2 / 2, a polynomial of degree 6 (Taylor, next term below 2e-7 relative), and 0
// where the result would be below the smallest normal number.
INLINE f32x8 exp_nonpositive(f32x8 x) {
  const f32x8 clipped = maximum(x, set8(-87.0f));
  const f32x8 n = round_even(mul(clipped, set8(1.44269504f)));
  f32x8 r = fma(n, set8(-0.693359375f), clipped);  // ln 2 in two parts, the first exact in few bits
  r = fma(n, set8(2.12194440e-4f), r);
  f32x8 p = set8(1.0f / 720);
  p = fma(p, r, set8(1.0f / 120));
  p = fma(p, r, set8(1.0f / 24));
  p = fma(p, r, set8(1.0f / 6));
  p = fma(p, r, set8(0.5f));
  p = fma(p, r, set8(1.0f));
  p = fma(p, r, set8(1.0f));
  const f32x8 result = mul(p, exp2_integer(n));
#if defined(__AVX2__)
  return _mm256_and_ps(result, _mm256_cmp_ps(x, _mm256_set1_ps(-87.0f), _CMP_GE_OQ));
#else
  return each8(x, result, [](float a, float e) { return a >= -87.0f ? e : 0.0f; });
#endif
}

}  // namespace PERSIMMON_ISA
}  // namespace persimmon

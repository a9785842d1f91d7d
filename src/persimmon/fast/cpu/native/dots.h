// Integer dot products of one superblock of weights with one ActivationBlock: 256 products, eight group sums.
//
// Sums of small integers are exact, so every instruction set gives the same result:
//   AVX-512 VNNI  vpdpbusd, 32 products an instruction (unsigned weights times signed inputs)
//   AVX2          vpmaddubsw adds pairs into 16 bits: nibbles reach 8 * 2 * 15 * 127 = 30480 < 32768 over the superblock;
//                 int8 weights use |w| * sign(x, w) and are widened after every pair, 2 * 127 * 127 = 32258
//   portable      plain loops
// Each weight type offers load(p), dot(weights, codes) -> eight lanes, and the constant `offset` that the caller adds times
// the sum of the codes: value = dot + offset * sum is the group's exact sum of weight * code (or of a plane of it).
#pragma once
#include "simd.h"

namespace persimmon {
namespace PERSIMMON_ISA {

#if defined(__AVX512VNNI__)

// In 256-bit registers: a vector holds a word of each group, so the sums need no folding, and processors with one 512-bit
// unit are half as fast again this way.
struct Weights {
  __m256i v[8];
};
INLINE __m256i load_vector(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
INLINE Weights load_nibbles(const uint8_t* p) {
  const __m256i mask = _mm256_set1_epi8(15);
  Weights w;
  for (int i = 0; i < 4; i++) {
    const __m256i bytes = load_vector(p + 32 * i);
    w.v[i] = _mm256_and_si256(bytes, mask);
    w.v[4 + i] = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask);
  }
  return w;
}
INLINE Weights load_bytes(const uint8_t* p) {  // + 128: vpdpbusd wants unsigned weights
  const __m256i flip = _mm256_set1_epi8(static_cast<char>(0x80));
  Weights w;
  for (int i = 0; i < 8; i++) w.v[i] = _mm256_xor_si256(load_vector(p + 32 * i), flip);
  return w;
}
INLINE f32x8 dot(const Weights& w, const int8_t* x) {
  __m256i a = _mm256_setzero_si256(), b = a;
  for (int i = 0; i < 8; i += 2) {
    a = _mm256_dpbusd_epi32(a, w.v[i], load_vector(x + 32 * i));
    b = _mm256_dpbusd_epi32(b, w.v[i + 1], load_vector(x + 32 * i + 32));
  }
  return _mm256_cvtepi32_ps(_mm256_add_epi32(a, b));
}
INLINE f32x8 dot_nibbles(const Weights& w, const int8_t* x) { return dot(w, x); }
INLINE f32x8 dot_bytes(const Weights& w, const int8_t* x) { return dot(w, x); }
constexpr float kBytesOffset = -128.0f;

#elif defined(__AVX2__)

struct Weights {
  __m256i v[8];
};
INLINE __m256i load_vector(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
INLINE Weights load_nibbles(const uint8_t* p) {
  const __m256i mask = _mm256_set1_epi8(15);
  Weights w;
  for (int i = 0; i < 4; i++) {
    const __m256i bytes = load_vector(p + 32 * i);
    w.v[i] = _mm256_and_si256(bytes, mask);
    w.v[4 + i] = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask);
  }
  return w;
}
INLINE Weights load_bytes(const uint8_t* p) {
  Weights w;
  for (int i = 0; i < 8; i++) w.v[i] = load_vector(p + 32 * i);
  return w;
}
INLINE f32x8 dot_nibbles(const Weights& w, const int8_t* x) {
  __m256i a = _mm256_maddubs_epi16(w.v[0], load_vector(x)), b = _mm256_maddubs_epi16(w.v[1], load_vector(x + 32));
  for (int i = 2; i < 8; i += 2) {
    a = _mm256_add_epi16(a, _mm256_maddubs_epi16(w.v[i], load_vector(x + 32 * i)));
    b = _mm256_add_epi16(b, _mm256_maddubs_epi16(w.v[i + 1], load_vector(x + 32 * i + 32)));
  }
  return _mm256_cvtepi32_ps(_mm256_madd_epi16(_mm256_add_epi16(a, b), _mm256_set1_epi16(1)));
}
INLINE f32x8 dot_bytes(const Weights& w, const int8_t* x) {
  const __m256i one = _mm256_set1_epi16(1);
  __m256i a = _mm256_setzero_si256(), b = a;
  for (int i = 0; i < 8; i += 2) {
    const __m256i p = _mm256_maddubs_epi16(_mm256_abs_epi8(w.v[i]), _mm256_sign_epi8(load_vector(x + 32 * i), w.v[i]));
    const __m256i q = _mm256_maddubs_epi16(_mm256_abs_epi8(w.v[i + 1]),
                                           _mm256_sign_epi8(load_vector(x + 32 * i + 32), w.v[i + 1]));
    a = _mm256_add_epi32(a, _mm256_madd_epi16(p, one));
    b = _mm256_add_epi32(b, _mm256_madd_epi16(q, one));
  }
  return _mm256_cvtepi32_ps(_mm256_add_epi32(a, b));
}
constexpr float kBytesOffset = 0.0f;

#else

struct Weights {
  int8_t v[kSuperblock];
};
INLINE Weights load_nibbles(const uint8_t* p) {
  Weights w;
  for (int i = 0; i < 128; i++) w.v[i] = p[i] & 15, w.v[128 + i] = p[i] >> 4;
  return w;
}
INLINE Weights load_bytes(const uint8_t* p) { return read_unaligned<Weights>(p); }
INLINE f32x8 dot(const Weights& w, const int8_t* x) {
  int32_t sums[kLanes] = {};
  for (int v = 0; v < 8; v++)
    for (int g = 0; g < kLanes; g++)
      for (int b = 0; b < 4; b++) sums[g] += w.v[32 * v + 4 * g + b] * x[32 * v + 4 * g + b];
  return gather8([&sums](int g) { return static_cast<float>(sums[g]); });
}
INLINE f32x8 dot_nibbles(const Weights& w, const int8_t* x) { return dot(w, x); }
INLINE f32x8 dot_bytes(const Weights& w, const int8_t* x) { return dot(w, x); }
constexpr float kBytesOffset = 0.0f;

#endif

// The formats of layout.h. A row's dot product is factor * sum over groups of (weight scale * input scale) * value.
struct Q8 {
  static constexpr int bytes = kQ8Bytes, scales_at = 256;
  static constexpr float offset = kBytesOffset, factor = 1.0f;
  INLINE Weights load(const uint8_t* p) { return load_bytes(p); }
  INLINE f32x8 dot(const Weights& w, const int8_t* x) { return dot_bytes(w, x); }
};
struct Nibbles {
  INLINE Weights load(const uint8_t* p) { return load_nibbles(p); }
  INLINE f32x8 dot(const Weights& w, const int8_t* x) { return dot_nibbles(w, x); }
};
struct Q4 : Nibbles {
  static constexpr int bytes = kQ4Bytes, scales_at = 128;
  static constexpr float offset = -8.0f, factor = 1.0f;
};
// w = 16 high + low - 128, and low is 7.5 on average: 16 high - 120.5 = 16 (high - 241 / 32).
struct High : Nibbles {
  static constexpr int bytes = kQ4Bytes, scales_at = 128;
  static constexpr float offset = -241.0f / 32, factor = 16.0f;
};
struct Low : Nibbles {
  static constexpr int bytes = kLowBytes;
  static constexpr float offset = -7.5f, factor = 1.0f;
};

template <class F>
INLINE f32x8 group_values(const Weights& w, const ActivationBlock& x) {
  const f32x8 sums = F::dot(w, x.code);
  return F::offset == 0.0f ? sums : fma(set8(F::offset), load8(x.sum), sums);
}

}  // namespace PERSIMMON_ISA
}  // namespace persimmon

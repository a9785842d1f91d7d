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

// Planes take whole cache lines of codes: here 512 bits win over 256, as more of the work is unpacking (docs/LOG.md, 2026-11-27).
struct PlaneWeights {
  __m512i v[4];  // lane-order weights 64 k ..
};
INLINE __m512i load_line(const void* p) { return _mm512_loadu_si512(p); }
INLINE PlaneWeights load_top(const uint8_t* p) {
  const __m512i mask = _mm512_set1_epi8(3), bytes = load_line(p);
  return {{_mm512_and_si512(bytes, mask), _mm512_and_si512(_mm512_srli_epi16(bytes, 2), mask),
           _mm512_and_si512(_mm512_srli_epi16(bytes, 4), mask), _mm512_and_si512(_mm512_srli_epi16(bytes, 6), mask)}};
}
INLINE PlaneWeights load_rest(const uint8_t* p) {
  const __m512i four = _mm512_set1_epi8(15), two = _mm512_set1_epi8(0x30);
  const __m512i middle = load_line(p), a = load_line(p + 64), b = load_line(p + 128);
  const __m512i m[4] = {_mm512_slli_epi16(middle, 4), _mm512_slli_epi16(middle, 2), middle, _mm512_srli_epi16(middle, 2)};
  const __m512i low[4] = {a, b, _mm512_srli_epi16(a, 4), _mm512_srli_epi16(b, 4)};
  PlaneWeights w;
  for (int k = 0; k < 4; k++) w.v[k] = _mm512_or_si512(_mm512_and_si512(low[k], four), _mm512_and_si512(m[k], two));
  return w;
}
INLINE f32x8 dot_plane(const PlaneWeights& w, const int8_t* x) {
  __m512i a = _mm512_dpbusd_epi32(_mm512_setzero_si512(), w.v[0], load_line(x));
  __m512i b = _mm512_dpbusd_epi32(_mm512_setzero_si512(), w.v[1], load_line(x + 64));
  a = _mm512_dpbusd_epi32(a, w.v[2], load_line(x + 128));
  b = _mm512_dpbusd_epi32(b, w.v[3], load_line(x + 192));
  a = _mm512_add_epi32(a, b);
  return _mm256_cvtepi32_ps(_mm256_add_epi32(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1)));
}
INLINE f32x8 dot_top(const PlaneWeights& w, const int8_t* x) { return dot_plane(w, x); }
INLINE f32x8 dot_rest(const PlaneWeights& w, const int8_t* x) { return dot_plane(w, x); }

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

INLINE Weights load_top(const uint8_t* p) {
  const __m256i mask = _mm256_set1_epi8(3), a = load_vector(p), b = load_vector(p + 32);
  Weights w;
  w.v[0] = _mm256_and_si256(a, mask), w.v[1] = _mm256_and_si256(b, mask);
  w.v[2] = _mm256_and_si256(_mm256_srli_epi16(a, 2), mask), w.v[3] = _mm256_and_si256(_mm256_srli_epi16(b, 2), mask);
  w.v[4] = _mm256_and_si256(_mm256_srli_epi16(a, 4), mask), w.v[5] = _mm256_and_si256(_mm256_srli_epi16(b, 4), mask);
  w.v[6] = _mm256_and_si256(_mm256_srli_epi16(a, 6), mask), w.v[7] = _mm256_and_si256(_mm256_srli_epi16(b, 6), mask);
  return w;
}
INLINE Weights load_rest(const uint8_t* p) {
  const __m256i mask = _mm256_set1_epi8(0x30);
  Weights w = load_nibbles(p + 64);
  for (int i = 0; i < 2; i++) {
    const __m256i middle = load_vector(p + 32 * i);
    w.v[i] = _mm256_or_si256(w.v[i], _mm256_and_si256(_mm256_slli_epi16(middle, 4), mask));
    w.v[2 + i] = _mm256_or_si256(w.v[2 + i], _mm256_and_si256(_mm256_slli_epi16(middle, 2), mask));
    w.v[4 + i] = _mm256_or_si256(w.v[4 + i], _mm256_and_si256(middle, mask));
    w.v[6 + i] = _mm256_or_si256(w.v[6 + i], _mm256_and_si256(_mm256_srli_epi16(middle, 2), mask));
  }
  return w;
}
INLINE f32x8 dot_top(const Weights& w, const int8_t* x) { return dot_nibbles(w, x); }
INLINE f32x8 dot_rest(const Weights& w, const int8_t* x) {  // four products reach 4 * 63 * 127 = 32004
  const __m256i one = _mm256_set1_epi16(1);
  __m256i sum = _mm256_setzero_si256();
  for (int i = 0; i < 8; i += 2) {
    const __m256i a = _mm256_maddubs_epi16(w.v[i], load_vector(x + 32 * i));
    const __m256i b = _mm256_maddubs_epi16(w.v[i + 1], load_vector(x + 32 * i + 32));
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_add_epi16(a, b), one));
  }
  return _mm256_cvtepi32_ps(sum);
}

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

INLINE int two_bits(const uint8_t* p, int i) { return p[i % 64] >> (i / 64 * 2) & 3; }
INLINE Weights load_top(const uint8_t* p) {
  Weights w;
  for (int i = 0; i < kSuperblock; i++) w.v[i] = static_cast<int8_t>(two_bits(p, i));
  return w;
}
INLINE Weights load_rest(const uint8_t* p) {
  Weights w = load_nibbles(p + 64);
  for (int i = 0; i < kSuperblock; i++) w.v[i] = static_cast<int8_t>(w.v[i] | two_bits(p, i) << 4);
  return w;
}
INLINE f32x8 dot_top(const Weights& w, const int8_t* x) { return dot(w, x); }
INLINE f32x8 dot_rest(const Weights& w, const int8_t* x) { return dot(w, x); }

#endif

// The formats of layout.h. A row's dot product is factor * sum over groups of (weight scale * input scale) * value.
struct Q8 {
  static constexpr int bytes = kQ8Bytes, scales_at = 256;
  static constexpr float offset = kBytesOffset;
  INLINE Weights load(const uint8_t* p) { return load_bytes(p); }
  INLINE f32x8 dot(const Weights& w, const int8_t* x) { return dot_bytes(w, x); }
};
struct Q4 {
  static constexpr int bytes = kQ4Bytes, scales_at = 128;
  static constexpr float offset = -8.0f;
  INLINE Weights load(const uint8_t* p) { return load_nibbles(p); }
  INLINE f32x8 dot(const Weights& w, const int8_t* x) { return dot_nibbles(w, x); }
};
// w = 64 top + rest - 128, and rest is 31.5 on average: 64 top - 96.5 = 64 (top - 193 / 128).
struct Top {
  static constexpr int bytes = kTopBytes;
  static constexpr float offset = -193.0f / 128, factor = 64.0f;
  INLINE auto load(const uint8_t* p) { return load_top(p); }
  template <class W>
  INLINE f32x8 dot(const W& w, const int8_t* x) {
    return dot_top(w, x);
  }
};
struct Rest {
  static constexpr int bytes = kRestBytes;
  static constexpr float offset = -31.5f;
  INLINE auto load(const uint8_t* p) { return load_rest(p); }
  template <class W>
  INLINE f32x8 dot(const W& w, const int8_t* x) {
    return dot_rest(w, x);
  }
};

template <class F, class W>
INLINE f32x8 group_values(const W& w, const ActivationBlock& x) {
  const f32x8 sums = F::dot(w, x.code);
  return F::offset == 0.0f ? sums : fma(set8(F::offset), load8(x.sum), sums);
}

}  // namespace PERSIMMON_ISA
}  // namespace persimmon

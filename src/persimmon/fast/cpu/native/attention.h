// One query against all keys and values of its head: softmax(q . K) . V, over a float32 or an int8 cache.
//
// Keys are stored eight to a block with one key per lane (layout in kernels.h), so that scores need no sums across lanes.
// int8: the query is rounded to int8 as well, scores are exact integer dot products times two scales; values are widened
// and weighted in float32. Rounding q, k and v to int8 costs about 0.5% noise each on a score or value.
// Scores of all keys are kept, so the softmax subtracts the true maximum, and its sum runs over keys in a fixed order: the
// result does not depend on how a prompt was cut into chunks.
// Not supported: head dimensions that are not a multiple of 4 with int8.
#pragma once
#include "activations.h"
#include "dots.h"
#include "kernels.h"

namespace persimmon {
namespace PERSIMMON_ISA {

constexpr int kMaxHeadDim = 256;

// Eight int8 keys against q, whose four-byte pieces are repeated in all eight lanes of `query`.
INLINE f32x8 score_block(const int8_t* keys, const int8_t* query, int head_dim, float sum_offset) {
#if defined(__AVX512VNNI__)
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  __m512i a = _mm512_setzero_si512(), b = a;
  const int n = head_dim * 8;  // bytes of the block
  int i = 0;
  for (; i + 128 <= n; i += 128) {
    a = _mm512_dpbusd_epi32(a, _mm512_xor_si512(_mm512_loadu_si512(keys + i), flip), _mm512_loadu_si512(query + i));
    b = _mm512_dpbusd_epi32(b, _mm512_xor_si512(_mm512_loadu_si512(keys + i + 64), flip),
                            _mm512_loadu_si512(query + i + 64));
  }
  a = _mm512_add_epi32(a, b);
  __m256i s = _mm256_add_epi32(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
  for (; i < n; i += 32) {
    const __m256i k = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys + i));
    s = _mm256_dpbusd_epi32(s, _mm256_xor_si256(k, _mm512_castsi512_si256(flip)),
                            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(query + i)));
  }
  return fma(set8(-128.0f), set8(sum_offset), _mm256_cvtepi32_ps(s));
#elif defined(__AVX2__)
  (void)sum_offset;
  const __m256i one = _mm256_set1_epi16(1);
  __m256i sum = _mm256_setzero_si256();
  for (int i = 0; i < head_dim * 8; i += 32) {
    const __m256i k = load_vector(keys + i), q = load_vector(query + i);
    sum = _mm256_add_epi32(
        sum, _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(k), _mm256_sign_epi8(q, k)), one));
  }
  return _mm256_cvtepi32_ps(sum);
#else
  (void)sum_offset;
  int32_t sums[8] = {};
  for (int i = 0; i < head_dim * 8; i += 32)
    for (int key = 0; key < 8; key++)
      for (int b = 0; b < 4; b++) sums[key] += keys[i + 4 * key + b] * query[i + 4 * key + b];
  return gather8([&sums](int key) { return static_cast<float>(sums[key]); });
#endif
}

static void scores_int8(const AttentionArgs& a) {
  int8_t codes[kMaxHeadDim], query[8 * kMaxHeadDim];
  const float q_scale = quantize_head(a.q, a.head_dim, codes) * a.scale;
  float sum = 0.0f;
  for (int d = 0; d < a.head_dim; d++) sum += codes[d];
  for (int j = 0; j < a.head_dim / 4; j++)
    for (int key = 0; key < 8; key++) memcpy(query + 32 * j + 4 * key, codes + 4 * j, 4);
  const int8_t* keys = static_cast<const int8_t*>(a.keys);
  for (int k = 0; k < a.length; k += 8, keys += 8 * a.head_dim) {
    const f32x8 s = score_block(keys, query, a.head_dim, sum);
    store8(a.scores + k, mul(s, mul(set8(q_scale), load8(a.key_scales + k))));
  }
}

static void scores_float(const AttentionArgs& a) {
  float query[kMaxHeadDim];
  for (int d = 0; d < a.head_dim; d++) query[d] = a.q[d] * a.scale;
  const float* keys = static_cast<const float*>(a.keys);
  const int block = 8 * a.head_dim;
  int k = 0;
  for (; k + 32 <= a.length; k += 32, keys += 4 * block) {  // four blocks at a time hide the latency of the sums
    f32x8 s[4] = {zero8(), zero8(), zero8(), zero8()};
    for (int d = 0; d < a.head_dim; d++)
      for (int b = 0; b < 4; b++) s[b] = fma(set8(query[d]), load8(keys + b * block + 8 * d), s[b]);
    for (int b = 0; b < 4; b++) store8(a.scores + k + 8 * b, s[b]);
  }
  for (; k < a.length; k += 8, keys += block) {
    f32x8 s = zero8();
    for (int d = 0; d < a.head_dim; d++) s = fma(set8(query[d]), load8(keys + 8 * d), s);
    store8(a.scores + k, s);
  }
}

// Scores -> e^(score - maximum) in place, zero behind the last key; returns their sum.
static float exponentials(float* scores, int length) {
  f32x8 largest = set8(-HUGE_VALF);
  const int padded = static_cast<int>(round_up(length, 8));
  for (int k = length; k < padded; k++) scores[k] = -HUGE_VALF;
  for (int k = 0; k < padded; k += 8) largest = maximum(load8(scores + k), largest);
  const f32x8 top = set8(max_lanes(largest));
  f32x8 sum = zero8();
  for (int k = 0; k < padded; k += 8) {
    const f32x8 e = exp_nonpositive(sub(load8(scores + k), top));
    store8(scores + k, e);
    sum = add(e, sum);
  }
  return sum_lanes(sum);
}

INLINE f32x16 load_value16(const float* p) { return load16(p); }
INLINE f32x16 load_value16(const int8_t* p) { return load_int8x16(p); }

// N dimensions from `from` of the weighted sum of all values.
template <class T, int N>
static void weighted_values(const AttentionArgs& a, int from, float inverse) {
  const T* v = static_cast<const T*>(a.values) + from;
  f32x16 sum[N / 16];
  for (int i = 0; i < N / 16; i++) sum[i] = zero16();
  for (int k = 0; k < a.length; k++, v += a.head_dim) {
    const f32x16 w = set16(a.scores[k]);
    for (int i = 0; i < N / 16; i++) sum[i] = fma(w, load_value16(v + 16 * i), sum[i]);
  }
  for (int i = 0; i < N / 16; i++) store16(a.out + from + 16 * i, mul(sum[i], set16(inverse)));
}

template <class T>
static void gather_values(const AttentionArgs& a, float inverse) {
  int d = 0;
  for (; d + 64 <= a.head_dim; d += 64) weighted_values<T, 64>(a, d, inverse);
  for (; d + 16 <= a.head_dim; d += 16) weighted_values<T, 16>(a, d, inverse);
  for (; d < a.head_dim; d++) {
    float sum = 0.0f;
    for (int k = 0; k < a.length; k++)
      sum = fma1(a.scores[k], static_cast<float>(static_cast<const T*>(a.values)[k * a.head_dim + d]), sum);
    a.out[d] = sum * inverse;
  }
}

static void attend_int8(const AttentionArgs& a) {
  scores_int8(a);
  const float inverse = 1.0f / exponentials(a.scores, a.length);
  for (int k = 0; k < a.length; k += 8) store8(a.scores + k, mul(load8(a.scores + k), load8(a.value_scales + k)));
  gather_values<int8_t>(a, inverse);
}

static void attend_float(const AttentionArgs& a) {
  scores_float(a);
  gather_values<float>(a, 1.0f / exponentials(a.scores, a.length));
}

}  // namespace PERSIMMON_ISA
}  // namespace persimmon

// Queries of one head against the cached keys and values of their sequence: softmax(q . K) . V, float32 or int8.
//
// Keys are taken in tiles of 64, counted from the start of the sequence. Each tile gives its scores, raises the running
// maximum if it must (earlier sums are then scaled down), and adds its weighted values to the output (online softmax,
// Milakov and Gimelshein 2018). So keys and values are streamed once and nothing grows with their number; up to kQueryTile
// queries share each tile while it is in the first-level cache, a few at a time in registers.
//
// For a lone token the memory is the limit. Its heads take each tile in turn, since their records of a block lie behind each
// other: memory is read in long pieces, with blocks of 16 tokens four at a time. The next tile is prefetched line by line
// while this one is computed.
//
// A query's result depends on its own position and the keys before it alone: tiles lie at fixed places, sums run over
// dimensions and keys in order, a scaling by one is left out, a key behind the query has weight zero. So one query or many,
// any cut of a prompt, any table of blocks and every instruction set give the same bits.
//
// int8: the query is rounded to int8 as well, scores are exact integer dot products times two scales. The weights of a tile
// are rounded to 14 bits, two planes of seven that two integer products take (2 operations for 64 bytes of values where
// widening to float32 takes 12); sums of a tile are exact, and added up in float32. Rounding q, k and v to int8 costs about
// 0.5% noise each on a score or value, rounding a weight at most 0.003% of the tile's largest: 0.2% if all 63 others err alike.
// Not supported: head dimensions that are not a multiple of 4, or above kMaxHeadDim.
#pragma once
#include "activations.h"
#include "kernels.h"

namespace persimmon {
namespace PERSIMMON_ISA {

constexpr int kTileGroups = 4;
constexpr int kTileKeys = kTileGroups * kKeyGroup;
constexpr int kWeightBits = 7, kLowMask = (1 << kWeightBits) - 1;  // of each of the two planes of a rounded weight
constexpr float kLargestWeight = (1 << 2 * kWeightBits) - 1;
constexpr float kSmallestTop = 1e-34f;  // stands in for smaller largest weights, so that kLargestWeight / top is finite
#if defined(__AVX512F__)
constexpr int kQueriesAtOnce = 4, kVectorsAtOnce = 4;  // 16 sums of 16 lanes: half of the registers
#else
constexpr int kQueriesAtOnce = 2, kVectorsAtOnce = 2;
#endif

// ---- sixteen lanes of softmax --------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
INLINE f32x16 less(f32x16 a, f32x16 b) { return _mm512_sub_ps(a, b); }
INLINE f32x16 larger(f32x16 a, f32x16 b) { return _mm512_max_ps(a, b); }
INLINE bool equal_lanes(f32x16 a, float value) { return _mm512_cmp_ps_mask(a, set16(value), _CMP_EQ_OQ); }
INLINE float largest_lane(f32x16 a) { return max_lanes(maximum(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1))); }
// exp_nonpositive of simd.h, the same operations in twice the lanes.
INLINE f32x16 exp_nonpositive16(f32x16 x) {
  const f32x16 clipped = _mm512_max_ps(x, set16(-87.0f));
  const f32x16 n = _mm512_roundscale_ps(mul(clipped, set16(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const f32x16 r = fma(n, set16(2.12194440e-4f), fma(n, set16(-0.693359375f), clipped));
  f32x16 p = set16(1.0f / 720);
  p = fma(p, r, set16(1.0f / 120));
  p = fma(p, r, set16(1.0f / 24));
  p = fma(p, r, set16(1.0f / 6));
  p = fma(p, r, set16(0.5f));
  p = fma(p, r, set16(1.0f));
  p = fma(p, r, set16(1.0f));
  const __m512i exponent = _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23);
  return _mm512_maskz_mul_ps(_mm512_cmp_ps_mask(x, set16(-87.0f), _CMP_GE_OQ), p, _mm512_castsi512_ps(exponent));
}
#else
INLINE f32x16 less(f32x16 a, f32x16 b) { return {sub(a.lo, b.lo), sub(a.hi, b.hi)}; }
INLINE f32x16 larger(f32x16 a, f32x16 b) { return {maximum(a.lo, b.lo), maximum(a.hi, b.hi)}; }
INLINE bool equal_lanes(f32x16 a, float value) {  // any of them
  float lanes[16];
  store16(lanes, a);
  bool found = false;
  for (int i = 0; i < 16; i++) found |= lanes[i] == value;
  return found;
}
INLINE float largest_lane(f32x16 a) { return max_lanes(maximum(a.lo, a.hi)); }
INLINE f32x16 exp_nonpositive16(f32x16 x) { return {exp_nonpositive(x.lo), exp_nonpositive(x.hi)}; }
#endif

// Weights times the scales of values; without weight 0, whatever stands where the scale of a key would be that is not there.
INLINE f32x16 scale_weights(f32x16 weights, f32x16 scales) {
#if defined(__AVX512F__)
  return _mm512_maskz_mul_ps(_mm512_cmp_ps_mask(weights, zero16(), _CMP_GT_OQ), weights, scales);
#elif defined(__AVX2__)
  const auto half = [](f32x8 w, f32x8 s) { return _mm256_and_ps(_mm256_cmp_ps(w, zero8(), _CMP_GT_OQ), mul(w, s)); };
  return {half(weights.lo, scales.lo), half(weights.hi, scales.hi)};
#else
  const auto half = [](f32x8 w, f32x8 s) { return each8(w, s, [](float a, float b) { return a > 0.0f ? a * b : 0.0f; }); };
  return {half(weights.lo, scales.lo), half(weights.hi, scales.hi)};
#endif
}

// Sixteen weights from 0 to kLargestWeight, rounded to integers: their upper and their lower bits.
INLINE void store_planes(f32x16 weights, uint8_t* high, uint8_t* low) {
#if defined(__AVX512F__)
  const __m512i codes = _mm512_cvtps_epi32(weights);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(high), _mm512_cvtepi32_epi8(_mm512_srli_epi32(codes, kWeightBits)));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(low), _mm512_cvtepi32_epi8(_mm512_and_si512(codes, _mm512_set1_epi32(kLowMask))));
#elif defined(__AVX2__)
  const __m256i mixed = _mm256_packus_epi32(_mm256_cvtps_epi32(weights.lo), _mm256_cvtps_epi32(weights.hi));
  const __m256i codes = _mm256_permute4x64_epi64(mixed, 0xD8);
  const __m256i planes = _mm256_packus_epi16(_mm256_srli_epi16(codes, kWeightBits), _mm256_and_si256(codes, _mm256_set1_epi16(kLowMask)));
  const __m256i sorted = _mm256_permute4x64_epi64(planes, 0xD8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(high), _mm256_castsi256_si128(sorted));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(low), _mm256_extracti128_si256(sorted, 1));
#else
  float rounded[16];
  store16(rounded, {round_even(weights.lo), round_even(weights.hi)});
  for (int i = 0; i < 16; i++) {
    const int code = rounded[i] > 0.0f ? static_cast<int>(rounded[i]) : 0;  // no number: 0, as elsewhere
    high[i] = static_cast<uint8_t>(code >> kWeightBits), low[i] = static_cast<uint8_t>(code & kLowMask);
  }
#endif
}

// ---- sixteen times four int8 products at once: sums[t] += codes[4 t .. 4 t + 3] . word ------------------------------------

#if defined(__AVX512VNNI__)
using Codes = __m512i;
using Sums = __m512i;
INLINE Codes load_codes(const uint8_t* p) { return _mm512_loadu_si512(p); }
INLINE Sums no_sums() { return _mm512_setzero_si512(); }
// The instruction wants one side from 0 to 255: keys are moved there, and their sums start where that is made up for.
INLINE Codes load_keys(const uint8_t* p) { return _mm512_xor_si512(load_codes(p), _mm512_set1_epi8(static_cast<char>(0x80))); }
INLINE Sums first_sums(int32_t query_sum) { return _mm512_set1_epi32(-128 * query_sum); }
INLINE Sums add_dots(Sums sums, Codes keys, int32_t query) { return _mm512_dpbusd_epi32(sums, keys, _mm512_set1_epi32(query)); }
INLINE f32x16 to_floats(Sums sums) { return _mm512_cvtepi32_ps(sums); }
struct WeightedSums {
  __m512i high, low;
};
INLINE WeightedSums no_weighted_sums() { return {no_sums(), no_sums()}; }
INLINE WeightedSums add_weighted(WeightedSums sums, Codes values, int32_t high, int32_t low) {
  return {_mm512_dpbusd_epi32(sums.high, _mm512_set1_epi32(high), values),
          _mm512_dpbusd_epi32(sums.low, _mm512_set1_epi32(low), values)};
}
INLINE f32x16 to_floats(WeightedSums sums) { return to_floats(_mm512_add_epi32(_mm512_slli_epi32(sums.high, kWeightBits), sums.low)); }
#elif defined(__AVX2__)
struct Codes {
  __m256i lo, hi;
};
using Sums = Codes;
using WeightedSums = Codes;
INLINE Codes load_codes(const uint8_t* p) {
  const __m256i* v = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(v), _mm256_loadu_si256(v + 1)};
}
INLINE Codes load_keys(const uint8_t* p) { return load_codes(p); }
INLINE Sums first_sums(int32_t) { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
INLINE __m256i add_dots8(__m256i sums, __m256i keys, __m256i query) {
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(keys), _mm256_sign_epi8(query, keys));
  return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
INLINE Sums add_dots(Sums sums, Codes keys, int32_t query) {
  const __m256i q = _mm256_set1_epi32(query);
  return {add_dots8(sums.lo, keys.lo, q), add_dots8(sums.hi, keys.hi, q)};
}
INLINE f32x16 to_floats(Sums sums) { return {_mm256_cvtepi32_ps(sums.lo), _mm256_cvtepi32_ps(sums.hi)}; }
INLINE WeightedSums no_weighted_sums() { return first_sums(0); }
// Pairs of products of seven bits with a code fit into 16 bits.
INLINE __m256i add_weighted8(__m256i sums, __m256i values, __m256i high, __m256i low) {
  const __m256i highs = _mm256_madd_epi16(_mm256_maddubs_epi16(high, values), _mm256_set1_epi16(1 << kWeightBits));
  const __m256i lows = _mm256_madd_epi16(_mm256_maddubs_epi16(low, values), _mm256_set1_epi16(1));
  return _mm256_add_epi32(sums, _mm256_add_epi32(highs, lows));
}
INLINE WeightedSums add_weighted(WeightedSums sums, Codes values, int32_t high, int32_t low) {
  const __m256i h = _mm256_set1_epi32(high), l = _mm256_set1_epi32(low);
  return {add_weighted8(sums.lo, values.lo, h, l), add_weighted8(sums.hi, values.hi, h, l)};
}
#else
struct Codes {
  int8_t code[64];
};
struct Sums {
  int32_t v[16];
};
using WeightedSums = Sums;
INLINE Codes load_codes(const uint8_t* p) { return read_unaligned<Codes>(p); }
INLINE Codes load_keys(const uint8_t* p) { return load_codes(p); }
INLINE Sums first_sums(int32_t) { return {}; }
INLINE Sums add_dots(Sums sums, const Codes& keys, int32_t query) {
  int8_t q[4];
  memcpy(q, &query, 4);
  for (int t = 0; t < 16; t++)
    for (int b = 0; b < 4; b++) sums.v[t] += keys.code[4 * t + b] * q[b];
  return sums;
}
INLINE f32x16 to_floats(const Sums& sums) {
  float floats[16];
  for (int t = 0; t < 16; t++) floats[t] = static_cast<float>(sums.v[t]);
  return load16(floats);
}
INLINE WeightedSums no_weighted_sums() { return {}; }
INLINE WeightedSums add_weighted(WeightedSums sums, const Codes& values, int32_t high, int32_t low) {
  int8_t h[4], l[4];
  memcpy(h, &high, 4), memcpy(l, &low, 4);
  for (int d = 0; d < 16; d++)
    for (int b = 0; b < 4; b++) sums.v[d] += values.code[4 * d + b] * ((h[b] << kWeightBits) + l[b]);
  return sums;
}
#endif

// ---- the two kinds of cache ----------------------------------------------------------------------------------------------

// The records of a tile, and of the one after it.
struct KeyTile {
  const uint8_t *group[kTileGroups], *next[kTileGroups];

  // Line `offset` of a record of the next tile.
  inline __attribute__((always_inline)) void fetch(int record, size_t offset) const { __builtin_prefetch(next[record] + offset); }
};

struct FloatCache {
  explicit FloatCache(const AttentionArgs& a) : q(a.q), stride(a.q_stride), dim(a.head_dim), scale(a.scale) {}

  // scores[i][64] of Q queries from `first`, for V records from `from`.
  template <int Q, int V>
  inline __attribute__((always_inline)) void scores(int first, const KeyTile& tile, int from, float* scores) const {
    f32x16 sums[Q][V];
    for (int i = 0; i < Q; i++)
      for (int v = 0; v < V; v++) sums[i][v] = zero16();
    for (int d = 0; d < dim; d++) {
      f32x16 keys[V];
      for (int v = 0; v < V; v++) {
        keys[v] = load16(reinterpret_cast<const float*>(tile.group[from + v]) + kKeyGroup * d);
        if (Q == 1) tile.fetch(from + v, 64 * d);
      }
      for (int i = 0; i < Q; i++) {
        const f32x16 x = set16(q[(first + i) * stride + d]);
        for (int v = 0; v < V; v++) sums[i][v] = fma(x, keys[v], sums[i][v]);
      }
    }
    for (int i = 0; i < Q; i++)
      for (int v = 0; v < V; v++) store16(scores + kTileKeys * i + kKeyGroup * (from + v), mul(sums[i][v], set16(scale)));
  }

  // out[i][D] += sum over the first `keys` keys of weights[i][key] * value, for Q queries.
  template <int Q>
  inline __attribute__((always_inline)) void add_values(const KeyTile& tile, int keys, const float* weights, float* out,
                                                        size_t out_stride) const {
    int d = 0;
    for (; d + 16 * kVectorsAtOnce <= dim; d += 16 * kVectorsAtOnce)
      add_vectors<Q, kVectorsAtOnce>(tile, keys, d, weights, out, out_stride);
    for (; d + 16 <= dim; d += 16) add_vectors<Q, 1>(tile, keys, d, weights, out, out_stride);
    for (; d < dim; d++)
      for (int i = 0; i < Q; i++) {
        float* sum = out + i * out_stride + d;
        for (int k = 0; k < keys; k++) *sum = fma1(weights[kTileKeys * i + k], value(tile, k)[d], *sum);
      }
  }

  template <int Q, int V>
  inline __attribute__((always_inline)) void add_vectors(const KeyTile& tile, int keys, int from, const float* weights,
                                                         float* out, size_t out_stride) const {
    f32x16 sums[Q][V];
    for (int i = 0; i < Q; i++)
      for (int v = 0; v < V; v++) sums[i][v] = load16(out + i * out_stride + from + 16 * v);
    for (int k = 0; k < keys; k++) {
      f32x16 values[V];
      for (int v = 0; v < V; v++) {
        const float* place = value(tile, k) + from + 16 * v;
        values[v] = load16(place);
        if (Q == 1) tile.fetch(k / kKeyGroup, reinterpret_cast<const uint8_t*>(place) - tile.group[k / kKeyGroup]);
      }
      for (int i = 0; i < Q; i++) {
        const f32x16 w = set16(weights[kTileKeys * i + k]);
        for (int v = 0; v < V; v++) sums[i][v] = fma(w, values[v], sums[i][v]);
      }
    }
    for (int i = 0; i < Q; i++)
      for (int v = 0; v < V; v++) store16(out + i * out_stride + from + 16 * v, sums[i][v]);
  }

  inline __attribute__((always_inline)) const float* value(const KeyTile& tile, int k) const {
    return reinterpret_cast<const float*>(tile.group[k / kKeyGroup]) + (kKeyGroup + k % kKeyGroup) * dim;
  }

  const float* q;
  size_t stride;
  int dim;
  float scale;
};

struct Int8Cache {
  explicit Int8Cache(const AttentionArgs& a) : dim(a.head_dim) {
    for (int i = 0; i < a.queries; i++) {
      int8_t codes[kMaxHeadDim];
      scale[i] = quantize_head(a.q + i * a.q_stride, dim, codes) * a.scale;
      sum[i] = 0;
      for (int d = 0; d < dim; d++) sum[i] += codes[d];
      memcpy(words[i], codes, dim);
    }
  }

  template <int Q, int V>
  inline __attribute__((always_inline)) void scores(int first, const KeyTile& tile, int from, float* scores) const {
    Sums sums[Q][V];
    for (int i = 0; i < Q; i++)
      for (int v = 0; v < V; v++) sums[i][v] = first_sums(sum[first + i]);
    for (int j = 0; j < dim / 4; j++) {
      Codes keys[V];
      for (int v = 0; v < V; v++) {
        keys[v] = load_keys(tile.group[from + v] + 64 * j);
        if (Q == 1) tile.fetch(from + v, 64 * j);
      }
      for (int i = 0; i < Q; i++)
        for (int v = 0; v < V; v++) sums[i][v] = add_dots(sums[i][v], keys[v], words[first + i][j]);
    }
    for (int v = 0; v < V; v++) {
      const f32x16 key_scales = load16(reinterpret_cast<const float*>(tile.group[from + v] + kKeyGroup * dim));
      if (Q == 1) tile.fetch(from + v, kKeyGroup * dim);
      for (int i = 0; i < Q; i++)
        store16(scores + kTileKeys * i + kKeyGroup * (from + v),
                mul(to_floats(sums[i][v]), mul(set16(scale[first + i]), key_scales)));
    }
  }

  template <int Q>
  inline __attribute__((always_inline)) void add_values(const KeyTile& tile, int keys, const float* weights, float* out,
                                                        size_t out_stride) const {
    RoundedWeights rounded[Q];
    for (int i = 0; i < Q; i++) rounded[i].unit = round_weights(tile, weights + kTileKeys * i, rounded[i].high, rounded[i].low);
    if (Q == 1)
      for (int g = 0; g < kTileGroups; g++) tile.fetch(g, int8_values_offset(dim) + kKeyGroup * dim);
    constexpr int V = Q == 1 ? kVectorsAtOnce : 2;  // each may have two sums
    int d = 0;
    for (; d + 16 * V <= dim; d += 16 * V) add_vectors<Q, V>(tile, keys, d, rounded, out, out_stride);
    for (; d + 16 <= dim; d += 16) add_vectors<Q, 1>(tile, keys, d, rounded, out, out_stride);
    for (; d < dim; d++)
      for (int i = 0; i < Q; i++) {
        int32_t total = 0;
        for (int k = 0; k < keys; k++)
          total += ((rounded[i].high[k] << kWeightBits) + rounded[i].low[k]) * static_cast<int8_t>(values(tile, k)[4 * d + k % 4]);
        out[i * out_stride + d] = fma1(rounded[i].unit, static_cast<float>(total), out[i * out_stride + d]);
      }
  }

  struct RoundedWeights {  // unit * (2^7 high + low): the weight of a value with its scale
    float unit;
    uint8_t high[kTileKeys], low[kTileKeys];
  };

  // Returns the unit.
  inline __attribute__((always_inline)) float round_weights(const KeyTile& tile, const float* weights, uint8_t* high, uint8_t* low) const {
    f32x16 scaled[kTileGroups], best = set16(kSmallestTop);
    for (int g = 0; g < kTileGroups; g++) {
      const uint8_t* scales = tile.group[g] + int8_values_offset(dim) + kKeyGroup * dim;
      scaled[g] = scale_weights(load16(weights + kKeyGroup * g), load16(reinterpret_cast<const float*>(scales)));
      best = larger(best, scaled[g]);
    }
    const float top = largest_lane(best);
    for (int g = 0; g < kTileGroups; g++)
      store_planes(mul(scaled[g], set16(kLargestWeight / top)), high + kKeyGroup * g, low + kKeyGroup * g);
    return top / kLargestWeight;
  }

  template <int Q, int V>
  inline __attribute__((always_inline)) void add_vectors(const KeyTile& tile, int keys, int from,
                                                         const RoundedWeights* weights, float* out, size_t out_stride) const {
    WeightedSums sums[Q][V];
    for (int i = 0; i < Q; i++)
      for (int v = 0; v < V; v++) sums[i][v] = no_weighted_sums();
    for (int k = 0; k < keys; k += 4) {
      const uint8_t* place = values(tile, k) + 4 * from;
      Codes codes[V];
      for (int v = 0; v < V; v++) {
        codes[v] = load_codes(place + 64 * v);
        if (Q == 1) tile.fetch(k / kKeyGroup, place + 64 * v - tile.group[k / kKeyGroup]);
      }
      for (int i = 0; i < Q; i++) {
        const int32_t high = read_unaligned<int32_t>(weights[i].high + k), low = read_unaligned<int32_t>(weights[i].low + k);
        for (int v = 0; v < V; v++) sums[i][v] = add_weighted(sums[i][v], codes[v], high, low);
      }
    }
    for (int i = 0; i < Q; i++)
      for (int v = 0; v < V; v++) {
        float* sum = out + i * out_stride + from + 16 * v;
        store16(sum, fma(set16(weights[i].unit), to_floats(sums[i][v]), load16(sum)));
      }
  }

  // The values of four keys from k - k % 4 on, dimension by dimension.
  inline __attribute__((always_inline)) const uint8_t* values(const KeyTile& tile, int k) const {
    return tile.group[k / kKeyGroup] + int8_values_offset(dim) + k % kKeyGroup / 4 * 4 * dim;
  }

  int dim;
  float scale[kQueryTile];
  int32_t sum[kQueryTile];
  int32_t words[kQueryTile][kMaxHeadDim / 4];  // the codes, four to a word
};

// ---- one tile after the other --------------------------------------------------------------------------------------------

struct Softmax {
  float top = -HUGE_VALF;
  f32x16 sum = zero16();  // of e^(score - top), key k in lane k mod 16
};

// Scores [64] -> weights in place; the `visible` first keys count. Scales what `out` [D] holds to the new maximum.
INLINE void to_weights(int visible, float* scores, Softmax* state, float* out, int dim) {
  for (int k = visible; k < kTileKeys; k++) scores[k] = -HUGE_VALF;
  f32x16 best = load16(scores);
  for (int k = kKeyGroup; k < kTileKeys; k += kKeyGroup) best = larger(best, load16(scores + k));
  const float top = largest_lane(best);
  if (top > state->top) {
    const f32x16 shrink = exp_nonpositive16(less(set16(state->top), set16(top)));
    float factor[16];
    store16(factor, shrink);
    for (int d = 0; d < dim; d++) out[d] *= factor[0];
    state->sum = mul(state->sum, shrink);
    state->top = top;
  }
  for (int g = 0; g < kTileGroups; g++) {
    const f32x16 e = exp_nonpositive16(less(load16(scores + kKeyGroup * g), set16(state->top)));
    state->sum = add(state->sum, e);
    store16(scores + kKeyGroup * g, e);
  }
}

// Q queries from `first`, the first of them at `position`, against one tile of which the sequence has `keys` keys; the first
// of them is key `start`.
template <int Q, class Cache>
INLINE void attend_tile(const AttentionArgs& a, const Cache& cache, const KeyTile& tile, int start, int keys, int first,
                        int position, Softmax* states) {
  float scores[Q * kTileKeys];
  float* out = a.out + first * a.out_stride;
  for (int g = 0; g < kTileGroups; g += kVectorsAtOnce) cache.template scores<Q, kVectorsAtOnce>(first, tile, g, scores);
  for (int i = 0; i < Q; i++) {
    const int visible = position + i + 1 - start;
    to_weights(visible, scores + kTileKeys * i, states + first + i, out + i * a.out_stride, a.head_dim);
  }
  const int last = min_int(keys, position + Q - start);
  cache.template add_values<Q>(tile, last, scores, out, a.out_stride);
}

// The records of the tile that begins with key `start`; those behind the last key repeat one that is there.
INLINE void find_groups(const AttentionArgs& a, int start, int keys, const uint8_t** group) {
  for (int g = 0; g < kTileGroups; g++) {
    const int index = (start + (g * kKeyGroup < keys ? g * kKeyGroup : 0)) / kKeyGroup;
    group[g] = a.base + a.table[index / a.groups_per_block] * a.block_bytes + index % a.groups_per_block * a.group_bytes;
  }
}

// One token: "queries" are its heads, whose records lie head_bytes apart.
template <class Cache>
INLINE void attend_heads(const AttentionArgs& a, const Cache& cache, Softmax* states) {
  const int length = a.position + 1;
  const uint8_t *group[kTileGroups], *after[kTileGroups];
  KeyTile tile;
  // Head i of the tile at hand; behind the last head come the heads of the tile after it.
  const auto locate = [&](int i, const uint8_t** out) {
    for (int g = 0; g < kTileGroups; g++)
      out[g] = i < a.queries ? group[g] + i * a.head_bytes : after[g] + (i - a.queries) * a.head_bytes;
  };
  find_groups(a, 0, length, after);
  for (int start = 0; start < length; start += kTileKeys) {
    const int keys = min_int(kTileKeys, length - start);
    memcpy(group, after, sizeof group);
    if (start + kTileKeys < length) find_groups(a, start + kTileKeys, length - start - kTileKeys, after);
    for (int i = 0; i < a.queries; i++) {
      locate(i, tile.group), locate(i + 1, tile.next);
      attend_tile<1>(a, cache, tile, start, keys, i, a.position, states);
    }
  }
}

template <class Cache>
INLINE void attend_queries(const AttentionArgs& a, const Cache& cache, Softmax* states) {
  const int length = a.position + a.queries;
  KeyTile tile;
  find_groups(a, 0, length, tile.next);
  for (int start = 0; start < length; start += kTileKeys) {
    memcpy(tile.group, tile.next, sizeof tile.group);
    if (start + kTileKeys < length) find_groups(a, start + kTileKeys, length - start - kTileKeys, tile.next);
    const int keys = min_int(kTileKeys, length - start);
    int i = start > a.position ? start - a.position : 0;  // earlier queries do not see this tile
    for (; i + kQueriesAtOnce <= a.queries; i += kQueriesAtOnce)
      attend_tile<kQueriesAtOnce>(a, cache, tile, start, keys, i, a.position + i, states);
    for (; i < a.queries; i++) attend_tile<1>(a, cache, tile, start, keys, i, a.position + i, states);
  }
}

INLINE void clear_output(const AttentionArgs& a) {
  for (int i = 0; i < a.queries; i++)
    for (int d = 0; d < a.head_dim; d++) a.out[i * a.out_stride + d] = 0.0f;
}

INLINE void divide_by_sums(const AttentionArgs& a, const Softmax* states) {
  for (int i = 0; i < a.queries; i++) {
    const float inverse = 1.0f / sum_lanes(states[i].sum);
    for (int d = 0; d < a.head_dim; d++) a.out[i * a.out_stride + d] *= inverse;
  }
}

template <class Cache>
INLINE void attend(const AttentionArgs& a) {
  const Cache cache(a);
  Softmax states[kQueryTile];
  clear_output(a);
  if (a.head_bytes) attend_heads(a, cache, states);
  else attend_queries(a, cache, states);
  divide_by_sums(a, states);
}

// Of `count` logits; logit k is in lane k mod 16.
static RowSummary summarize(const float* logits, int count) {
  const auto piece = [&](int k) {
    float tail[16];
    if (k + 16 <= count) return load16(logits + k);
    for (int i = 0; i < 16; i++) tail[i] = k + i < count ? logits[k + i] : -HUGE_VALF;
    return load16(tail);
  };
  f32x16 best = set16(-HUGE_VALF), sum = zero16();
  for (int k = 0; k < count; k += 16) best = larger(best, piece(k));
  RowSummary found = {largest_lane(best), 0, 0.0f};
  for (int k = 0; k < count; k += 16) sum = add(sum, exp_nonpositive16(less(piece(k), set16(found.top))));
  found.sum = sum_lanes(sum);
  while (found.at + 16 < count && !equal_lanes(load16(logits + found.at), found.top)) found.at += 16;
  while (found.at + 1 < count && logits[found.at] != found.top) found.at++;
  return found;
}

static void attend_int8(const AttentionArgs& a) { attend<Int8Cache>(a); }
static void attend_float(const AttentionArgs& a) { attend<FloatCache>(a); }

}  // namespace PERSIMMON_ISA
}  // namespace persimmon

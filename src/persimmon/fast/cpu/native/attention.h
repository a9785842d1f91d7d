// Queries of one head against the cached keys and values of their sequence: softmax(q . K) . V, float32 or int8.
//
// Keys are taken in tiles of 64, counted from the start of the sequence. Each tile gives its scores, raises the running
// maximum if it must (earlier sums are then scaled down), and adds its weighted values to the output (online softmax,
// Milakov and Gimelshein 2018). So keys and values are streamed once and nothing grows with their number; up to kQueryTile
// queries share each tile while it is in the first-level cache, a few at a time in registers.
//
// For a lone token the memory is the limit. Its heads take each tile in turn, since their records of a block lie behind each
// other: memory is read in long pieces. The next tile is prefetched line by line while this one is computed.
//
// A query's result depends on its own position and the keys before it alone: tiles lie at fixed places, sums run over
// dimensions and keys in order, a scaling by one is left out, a key behind the query has weight zero. So one query or many,
// any cut of a prompt, any table of blocks and every instruction set give the same bits.
//
// int8: the query is rounded to int8 as well, scores are exact integer dot products times two scales; values are widened
// and weighted in float32. Rounding q, k and v to int8 costs about 0.5% noise each on a score or value.
// Not supported: head dimensions that are not a multiple of 4, or above kMaxHeadDim.
#pragma once
#include "activations.h"
#include "kernels.h"

namespace persimmon {
namespace PERSIMMON_ISA {

constexpr int kTileGroups = 4;
constexpr int kTileKeys = kTileGroups * kKeyGroup;
constexpr int kTilesAhead = 3;  // of a head: 26 KiB of int8 keys and values of 64 dimensions
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

// ---- sixteen int8 keys at once: sums += keys[t][4 j .. 4 j + 3] . query[4 j .. 4 j + 3] ----------------------------------------

#if defined(__AVX512VNNI__)
using KeyBytes = __m512i;  // moved to 0 .. 255, as the instruction wants; the sums start where that is made up for
using KeySums = __m512i;
INLINE KeyBytes load_keys(const uint8_t* p) {
  return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(static_cast<char>(0x80)));
}
INLINE KeySums first_sums(int32_t query_sum) { return _mm512_set1_epi32(-128 * query_sum); }
INLINE KeySums add_dots(KeySums sums, KeyBytes keys, int32_t query) {
  return _mm512_dpbusd_epi32(sums, keys, _mm512_set1_epi32(query));
}
INLINE f32x16 to_floats(KeySums sums) { return _mm512_cvtepi32_ps(sums); }
#elif defined(__AVX2__)
struct KeyBytes {
  __m256i lo, hi;
};
using KeySums = KeyBytes;
INLINE KeyBytes load_keys(const uint8_t* p) {
  const __m256i* v = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(v), _mm256_loadu_si256(v + 1)};
}
INLINE KeySums first_sums(int32_t) { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
INLINE __m256i add_dots8(__m256i sums, __m256i keys, __m256i query) {
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(keys), _mm256_sign_epi8(query, keys));
  return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
INLINE KeySums add_dots(KeySums sums, KeyBytes keys, int32_t query) {
  const __m256i q = _mm256_set1_epi32(query);
  return {add_dots8(sums.lo, keys.lo, q), add_dots8(sums.hi, keys.hi, q)};
}
INLINE f32x16 to_floats(KeySums sums) { return {_mm256_cvtepi32_ps(sums.lo), _mm256_cvtepi32_ps(sums.hi)}; }
#else
struct KeyBytes {
  int8_t code[64];
};
struct KeySums {
  int32_t v[kKeyGroup];
};
INLINE KeyBytes load_keys(const uint8_t* p) { return read_unaligned<KeyBytes>(p); }
INLINE KeySums first_sums(int32_t) { return {}; }
INLINE KeySums add_dots(KeySums sums, const KeyBytes& keys, int32_t query) {
  int8_t q[4];
  memcpy(q, &query, 4);
  for (int t = 0; t < kKeyGroup; t++)
    for (int b = 0; b < 4; b++) sums.v[t] += keys.code[4 * t + b] * q[b];
  return sums;
}
INLINE f32x16 to_floats(const KeySums& sums) {
  float floats[kKeyGroup];
  for (int t = 0; t < kKeyGroup; t++) floats[t] = static_cast<float>(sums.v[t]);
  return load16(floats);
}
#endif

// ---- the two kinds of cache ----------------------------------------------------------------------------------------------

// The records of a tile, of the one after it, and of one that is read some time later.
struct KeyTile {
  const uint8_t *group[kTileGroups], *next[kTileGroups], *later[kTileGroups];

  // Line `offset` of a record of the next tile into the first cache, of the later one into the second.
  inline __attribute__((always_inline)) void fetch(int record, size_t offset) const {
    __builtin_prefetch(next[record] + offset);
    __builtin_prefetch(later[record] + offset, 0, 2);
  }
};

struct FloatCache {
  using Value = float;
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
  size_t values_offset() const { return kKeyGroup * dim * sizeof(float); }
  inline __attribute__((always_inline)) f32x16 weights(f32x16 e, const uint8_t*) const { return e; }

  const float* q;
  size_t stride;
  int dim;
  float scale;
};

struct Int8Cache {
  using Value = int8_t;
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
    KeySums sums[Q][V];
    for (int i = 0; i < Q; i++)
      for (int v = 0; v < V; v++) sums[i][v] = first_sums(sum[first + i]);
    for (int j = 0; j < dim / 4; j++) {
      KeyBytes keys[V];
      for (int v = 0; v < V; v++) {
        keys[v] = load_keys(tile.group[from + v] + 64 * j);
        if (Q == 1) tile.fetch(from + v, 64 * j);
      }
      for (int i = 0; i < Q; i++)
        for (int v = 0; v < V; v++) sums[i][v] = add_dots(sums[i][v], keys[v], words[first + i][j]);
    }
    for (int v = 0; v < V; v++) {
      const f32x16 key_scales = load16(reinterpret_cast<const float*>(tile.group[from + v] + kKeyGroup * dim));
      for (int i = 0; i < Q; i++)
        store16(scores + kTileKeys * i + kKeyGroup * (from + v),
                mul(to_floats(sums[i][v]), mul(set16(scale[first + i]), key_scales)));
    }
  }
  size_t values_offset() const { return int8_values_offset(dim); }
  // The weight of a value includes its scale.
  inline __attribute__((always_inline)) f32x16 weights(f32x16 e, const uint8_t* group) const {
    return mul(e, load16(reinterpret_cast<const float*>(group + values_offset() + kKeyGroup * dim)));
  }

  int dim;
  float scale[kQueryTile];
  int32_t sum[kQueryTile];
  int32_t words[kQueryTile][kMaxHeadDim / 4];  // the codes, four to a word
};

INLINE f32x16 load_value16(const float* p) { return load16(p); }
INLINE f32x16 load_value16(const int8_t* p) { return load_int8x16(p); }

// out[i][from .. from + 16 V) += sum over the first `keys` keys of weights[i][key] * value.
template <class T, int Q, int V>
INLINE void add_values(const KeyTile& tile, size_t offset, int keys, int dim, int from, const float* weights, float* out,
                       size_t stride) {
  f32x16 sums[Q][V];
  for (int i = 0; i < Q; i++)
    for (int v = 0; v < V; v++) sums[i][v] = load16(out + i * stride + from + 16 * v);
  for (int k = 0; k < keys; k++) {
    const size_t place = offset + (k % kKeyGroup * dim + from) * sizeof(T);
    const T* value = reinterpret_cast<const T*>(tile.group[k / kKeyGroup] + place);
    if (Q == 1)
      for (size_t i = 0; i < 16 * V * sizeof(T); i += 64) tile.fetch(k / kKeyGroup, place + i);
    f32x16 values[V];
    for (int v = 0; v < V; v++) values[v] = load_value16(value + 16 * v);
    for (int i = 0; i < Q; i++) {
      const f32x16 w = set16(weights[kTileKeys * i + k]);
      for (int v = 0; v < V; v++) sums[i][v] = fma(w, values[v], sums[i][v]);
    }
  }
  for (int i = 0; i < Q; i++)
    for (int v = 0; v < V; v++) store16(out + i * stride + from + 16 * v, sums[i][v]);
}

template <class T, int Q>
INLINE void add_all_values(const KeyTile& tile, size_t offset, int keys, int dim, const float* weights, float* out,
                           size_t stride) {
  constexpr int wide = 16 * kVectorsAtOnce;
  int d = 0;
  for (; d + wide <= dim; d += wide) add_values<T, Q, kVectorsAtOnce>(tile, offset, keys, dim, d, weights, out, stride);
  for (; d + 16 <= dim; d += 16) add_values<T, Q, 1>(tile, offset, keys, dim, d, weights, out, stride);
  for (; d < dim; d++)
    for (int i = 0; i < Q; i++)
      for (int k = 0; k < keys; k++) {
        const T* values = reinterpret_cast<const T*>(tile.group[k / kKeyGroup] + offset);
        float* sum = out + i * stride + d;
        *sum = fma1(weights[kTileKeys * i + k], static_cast<float>(values[k % kKeyGroup * dim + d]), *sum);
      }
}

// ---- one tile after the other --------------------------------------------------------------------------------------------

struct Softmax {
  float top = -HUGE_VALF;
  f32x16 sum = zero16();  // of e^(score - top), key k in lane k mod 16
};

// Scores [64] -> weights in place; the `visible` first keys count. Scales what `out` [D] holds to the new maximum.
template <class Cache>
INLINE void to_weights(const Cache& cache, const KeyTile& tile, int visible, float* scores, Softmax* state, float* out) {
  for (int k = visible; k < kTileKeys; k++) scores[k] = -HUGE_VALF;
  f32x16 best = load16(scores);
  for (int k = kKeyGroup; k < kTileKeys; k += kKeyGroup) best = larger(best, load16(scores + k));
  const float top = largest_lane(best);
  if (top > state->top) {
    const f32x16 shrink = exp_nonpositive16(less(set16(state->top), set16(top)));
    float factor[16];
    store16(factor, shrink);
    for (int d = 0; d < cache.dim; d++) out[d] *= factor[0];
    state->sum = mul(state->sum, shrink);
    state->top = top;
  }
  for (int g = 0; g < kTileGroups; g++) {
    const f32x16 e = exp_nonpositive16(less(load16(scores + kKeyGroup * g), set16(state->top)));
    state->sum = add(state->sum, e);
    store16(scores + kKeyGroup * g, cache.weights(e, tile.group[g]));
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
    to_weights(cache, tile, visible, scores + kTileKeys * i, states + first + i, out + i * a.out_stride);
  }
  const int last = min_int(keys, position + Q - start);
  add_all_values<typename Cache::Value, Q>(tile, cache.values_offset(), last, a.head_dim, scores, out, a.out_stride);
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
      locate(i, tile.group), locate(i + 1, tile.next), locate(i + kTilesAhead, tile.later);
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
    memcpy(tile.later, tile.next, sizeof tile.next);
    const int keys = min_int(kTileKeys, length - start);
    int i = start > a.position ? start - a.position : 0;  // earlier queries do not see this tile
    for (; i + kQueriesAtOnce <= a.queries; i += kQueriesAtOnce)
      attend_tile<kQueriesAtOnce>(a, cache, tile, start, keys, i, a.position + i, states);
    for (; i < a.queries; i++) attend_tile<1>(a, cache, tile, start, keys, i, a.position + i, states);
  }
}

template <class Cache>
INLINE void attend(const AttentionArgs& a) {
  const Cache cache(a);
  Softmax states[kQueryTile];
  for (int i = 0; i < a.queries; i++)
    for (int d = 0; d < a.head_dim; d++) a.out[i * a.out_stride + d] = 0.0f;
  if (a.head_bytes) attend_heads(a, cache, states);
  else attend_queries(a, cache, states);
  for (int i = 0; i < a.queries; i++) {
    const float inverse = 1.0f / sum_lanes(states[i].sum);
    for (int d = 0; d < a.head_dim; d++) a.out[i * a.out_stride + d] *= inverse;
  }
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

// Dense products of weight rows with tokens: decoding (one token), batches and prefill alike.
//
// A row is one stream of superblocks, scales included, so that a single prefetcher follows it: separate scale areas cost
// 25-40% of the bandwidth. Weights are unpacked once and used for up to kTile tokens; a token's lanes are summed the same
// way in every tile size, so decode and prefill agree to the bit.
// Exact: the integer group sums. Rounded: float32 accumulation over groups, in eight lanes per row (float rows: sixteen).
#pragma once
#include "dots.h"
#include "kernels.h"

namespace persimmon {
namespace PERSIMMON_ISA {

#if defined(__AVX512F__)
constexpr int kTile = 8;  // tokens that share unpacked weights; thirty-two registers ...
#else
constexpr int kTile = 4;  // ... or sixteen
#endif

// Products of one packed row of `blocks` superblocks with N tokens.
template <class F, int N>
INLINE void packed_row(const uint8_t* row, int blocks, const ActivationBlock* const* x, float* out) {
  f32x8 sum[N];
  for (int t = 0; t < N; t++) sum[t] = zero8();
  for (int s = 0; s < blocks; s++, row += F::bytes) {
    prefetch_stream(row, F::bytes);  // rows follow each other in memory, so it crosses their ends
    const Weights w = F::load(row);
    const f32x8 scale = load_half8(row + F::scales_at);
    for (int t = 0; t < N; t++)
      sum[t] = fma(mul(scale, load8(x[t][s].scale)), group_values<F>(w, x[t][s]), sum[t]);
  }
  for (int t = 0; t < N; t++) out[t] = sum_lanes(sum[t]);
}

// What lies behind the codes of a top row.
INLINE const uint8_t* top_scales(const uint8_t* row, int blocks) { return row + blocks * kTopBytes; }
INLINE const TopFacts& top_facts(const uint8_t* row, int blocks) {
  return *reinterpret_cast<const TopFacts*>(row + blocks * (kTopBytes + kLanes));
}

// Estimates of one row and N tokens from its top bits. Two or four rows at a time, sharing the loads of the inputs, are slower:
// each would be a stream of its own (docs/LOG.md, 2026-11-27).
template <int N>
INLINE void top_row(const uint8_t* row, int blocks, const ActivationBlock* const* x, float* out) {
  const uint8_t* scales = top_scales(row, blocks);
  f32x8 sum[N];
  for (int t = 0; t < N; t++) sum[t] = zero8();
  for (int s = 0; s < blocks; s++) {
    prefetch_stream(row + s * kTopBytes, kTopBytes);
    const auto w = Top::load(row + s * kTopBytes);
    const f32x8 scale = load_bytes8(scales + s * kLanes);
    for (int t = 0; t < N; t++)
      sum[t] = fma(mul(scale, load8(x[t][s].scale)), group_values<Top>(w, x[t][s]), sum[t]);
  }
  prefetch_stream(scales, static_cast<int>(top_row_bytes(blocks)) - blocks * kTopBytes);
  const float factor = Top::factor * top_facts(row, blocks).unit;
  for (int t = 0; t < N; t++) out[t] = factor * sum_lanes(sum[t]);
}

// What the rest adds to the estimates of one row and N tokens; the scales lie in its top row. `next`: the rest row that is
// wanted after this one, or null; it is fetched piece by piece meanwhile.
template <int N>
INLINE void rest_row(const uint8_t* rest, const uint8_t* top, int blocks, const ActivationBlock* const* x, float* out,
                     const uint8_t* next = nullptr) {
  const uint8_t* scales = top_scales(top, blocks);
  f32x8 sum[N];
  for (int t = 0; t < N; t++) sum[t] = zero8();
  for (int s = 0; s < blocks; s++) {
    if (next) prefetch(next + s * kRestBytes, kRestBytes);
    const auto w = Rest::load(rest + s * kRestBytes);
    const f32x8 scale = load_bytes8(scales + s * kLanes);
    for (int t = 0; t < N; t++)
      sum[t] = fma(mul(scale, load8(x[t][s].scale)), group_values<Rest>(w, x[t][s]), sum[t]);
  }
  const float unit = top_facts(top, blocks).unit;
  for (int t = 0; t < N; t++) out[t] = unit * sum_lanes(sum[t]);
}

INLINE f32x16 load_weights16(const float* p) { return load16(p); }
INLINE f32x16 load_weights16(const uint16_t* p) { return load_bf16x16(p); }

constexpr int kFloatsAhead = 4096;  // bytes: with several rows at once every one of them has a stream of its own

// Products of R rows of T = float or bfloat16, `stride` elements apart, with N tokens: out[r * N + t].
template <class T, int N, int R>
INLINE void float_rows(const T* row, size_t stride, int blocks, const float* const* x, float* out) {
  constexpr int count = R * N;
  f32x16 sum[count];
#pragma GCC unroll 32
  for (int k = 0; k < count; k++) sum[k] = zero16();
  for (int i = 0; i < blocks * kSuperblock; i += 16) {
    f32x16 w[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      w[r] = load_weights16(row + r * stride + i);
      if (i * sizeof(T) % 64 == 0) __builtin_prefetch(reinterpret_cast<const char*>(row + r * stride + i) + kFloatsAhead, 0, 2);
    }
#pragma GCC unroll 8
    for (int t = 0; t < N; t++) {
      const f32x16 v = load16(x[t] + i);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) sum[r * N + t] = fma(w[r], v, sum[r * N + t]);
    }
  }
  int k = 0;
  for (; k + 8 <= count; k += 8) sum_lanes_of_8(sum + k, out + k);
  for (; k < count; k++) out[k] = sum_lanes(sum[k]);
}
// Rows that share the loads of the inputs and have their sums together in registers.
template <int N>
constexpr int rows_at_once() {
#if defined(__AVX512F__)
  return N == 1 || N == 3 ? 8 : N == 2 || N == 4 ? 4 : 2;
#else
  return N == 1 ? 4 : N < 4 ? 2 : 1;
#endif
}

// R rows of any format with N tokens, out[r * N + t] without bias: `together` rows at once, or one. Packed rows go alone.
template <class P>
struct OneByOne {
  using Input = ActivationBlock;
  template <int N>
  static constexpr int together() {
    return 1;
  }
  template <int N, int R>
  INLINE void rows(const RowsArgs& a, int r, const Input* const* x, float* out) {
    P::template row<N>(a, r, x, out);
  }
};
struct PackedQ8 : OneByOne<PackedQ8> {
  template <int N>
  INLINE void row(const RowsArgs& a, int r, const Input* const* x, float* out) {
    packed_row<Q8, N>(a.weights + r * a.row_bytes, a.blocks, x, out);
  }
};
struct PackedQ4 : OneByOne<PackedQ4> {
  template <int N>
  INLINE void row(const RowsArgs& a, int r, const Input* const* x, float* out) {
    packed_row<Q4, N>(a.weights + r * a.row_bytes, a.blocks, x, out);
  }
};
struct PackedPlanes : OneByOne<PackedPlanes> {
  template <int N>
  INLINE void row(const RowsArgs& a, int r, const Input* const* x, float* out) {
    const uint8_t* top = a.weights + r * a.row_bytes;
    float rest[N];
    top_row<N>(top, a.blocks, x, out);
    rest_row<N>(a.rest + r * a.rest_bytes, top, a.blocks, x, rest);
    for (int t = 0; t < N; t++) out[t] += rest[t];
  }
};
template <class T>
struct FloatRows {
  using Input = float;
  template <int N>
  static constexpr int together() {
    return rows_at_once<N>();
  }
  template <int N, int R>
  INLINE void rows(const RowsArgs& a, int r, const Input* const* x, float* out) {
    float_rows<T, N, R>(reinterpret_cast<const T*>(a.weights + r * a.row_bytes), a.row_bytes / sizeof(T), a.blocks, x, out);
  }
};

// Inputs of one token are `blocks` ActivationBlocks, or 256 * blocks floats.
INLINE const ActivationBlock* token_input(const ActivationBlock* x, int t, int blocks) {
  return x + static_cast<size_t>(t) * blocks;
}
INLINE const float* token_input(const float* x, int t, int blocks) {
  return x + static_cast<size_t>(t) * blocks * kSuperblock;
}

INLINE void finish(const RowsArgs& a, int r, int t, float product) {
  const float v = a.bias ? product + a.bias[r] : product;
  float* y = a.y + t * a.y_stride + r;
  if (a.epilogue == Epilogue::store) *y = v;
  if (a.epilogue == Epilogue::add) *y += v;
  if (a.epilogue == Epilogue::squared_relu) *y = v > 0.0f ? v * v : 0.0f;
}

// take(row, its N products), rows ascending.
template <class R, int N, class Take>
INLINE void for_rows(const RowsArgs& a, int begin, int end, const typename R::Input* const* x, Take&& take) {
  constexpr int together = R::template together<N>();
  float out[together * N];
  int r = begin;
  for (; r + together <= end; r += together) {
    R::template rows<N, together>(a, r, x, out);
    for (int k = 0; k < together; k++) take(r + k, out + k * N);
  }
  for (; r < end; r++) {
    R::template rows<N, 1>(a, r, x, out);
    take(r, out);
  }
}

template <class R, int N>
static void rows_tile(const RowsArgs& a, int token, int begin, int end) {
  const typename R::Input* x[N];
  for (int t = 0; t < N; t++) x[t] = token_input(static_cast<const typename R::Input*>(a.x), token + t, a.blocks);
  for_rows<R, N>(a, begin, end, x, [&](int r, const float* products) {
    for (int t = 0; t < N; t++) finish(a, r, token + t, products[t]);
  });
}

template <class R>
static void rows_of(const RowsArgs& a, int begin, int end) {
  int token = 0;
  for (; token + kTile <= a.tokens; token += kTile) rows_tile<R, kTile>(a, token, begin, end);
  for (; token + 4 <= a.tokens; token += 4) rows_tile<R, 4>(a, token, begin, end);
  switch (a.tokens - token) {
    case 3: rows_tile<R, 3>(a, token, begin, end); break;
    case 2: rows_tile<R, 2>(a, token, begin, end); break;
    case 1: rows_tile<R, 1>(a, token, begin, end); break;
    default: break;
  }
}

static void rows(const RowsArgs& a, int begin, int end) {
  switch (a.format) {
    case Format::f32: rows_of<FloatRows<float>>(a, begin, end); break;
    case Format::bf16: rows_of<FloatRows<uint16_t>>(a, begin, end); break;
    case Format::q8: rows_of<PackedQ8>(a, begin, end); break;
    case Format::q4: rows_of<PackedQ4>(a, begin, end); break;
    case Format::planes: rows_of<PackedPlanes>(a, begin, end); break;
  }
}

template <int N>
static void estimate_tile(const RowsArgs& a, int token, int begin, int end, float sigmas, float* estimate, float* bound,
                          size_t stride) {
  const ActivationBlock* x[N];
  for (int t = 0; t < N; t++) x[t] = token_input(static_cast<const ActivationBlock*>(a.x), token + t, a.blocks);
  float out[N];
  for (int r = begin; r < end; r++) {
    const uint8_t* row = a.weights + r * a.row_bytes;
    const TopFacts& facts = top_facts(row, a.blocks);
    top_row<N>(row, a.blocks, x, out);
    for (int t = 0; t < N; t++) {
      const float value = out[t] + facts.shift;
      estimate[(token + t) * stride + r] = value;
      bound[(token + t) * stride + r] = value + sigmas * (facts.error * a.distances[token + t]);
    }
  }
}

static void estimate_rows(const RowsArgs& a, int begin, int end, float sigmas, float* estimate, float* bound,
                          size_t stride) {
  int token = 0;
  for (; token + kTile <= a.tokens; token += kTile)
    estimate_tile<kTile>(a, token, begin, end, sigmas, estimate, bound, stride);
  for (; token + 4 <= a.tokens; token += 4) estimate_tile<4>(a, token, begin, end, sigmas, estimate, bound, stride);
  for (; token < a.tokens; token++) estimate_tile<1>(a, token, begin, end, sigmas, estimate, bound, stride);
}

static float refine_row(const RowsArgs& a, int token, int r) {
  const ActivationBlock* x = token_input(static_cast<const ActivationBlock*>(a.x), token, a.blocks);
  float product;
  PackedPlanes::row<1>(a, r, &x, &product);
  return product;
}

}  // namespace PERSIMMON_ISA
}  // namespace persimmon

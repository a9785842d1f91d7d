// The attention of train_attention.h for bfloat16 on AMX: products of bfloat16 tiles with float32 sums, sixteen times as fast per
// core as float32 vectors, so that the exponentials become the larger part.
//
// Scores are computed transposed, keys by queries: then queries lie along the vector lanes, running maxima, totals and the
// forward pass's normalizers are plain vectors, and no sum across lanes is needed. Queries, keys, values and gradients are rounded to
// bfloat16 once, as under PyTorch's autocast, probabilities and gradients of scores once per tile. The exponential is good to
// 1e-4, a twentieth of a bfloat16 step; forward and backward pass use the same one.
//
// Layouts, with A and B the operands of the tile product C += A B (16 x 32 times 32 x 16 numbers):
//   rows    [n][W]                W: head dimension padded to 32; A, summed over dimensions
//   across  [n / 32][W][32]       the same transposed in blocks of 32 rows; A, summed over rows
//   lanes   [n / 16][W / 32][tile]  B, 16 rows as columns, summed over dimensions
//   pairs   [n / 32][W / 16][tile]  B, dimensions as columns, summed over rows
// where a tile for B is [16][16][2]: the two numbers that one 32-bit lane multiplies lie side by side.
#pragma once
#include "train_attention.h"

#if defined(__AMX_BF16__)
#include <immintrin.h>

namespace persimmon {
namespace PERSIMMON_ISA {

constexpr int kAmxQueries = 64, kAmxKeys = 128;  // a tile of scores: 32 KiB of float32
constexpr int kTile = 512;                       // numbers of a B tile
constexpr int kStep = 32;                        // numbers summed by one tile product

struct alignas(64) TileShapes {  // eight tiles of 16 rows x 64 bytes
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static const volatile TileShapes kTileShapes;  // in memory whole: GCC believes that the instruction reads eight bytes

class TileRegisters {  // this thread has them while this lives
 public:
  TileRegisters() { _tile_loadconfig(const_cast<const TileShapes*>(&kTileShapes)); }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

struct TileOperand {
  const uint16_t* data;
  size_t row;   // numbers between the rows of a tile: A only, B has 32
  size_t tile;  // ... between neighbouring tiles of C's rows (A) or columns (B)
  size_t step;  // ... between steps of the sum
};

// C [16 m][16 n] (+)= A B; m and n are even.
static void tile_product(const TileOperand& a, const TileOperand& b, float* c, size_t c_row, int m, int n, int steps, bool add) {
  for (int i = 0; i < m; i += 2)
    for (int j = 0; j < n; j += 2) {
      float* at = c + 16 * i * c_row + 16 * j;
      if (add) {
        _tile_loadd(0, at, c_row * 4);
        _tile_loadd(1, at + 16, c_row * 4);
        _tile_loadd(2, at + 16 * c_row, c_row * 4);
        _tile_loadd(3, at + 16 * c_row + 16, c_row * 4);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      for (int s = 0; s < steps; s++) {
        const uint16_t *left = a.data + i * a.tile + s * a.step, *right = b.data + j * b.tile + s * b.step;
        _tile_loadd(4, left, a.row * 2);
        _tile_loadd(6, right, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, right + b.tile, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, left + a.tile, a.row * 2);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, at, c_row * 4);
      _tile_stored(1, at + 16, c_row * 4);
      _tile_stored(2, at + 16 * c_row, c_row * 4);
      _tile_stored(3, at + 16 * c_row + 16, c_row * 4);
    }
}

// ---- packing ---------------------------------------------------------------------------------------------------------------

INLINE __m256i to_bf16(f32x16 a) { return (__m256i)_mm512_cvtneps_pbh(a); }
INLINE void store_tile_line(uint16_t* p, __m256i even, __m256i odd) {  // side by side in every 32-bit lane
  const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16);
  _mm512_storeu_si512(p, _mm512_or_si512(_mm512_cvtepu16_epi32(even), high));
}

// [count][P] float32 -> rows; zeros for rows up to `padded_count`.
static void pack_rows(const float* from, int count, int padded_count, int P, int W, uint16_t* rows) {
  for (int i = 0; i < padded_count; i++, rows += W)
    for (int d = 0; d < W; d += 16) {
      const bool there = i < count && d < P;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(rows + d), there ? to_bf16(load16(from + static_cast<size_t>(i) * P + d)) : __m256i{});
    }
}

static void pack_across(const uint16_t* rows, int count, int W, uint16_t* across) {
  for (int block = 0; block < count; block += kStep, across += W * kStep)
    for (int i = 0; i < kStep; i++)
      for (int d = 0; d < W; d++) across[d * kStep + i] = rows[static_cast<size_t>(block + i) * W + d];
}

static void pack_lanes(const uint16_t* rows, int count, int W, uint16_t* lanes) {
  const __m512i line = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32(W / 2));
  for (int i = 0; i < count; i += 16)
    for (int d = 0; d < W; d += 2, lanes += 32)
      _mm512_storeu_si512(lanes, _mm512_i32gather_epi32(line, rows + static_cast<size_t>(i) * W + d, 4));
}

static void pack_pairs(const uint16_t* rows, int count, int W, uint16_t* pairs) {
  auto part = [](const uint16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); };
  for (int block = 0; block < count; block += kStep)
    for (int d = 0; d < W; d += 16)
      for (int i = 0; i < kStep; i += 2, pairs += 32) {
        const uint16_t* even = rows + static_cast<size_t>(block + i) * W + d;
        store_tile_line(pairs, part(even), part(even + W));
      }
}

// ---- scores ------------------------------------------------------------------------------------------------------------------

// Of sixteen queries from `query`, those that see `key`.
INLINE __mmask16 seeing(int query, int key) {
  const int hidden = key - query;
  return hidden <= 0 ? 0xFFFF : hidden >= 16 ? 0 : static_cast<__mmask16>(0xFFFFu << hidden);
}

// Transposed scores [keys][kAmxQueries] of queries from q0 and keys from k0 -> probabilities as B tiles [keys / 32][queries / 16],
// with running maxima and totals; `shrink` receives what earlier outputs are to be multiplied with.
template <bool kMasked>
static void amx_softmax(const float* scores, int queries, int keys, int q0, int k0, float factor, float* maxima, float* totals,
                        float* shrink, uint16_t* tiles) {
  for (int j = 0; j < queries; j += 16) {
    f32x16 most = set16(-INFINITY);
    for (int i = 0; i < keys; i++) {
      const f32x16 x = load16(scores + i * kAmxQueries + j);
      most = kMasked ? _mm512_mask_max_ps(most, seeing(q0 + j, k0 + i), most, x) : maximum(most, x);
    }
    const f32x16 before = load16(maxima + j), now = maximum(before, mul(most, set16(factor))), shift = sub(zero16(), now);
    store16(maxima + j, now);
    const f32x16 less = exp2_nonpositive(sub(before, now));
    store16(shrink + j, less);
    f32x16 total = mul(load16(totals + j), less);
    for (int i = 0; i < keys; i += 2) {
      f32x16 even = exp2_nonpositive<4>(fma(load16(scores + i * kAmxQueries + j), set16(factor), shift));
      f32x16 odd = exp2_nonpositive<4>(fma(load16(scores + (i + 1) * kAmxQueries + j), set16(factor), shift));
      if (kMasked) {
        even = _mm512_maskz_mov_ps(seeing(q0 + j, k0 + i), even);
        odd = _mm512_maskz_mov_ps(seeing(q0 + j, k0 + i + 1), odd);
      }
      total = add(total, add(even, odd));
      uint16_t* tile = tiles + (i / kStep * (kAmxQueries / 16) + j / 16) * kTile;
      store_tile_line(tile + i % kStep * 16, to_bf16(even), to_bf16(odd));
    }
    store16(totals + j, total);
  }
}

// Transposed scores and products [keys][kAmxQueries] -> probabilities and gradients of scores as A (a row per key), and the latter
// as B tiles too.
template <bool kMasked>
static void amx_gradients(const float* scores, const float* products, int queries, int keys, int q0, int k0, float factor,
                          const float* normalizer, const float* dots, uint16_t* shares, uint16_t* grads, uint16_t* tiles) {
  for (int j = 0; j < queries; j += 16) {
    const f32x16 shift = sub(zero16(), load16(normalizer + j)), dot = load16(dots + j);
    for (int i = 0; i < keys; i += 2) {
      __m256i gradient[2];
      for (int both = 0; both < 2; both++) {
        const int at = (i + both) * kAmxQueries + j;
        f32x16 p = exp2_nonpositive<4>(fma(load16(scores + at), set16(factor), shift));
        if (kMasked) p = _mm512_maskz_mov_ps(seeing(q0 + j, k0 + i + both), p);
        gradient[both] = to_bf16(mul(p, sub(load16(products + at), dot)));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(shares + at), to_bf16(p));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(grads + at), gradient[both]);
      }
      uint16_t* tile = tiles + (i / kStep * (kAmxQueries / 16) + j / 16) * kTile;
      store_tile_line(tile + i % kStep * 16, gradient[0], gradient[1]);
    }
  }
}

// ---- scratch memory ----------------------------------------------------------------------------------------------------------

class Arena {  // hands out pieces of a thread's scratch memory, each on a cache line
 public:
  explicit Arena(float* memory) : next_(reinterpret_cast<char*>(memory)) {}
  template <class T>
  T* take(size_t n) {
    T* p = reinterpret_cast<T*>(next_);
    next_ += round_up(n * sizeof(T), 64);
    return p;
  }

 private:
  char* next_;
};

static size_t amx_scratch(int padded, int length) {
  const size_t n = round_up(length, kAmxKeys), W = round_up(padded, kStep), scores = kAmxKeys * kAmxQueries;
  // Backward, which needs more than forward: nine packed bfloat16 arrays, grad_q, two vectors; two tiles of scores three times
  // over, grad_k and grad_v.
  const size_t bytes = n * W * (9 * 2 + 4) + n * 8 + scores * (2 * 4 + 3 * 2) + 2 * kAmxKeys * W * 4;
  const size_t floats = bytes / 4 + 1024, plain = attention_scratch(padded, length);
  return floats > plain ? round_up(floats, 64) : plain;
}

// ---- forward -----------------------------------------------------------------------------------------------------------------

static void amx_forward(const AttentionTensors& t, int head, int start, int first, int last, float* scratch) {
  const int P = t.padded, W = static_cast<int>(round_up(P, kStep)), steps = W / kStep, tiles = W / 16;
  const int n = static_cast<int>(round_up(last, kAmxKeys));
  const size_t base = (static_cast<size_t>(head) * t.tokens + start) * P;
  Arena arena(scratch);
  uint16_t *keys = arena.take<uint16_t>(static_cast<size_t>(n) * W), *values = arena.take<uint16_t>(static_cast<size_t>(n) * W);
  uint16_t *queries = arena.take<uint16_t>(kAmxQueries * W), *lanes = arena.take<uint16_t>(kAmxQueries * W);
  uint16_t* shares = arena.take<uint16_t>(kAmxKeys * kAmxQueries);
  float *scores = arena.take<float>(kAmxKeys * kAmxQueries), *sums = arena.take<float>(W * kAmxQueries);
  float *maxima = arena.take<float>(kAmxQueries), *totals = arena.take<float>(kAmxQueries), *shrink = arena.take<float>(kAmxQueries);
  pack_rows(t.v + base, last, n, P, W, keys);  // for a moment
  pack_across(keys, n, W, values);
  pack_rows(t.k + base, last, n, P, W, keys);
  const float factor = t.scale * kLog2E;
  const TileRegisters registers;
  alignas(64) float line[kMostHeadDim];
  for (int q0 = first; q0 < last; q0 += kAmxQueries) {
    const int count = min_int(kAmxQueries, last - q0), wide = static_cast<int>(round_up(count, kStep));
    pack_rows(t.q + base + static_cast<size_t>(q0) * P, count, wide, P, W, queries);
    pack_lanes(queries, wide, W, lanes);
    for (int i = 0; i < kAmxQueries; i++) maxima[i] = -INFINITY, totals[i] = 0;
    for (int k0 = 0; k0 < q0 + count; k0 += kAmxKeys) {
      const int high = min_int(kAmxKeys, static_cast<int>(round_up(q0 + count - k0, kStep)));
      tile_product({keys + static_cast<size_t>(k0) * W, static_cast<size_t>(W), static_cast<size_t>(16 * W), kStep},
                   {lanes, 32, static_cast<size_t>(steps * kTile), kTile}, scores, kAmxQueries, high / 16, wide / 16, steps, false);
      if (k0 + high > q0 + 1) amx_softmax<true>(scores, wide, high, q0, k0, factor, maxima, totals, shrink, shares);
      else amx_softmax<false>(scores, wide, high, q0, k0, factor, maxima, totals, shrink, shares);
      if (k0 > 0)
        for (int d = 0; d < W; d++)
          for (int j = 0; j < wide; j += 16)
            store16(sums + d * kAmxQueries + j, mul(load16(sums + d * kAmxQueries + j), load16(shrink + j)));
      tile_product({values + static_cast<size_t>(k0) * W, kStep, 16 * kStep, static_cast<size_t>(W * kStep)},
                   {shares, 32, kTile, kAmxQueries / 16 * kTile}, sums, kAmxQueries, tiles, wide / 16, high / kStep, k0 > 0);
    }
    for (int i = 0; i < count; i++) {
      const size_t token = static_cast<size_t>(start) + q0 + i;
      const float share = 1.0f / totals[i];
      for (int d = 0; d < P; d++) line[d] = sums[d * kAmxQueries + i] * share;
      write_unpadded(line, t.dim, static_cast<uint16_t*>(t.out) + (token * t.heads + head) * t.dim);
      t.normalizer[static_cast<size_t>(head) * t.tokens + token] = maxima[i] + std::log2(totals[i]);
    }
  }
}

// ---- backward ----------------------------------------------------------------------------------------------------------------

static void amx_backward(const AttentionTensors& t, int head, int start, int end, float* scratch) {
  const int P = t.padded, W = static_cast<int>(round_up(P, kStep)), steps = W / kStep, tiles = W / 16, count = end - start;
  const int n = static_cast<int>(round_up(count, kAmxKeys));
  const size_t size = static_cast<size_t>(n) * W, base = (static_cast<size_t>(head) * t.tokens + start) * P;
  Arena arena(scratch);
  auto packed = [&] { return arena.take<uint16_t>(size); };
  uint16_t *rows = packed(), *q_lanes = packed(), *q_pairs = packed(), *g_lanes = packed(), *g_pairs = packed();
  uint16_t *keys = packed(), *keys_across = packed(), *values = packed();
  float *grad_q = arena.take<float>(size), *normalizer = arena.take<float>(n), *dots = arena.take<float>(n);  // grad_q [n / 64][W][64]
  constexpr int kScores = kAmxKeys * kAmxQueries;
  float *scores = arena.take<float>(kScores), *products = arena.take<float>(kScores);
  uint16_t *shares = arena.take<uint16_t>(kScores), *grads = arena.take<uint16_t>(kScores), *grad_tiles = arena.take<uint16_t>(kScores);
  float *grad_k = arena.take<float>(kAmxKeys * W), *grad_v = arena.take<float>(kAmxKeys * W);
  const uint16_t *out = static_cast<const uint16_t*>(t.out), *grad_out = static_cast<const uint16_t*>(t.grad_out);
  for (int i = 0; i < n; i++) {
    uint16_t* row = rows + static_cast<size_t>(i) * W;
    const size_t place = ((static_cast<size_t>(start) + i) * t.heads + head) * t.dim;
    float sum = 0;
    for (int d = 0; d < W; d++) row[d] = i < count && d < t.dim ? grad_out[place + d] : 0;
    for (int d = 0; i < count && d < t.dim; d++) sum += bf16_to_float(row[d]) * bf16_to_float(out[place + d]);
    dots[i] = sum;
    normalizer[i] = i < count ? t.normalizer[static_cast<size_t>(head) * t.tokens + start + i] : 0;
  }
  pack_lanes(rows, n, W, g_lanes);
  pack_pairs(rows, n, W, g_pairs);
  pack_rows(t.q + base, count, n, P, W, rows);
  pack_lanes(rows, n, W, q_lanes);
  pack_pairs(rows, n, W, q_pairs);
  pack_rows(t.k + base, count, n, P, W, keys);
  pack_across(keys, n, W, keys_across);
  pack_rows(t.v + base, count, n, P, W, values);
  memset(grad_q, 0, size * sizeof(float));
  const float factor = t.scale * kLog2E;
  const size_t w = W;
  const TileRegisters registers;
  for (int k0 = 0; k0 < count; k0 += kAmxKeys) {
    memset(grad_k, 0, kAmxKeys * w * sizeof(float));
    memset(grad_v, 0, kAmxKeys * w * sizeof(float));
    for (int q0 = k0; q0 < count; q0 += kAmxQueries) {
      const int wide = static_cast<int>(round_up(min_int(kAmxQueries, count - q0), kStep));
      const int high = min_int(kAmxKeys, q0 + wide - k0);
      const TileOperand lanes = {nullptr, 32, steps * static_cast<size_t>(kTile), kTile}, plain = {nullptr, w, 16 * w, kStep};
      auto at = [](TileOperand operand, const uint16_t* data) { return operand.data = data, operand; };
      tile_product(at(plain, keys + k0 * w), at(lanes, q_lanes + q0 * w), scores, kAmxQueries, high / 16, wide / 16, steps, false);
      tile_product(at(plain, values + k0 * w), at(lanes, g_lanes + q0 * w), products, kAmxQueries, high / 16, wide / 16, steps, false);
      if (k0 + high > q0 + 1)
        amx_gradients<true>(scores, products, wide, high, q0, k0, factor, normalizer + q0, dots + q0, shares, grads, grad_tiles);
      else amx_gradients<false>(scores, products, wide, high, q0, k0, factor, normalizer + q0, dots + q0, shares, grads, grad_tiles);
      const TileOperand score_rows = {nullptr, kAmxQueries, 16 * kAmxQueries, kStep}, pairs = {nullptr, 32, kTile, tiles * static_cast<size_t>(kTile)};
      tile_product(at(score_rows, shares), at(pairs, g_pairs + q0 * w), grad_v, w, high / 16, tiles, wide / kStep, true);
      tile_product(at(score_rows, grads), at(pairs, q_pairs + q0 * w), grad_k, w, high / 16, tiles, wide / kStep, true);
      tile_product({keys_across + k0 * w, kStep, 16 * kStep, w * kStep}, {grad_tiles, 32, kTile, kAmxQueries / 16 * kTile},
                   grad_q + q0 * w, kAmxQueries, tiles, wide / 16, high / kStep, true);
    }
    for (int i = 0; i < kAmxKeys && k0 + i < count; i++)
      for (int d = 0; d < P; d += 16) {
        const size_t to = base + static_cast<size_t>(k0 + i) * P + d;
        store16(t.grad_k + to, mul(load16(grad_k + i * w + d), set16(t.scale)));
        store16(t.grad_v + to, load16(grad_v + i * w + d));
      }
  }
  for (int i = 0; i < count; i++) {
    const float* from = grad_q + static_cast<size_t>(i / kAmxQueries) * kAmxQueries * w + i % kAmxQueries;
    for (int d = 0; d < P; d++) t.grad_q[base + static_cast<size_t>(i) * P + d] = from[d * kAmxQueries] * t.scale;
  }
}

static void amx_attention_forward(const AttentionTensors& t, int head, int start, int first, int last, float* scratch) {
  if (t.element == Element::bf16) amx_forward(t, head, start, first, last, scratch);
  else attention_forward_as<float>(t, head, start, first, last, scratch);
}

static void amx_attention_backward(const AttentionTensors& t, int head, int start, int end, float* scratch) {
  if (t.element == Element::bf16) amx_backward(t, head, start, end, scratch);
  else attention_backward_as<float>(t, head, start, end, scratch);
}

}  // namespace PERSIMMON_ISA
}  // namespace persimmon
#endif

// The products of float_tiles.h over whole matrices: few tokens read them as a stream, many piece by piece. What they become: rows
// with their epilogue, active neurons of the MLP.
//
// With few tokens reading the weights is the limit, and tile loads read no stream as fast as vectors do: rows are copied, sixteen at a
// time, while those before them are multiplied. Many tokens of wide rows are cut by inputs as well, so that what is read again lies
// in the second cache; sums between the pieces are kept as they are, in float32. Neither changes a bit.
#pragma once
#include "float_tiles.h"

#if defined(__AMX_BF16__)

namespace persimmon {
namespace PERSIMMON_ISA {

constexpr int kWholeInputs = 512;    // rows up to this size are not cut ...
constexpr int kPieceInputs = 512;    // ... others into such pieces: 256 tokens of one are 768 KiB
constexpr int kPieceRows = 128;      // rows of a piece: 128 KiB, and their sums with 256 tokens 384 KiB
constexpr int kFewTiles = 3;         // inputs with which rows are read as a stream
constexpr int kAloneTokens = 3;      // tokens whose sums are sooner gathered one by one than transposed together
constexpr int kCopySoon = 512;       // bytes of the stream that are fetched into the first cache

struct FloatTileArgs {
  const uint8_t* weights;
  size_t row_bytes;
  const uint16_t* panels;
  int tokens, inputs;
  size_t tile() const { return static_cast<size_t>(inputs) / kStepInputs * kTileHalves; }
  const uint16_t* panel(int token) const { return panels + static_cast<size_t>(token / kPanelTokens) * kPanelTiles * tile(); }
};

// The products of 16 rows with a token whose three sums are the first of each row.
INLINE f32x16 first_products(const float* c) {
  __m512 q[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {  // of rows i, 4 + i, 8 + i, 12 + i
    q[i] = _mm512_castps128_ps512(_mm_loadu_ps(c + 16 * i));
    q[i] = _mm512_insertf32x4(q[i], _mm_loadu_ps(c + 16 * (4 + i)), 1);
    q[i] = _mm512_insertf32x4(q[i], _mm_loadu_ps(c + 16 * (8 + i)), 2);
    q[i] = _mm512_insertf32x4(q[i], _mm_loadu_ps(c + 16 * (12 + i)), 3);
  }
  const __m512 l01 = _mm512_unpacklo_ps(q[0], q[1]), l23 = _mm512_unpacklo_ps(q[2], q[3]);
  const __m512 h01 = _mm512_unpackhi_ps(q[0], q[1]), h23 = _mm512_unpackhi_ps(q[2], q[3]);
  return add(add(_mm512_shuffle_ps(h01, h23, 0x44), _mm512_shuffle_ps(l01, l23, 0xEE)), _mm512_shuffle_ps(l01, l23, 0x44));
}

// A KiB of a stream of weights.
INLINE void copy_step(const uint8_t* from, uint8_t* to) {
#pragma GCC unroll 16
  for (int i = 0; i < 1024; i += 64) {
    _mm512_store_si512(to + i, _mm512_loadu_si512(from + i));
    __builtin_prefetch(from + kStreamAhead + i, 0, 2);
    __builtin_prefetch(from + kCopySoon + i, 0, 3);
  }
}

// 16 rows at a time with T tiles of inputs; the next 16 are copied meanwhile.
template <int T, class Finish>
INLINE void streamed_rows(const FloatTileArgs& a, int row, int blocks, float* scratch, Finish&& finish) {
  const int steps = a.inputs / kStepInputs;
  const size_t bytes = kPanelRows * a.row_bytes;
  uint8_t* const copies[2] = {reinterpret_cast<uint8_t*>(scratch), reinterpret_cast<uint8_t*>(scratch) + bytes};
  alignas(64) float c[T * kTileFloats];
  const uint8_t* from = a.weights + row * a.row_bytes;
  for (int s = 0; s < steps; s++) copy_step(from + 1024 * s, copies[0] + 1024 * s);
  for (int b = 0; b < blocks; b++) {
    const uint8_t* w = copies[b % 2];
    const uint16_t* x = a.panels;
    uint8_t* to = copies[(b + 1) % 2];
    from += bytes;
    asm volatile("" ::: "memory");  // GCC does not know that a tile load reads memory
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    for (int s = 0; s < steps; s++, w += 2 * kStepInputs, x += kTileHalves) {
      _tile_loadd(6, x, 64);
      _tile_loadd(4, w, a.row_bytes);
      _tile_dpbf16ps(0, 4, 6);
      if (T > 1) _tile_loadd(7, x + a.tile(), 64);
      if (T > 1) _tile_dpbf16ps(1, 4, 7);
      if (T > 2) _tile_loadd(6, x + 2 * a.tile(), 64);
      if (T > 2) _tile_dpbf16ps(2, 4, 6);
      if (b + 1 < blocks) copy_step(from + 1024 * s, to + 1024 * s);
      else prefetch(from + 1024 * s, 1024);  // the next call's first rows, most likely
    }
    _tile_stored(0, c, 64);
    if (T > 1) _tile_stored(1, c + kTileFloats, 64);
    if (T > 2) _tile_stored(2, c + 2 * kTileFloats, 64);
    if (T == 1 && a.tokens <= kAloneTokens)
      for (int t = 0; t < a.tokens; t++) finish(row + kPanelRows * b, t, first_products(c + kFloatParts * t));
    else finish_panel_sums(c, 1, row + kPanelRows * b, 0, a.tokens, finish);
  }
}

// One token and the rows of a list, gathered sixteen at a time: finish(place in the list, products of 16 rows of it).
template <class Finish>
INLINE void listed_rows(const FloatTileArgs& a, const int* list, int count, float* scratch, Finish&& finish) {
  uint8_t* const copies = reinterpret_cast<uint8_t*>(scratch);
  alignas(64) float c[kTileFloats];
  if (count) configure_rows(kPanelRows);
  for (int k = 0; k < count; k += kPanelRows) {
    for (int i = 0; i < kPanelRows; i++) {
      const uint8_t* from = a.weights + list[min_int(k + i, count - 1)] * a.row_bytes;
      for (size_t at = 0; at < a.row_bytes; at += 64) _mm512_store_si512(copies + i * a.row_bytes + at, _mm512_loadu_si512(from + at));
    }
    const WeightTiles w = {copies, a.row_bytes, 0, 2 * kStepInputs};
    panel_sums(w, 1, a.panels, a.tile(), 1, a.inputs / kStepInputs, c, false);
    finish(k, first_products(c));
  }
  release();
}

constexpr int kBlocksAtOnce = 2;  // of 16 rows: with their sums they take half of the first cache

// `blocks` blocks of rows, of which the last may be cut, uncut by inputs.
template <class Finish>
INLINE void whole_rows(const FloatTileArgs& a, int row, int blocks, Finish&& finish) {
  alignas(64) float sums[kPanelTiles * kBlocksAtOnce * kTileFloats];
  const WeightTiles w = {a.weights + row * a.row_bytes, a.row_bytes, kPanelRows * a.row_bytes, 2 * kStepInputs};
  for (int token = 0; token < a.tokens; token += kPanelTokens) {
    const int count = min_int(kPanelTokens, a.tokens - token);
    panel_sums(w, blocks, a.panel(token), a.tile(), tiles_of(count), a.inputs / kStepInputs, sums, false);
    finish_panel_sums(sums, blocks, row, token, count, finish);
  }
}

// Rows [row, row + 16 blocks), piece by piece of their inputs.
template <class Finish>
INLINE void cut_rows(const FloatTileArgs& a, int row, int blocks, float* scratch, Finish&& finish) {
  constexpr int tile_bytes = 2 * kTileHalves;
  const size_t panel_floats = static_cast<size_t>(kPanelTiles) * blocks * kTileFloats;
  uint8_t* piece = reinterpret_cast<uint8_t*>(scratch);
  float* sums = scratch + kPieceRows * kPieceInputs / 2;
  for (int input = 0; input < a.inputs; input += kPieceInputs) {
    const int steps = min_int(kPieceInputs, a.inputs - input) / kStepInputs;
    for (int r = 0; r < kPanelRows * blocks; r++) {
      const uint8_t* from = a.weights + (row + r) * a.row_bytes + 2 * input;
      prefetch(from + 2 * a.row_bytes, 2 * kPieceInputs);
      uint8_t* to = piece + static_cast<size_t>(r / kPanelRows) * steps * tile_bytes + r % kPanelRows * 64;
      for (int s = 0; s < steps; s++) _mm512_store_si512(to + s * tile_bytes, _mm512_loadu_si512(from + 64 * s));
    }
    const WeightTiles w = {piece, 64, static_cast<size_t>(steps) * tile_bytes, tile_bytes};
    for (int token = 0; token < a.tokens; token += kPanelTokens) {
      const uint16_t* x = a.panel(token) + static_cast<size_t>(input) / kStepInputs * kTileHalves;
      float* c = sums + token / kPanelTokens * panel_floats;
      const int tiles = tiles_of(min_int(kPanelTokens, a.tokens - token));
      panel_sums(w, blocks, x, a.tile(), tiles, steps, c, input > 0);
    }
  }
  for (int token = 0; token < a.tokens; token += kPanelTokens)
    finish_panel_sums(sums + token / kPanelTokens * panel_floats, blocks, row, token, min_int(kPanelTokens, a.tokens - token), finish);
}

static size_t float_tile_scratch(int inputs, int tokens) {
  const size_t copies = static_cast<size_t>(kPanelRows) * inputs;  // two of bfloat16
  if (inputs <= kWholeInputs) return copies;
  return copies + kPieceRows * kPieceInputs / 2 + round_up(tokens, kPanelTokens) / kPanelTokens * kPanelTiles * kPieceRows / kPanelRows * kTileFloats;
}

// finish(row, token, products of 16 rows) for rows [begin, end); the last call for a token may have fewer rows.
template <class Finish>
INLINE void for_float_tiles(const FloatTileArgs& a, int begin, int end, float* scratch, Finish&& finish) {
  int row = begin, left = (end - begin) / kPanelRows;
  const bool cut = a.tokens > kPanelTokens && a.inputs > kWholeInputs;
  const int few = a.tokens <= kPanelTokens ? tiles_of(a.tokens) : kPanelTiles;
  const int most = few <= kFewTiles ? left : cut ? kPieceRows / kPanelRows : kBlocksAtOnce;
  if (left) configure_rows(kPanelRows);
  while (left) {
    const int blocks = min_int(left, most);
    if (few == 1) streamed_rows<1>(a, row, blocks, scratch, finish);
    else if (few == 2) streamed_rows<2>(a, row, blocks, scratch, finish);
    else if (few == 3) streamed_rows<3>(a, row, blocks, scratch, finish);
    else if (cut) cut_rows(a, row, blocks, scratch, finish);
    else whole_rows(a, row, blocks, finish);
    row += blocks * kPanelRows, left -= blocks;
  }
  if (row < end) {
    configure_rows(end - row);
    whole_rows(a, row, 1, finish);
  }
  release();
}

// ---- rows and neurons ------------------------------------------------------------------------------------------------------------

static void float_tile_rows(const RowsArgs& a, int begin, int end, float* scratch) {
  const FloatTileArgs tiles = {a.weights, a.row_bytes, a.panels, a.tokens, a.blocks * kSuperblock};
  for_float_tiles(tiles, begin, end, scratch, [&](int row, int token, f32x16 products) { finish_panel(a, row, end, token, products); });
}

static void float_tile_activate(const MlpArgs& a, int begin, int end, ActiveBlock* const* out, MlpCounts* counts, float* scratch) {
  const FloatTileArgs tiles = {a.up, a.up_bytes, a.panels, a.tokens, a.blocks * kSuperblock};
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  int64_t active = 0;
  for_float_tiles(tiles, begin, end, scratch, [&](int row, int token, f32x16 products) {
    const __mmask16 there = rows_mask(row, end);
    const f32x16 v = add(products, _mm512_maskz_loadu_ps(there, a.bias + row));
    const __mmask16 positive = _mm512_mask_cmp_ps_mask(there, v, zero16(), _CMP_GT_OQ);
    if (!positive) return;
    ActiveBlock* list = out[token];
    const int count = __builtin_popcount(positive);
    const __mmask16 some = static_cast<__mmask16>((1u << count) - 1);
    const __m512i index = _mm512_add_epi32(lane, _mm512_set1_epi32(row % kNeuronBlock));
    _mm512_mask_cvtepi32_storeu_epi8(list->index + list->count, some, _mm512_maskz_compress_epi32(positive, index));
    _mm512_mask_storeu_ps(list->value + list->count, some, _mm512_maskz_compress_ps(positive, mul(v, v)));
    list->count += count, active += count;
  });
  counts->candidates += static_cast<int64_t>(end - begin) * a.tokens, counts->active += active;
}

// One token and one block of neurons: as one_block, but for the order of sums.
static void float_tile_block(const MlpArgs& a, int block, float* sum, MlpCounts* counts, float* scratch) {
  ActiveBlock active;
  active.count = 0;
  ActiveBlock* out = &active;
  float_tile_activate(a, block * kNeuronBlock, min_int((block + 1) * kNeuronBlock, a.neurons), &out, counts, scratch);
  add_neurons(a, block, active, 0, sum);
}

}  // namespace PERSIMMON_ISA
}  // namespace persimmon

#endif

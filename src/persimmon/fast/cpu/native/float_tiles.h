// Products of bfloat16 rows with float32 inputs on AMX, for one token and for many.
//
// A float32 has 24 significant bits, a bfloat16 eight. So every input is cut, exactly, into three bfloat16 numbers: x = high + mid + low;
// and weight . x is the sum of three products of bfloat16 numbers with float32 sums, which tdpbf16ps does sixteen times as fast as
// the vector unit does one in float32. Rounded are the sums alone, as in every float32 product.
//
// The order of sums: for each part, 32 inputs at a time (within which the processor has its own fixed order) are added to one float32
// number, ascending; a row's product is (low + mid) + high. A column of a tile never depends on the others, so neither does a token
// on its company. Other instruction sets sum in another order (panels.h): `amx` differs from them by float32 rounding.
// Numbers below the smallest normal float32 (1.2e-38) count as zero here: the unit knows no others.
//
// Layouts. A tile for 16 columns and 32 inputs is [16 pairs of inputs][16 columns][2]; a column is a part of a token. Tokens lie in panels
// of kPanelTokens: sixteen tokens have three tiles, one for each part; a rest of at most ten has all parts of five tokens in one
// tile, those of a token side by side. [panel][tile][inputs / 32][tile for 32 inputs]. Weights stay as they are: 16 rows x 64 bytes are the other operand.
//
// With few tokens reading the weights is the limit, and tile loads read no stream as fast as vectors do: rows are copied, sixteen at a
// time, while those before them are multiplied. Many tokens of wide rows are cut by inputs as well, so that what is read again lies
// in the second cache; sums between the pieces are kept as they are, in float32. Neither changes a bit.
#pragma once
#include "tiled_rows.h"

#if defined(__AMX_BF16__)
#include <immintrin.h>

namespace persimmon {
namespace PERSIMMON_ISA {

constexpr int kStepInputs = 32;      // inputs of a tile product
constexpr int kTileHalves = 512;     // 16-bit numbers of a tile
constexpr int kTileFloats = 256;     // sums of a tile
constexpr int kFloatParts = 3;
constexpr int kSharedTokens = 5;     // tokens whose parts share a tile
constexpr int kPanelTiles = kFloatParts * kPanelTokens / kTileTokens;
constexpr int kWholeInputs = 512;    // rows up to this size are not cut ...
constexpr int kPieceInputs = 512;    // ... others into such pieces: 256 tokens of one are 768 KiB
constexpr int kPieceRows = 128;      // rows of a piece: 128 KiB, and their sums with 256 tokens 384 KiB
constexpr int kFewTiles = 3;         // inputs with which rows are read as a stream
constexpr int kCopySoon = 512;       // bytes of the stream that are fetched into the first cache

// Tokens and tiles that come next when `left` tokens of a panel are left.
struct TileCut {
  int tokens, tiles;
  explicit TileCut(int left)
      : tokens(left > 2 * kSharedTokens ? min_int(left, kTileTokens) : min_int(left, kSharedTokens)),
        tiles(left > 2 * kSharedTokens ? kFloatParts : 1) {}
};
INLINE int tiles_of(int tokens) {
  int tiles = 0;
  while (tokens > 0) {
    const TileCut cut(tokens);
    tiles += cut.tiles, tokens -= cut.tokens;
  }
  return tiles;
}

// ---- tile registers: 0 to 3 sums, 4 and 5 weights, 6 and 7 inputs ----------------------------------------------------------------

struct alignas(64) FloatTileShapes {
  uint8_t palette = 0, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
struct FloatTileTable {  // for 1 to 16 rows of weights
  FloatTileShapes of[kPanelRows + 1] = {};
  constexpr FloatTileTable() {
    for (int n = 1; n <= kPanelRows; n++) {
      of[n].palette = 1;
      for (int i = 0; i < 8; i++) of[n].row_bytes[i] = 64, of[n].rows[i] = static_cast<uint8_t>(i < 6 ? n : 16);
    }
  }
};
static constexpr FloatTileTable kFloatTiles;
INLINE void configure_rows(int rows) { asm volatile("ldtilecfg %0" ::"m"(kFloatTiles.of[rows])); }

// ---- inputs --------------------------------------------------------------------------------------------------------------------

// The three parts of 32 floats, highest first; cut off, not rounded, so that no part is larger than the whole.
INLINE void split32(const float* x, __m512i* parts) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
  alignas(64) static constexpr uint16_t kOdd[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                    33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  const __m512i odd = _mm512_load_si512(kOdd);
  __m512 a = load16(x), b = load16(x + 16);
#pragma GCC unroll 3
  for (int k = 0; k < kFloatParts; k++) {
    const __m512i left = _mm512_castps_si512(a), right = _mm512_castps_si512(b);
    parts[k] = _mm512_permutex2var_epi16(left, odd, right);
    a = _mm512_sub_ps(a, _mm512_castsi512_ps(_mm512_and_si512(left, upper)));
    b = _mm512_sub_ps(b, _mm512_castsi512_ps(_mm512_and_si512(right, upper)));
  }
}

INLINE void store_tile(const __m512i* lines, uint16_t* tile) {
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) _mm512_store_si512(tile + 32 * i, lines[i]);
}

// x [tokens][inputs] -> panels [begin, end).
static void make_float_tiles(const float* x, int inputs, int tokens, int begin, int end, uint16_t* panels) {
  const size_t tile_halves = static_cast<size_t>(inputs) / kStepInputs * kTileHalves;
  for (int p = begin; p < end; p++) {
    uint16_t* tile = panels + static_cast<size_t>(p) * kPanelTiles * tile_halves;
    const int last = min_int(tokens, (p + 1) * kPanelTokens);
    for (int t = p * kPanelTokens; t < last;) {
      const TileCut cut(last - t);
      for (int i = 0; i < inputs; i += kStepInputs) {
        __m512i lines[kFloatParts][16] = {};
        for (int k = 0; k < cut.tokens; k++) {
          __m512i parts[kFloatParts];
          split32(x + static_cast<size_t>(t + k) * inputs + i, parts);
          for (int part = 0; part < kFloatParts; part++)
            cut.tiles == 1 ? lines[0][kFloatParts * k + part] = parts[part] : lines[part][k] = parts[part];
        }
        for (int k = 0; k < cut.tiles; k++) {
          transpose16(lines[k]);
          store_tile(lines[k], tile + k * tile_halves + static_cast<size_t>(i) / kStepInputs * kTileHalves);
        }
      }
      tile += cut.tiles * tile_halves, t += cut.tokens;
    }
  }
}

// ---- products --------------------------------------------------------------------------------------------------------------------

struct WeightTiles {
  const uint8_t* first;
  size_t row, block, step;  // bytes from a row, from 16 rows, from 32 inputs to the next
};

// Sums lie as [tile][block of 16 rows][16][16], `c_tile` floats from a tile to the next.
// R blocks of rows with two tiles of inputs, `x_tile` numbers apart.
template <int R>
INLINE void two_tiles(const WeightTiles& w, const uint16_t* x, size_t x_tile, int steps, float* c, size_t c_tile, bool add) {
  if (add) {
    _tile_loadd(0, c, 64);
    _tile_loadd(1, c + c_tile, 64);
    if (R > 1) _tile_loadd(2, c + kTileFloats, 64);
    if (R > 1) _tile_loadd(3, c + c_tile + kTileFloats, 64);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const uint8_t* a = w.first;
  for (int s = 0; s < steps; s++, a += w.step, x += kTileHalves) {
    _tile_loadd(4, a, w.row);
    _tile_loadd(6, x, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, x + x_tile, 64);
    _tile_dpbf16ps(1, 4, 7);
    if (R > 1) _tile_loadd(5, a + w.block, w.row);
    if (R > 1) _tile_dpbf16ps(2, 5, 6);
    if (R > 1) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, 64);
  _tile_stored(1, c + c_tile, 64);
  if (R > 1) _tile_stored(2, c + kTileFloats, 64);
  if (R > 1) _tile_stored(3, c + c_tile + kTileFloats, 64);
}

// R blocks of rows with one tile of inputs.
template <int R>
INLINE void one_tile(const WeightTiles& w, const uint16_t* x, int steps, float* c, bool add) {
  if (add) {
    _tile_loadd(0, c, 64);
    if (R > 1) _tile_loadd(1, c + kTileFloats, 64);
  } else {
    _tile_zero(0);
    _tile_zero(1);
  }
  const uint8_t* a = w.first;
  for (int s = 0; s < steps; s++, a += w.step, x += kTileHalves) {
    _tile_loadd(6, x, 64);
    _tile_loadd(4, a, w.row);
    _tile_dpbf16ps(0, 4, 6);
    if (R > 1) _tile_loadd(5, a + w.block, w.row);
    if (R > 1) _tile_dpbf16ps(1, 5, 6);
  }
  _tile_stored(0, c, 64);
  if (R > 1) _tile_stored(1, c + kTileFloats, 64);
}

// `blocks` blocks of rows with the tiles of a panel.
static void panel_sums(const WeightTiles& w, int blocks, const uint16_t* x, size_t x_tile, int tiles, int steps, float* c, bool add) {
  asm volatile("" ::: "memory");  // GCC does not know that a tile load reads memory
  const size_t c_tile = static_cast<size_t>(blocks) * kTileFloats;
  const auto at = [&](int block) { return WeightTiles{w.first + block * w.block, w.row, w.block, w.step}; };
  int tile = 0;
  for (; tile + 2 <= tiles; tile += 2) {
    const uint16_t* inputs = x + tile * x_tile;
    float* sums = c + tile * c_tile;
    int b = 0;
    for (; b + 2 <= blocks; b += 2) two_tiles<2>(at(b), inputs, x_tile, steps, sums + b * kTileFloats, c_tile, add);
    if (b < blocks) two_tiles<1>(at(b), inputs, x_tile, steps, sums + b * kTileFloats, c_tile, add);
  }
  for (int b = 0; tile < tiles && b < blocks; b += 2) {
    float* sums = c + tile * c_tile + b * kTileFloats;
    b + 2 <= blocks ? one_tile<2>(at(b), x + tile * x_tile, steps, sums, add) : one_tile<1>(at(b), x + tile * x_tile, steps, sums, add);
  }
  asm volatile("" ::: "memory");
}

// finish(row, token, products of 16 rows) for the sums of a panel of which `tokens` are there, from `token`.
template <class Finish>
INLINE void finish_panel_sums(const float* c, int blocks, int row, int token, int tokens, Finish&& finish) {
  const size_t c_tile = static_cast<size_t>(blocks) * kTileFloats;
  while (tokens > 0) {
    const TileCut cut(tokens);
    for (int b = 0; b < blocks; b++) {
      const float* high = c + b * kTileFloats;
      __m512i v[16];
#pragma GCC unroll 16
      for (int r = 0; r < 16; r++) {
        f32x16 sums = load16(high + 16 * r);
        if (cut.tiles == kFloatParts)
          sums = add(add(load16(high + 2 * c_tile + 16 * r), load16(high + c_tile + 16 * r)), sums);
        v[r] = _mm512_castps_si512(sums);
      }
      transpose16(v);
      for (int t = 0; t < cut.tokens; t++) {
        f32x16 products = _mm512_castsi512_ps(v[t]);
        if (cut.tiles == 1) {
          const __m512i* part = v + kFloatParts * t;
          products = add(add(_mm512_castsi512_ps(part[2]), _mm512_castsi512_ps(part[1])), _mm512_castsi512_ps(part[0]));
        }
        finish(row + kPanelRows * b, token + t, products);
      }
    }
    c += cut.tiles * c_tile, token += cut.tokens, tokens -= cut.tokens;
  }
}

struct FloatTileArgs {
  const uint8_t* weights;
  size_t row_bytes;
  const uint16_t* panels;
  int tokens, inputs;
  size_t tile() const { return static_cast<size_t>(inputs) / kStepInputs * kTileHalves; }
  const uint16_t* panel(int token) const { return panels + static_cast<size_t>(token / kPanelTokens) * kPanelTiles * tile(); }
};

// The products of 16 rows with one token, whose three sums are the first of each row.
INLINE f32x16 first_products(const float* c) {
  __m512 q[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {  // of rows i, 4 + i, 8 + i, 12 + i
    q[i] = _mm512_castps128_ps512(_mm_load_ps(c + 16 * i));
    q[i] = _mm512_insertf32x4(q[i], _mm_load_ps(c + 16 * (4 + i)), 1);
    q[i] = _mm512_insertf32x4(q[i], _mm_load_ps(c + 16 * (8 + i)), 2);
    q[i] = _mm512_insertf32x4(q[i], _mm_load_ps(c + 16 * (12 + i)), 3);
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
    }
    _tile_stored(0, c, 64);
    if (T > 1) _tile_stored(1, c + kTileFloats, 64);
    if (T > 2) _tile_stored(2, c + 2 * kTileFloats, 64);
    if (T == 1 && a.tokens == 1) finish(row + kPanelRows * b, 0, first_products(c));
    else finish_panel_sums(c, 1, row + kPanelRows * b, 0, a.tokens, finish);
  }
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

// One token and one block of neurons of any format: one_block, but for the sums of bfloat16 rows.
static void float_tile_or_one_block(const MlpArgs& a, int block, float* sum, MlpCounts* counts, float* scratch) {
  if (a.format != Format::bf16) return one_block(a, block, sum, counts, scratch);
  ActiveBlock active;
  active.count = 0;
  ActiveBlock* out = &active;
  float_tile_activate(a, block * kNeuronBlock, min_int((block + 1) * kNeuronBlock, a.neurons), &out, counts, scratch);
  add_neurons(a, block, active, 0, sum);
}

}  // namespace PERSIMMON_ISA
}  // namespace persimmon

#endif

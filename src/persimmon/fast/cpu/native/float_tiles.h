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

// The three parts of one token as the first columns of its tiles; the others stay what they are, as no column depends on them.
static void make_one_token(const float* x, int inputs, uint16_t* tile) {
  for (int i = 0; i < inputs; i += kStepInputs, tile += kTileHalves) {
    __m512i p[kFloatParts];
    split32(x + i, p);
    const __m512i zero = _mm512_setzero_si512();
    const __m512i l = _mm512_unpacklo_epi32(p[0], p[1]), h = _mm512_unpackhi_epi32(p[0], p[1]);
    const __m512i m = _mm512_unpacklo_epi32(p[2], zero), n = _mm512_unpackhi_epi32(p[2], zero);
    const __m512i lines[4] = {_mm512_unpacklo_epi64(l, m), _mm512_unpackhi_epi64(l, m), _mm512_unpacklo_epi64(h, n),
                              _mm512_unpackhi_epi64(h, n)};  // quarter q of line k: pair 4 q + k
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
      __m128i* line = reinterpret_cast<__m128i*>(tile + 32 * k);
      _mm_store_si128(line, _mm512_castsi512_si128(lines[k]));
      _mm_store_si128(line + 16, _mm512_extracti32x4_epi32(lines[k], 1));
      _mm_store_si128(line + 32, _mm512_extracti32x4_epi32(lines[k], 2));
      _mm_store_si128(line + 48, _mm512_extracti32x4_epi32(lines[k], 3));
    }
  }
}

// x [tokens][inputs] -> panels [begin, end).
static void make_float_tiles(const float* x, int inputs, int tokens, int begin, int end, uint16_t* panels) {
  if (tokens == 1) return make_one_token(x, inputs, panels);
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

}  // namespace PERSIMMON_ISA
}  // namespace persimmon

#endif

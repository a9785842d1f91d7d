// The q4 down projection for many tokens: 128 outputs of a block of 256 neurons are unpacked into the panels of tiles.h and
// used for every token. Rows that no token of the call needs are not read. The bits are those of int4_down.h.
#pragma once
#include "int4_down.h"
#include "tiled_rows.h"

#if defined(__AVX512VNNI__)

namespace persimmon {
namespace PERSIMMON_ISA {

constexpr int kPiecePanels = kInt4Piece / kPanelRows;

// Panels [16 outputs][group] of signed weights. What is skipped keeps whatever codes it had: they meet codes of zero.
static void unpack_piece(const Int4DownArgs& a, int block, int column, WeightGroup* out) {
  const size_t row_bytes = static_cast<size_t>(a.blocks) * kSuperblock / 2, at = column / 2;
  for (int g = 0; g < kLanes; g++, out++) {
    const int group = block * kLanes + g;
    const uint32_t needed = group < a.groups ? a.needed[group] : 0;
    const uint8_t* record = a.records + group * a.record_bytes;
    for (int j = 0; j < kPiecePanels; j++)
      _mm512_store_ps(out[j * kLanes].scale, needed ? load_half16(record + 2 * column + 32 * j) : zero16());
    for (int v = 0; v < 8; v++) {
      const uint32_t four = needed >> 4 * v & 15;
      if (!four) continue;
      __m512i r[4];
      interleave_needed(record + (4 + 4 * v) * row_bytes, row_bytes, four, at, r);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        _mm512_store_si512(out[j * kLanes].code[v], low_nibbles(r[j]));
        _mm512_store_si512(out[(4 + j) * kLanes].code[v], high_nibbles(r[j]));
      }
    }
  }
}

// The pieces of a range of columns, in the order of work: fetched ahead while others are multiplied. A row's pieces come four
// at a time, as memory likes neighbours, and every fourth row at once.
struct PieceOrder {
  int begin, pieces;  // of a block
  int now;            // counted through all blocks
};
constexpr int kPiecesAhead = 4;

// The lines of one of the eight groups of a block. Inline: GCC removes calls of functions that do nothing but prefetch.
INLINE void fetch_ahead(const Int4DownArgs& a, const PieceOrder& order, int g) {
  const size_t row_bytes = static_cast<size_t>(a.blocks) * kSuperblock / 2;
  const uint8_t* codes[kPiecesAhead];
  uint32_t needed[kPiecesAhead], any = 0;
  for (int k = 0; k < kPiecesAhead; k++) {
    const int piece = order.now + 1 + k, group = piece / order.pieces * kLanes + g;
    const int column = order.begin + piece % order.pieces * kInt4Piece;
    const uint8_t* record = a.records + group * a.record_bytes;
    needed[k] = group < a.groups ? a.needed[group] : 0;
    codes[k] = record + 4 * row_bytes + column / 2;
    any |= needed[k];
    if (k == 0 && needed[k]) prefetch(record + 2 * column, 2 * kInt4Piece);
  }
  for (uint32_t left = any & 0x11111111u << order.now % kPiecesAhead; left; left &= left - 1) {
    const int n = __builtin_ctz(left);
#pragma GCC unroll 4
    for (int k = 0; k < kPiecesAhead; k++)
      if (needed[k] >> n & 1) __builtin_prefetch(codes[k] + n * row_bytes, 0, 2);
  }
}

// Sums of a panel with N tokens from `first` of a tile, as lane_products has them. Inputs are squares, so they are the
// operand of vpdpbusd that has no sign. Few tokens do not keep the tile unit of AMX busy: its results take too long.
template <int N>
INLINE void panel_sums(const WeightGroup* w, const TokenGroup* x, int first, f32x16* sum) {
#if defined(__AMX_INT8__)
  if (N == kTileTokens) return lane_products<Panel<Q4>, N>(w, x, first, kLanes, sum);
#endif
  for (int g = 0; g < kLanes; g++) {
    __m512i code[8];
#pragma GCC unroll 8
    for (int v = 0; v < 8; v++) code[v] = _mm512_load_si512(w[g].code[v]);
    const f32x16 scale = _mm512_load_ps(w[g].scale);
#pragma GCC unroll 16
    for (int t = 0; t < N; t++) {
      const f32x16 integers = _mm512_cvtepi32_ps(group_integers<true>(code, x[g].code[first + t]));
      sum[t] = fma(mul(scale, set16(x[g].scale[first + t])), integers, sum[t]);
    }
  }
}

// total[t][0 .. 128) += the block's sums of N tokens of a tile, from `first` on.
template <int N>
static void piece_products(const Int4DownArgs& a, const WeightGroup* panels, const TokenGroup* x, int first, const PieceOrder* order, float* total,
                           size_t stride) {
  for (int j = 0; j < kPiecePanels; j++) {
    if (order) fetch_ahead(a, *order, j);
    f32x16 sum[N];
#pragma GCC unroll 16
    for (int t = 0; t < N; t++) sum[t] = zero16();
    panel_sums<N>(panels + j * kLanes, x, first, sum);
#pragma GCC unroll 16
    for (int t = 0; t < N; t++) {
      float* y = total + t * stride + 16 * j;
      store16(y, add(load16(y), sum[t]));
    }
  }
}

static void all_products(const Int4DownArgs& a, const WeightGroup* panels, const TokenGroup* x, const PieceOrder& order,
                         float* total, size_t stride) {
  const int full = a.tokens / kTileTokens * kTileTokens, rest = a.tokens - full;
  if (full) configure(kTileTokens);
  for (int t = 0; t < full; t += kTileTokens, x += kLanes)
    piece_products<kTileTokens>(a, panels, x, 0, t == 0 ? &order : nullptr, total + t * stride, stride);
  if (!rest) return;
  const PieceOrder* first = full ? nullptr : &order;
  const int padded = rest <= 4 ? 4 : rest <= 8 ? 8 : 16;
  if (padded == 16) configure(padded);
  if (padded == 4) piece_products<4>(a, panels, x, 0, first, total + full * stride, stride);
  else if (padded == 8) piece_products<8>(a, panels, x, 0, first, total + full * stride, stride);
  else piece_products<16>(a, panels, x, 0, first, total + full * stride, stride);
}

// Columns [begin, end) of all tokens; panels: kInt4PanelBytes, aligned to 64.
static void tiled_int4_columns(const Int4DownArgs& a, int begin, int end, float* total, uint8_t* panels) {
  WeightGroup* unpacked = reinterpret_cast<WeightGroup*>(panels);
  static_assert(sizeof(WeightGroup) * kPiecePanels * kLanes == kInt4PanelBytes, "what the caller has");
  const size_t columns = end - begin, tiles = (a.tokens + kTileTokens - 1) / kTileTokens;
  memset(total, 0, sizeof(float) * columns * tiles * kTileTokens);
  PieceOrder order = {begin, static_cast<int>(columns) / kInt4Piece, 0};
  for (int b = 0; b * kLanes < a.groups; b++)
    for (int column = begin; column < end; column += kInt4Piece, order.now++) {
      unpack_piece(a, b, column, unpacked);
      all_products(a, unpacked, a.tiles + b * tiles * kLanes, order, total + column - begin, columns);
    }
  release();
  for (int t = 0; t < a.tokens; t++)
    for (size_t i = 0; i < columns; i++) a.y[t * a.y_stride + begin + i] += total[t * columns + i] + a.bias[begin + i];
}

}  // namespace PERSIMMON_ISA
}  // namespace persimmon

#endif

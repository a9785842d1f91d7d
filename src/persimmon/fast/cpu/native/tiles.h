// Products of packed rows with many tokens at once: prefill, batches, speculative blocks.
//
// Sixteen rows (a panel) are unpacked once into the order that the integer unit wants, one record per group of 32 weights,
// and used for every token of the call; tokens lie in tiles of sixteen, cut by groups likewise. One group of a panel and a
// tile is 16 x 16 x 32 products, exact in int32 on both units:
//   AMX           one tdpbssd
//   AVX-512 VNNI  eight vpdpbusd a token, weights in registers, inputs broadcast
// Sums: a group's products are scaled and added as in packed_row: group g of every superblock in lane g, superblocks
// ascending, lanes folded as by sum_lanes. So the result has the bits of rows.h, whatever the number of tokens.
// Lanes are outermost, so that an eighth of the tiles and panels at a time stays in the first two caches.
#pragma once
#include "rows.h"

#if defined(__AVX512VNNI__)

namespace persimmon {
namespace PERSIMMON_ISA {

constexpr int kTiledTokens = 12;    // below, unpacking costs more than it saves
constexpr int kPanelRows = 16;      // lanes of a vector
constexpr int kPanelsAtOnce = 4;    // 64 rows of 16,384 inputs are 1 MiB unpacked: half a second-level cache

#if defined(__AMX_INT8__)
constexpr bool kSignedWeights = true;
#else
constexpr bool kSignedWeights = false;  // vpdpbusd wants unsigned weights
#endif

struct alignas(64) WeightGroup {  // 32 weights of 16 rows
  uint8_t code[8][kPanelRows][4];
  float scale[kPanelRows];
};

// ---- tokens --------------------------------------------------------------------------------------------------------------

// Tiles [begin, end) of x[tokens][blocks]; records are ordered [tile][lane][superblock], missing tokens are zeros.
static void make_tiles(const ActivationBlock* x, int tokens, int blocks, int begin, int end, TokenGroup* tiles) {
  for (int tile = begin; tile < end; tile++)
    for (int t = 0; t < kTileTokens; t++) {
      const int token = tile * kTileTokens + t;
      for (int s = 0; s < blocks; s++)
#pragma GCC unroll 16
        for (int g = 0; g < kLanes; g++) {
          TokenGroup& out = tiles[(static_cast<size_t>(tile) * kLanes + g) * blocks + s];
          if (token >= tokens) {
            memset(out.code[t], 0, kGroup);
            out.scale[t] = out.sum[t] = 0.0f;
            continue;
          }
          const ActivationBlock& in = token_input(x, token, blocks)[s];
          for (int v = 0; v < 8; v++) memcpy(out.code[t] + 4 * v, in.code + 32 * v + 4 * g, 4);
          out.scale[t] = in.scale[g], out.sum[t] = in.sum[g];
        }
    }
}

// ---- weights -------------------------------------------------------------------------------------------------------------

// The formats as stored in a panel: codes less `shift` (128: the sign bit flipped), value = product + offset * sum of inputs.
template <class F>
struct Panel {  // planes
  static constexpr bool bytes = false, plane = true;
  static constexpr int shift = 0;
  static constexpr float offset = F::offset;
};
template <>
struct Panel<Q4> {
  static constexpr bool bytes = false, plane = false;
  static constexpr int shift = kSignedWeights ? 8 : 0;
  static constexpr float offset = kSignedWeights ? 0.0f : Q4::offset;
};
template <>
struct Panel<Q8> {
  static constexpr bool bytes = true, plane = false;
  static constexpr int shift = kSignedWeights ? 0 : -128;
  static constexpr float offset = kSignedWeights ? 0.0f : Q8::offset;
};

// Transpose 16 x 16 words.
INLINE void transpose16(__m512i* r) {
  __m512i a[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    const __m512i l01 = _mm512_unpacklo_epi32(r[i], r[i + 1]), h01 = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    const __m512i l23 = _mm512_unpacklo_epi32(r[i + 2], r[i + 3]), h23 = _mm512_unpackhi_epi32(r[i + 2], r[i + 3]);
    a[i] = _mm512_unpacklo_epi64(l01, l23), a[i + 1] = _mm512_unpackhi_epi64(l01, l23);
    a[i + 2] = _mm512_unpacklo_epi64(h01, h23), a[i + 3] = _mm512_unpackhi_epi64(h01, h23);
  }
#pragma GCC unroll 16
  for (int c = 0; c < 4; c++) {  // a[4 q + c]: columns c, 4 + c, 8 + c, 12 + c of rows 4 q .. 4 q + 3
    const __m512i l = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x88), h = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xDD);
    const __m512i m = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x88), n = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xDD);
    r[c] = _mm512_shuffle_i32x4(l, m, 0x88), r[8 + c] = _mm512_shuffle_i32x4(l, m, 0xDD);
    r[4 + c] = _mm512_shuffle_i32x4(h, n, 0x88), r[12 + c] = _mm512_shuffle_i32x4(h, n, 0xDD);
  }
}

// Eight scales of 16 rows, transposed to scale[g][row].
INLINE void transpose_scales(const f32x8* row, __m512* out) {
  __m512 z[8];
#pragma GCC unroll 16
  for (int i = 0; i < 8; i++) z[i] = _mm512_insertf32x8(_mm512_castps256_ps512(row[i]), row[8 + i], 1);
  __m512i a[8];
#pragma GCC unroll 16
  for (int i = 0; i < 8; i += 4) {
    const __m512i l01 = _mm512_castps_si512(_mm512_unpacklo_ps(z[i], z[i + 1]));
    const __m512i h01 = _mm512_castps_si512(_mm512_unpackhi_ps(z[i], z[i + 1]));
    const __m512i l23 = _mm512_castps_si512(_mm512_unpacklo_ps(z[i + 2], z[i + 3]));
    const __m512i h23 = _mm512_castps_si512(_mm512_unpackhi_ps(z[i + 2], z[i + 3]));
    a[i] = _mm512_unpacklo_epi64(l01, l23), a[i + 1] = _mm512_unpackhi_epi64(l01, l23);
    a[i + 2] = _mm512_unpacklo_epi64(h01, h23), a[i + 3] = _mm512_unpackhi_epi64(h01, h23);
  }
  const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13), second = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
#pragma GCC unroll 16
  for (int c = 0; c < 4; c++) {
    out[c] = _mm512_castsi512_ps(_mm512_permutex2var_epi64(a[c], first, a[4 + c]));
    out[4 + c] = _mm512_castsi512_ps(_mm512_permutex2var_epi64(a[c], second, a[4 + c]));
  }
}

// Where N rows lie; missing ones repeat the last. The rest of planes has the scales of the top.
template <int N>
struct RowPlaces {
  const uint8_t* codes[N];
  const uint8_t* scales[N];
  int bytes, scales_bytes;  // from one superblock to the next
  size_t ahead;             // bytes from a row to the one N rows on
  int tail;                 // bytes of a top row from its scales on
};
using PanelRows = RowPlaces<kPanelRows>;

template <class F, int N>
INLINE RowPlaces<N> row_places(const uint8_t* base, size_t row_bytes, int first, int end) {
  RowPlaces<N> rows;
  for (int r = 0; r < N; r++) {
    rows.codes[r] = base + static_cast<size_t>(min_int(first + r, end - 1)) * row_bytes;
    rows.scales[r] = rows.codes[r] + F::scales_at;
  }
  rows.bytes = rows.scales_bytes = F::bytes, rows.ahead = N * row_bytes, rows.tail = 0;
  return rows;
}

template <int N>
INLINE RowPlaces<N> top_places(const uint8_t* base, size_t row_bytes, int blocks, int first, int end) {
  RowPlaces<N> rows;
  for (int r = 0; r < N; r++) {
    rows.codes[r] = base + static_cast<size_t>(min_int(first + r, end - 1)) * row_bytes;
    rows.scales[r] = top_scales(rows.codes[r], blocks);
  }
  rows.bytes = kTopBytes, rows.scales_bytes = kLanes, rows.ahead = N * row_bytes;
  rows.tail = static_cast<int>(top_row_bytes(blocks)) - blocks * kTopBytes;
  return rows;
}
template <int N>
INLINE void go_to_rest(const uint8_t* base, size_t row_bytes, int first, int end, RowPlaces<N>* rows) {
  for (int r = 0; r < N; r++) rows->codes[r] = base + static_cast<size_t>(min_int(first + r, end - 1)) * row_bytes;
  rows->bytes = kRestBytes, rows->ahead = N * row_bytes;
}
template <class F>
INLINE f32x8 scales_at(const uint8_t* p) {
  return Panel<F>::plane ? load_bytes8(p) : load_half8(p);
}

// Words of sixteen rows at `offset` of superblock s: r[i] is word i of each.
INLINE void load_words(const PanelRows& rows, int s, int offset, __m512i* r) {
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(rows.codes[i] + static_cast<size_t>(s) * rows.bytes + offset);
  transpose16(r);
}

// put(word, codes of it in every row) for the 64 words of one superblock, in lane order.
template <class F>
struct UnpackPanel {
  template <class Put>
  INLINE void words(const PanelRows& rows, int s, Put put) {
    const __m512i mask = _mm512_set1_epi8(15);
    for (int quarter = 0; quarter < (Panel<F>::bytes ? 4 : 2); quarter++) {
      __m512i r[16];
      load_words(rows, s, 64 * quarter, r);
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) {
        const int word = 16 * quarter + i;
        if (Panel<F>::bytes) {
          put(word, r[i]);
        } else {
          put(word, _mm512_and_si512(r[i], mask));
          put(word + 32, _mm512_and_si512(_mm512_srli_epi16(r[i], 4), mask));
        }
      }
    }
  }
};
template <>
struct UnpackPanel<Top> {
  template <class Put>
  INLINE void words(const PanelRows& rows, int s, Put put) {
    const __m512i mask = _mm512_set1_epi8(3);
    __m512i r[16];
    load_words(rows, s, 0, r);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
      put(i, _mm512_and_si512(r[i], mask));
      put(16 + i, _mm512_and_si512(_mm512_srli_epi16(r[i], 2), mask));
      put(32 + i, _mm512_and_si512(_mm512_srli_epi16(r[i], 4), mask));
      put(48 + i, _mm512_and_si512(_mm512_srli_epi16(r[i], 6), mask));
    }
  }
};
template <>
struct UnpackPanel<Rest> {
  template <class Put>
  INLINE void words(const PanelRows& rows, int s, Put put) {
    const __m512i four = _mm512_set1_epi8(15), two = _mm512_set1_epi8(0x30);
    __m512i middle[16], low[16];
    load_words(rows, s, 0, middle);
    const auto join = [&](__m512i l, __m512i m) { return _mm512_or_si512(_mm512_and_si512(l, four), _mm512_and_si512(m, two)); };
    load_words(rows, s, 64, low);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
      put(i, join(low[i], _mm512_slli_epi16(middle[i], 4)));
      put(32 + i, join(_mm512_srli_epi16(low[i], 4), middle[i]));
    }
    load_words(rows, s, 128, low);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
      put(16 + i, join(low[i], _mm512_slli_epi16(middle[i], 2)));
      put(48 + i, join(_mm512_srli_epi16(low[i], 4), _mm512_srli_epi16(middle[i], 2)));
    }
  }
};

template <class F>
static void unpack_panel(const PanelRows& rows, int blocks, WeightGroup* out) {
  using P = Panel<F>;
  const __m512i shift = _mm512_set1_epi8(static_cast<char>(P::shift));
  for (int s = 0; s < blocks; s++) {
    UnpackPanel<F>::words(rows, s, [&](int word, __m512i codes) {
      _mm512_store_si512(out[static_cast<size_t>(word % 8) * blocks + s].code[word / 8], P::shift ? _mm512_sub_epi8(codes, shift) : codes);
    });
    f32x8 scale[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) scale[i] = scales_at<F>(rows.scales[i] + static_cast<size_t>(s) * rows.scales_bytes);
    __m512 by_group[8];
    transpose_scales(scale, by_group);
#pragma GCC unroll 16
    for (int g = 0; g < kLanes; g++) _mm512_store_ps(out[static_cast<size_t>(g) * blocks + s].scale, by_group[g]);
  }
}

// ---- products ------------------------------------------------------------------------------------------------------------

#if defined(__AMX_INT8__)

struct alignas(64) TileShapes {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
// Tiles 0 and 1: products; 2 and 3: inputs of `tokens` tokens; 4 and 5: weights.
INLINE void configure(int tokens) {
  TileShapes shapes = {};
  shapes.palette = 1;
  for (int i = 0; i < 6; i++) {
    shapes.row_bytes[i] = i == 2 || i == 3 ? kGroup : 4 * kPanelRows;
    shapes.rows[i] = static_cast<uint8_t>(i < 4 ? tokens : 8);
  }
  asm volatile("ldtilecfg %0" ::"m"(shapes));
}
INLINE void release() { asm volatile("tilerelease"); }

// product[t][r] of one group; even and odd groups take different tiles.
#define PERSIMMON_TILE_PRODUCT(name, c, a, b)                                                              \
  INLINE void name(const int8_t* x, const void* w, int32_t* product) {                                     \
    asm volatile("tileloadd (%0,%1,1), %%tmm" #a ::"r"(x), "r"(static_cast<long>(kGroup)) : "memory");     \
    asm volatile("tileloadd (%0,%1,1), %%tmm" #b ::"r"(w), "r"(4L * kPanelRows) : "memory");               \
    asm volatile("tilezero %%tmm" #c "\n\ttdpbssd %%tmm" #b ", %%tmm" #a ", %%tmm" #c ::: "memory");       \
    asm volatile("tilestored %%tmm" #c ", (%0,%1,1)" ::"r"(product), "r"(4L * kPanelRows) : "memory");     \
  }
PERSIMMON_TILE_PRODUCT(even_product, 0, 2, 4)
PERSIMMON_TILE_PRODUCT(odd_product, 1, 3, 5)
#undef PERSIMMON_TILE_PRODUCT

#else

INLINE void configure(int) {}
INLINE void release() {}

#endif

// One group's integers join a token's sum. `x` points to the token's scale; its sum follows at the distance of a tile.
template <class P>
INLINE void add_group(f32x16 value, const float* x, f32x16 scale, f32x16* sum) {
  if (P::offset != 0.0f) value = fma(set16(P::offset), set16(x[kTileTokens]), value);
  *sum = fma(mul(scale, set16(x[0])), value, *sum);
}

// A group's integers: eight vectors of codes with the group's 32 inputs. vpdpbusd has one operand without a sign: the inputs or the weights.
template <bool kPlainInputs>
INLINE __m512i group_integers(const __m512i* code, const int8_t* input) {
  __m512i sum[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
#pragma GCC unroll 8
  for (int v = 0; v < 8; v++) {
    const __m512i x = _mm512_set1_epi32(read_unaligned<int32_t>(input + 4 * v));
    sum[v % 2] = kPlainInputs ? _mm512_dpbusd_epi32(sum[v % 2], x, code[v]) : _mm512_dpbusd_epi32(sum[v % 2], code[v], x);
  }
  return _mm512_add_epi32(sum[0], sum[1]);
}

// sum[t] of one panel, one lane, and N tokens from `first` of a tile.
template <class P, int N>
INLINE void lane_products(const WeightGroup* w, const TokenGroup* x, int first, int blocks, f32x16* sum) {
#if defined(__AMX_INT8__)
  alignas(64) int32_t product[2][N][kPanelRows];
  const auto issue = [&](int s) {
    if (s % 2) odd_product(x[s].code[first], w[s].code, product[1][0]);
    else even_product(x[s].code[first], w[s].code, product[0][0]);
  };
  issue(0);
  for (int s = 0; s < blocks; s++) {
    if (s + 1 < blocks) issue(s + 1);
    const f32x16 scale = _mm512_load_ps(w[s].scale);
#pragma GCC unroll 16
    for (int t = 0; t < N; t++)
      add_group<P>(_mm512_cvtepi32_ps(_mm512_load_si512(product[s % 2][t])), x[s].scale + first + t, scale, sum + t);
  }
#else
  for (int s = 0; s < blocks; s++) {
    __m512i code[8];
#pragma GCC unroll 16
    for (int v = 0; v < 8; v++) code[v] = _mm512_load_si512(w[s].code[v]);
    const f32x16 scale = _mm512_load_ps(w[s].scale);
#pragma GCC unroll 16
    for (int t = 0; t < N; t++) {
      const f32x16 integers = _mm512_cvtepi32_ps(group_integers<false>(code, x[s].code[first + t]));
      add_group<P>(integers, x[s].scale + first + t, scale, sum + t);
    }
  }
#endif
}

// Lanes in the order in which sum_lanes joins them, and that joining: part[0] becomes the sum after the last one.
constexpr int kLaneOrder[kLanes] = {0, 4, 2, 6, 1, 5, 3, 7};

INLINE void join_lane(int step, f32x16 value, float* const* part) {
  switch (step) {
    case 0: store16(part[0], value); break;
    case 1: store16(part[0], add(load16(part[0]), value)); break;
    case 2: case 4: store16(part[1], value); break;
    case 3: store16(part[0], add(load16(part[0]), add(load16(part[1]), value))); break;
    case 5: store16(part[1], add(load16(part[1]), value)); break;
    case 6: store16(part[2], value); break;
    default:
      store16(part[0], add(load16(part[0]), add(load16(part[1]), add(load16(part[2]), value))));
  }
}

// The scratch memory of one call: panels, and per panel and token the three parts of a sum, and an estimate.
struct TileScratch {
  WeightGroup* panels;  // [kPanelsAtOnce][lane][superblock]
  float* part;          // [kParts][kPanelsAtOnce][tokens rounded up to tiles][kPanelRows]
  int blocks, tokens;   // tokens rounded up

  TileScratch(uint8_t* memory, int blocks, int tokens)
      : panels(reinterpret_cast<WeightGroup*>(memory)),
        part(reinterpret_cast<float*>(panels + static_cast<size_t>(kPanelsAtOnce) * kLanes * blocks)), blocks(blocks),
        tokens(static_cast<int>(round_up(tokens, kTileTokens))) {}
  WeightGroup* panel(int p) const { return panels + static_cast<size_t>(p) * kLanes * blocks; }
  float* at(int k, int p, int token) const {
    return part + ((static_cast<size_t>(k) * kPanelsAtOnce + p) * tokens + token) * kPanelRows;
  }
};
constexpr int kSum = 0, kEstimate = 3, kParts = 4;

static size_t tile_scratch_bytes(int blocks, int tokens) {
  return sizeof(WeightGroup) * kPanelsAtOnce * kLanes * blocks +
         sizeof(float) * kParts * kPanelsAtOnce * kPanelRows * round_up(tokens, kTileTokens);
}

template <class P, int N>
static void lane_of_tokens(const TileScratch& m, int step, int panels, const TokenGroup* x, int token) {
  const int lane = kLaneOrder[step], tile = token / kTileTokens;
  x += (static_cast<size_t>(tile) * kLanes + lane) * m.blocks;
  for (int p = 0; p < panels; p++) {
    f32x16 sum[N];
#pragma GCC unroll 16
    for (int t = 0; t < N; t++) sum[t] = zero16();
    lane_products<P, N>(m.panel(p) + static_cast<size_t>(lane) * m.blocks, x, token % kTileTokens, m.blocks, sum);
#pragma GCC unroll 16
    for (int t = 0; t < N; t++) {
      float* const part[3] = {m.at(kSum, p, token + t), m.at(kSum + 1, p, token + t), m.at(kSum + 2, p, token + t)};
      join_lane(step, sum[t], part);
    }
  }
}

// Sums of the unpacked panels with all tokens.
template <class F>
static void panel_products(const TileScratch& m, int panels, const TokenGroup* x, int tokens) {
  constexpr int most = kTileTokens;
  const int full = tokens / most * most, rest = tokens - full;
  for (int step = 0; step < kLanes; step++) {
    if (full && (step == 0 || rest)) configure(most);
    for (int token = 0; token < full; token += most) lane_of_tokens<Panel<F>, most>(m, step, panels, x, token);
    if (!rest) continue;
    const int padded = rest <= 4 ? 4 : rest <= 8 ? 8 : 16;
    configure(padded);
    if (padded == 4) lane_of_tokens<Panel<F>, 4>(m, step, panels, x, full);
    else if (padded == 8) lane_of_tokens<Panel<F>, 8>(m, step, panels, x, full);
    else lane_of_tokens<Panel<F>, most>(m, step, panels, x, full);
  }
}

}  // namespace PERSIMMON_ISA
}  // namespace persimmon

#endif

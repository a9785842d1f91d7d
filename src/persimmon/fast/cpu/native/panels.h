// Products of float32 or bfloat16 rows with many tokens.
//
// The kernel for few tokens (float_rows of rows.h) holds the sixteen partial sums of a row and a token in one register and adds
// them up at the end; with 256 inputs that end costs as much as the products. Here a register holds the same partial sum of
// sixteen tokens: inputs lie transposed, [panel of 32 tokens][input mod 16][input / 16][token], a weight is broadcast to all of them, and a
// block of eight rows and 32 tokens takes partial sum after partial sum. These are added up in the order of sum_lanes, as a
// binary counter does it: partial sums come in bit-reversed order, and two of equal weight are added at once.
// So every row and token has exactly the sum of the one-token kernel; rounding differs nowhere.
//
// A row's weights become floats once per call of up to 256 tokens. Per 16 products of a vector: half a load. Bound by the
// multipliers from 16 tokens on; below, the padding to 16 costs what it saves.
// Not supported: packed formats, which have tiles.h. bfloat16 rows on AMX have float_tiles.h.
#pragma once
#include "sparse_mlp.h"

namespace persimmon {
namespace PERSIMMON_ISA {

constexpr int kFewestPanelTokens = 13;
constexpr int kPanelVectors = kPanelTokens / 16;
constexpr int kRowBlock = 16;  // rows that are finished together: a cache line of every token's output
#if defined(__AVX512F__)
constexpr int kRowsInRegisters = 8, kVectorsInRegisters = 2;  // sixteen sums of the thirty-two registers ...
#else
constexpr int kRowsInRegisters = 4, kVectorsInRegisters = 1;  // ... or eight of sixteen
#endif

// Tokens of a panel are kPanelTokens, the last one's a multiple of 16 in memory of the full size.
INLINE const float* panel_of(const float* panels, int token, int inputs) {
  return panels + static_cast<size_t>(token / kPanelTokens) * kPanelTokens * inputs;
}

// The columns of 16 rows of 16, `stride` apart.
INLINE void transpose(const float* in, size_t stride, f32x16* out) {
#if defined(__AVX512F__)
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) a[i] = load16(in + i * stride);
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]), b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // a[i + c]: column c of each quarter, of rows i to i + 3
    a[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(b[i]), _mm512_castps_pd(b[i + 2])));
    a[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(b[i]), _mm512_castps_pd(b[i + 2])));
    a[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(b[i + 1]), _mm512_castps_pd(b[i + 3])));
    a[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(b[i + 1]), _mm512_castps_pd(b[i + 3])));
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; c++) {  // column 4 q + c is quarter q of a[c], a[4 + c], a[8 + c], a[12 + c]
    const __m512 low = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x44), high = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xEE);
    const __m512 low2 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x44), high2 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xEE);
    out[c] = _mm512_shuffle_f32x4(low, low2, 0x88), out[4 + c] = _mm512_shuffle_f32x4(low, low2, 0xDD);
    out[8 + c] = _mm512_shuffle_f32x4(high, high2, 0x88), out[12 + c] = _mm512_shuffle_f32x4(high, high2, 0xDD);
  }
#else
  for (int t = 0; t < 16; t++) {
    float column[16];
    for (int r = 0; r < 16; r++) column[r] = in[r * stride + t];
    out[t] = load16(column);
  }
#endif
}

static void make_panels(const float* x, int inputs, int tokens, int begin, int end, uint16_t* out) {
  float* panels = reinterpret_cast<float*>(out);
  for (int p = begin; p < end; p++) {
    float* panel = panels + static_cast<size_t>(p) * kPanelTokens * inputs;
    const int first = p * kPanelTokens, count = min_int(kPanelTokens, tokens - first);
    for (int from = 0; from < kPanelTokens; from += 16) {
      const float* source = x + static_cast<size_t>(first + from) * inputs;
      for (int i = 0; i < inputs; i += 16) {
        f32x16 columns[16];
        if (from + 16 <= count) {
          transpose(source + i, inputs, columns);
        } else {
          float some[16][16] = {};
          for (int t = 0; from + t < count; t++) memcpy(some[t], source + static_cast<size_t>(t) * inputs + i, sizeof some[t]);
          transpose(some[0], 16, columns);
        }
        for (int j = 0; j < 16; j++) store16(panel + (j * (inputs / 16) + i / 16) * kPanelTokens + from, columns[j]);
      }
    }
  }
}

// The sums of partial sum `lane` of R rows (`inputs` floats each) and 16 V tokens.
template <int R, int V>
INLINE void lane_sums(const float* rows, const float* panel, int inputs, int lane, f32x16 (*sum)[V]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) sum[r][v] = zero16();
  panel += static_cast<size_t>(lane) * (inputs / 16) * kPanelTokens;
  for (int i = lane; i < inputs; i += 16, panel += kPanelTokens) {
    f32x16 x[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; v++) x[v] = load16(panel + 16 * v);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const f32x16 w = set16(rows[static_cast<size_t>(r) * inputs + i]);
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) sum[r][v] = fma(w, x[v], sum[r][v]);
    }
  }
}

// out[r][0 .. 16 V) = rows[r] . tokens of the panel.
template <int R, int V>
INLINE void panel_block(const float* rows, const float* panel, int inputs, float (*out)[kPanelTokens]) {
  constexpr int kLevels = 4;  // of the tree over 16 partial sums
  f32x16 sum[R][V], waiting[kLevels][R][V];
  for (int step = 0; step < 16; step++) {
    const int lane = (step & 1) << 3 | (step & 2) << 1 | (step & 4) >> 1 | (step & 8) >> 3;
    lane_sums<R, V>(rows, panel, inputs, lane, sum);
    int level = 0;
    for (; step >> level & 1; level++)
#pragma GCC unroll 16
      for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) sum[r][v] = add(waiting[level][r][v], sum[r][v]);
    if (level < kLevels)
#pragma GCC unroll 16
      for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) waiting[level][r][v] = sum[r][v];
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) store16(out[r] + 16 * v, sum[r][v]);
}

// R rows at a time and 16 V tokens of a panel.
template <int R, int V>
INLINE void panel_strip(const float* rows, const float* panel, int inputs, float* out) {
  for (int r = 0; r < kRowBlock; r += R)
    panel_block<R, V>(rows + static_cast<size_t>(r) * inputs, panel, inputs,
                      reinterpret_cast<float(*)[kPanelTokens]>(out + r * kPanelTokens));
}

// kRowBlock rows and the first `count` tokens of a panel.
static void panel_rows_block(const float* rows, const float* panel, int inputs, int count, float (*out)[kPanelTokens]) {
  constexpr int sums = kRowsInRegisters * kVectorsInRegisters;
  int v = 0;
  for (; v + kVectorsInRegisters <= kPanelVectors && 16 * (v + kVectorsInRegisters - 1) < count; v += kVectorsInRegisters)
    panel_strip<kRowsInRegisters, kVectorsInRegisters>(rows, panel + 16 * v, inputs, out[0] + 16 * v);
  for (; 16 * v < count; v++) panel_strip<sums, 1>(rows, panel + 16 * v, inputs, out[0] + 16 * v);
}

// kRowBlock rows from `row` as floats: where they lie, or widened into `scratch`.
INLINE const float* float_rows(const uint8_t* weights, size_t row_bytes, bool wide, int row, int inputs, float* scratch) {
  const uint8_t* first = weights + row * row_bytes;
  if (wide) return reinterpret_cast<const float*>(first);
  for (int r = 0; r < kRowBlock; r++) {
    const uint16_t* source = reinterpret_cast<const uint16_t*>(first + r * row_bytes);
    prefetch(first + (kRowBlock + r) * row_bytes, static_cast<int>(row_bytes));
    for (int i = 0; i < inputs; i += 16) store16(scratch + static_cast<size_t>(r) * inputs + i, load_bf16x16(source + i));
  }
  return scratch;
}

static size_t panel_scratch_floats(int inputs, int) { return static_cast<size_t>(kRowBlock) * inputs; }

// finish(row, token, products of kRowBlock rows from `row`), for whole blocks of rows from `begin`.
// Returns the first row that is left.
template <class Finish>
INLINE int for_panels(Format format, const uint8_t* weights, size_t row_bytes, const uint16_t* x, int tokens, int inputs,
                      int begin, int end, float* scratch, Finish&& finish) {
  const float* panels = reinterpret_cast<const float*>(x);
  int row = begin;
  for (; row + kRowBlock <= end; row += kRowBlock) {
    const float* rows = float_rows(weights, row_bytes, format == Format::f32, row, inputs, scratch);
    for (int token = 0; token < tokens; token += kPanelTokens) {
      alignas(64) float out[kRowBlock][kPanelTokens];
      const int count = min_int(kPanelTokens, tokens - token);
      panel_rows_block(rows, panel_of(panels, token, inputs), inputs, count, out);
      for (int t = 0; t < count; t += 16) {
        f32x16 products[16];
        transpose(out[0] + t, kPanelTokens, products);
        for (int i = 0; i < min_int(16, count - t); i++) finish(row, token + t + i, products[i]);
      }
    }
  }
  return row;
}

static void panel_rows(const RowsArgs& a, int begin, int end, float* scratch) {
  const int inputs = a.blocks * kSuperblock;
  const int left = for_panels(a.format, a.weights, a.row_bytes, a.panels, a.tokens, inputs, begin, end, scratch,
                              [&](int row, int token, f32x16 v) {
    if (a.bias) v = add(v, load16(a.bias + row));
    float* y = a.y + token * a.y_stride + row;
    if (a.epilogue == Epilogue::add) v = add(load16(y), v);
    store16(y, v);
    for (int r = 0; a.epilogue == Epilogue::squared_relu && r < kRowBlock; r++) y[r] = y[r] > 0.0f ? y[r] * y[r] : 0.0f;
  });
  if (left < end) rows(a, left, end);
}

// Bits of the lanes that are above zero.
INLINE uint32_t positive_lanes(f32x16 v) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_GT_OQ);
#else
  float lanes[16];
  store16(lanes, v);
  uint32_t bits = 0;
  for (int i = 0; i < 16; i++) bits |= static_cast<uint32_t>(lanes[i] > 0.0f) << i;
  return bits;
#endif
}

static void panel_activate(const MlpArgs& a, int begin, int end, ActiveBlock* const* out, MlpCounts* counts, float* scratch) {
  const int inputs = a.blocks * kSuperblock;
  const int left = for_panels(a.format, a.up, a.up_bytes, a.panels, a.tokens, inputs, begin, end, scratch,
                              [&](int row, int token, f32x16 products) {
    const f32x16 v = add(products, load16(a.bias + row));
    uint32_t bits = positive_lanes(v);
    if (!bits) return;
    float lanes[16];
    store16(lanes, v);
    counts->active += __builtin_popcount(bits);
    for (; bits; bits &= bits - 1) {
      const int r = __builtin_ctz(bits);
      append(out[token], (row + r) % kNeuronBlock, lanes[r]);
    }
  });
  counts->candidates += static_cast<int64_t>(left - begin) * a.tokens;
  if (left < end) activate(a, left, end, 0, a.tokens, out, counts);
}

}  // namespace PERSIMMON_ISA
}  // namespace persimmon

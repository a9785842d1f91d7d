// What the products of tiles.h become: rows with their epilogue, estimates of the head, active neurons of the MLP.
//
// Each does what its namesake for few tokens does (rows.h, sparse_mlp.h), with the same bits.
#pragma once
#include "sparse_mlp.h"
#include "tiles.h"

#if defined(__AVX512VNNI__)

namespace persimmon {
namespace PERSIMMON_ISA {

// ---- rows ----------------------------------------------------------------------------------------------------------------

INLINE __mmask16 rows_mask(int first, int end) {
  return static_cast<__mmask16>(end - first >= kPanelRows ? 0xFFFF : (1 << (end - first)) - 1);
}

INLINE void finish_panel(const RowsArgs& a, int first, int end, int t, f32x16 product) {
  const __mmask16 mask = rows_mask(first, end);
  float* y = a.y + t * a.y_stride + first;
  f32x16 v = a.bias ? add(product, _mm512_maskz_loadu_ps(mask, a.bias + first)) : product;
  if (a.epilogue == Epilogue::add) v = add(_mm512_maskz_loadu_ps(mask, y), v);
  if (a.epilogue == Epilogue::squared_relu) v = _mm512_maskz_mul_ps(_mm512_cmp_ps_mask(v, zero16(), _CMP_GT_OQ), v, v);
  _mm512_mask_storeu_ps(y, mask, v);
}

// Sums of rows [first, end), at most kPanelsAtOnce panels.
template <class F>
static void products_of(const TileScratch& m, const RowsArgs& a, int first, int end) {
  int panels = 0;
  for (int r = first; r < end; r += kPanelRows)
    unpack_panel<F>(row_places<F, kPanelRows>(a.weights, a.row_bytes, r, end), a.blocks, m.panel(panels++));
  panel_products<F>(m, panels, a.tiles, a.tokens);
}
// The same of planes: of the top, and of the rest.
static void top_products(const TileScratch& m, const RowsArgs& a, int first, int end) {
  int panels = 0;
  for (int r = first; r < end; r += kPanelRows)
    unpack_panel<Top>(top_places<kPanelRows>(a.weights, a.row_bytes, a.blocks, r, end), a.blocks, m.panel(panels++));
  panel_products<Top>(m, panels, a.tiles, a.tokens);
}
static void rest_products(const TileScratch& m, const RowsArgs& a, int first, int end) {
  int panels = 0;
  for (int r = first; r < end; r += kPanelRows) {
    PanelRows rows = top_places<kPanelRows>(a.weights, a.row_bytes, a.blocks, r, end);
    go_to_rest(a.rest, a.rest_bytes, r, end, &rows);
    unpack_panel<Rest>(rows, a.blocks, m.panel(panels++));
  }
  panel_products<Rest>(m, panels, a.tiles, a.tokens);
}

// The facts of a panel's rows, a row in each lane.
struct PanelFacts {
  float unit[kPanelRows], shift[kPanelRows], error[kPanelRows];
  PanelFacts(const RowsArgs& a, int first, int end) {
    for (int i = 0; i < kPanelRows; i++) {
      const TopFacts& facts = top_facts(a.weights + static_cast<size_t>(min_int(first + i, end - 1)) * a.row_bytes, a.blocks);
      unit[i] = facts.unit, shift[i] = facts.shift, error[i] = facts.error;
    }
  }
  f32x16 top(const TileScratch& m, int p, int t) const { return mul(mul(set16(Top::factor), load16(unit)), load16(m.at(kSum, p, t))); }
  f32x16 rest(const TileScratch& m, int p, int t) const { return mul(load16(unit), load16(m.at(kSum, p, t))); }
};

// A token's panels together, as its outputs are neighbours.
template <class F>
static void rows_of_panels(const TileScratch& m, const RowsArgs& a, int first, int end) {
  products_of<F>(m, a, first, end);
  for (int t = 0; t < a.tokens; t++)
    for (int p = 0, r = first; r < end; r += kPanelRows, p++) finish_panel(a, r, end, t, load16(m.at(kSum, p, t)));
}

static void planes_of_panels(const TileScratch& m, const RowsArgs& a, int first, int end) {
  top_products(m, a, first, end);
  for (int p = 0, r = first; r < end; r += kPanelRows, p++) {
    const PanelFacts facts(a, r, end);
    for (int t = 0; t < a.tokens; t++) store16(m.at(kEstimate, p, t), facts.top(m, p, t));
  }
  rest_products(m, a, first, end);
  for (int p = 0, r = first; r < end; r += kPanelRows, p++) {
    const PanelFacts facts(a, r, end);
    for (int t = 0; t < a.tokens; t++) finish_panel(a, r, end, t, add(load16(m.at(kEstimate, p, t)), facts.rest(m, p, t)));
  }
}

// Rows of a call that are unpacked together: one panel while all tokens fit into a tile, so that memory is read evenly.
INLINE int rows_at_once(int tokens) { return kPanelRows * (tokens > kTileTokens ? kPanelsAtOnce : 1); }

static void tiled_rows(const RowsArgs& a, int begin, int end, uint8_t* scratch) {
  const TileScratch m(scratch, a.blocks, a.tokens);
  const int step = rows_at_once(a.tokens);
  for (int first = begin; first < end; first += step) {
    const int last = min_int(first + step, end);
    if (a.format == Format::q4) rows_of_panels<Q4>(m, a, first, last);
    if (a.format == Format::q8) rows_of_panels<Q8>(m, a, first, last);
    if (a.format == Format::planes) planes_of_panels(m, a, first, last);
  }
  release();
}

static void tiled_estimates(const RowsArgs& a, int begin, int end, float sigmas, float* estimate, float* bound, size_t stride,
                            uint8_t* scratch) {
  const TileScratch m(scratch, a.blocks, a.tokens);
  const int step = rows_at_once(a.tokens);
  for (int first = begin; first < end; first += step) {
    const int last = min_int(first + step, end);
    top_products(m, a, first, last);
    for (int p = 0, r = first; r < last; r += kPanelRows, p++) {
      const PanelFacts facts(a, r, last);
      const __mmask16 mask = rows_mask(r, last);
      for (int t = 0; t < a.tokens; t++) {
        const f32x16 value = add(facts.top(m, p, t), load16(facts.shift));
        const f32x16 spread = mul(load16(facts.error), set16(a.distances[t]));
        _mm512_mask_storeu_ps(estimate + t * stride + r, mask, value);
        _mm512_mask_storeu_ps(bound + t * stride + r, mask, add(value, mul(set16(sigmas), spread)));
      }
    }
  }
  release();
}

// ---- the MLP's up projection (sparse_mlp.h) --------------------------------------------------------------------------------

INLINE RowsArgs up_rows(const MlpArgs& a) {
  RowsArgs rows = {};
  rows.format = a.format, rows.weights = a.up, rows.row_bytes = a.up_bytes, rows.rest = a.down, rows.rest_bytes = a.down_bytes;
  rows.blocks = a.blocks, rows.x = a.x, rows.tokens = a.tokens, rows.tiles = a.tiles;
  return rows;
}

// Products of the outlier columns, in the order of outlier_product.
struct OutlierPanel {
  f32x16 weight[kOutliers];  // [column], a row in each lane
  OutlierPanel(const MlpArgs& a, int first, int end) {
    __m512i r[kPanelRows];
    for (int i = 0; i < kPanelRows; i++)
      r[i] = _mm512_castps_si512(load_half16(top_facts(a.up + static_cast<size_t>(min_int(first + i, end - 1)) * a.up_bytes, a.blocks).outlier));
    transpose16(r);
    for (int i = 0; i < kOutliers; i++) weight[i] = _mm512_castsi512_ps(r[i]);
  }
  INLINE f32x16 pair(const OutlierPanel& w, const float* x, int i) {
    return add(mul(w.weight[i], set16(x[i])), mul(w.weight[i + 8], set16(x[i + 8])));
  }
  INLINE f32x16 product(const OutlierPanel& w, const float* x) {
    f32x16 four[4];
    for (int i = 0; i < 4; i++) four[i] = add(pair(w, x, i), pair(w, x, i + 4));
    return add(add(four[0], four[2]), add(four[1], four[3]));
  }
};

// Append a row's positive pre-activations.
template <class Value>
INLINE void append_row(const MlpArgs& a, int r, ActiveBlock* const* out, MlpCounts* counts, Value value) {
  for (int t = 0; t < a.tokens; t++) {
    const float p = value(t);
    if (p > 0.0f) append(out[t], r % kNeuronBlock, p), counts->active++;
  }
}

static void activate_bytes(const TileScratch& m, const MlpArgs& a, int first, int end, ActiveBlock* const* out, MlpCounts* counts) {
  products_of<Q8>(m, up_rows(a), first, end);
  for (int r = first; r < end; r++)
    append_row(a, r, out, counts, [&](int t) { return m.at(kSum, (r - first) / kPanelRows, t)[(r - first) % kPanelRows] + a.bias[r]; });
  counts->candidates += static_cast<int64_t>(end - first) * a.tokens;
}

// Above this share of candidates the rest is multiplied as a whole, below it for them alone; the results are the same.
constexpr float kDenseCandidates = 0.2f;

static void activate_planes_of_panels(const TileScratch& m, const MlpArgs& a, int first, int end, ActiveBlock* const* out, MlpCounts* counts) {
  const RowsArgs rows = up_rows(a);
  top_products(m, rows, first, end);
  int64_t candidates = 0;
  for (int p = 0, r = first; r < end; r += kPanelRows, p++) {
    const OutlierPanel outliers(a, r, end);
    const PanelFacts facts(rows, r, end);
    const __mmask16 mask = rows_mask(r, end);
    const f32x16 bias = _mm512_maskz_loadu_ps(mask, a.bias + r);
    for (int t = 0; t < a.tokens; t++) {
      float* estimate = m.at(kEstimate, p, t);
      const f32x16 value = add(add(facts.top(m, p, t), OutlierPanel::product(outliers, a.outliers + t * kOutliers)), bias);
      const f32x16 least = mul(set16(-a.margin), mul(load16(facts.error), set16(a.distances[t])));
      const __mmask16 wanted = _mm512_mask_cmp_ps_mask(mask, add(value, load16(facts.shift)), least, _CMP_NLE_UQ);
      candidates += __builtin_popcount(wanted);
      // What is skipped becomes -inf, which no rest makes positive.
      store16(estimate, _mm512_mask_blend_ps(wanted, set16(-HUGE_VALF), value));
    }
  }
  counts->candidates += candidates;
  const auto estimate = [&](int r, int t) { return m.at(kEstimate, (r - first) / kPanelRows, t)[(r - first) % kPanelRows]; };
  if (candidates > kDenseCandidates * static_cast<float>(end - first) * static_cast<float>(a.tokens)) {
    rest_products(m, rows, first, end);
    for (int r = first; r < end; r++) {
      const float unit = top_facts(a.up + r * a.up_bytes, a.blocks).unit;
      append_row(a, r, out, counts, [&](int t) { return estimate(r, t) + unit * m.at(kSum, (r - first) / kPanelRows, t)[(r - first) % kPanelRows]; });
    }
    return;
  }
  for (int r = first; r < end; r++) {
    if (r + 2 < end) prefetch(a.down + static_cast<size_t>(r + 2) * a.down_bytes, a.blocks * kRestBytes);
    append_row(a, r, out, counts, [&](int t) {
      const float value = estimate(r, t);
      if (value == -HUGE_VALF) return value;
      const ActivationBlock* x = token_input(static_cast<const ActivationBlock*>(a.x), t, a.blocks);
      float rest;
      rest_row<1>(a.down + r * a.down_bytes, a.up + r * a.up_bytes, a.blocks, &x, &rest);
      return value + rest;
    });
  }
}

// Neurons [begin, end) of one block, all tokens: as activate() does.
static void tiled_activate(const MlpArgs& a, int begin, int end, ActiveBlock* const* out, MlpCounts* counts, uint8_t* scratch) {
  const TileScratch m(scratch, a.blocks, a.tokens);
  const int step = rows_at_once(a.tokens);
  for (int first = begin; first < end; first += step) {
    const int last = min_int(first + step, end);
    if (a.format == Format::q8) activate_bytes(m, a, first, last, out, counts);
    if (a.format == Format::planes) activate_planes_of_panels(m, a, first, last, out, counts);
  }
  release();
}

}  // namespace PERSIMMON_ISA
}  // namespace persimmon

#endif

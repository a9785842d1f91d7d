// Products of packed rows with three to eight tokens on AMX: batches and speculative blocks.
//
// Here the weights are the left matrix of the tile product: sixteen rows as they lie in memory, their nibbles unpacked but not
// transposed, which is what makes tiles.h too dear for so few tokens. The right matrix is the tokens. A tile product
// spans 64 inputs, two groups of 32 with a scale each, so the right matrix is diagonal: eight columns have the codes of one group and
// zeros for the other, eight columns the reverse, and one instruction gives the sums of both groups for eight tokens.
// Groups are paired (0, 4), (2, 6), (1, 5), (3, 7): the order in which sum_lanes joins them. Integer sums are exact and the
// float32 sums keep the order of packed_row, so the result has the bits of rows.h.
#pragma once
#include "sparse_mlp.h"
#include "tiles.h"

namespace persimmon {
namespace PERSIMMON_ISA {

#if defined(__AMX_INT8__)

constexpr int kFewestEights = 3;   // below, the kernels of rows.h are bound by memory already
constexpr int kEightRows = 32;     // two tiles of rows share the loads of the tokens
constexpr int kPairGroups[kPairs][2] = {{0, 4}, {2, 6}, {1, 5}, {3, 7}};

// Superblocks [begin, end) of at most eight tokens; missing tokens are zeros.
static void make_eights(const ActivationBlock* x, int tokens, int blocks, int begin, int end, EightTokens* out) {
  for (int s = begin; s < end; s++) {
    memset(out + s, 0, sizeof(EightTokens));
    for (int t = 0; t < tokens; t++) {
      const ActivationBlock& in = token_input(x, t, blocks)[s];
      for (int p = 0; p < kPairs; p++)
        for (int side = 0; side < 2; side++) {
          const int g = kPairGroups[p][side], column = 8 * side + t;
          for (int v = 0; v < 8; v++) memcpy(out[s].code[p][v / 4 * 8 + side * 4 + v % 4][column], in.code + 32 * v + 4 * g, 4);
          out[s].scale[p][column] = in.scale[g], out[s].sum[p][column] = in.sum[g], out[s].energy[p][column] = in.energy[g];
        }
    }
  }
}

// ---- the working memory of a panel of kEightRows rows -------------------------------------------------------------------

struct alignas(64) EightPanel {
  uint8_t code[2][2][kPairs][16][64];     // [superblock even, odd][tile of rows]
  float scale[2][kEightRows][kLanes];
  int32_t product[2][kEightRows][16];     // [pair even, odd]
  float sum[kPairs][kEightRows][16];      // a lane is a group of the pair and a token
  float variance[kPairs][kEightRows][16];
};

struct EightRowsAt {
  const uint8_t* codes[kEightRows];
  const uint8_t* scales[kEightRows];
  int bytes, scales_bytes;  // from one superblock to the next
  size_t ahead;             // bytes from a row to the one to fetch meanwhile
};

// Memory to fetch while a panel is multiplied: `count` pieces of as many bytes as a low plane.
struct Fetches {
  const uint8_t* piece[kEightRows];
  int count = 0;
};

template <class F>
INLINE EightRowsAt eight_rows_at(const uint8_t* base, size_t row_bytes, int first, int end) {
  EightRowsAt rows;
  for (int i = 0; i < kEightRows; i++) {
    rows.codes[i] = base + static_cast<size_t>(min_int(first + i, end - 1)) * row_bytes;
    rows.scales[i] = rows.codes[i] + F::scales_at;
  }
  rows.bytes = rows.scales_bytes = F::bytes, rows.ahead = kEightRows * row_bytes;
  return rows;
}

// Words of a pair in a tile's row: both groups' vectors 0-3, then their vectors 4-7 (a nibble's upper half, or other bytes).
struct PairOrder {
  __m512i word[kPairs];
  PairOrder() {
    for (int p = 0; p < kPairs; p++) {
      alignas(64) int32_t at[16];
      for (int i = 0; i < 16; i++) at[i] = i % 4 * 8 + kPairGroups[p][i / 4 % 2];
      word[p] = _mm512_load_si512(at);
    }
  }
};

// Rows [first, first + count) of one superblock.
template <class F>
INLINE void unpack_eight_rows(const EightRowsAt& rows, const PairOrder& order, int s, int first, int count, EightPanel* m) {
  const __m512i mask = _mm512_set1_epi8(15), shift = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 4, 4, 4, 4, 4, 4, 4, 4);
  for (int r = first; r < first + count; r++) {
    const uint8_t* at = rows.codes[r] + static_cast<size_t>(s) * rows.bytes;
    if (rows.ahead) prefetch(at + rows.ahead, rows.bytes);
    const __m512i a = _mm512_loadu_si512(at), b = _mm512_loadu_si512(at + 64);
    auto* out = m->code[s % 2][r / 16];
    if (Panel<F>::bytes) {
      const __m512i c = _mm512_loadu_si512(at + 128), d = _mm512_loadu_si512(at + 192);
#pragma GCC unroll 4
      for (int p = 0; p < kPairs; p++)
        _mm512_store_si512(out[p][r % 16], _mm512_mask_blend_epi32(0xFF00, _mm512_permutex2var_epi32(a, order.word[p], b),
                                                                   _mm512_permutex2var_epi32(c, order.word[p], d)));
    } else {
#pragma GCC unroll 4
      for (int p = 0; p < kPairs; p++)
        _mm512_store_si512(out[p][r % 16],
                           _mm512_and_si512(_mm512_srlv_epi32(_mm512_permutex2var_epi32(a, order.word[p], b), shift), mask));
    }
    store8(m->scale[s % 2][r], load_half8(rows.scales[r] + static_cast<size_t>(s) * rows.scales_bytes));
  }
}

INLINE void configure_eights() {
  TileShapes shapes = {};
  shapes.palette = 1;
  for (int i = 0; i < 6; i++) shapes.row_bytes[i] = 64, shapes.rows[i] = 16;
  asm volatile("ldtilecfg %0" ::"m"(shapes));
}

// product[r] of one pair: unsigned nibbles or signed bytes times signed inputs.
template <class F>
INLINE void eight_products(const uint8_t* first, const uint8_t* second, const void* x, int32_t* product) {
  asm volatile("tileloadd (%0,%1,1), %%tmm4" ::"r"(x), "r"(64L) : "memory");
  asm volatile("tileloadd (%0,%1,1), %%tmm2" ::"r"(first), "r"(64L) : "memory");
  asm volatile("tileloadd (%0,%1,1), %%tmm3" ::"r"(second), "r"(64L) : "memory");
  if (Panel<F>::bytes) {
    asm volatile("tilezero %%tmm0\n\ttdpbssd %%tmm4, %%tmm2, %%tmm0" ::: "memory");
    asm volatile("tilezero %%tmm1\n\ttdpbssd %%tmm4, %%tmm3, %%tmm1" ::: "memory");
  } else {
    asm volatile("tilezero %%tmm0\n\ttdpbusd %%tmm4, %%tmm2, %%tmm0" ::: "memory");
    asm volatile("tilezero %%tmm1\n\ttdpbusd %%tmm4, %%tmm3, %%tmm1" ::: "memory");
  }
  asm volatile("tilestored %%tmm0, (%0,%1,1)" ::"r"(product), "r"(64L) : "memory");
  asm volatile("tilestored %%tmm1, (%0,%1,1)" ::"r"(product + 256), "r"(64L) : "memory");
}

// One pair's integers join the sums (and the variances) of all rows.
template <class F, bool kSpread>
INLINE void add_pair(const EightTokens& x, int s, int pair, EightPanel* m) {
  constexpr float offset = Panel<F>::bytes ? 0.0f : F::offset;
  const f32x16 scale = load16(x.scale[pair]), energy = load16(x.energy[pair]);
  const f32x16 moved = mul(set16(offset), load16(x.sum[pair]));  // exact, and so is its sum with the product
  alignas(64) int32_t lanes[16];
  for (int i = 0; i < 16; i++) lanes[i] = kPairGroups[pair][i / 8];
  const __m512i both = _mm512_load_si512(lanes);
#pragma GCC unroll 4
  for (int r = 0; r < kEightRows; r++) {
    f32x16 value = _mm512_cvtepi32_ps(_mm512_load_si512(m->product[pair % 2][r]));
    if (offset != 0.0f) value = add(value, moved);
    const f32x16 weight = _mm512_permutexvar_ps(both, _mm512_castps256_ps512(load8(m->scale[s % 2][r])));
    float *sum = m->sum[pair][r], *variance = m->variance[pair][r];
    store16(sum, fma(mul(weight, scale), value, load16(sum)));
    if (kSpread) store16(variance, fma(mul(weight, weight), energy, load16(variance)));
  }
}

INLINE void fetch_share(const Fetches& fetches, int blocks, int step) {  // of 4 * blocks steps
  const int lines = blocks * kLowBytes / 64, total = fetches.count * lines, steps = kPairs * blocks;
  for (int i = step * total / steps; i < (step + 1) * total / steps; i++)
    __builtin_prefetch(fetches.piece[i / lines] + i % lines * 64, 0, 2);
}

// Sums of kEightRows rows with eight tokens: unpacking, products and sums overlap, each one step behind the other.
template <class F, bool kSpread>
static void multiply_eights(const EightRowsAt& rows, int blocks, const EightTokens* x, const Fetches& fetches, EightPanel* m) {
  const PairOrder order;
  memset(m->sum, 0, sizeof m->sum);
  if (kSpread) memset(m->variance, 0, sizeof m->variance);
  unpack_eight_rows<F>(rows, order, 0, 0, kEightRows, m);
  for (int s = 0; s < blocks; s++) {
#pragma GCC unroll 4
    for (int p = 0; p < kPairs; p++) {
      eight_products<F>(m->code[s % 2][0][p][0], m->code[s % 2][1][p][0], x[s].code[p], m->product[p % 2][0]);
      fetch_share(fetches, blocks, s * kPairs + p);
      // The last pair of the superblock before uses scales that the unpacking of the next one overwrites, so it comes first.
      if (p > 0) add_pair<F, kSpread>(x[s], s, p - 1, m);
      else if (s > 0) add_pair<F, kSpread>(x[s - 1], s - 1, kPairs - 1, m);
      if (s + 1 < blocks) unpack_eight_rows<F>(rows, order, s + 1, p * (kEightRows / kPairs), kEightRows / kPairs, m);
    }
  }
  add_pair<F, kSpread>(x[blocks - 1], blocks - 1, kPairs - 1, m);
}

// A row's eight tokens, lanes joined as by sum_lanes.
INLINE f32x8 join_pairs(const float (*pair)[kEightRows][16], int r) {
  const f32x8 even = add(fold(load16(pair[0][r])), fold(load16(pair[1][r])));
  return add(even, add(fold(load16(pair[2][r])), fold(load16(pair[3][r]))));
}
template <class F>
INLINE f32x8 eight_sums(const EightPanel& m, int r) {
  return mul(set8(F::factor), join_pairs(m.sum, r));
}
INLINE f32x8 eight_spreads(const EightPanel& m, int r) {
  return _mm256_sqrt_ps(mul(join_pairs(m.variance, r), set8(256.0f / 12.0f)));
}

// ---- rows ----------------------------------------------------------------------------------------------------------------

INLINE void finish_eights(const RowsArgs& a, int r, f32x8 products) {
  float out[8];
  store8(out, products);
  for (int t = 0; t < a.tokens; t++) finish(a, r, t, out[t]);
}

template <class F>
static void eight_rows_of(const RowsArgs& a, int begin, int end) {
  EightPanel m;
  for (int first = begin; first < end; first += kEightRows) {
    multiply_eights<F, false>(eight_rows_at<F>(a.weights, a.row_bytes, first, end), a.blocks, a.eights, {}, &m);
    for (int r = first; r < min_int(first + kEightRows, end); r++) finish_eights(a, r, eight_sums<F>(m, r - first));
  }
}

static void eight_rows_of_planes(const RowsArgs& a, int begin, int end) {
  EightPanel m;
  for (int first = begin; first < end; first += kEightRows) {
    EightRowsAt rows = eight_rows_at<High>(a.weights, a.row_bytes, first, end);
    f32x8 high[kEightRows];
    multiply_eights<High, false>(rows, a.blocks, a.eights, {}, &m);
    for (int i = 0; i < kEightRows; i++) {
      high[i] = eight_sums<High>(m, i);
      rows.codes[i] = a.low + static_cast<size_t>(min_int(first + i, end - 1)) * a.low_bytes;
    }
    rows.bytes = kLowBytes, rows.ahead = kEightRows * a.low_bytes;
    multiply_eights<Low, false>(rows, a.blocks, a.eights, {}, &m);
    for (int r = first; r < min_int(first + kEightRows, end); r++)
      finish_eights(a, r, add(high[r - first], eight_sums<Low>(m, r - first)));
  }
}

static void eight_rows(const RowsArgs& a, int begin, int end) {
  configure_eights();
  if (a.format == Format::q4) eight_rows_of<Q4>(a, begin, end);
  if (a.format == Format::q8) eight_rows_of<Q8>(a, begin, end);
  if (a.format == Format::planes) eight_rows_of_planes(a, begin, end);
  release();
}

static void eight_estimates(const RowsArgs& a, int begin, int end, float sigmas, float* estimate, float* bound, size_t stride) {
  EightPanel m;
  configure_eights();
  for (int first = begin; first < end; first += kEightRows) {
    multiply_eights<High, true>(eight_rows_at<High>(a.weights, a.row_bytes, first, end), a.blocks, a.eights, {}, &m);
    for (int r = first; r < min_int(first + kEightRows, end); r++) {
      float high[8], most[8];
      const f32x8 sums = eight_sums<High>(m, r - first);
      store8(high, sums), store8(most, add(sums, mul(set8(sigmas), eight_spreads(m, r - first))));
      for (int t = 0; t < a.tokens; t++) estimate[t * stride + r] = high[t], bound[t * stride + r] = most[t];
    }
  }
  release();
}

// ---- the MLP's up projection (sparse_mlp.h) --------------------------------------------------------------------------------

// The outlier inputs of all tokens, a token in each lane; sums in the order of outlier_product.
struct EightOutliers {
  f32x8 input[kOutliers];
  explicit EightOutliers(const MlpArgs& a) {
    for (int i = 0; i < kOutliers; i++) {
      float lanes[8] = {};
      for (int t = 0; t < a.tokens; t++) lanes[t] = a.outliers[t * kOutliers + i];
      input[i] = load8(lanes);
    }
  }
  f32x8 pair(const float* w, int i) const { return add(mul(set8(w[i]), input[i]), mul(set8(w[i + 8]), input[i + 8])); }
  f32x8 product(const uint8_t* weights) const {
    float w[kOutliers];
    store16(w, load_half16(weights));
    f32x8 four[4];
    for (int i = 0; i < 4; i++) four[i] = add(pair(w, i), pair(w, i + 4));
    return add(add(four[0], four[2]), add(four[1], four[3]));
  }
};

// The neurons of a panel that some token may want, with their estimates.
struct EightCandidates {
  int count = 0;
  int row[kEightRows];
  uint8_t tokens[kEightRows];  // a bit for each that wants it
  float estimate[kEightRows][8];
};

static void find_candidates(const MlpArgs& a, const EightPanel& m, const EightOutliers& outliers, int first, int end,
                            EightCandidates* found) {
  found->count = 0;
  for (int r = first; r < end; r++) {
    const uint8_t* hot = a.up + static_cast<size_t>(r) * a.up_bytes;
    const f32x8 p = add(add(eight_sums<High>(m, r - first), outliers.product(hot + a.blocks * kQ4Bytes)), set8(a.bias[r]));
    const __mmask8 wanted = _mm256_cmp_ps_mask(p, mul(set8(-a.margin), eight_spreads(m, r - first)), _CMP_NLE_UQ);
    const int k = found->count;
    found->row[k] = r, found->tokens[k] = static_cast<uint8_t>(wanted & ((1 << a.tokens) - 1));
    store8(found->estimate[k], p);
    found->count += found->tokens[k] != 0;
  }
}

// The low planes of up to four tokens with one candidate.
INLINE void low_of(const MlpArgs& a, int r, const ActivationBlock* const* x, int count, float* low) {
  const uint8_t *hot = a.up + static_cast<size_t>(r) * a.up_bytes, *cold = a.down + static_cast<size_t>(r) * a.down_bytes;
  switch (count) {
    case 1: low_row<1>(cold, hot, a.blocks, x, low); break;
    case 2: low_row<2>(cold, hot, a.blocks, x, low); break;
    case 3: low_row<3>(cold, hot, a.blocks, x, low); break;
    default: low_row<4>(cold, hot, a.blocks, x, low); break;
  }
}

static void refine_candidates(const MlpArgs& a, const EightCandidates& found, ActiveBlock* const* out, MlpCounts* counts) {
  for (int k = 0; k < found.count; k++) {
    const int r = found.row[k];
    for (int mask = found.tokens[k]; mask;) {
      int token[4], count = 0;
      const ActivationBlock* x[4];
      for (; mask && count < 4; mask &= mask - 1, count++) {
        token[count] = __builtin_ctz(mask);
        x[count] = token_input(static_cast<const ActivationBlock*>(a.x), token[count], a.blocks);
      }
      float low[4];
      low_of(a, r, x, count, low);
      counts->candidates += count;
      for (int i = 0; i < count; i++) {
        const float p = found.estimate[k][token[i]] + low[i];
        if (p > 0.0f) append(out[token[i]], r % kNeuronBlock, p), counts->active++;
      }
    }
  }
}

// p44: the low planes that a panel wants are fetched while the next panel is estimated.
static void eight_activate_planes(const MlpArgs& a, int begin, int end, ActiveBlock* const* out, MlpCounts* counts) {
  EightPanel m;
  const EightOutliers outliers(a);
  EightCandidates found;
  Fetches fetches;
  for (int first = begin; first < end; first += kEightRows) {
    EightRowsAt rows = eight_rows_at<High>(a.up, a.up_bytes, first, end);
    multiply_eights<High, true>(rows, a.blocks, a.eights, fetches, &m);
    if (first > begin) refine_candidates(a, found, out, counts);
    find_candidates(a, m, outliers, first, min_int(first + kEightRows, end), &found);
    fetches.count = found.count;
    for (int k = 0; k < found.count; k++) fetches.piece[k] = a.down + static_cast<size_t>(found.row[k]) * a.down_bytes;
  }
  for (int k = 0; k < fetches.count; k++) prefetch(fetches.piece[k], a.blocks * kLowBytes);
  refine_candidates(a, found, out, counts);
}

static void eight_activate_bytes(const MlpArgs& a, int begin, int end, ActiveBlock* const* out, MlpCounts* counts) {
  EightPanel m;
  for (int first = begin; first < end; first += kEightRows) {
    multiply_eights<Q8, false>(eight_rows_at<Q8>(a.up, a.up_bytes, first, end), a.blocks, a.eights, {}, &m);
    for (int r = first; r < min_int(first + kEightRows, end); r++) {
      float p[8];
      store8(p, add(eight_sums<Q8>(m, r - first), set8(a.bias[r])));
      for (int t = 0; t < a.tokens; t++)
        if (p[t] > 0.0f) append(out[t], r % kNeuronBlock, p[t]), counts->active++;
    }
  }
  counts->candidates += static_cast<int64_t>(end - begin) * a.tokens;
}

// Neurons [begin, end) of one block, all tokens: as activate() does.
static void eight_activate(const MlpArgs& a, int begin, int end, ActiveBlock* const* out, MlpCounts* counts) {
  configure_eights();
  if (a.format == Format::q8) eight_activate_bytes(a, begin, end, out, counts);
  if (a.format == Format::planes) eight_activate_planes(a, begin, end, out, counts);
  release();
}

#define PERSIMMON_EIGHTS kFewestEights, make_eights, eight_rows, eight_estimates, eight_activate
#else
#define PERSIMMON_EIGHTS 0, nullptr, nullptr, nullptr, nullptr
#endif

}  // namespace PERSIMMON_ISA
}  // namespace persimmon

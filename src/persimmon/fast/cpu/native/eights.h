// Products of packed rows with three to eight tokens on AMX: batches and speculative blocks.
//
// Here the weights are the left matrix of the tile product: sixteen rows as they lie in memory, their nibbles unpacked but not
// transposed, which is what makes tiles.h too dear for so few tokens. The right matrix is the tokens. A tile product
// spans 64 inputs, two groups of 32 with a scale each, so the right matrix is diagonal: eight columns have the codes of one group and
// zeros for the other, eight columns the reverse, and one instruction gives the sums of both groups for eight tokens.
// Groups are paired (0, 4), (2, 6), (1, 5), (3, 7): the order in which sum_lanes joins them. Integer sums are exact and the
// float32 sums keep the order of packed_row, so the result has the bits of rows.h.
#pragma once
#include <type_traits>

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
          out[s].scale[p][column] = in.scale[g], out[s].sum[p][column] = in.sum[g];
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
};

using EightRowsAt = RowPlaces<kEightRows>;

// Memory to fetch while a panel is multiplied: `count` rest rows.
struct Fetches {
  const uint8_t* piece[kEightRows];
  int count = 0;
};

// Words of a pair in a tile's row: both groups' vectors 0-3, then their vectors 4-7 (a nibble's upper half, or other bytes).
// Two bits a weight: a line of 16 words has two vectors in each pair of bits.
struct PairOrder {
  __m512i word[kPairs], two_bits[kPairs];
  PairOrder() {
    for (int p = 0; p < kPairs; p++) {
      alignas(64) int32_t at[16], of_line[16];
      for (int i = 0; i < 16; i++) {
        at[i] = i % 4 * 8 + kPairGroups[p][i / 4 % 2];
        of_line[i] = i % 2 * 8 + kPairGroups[p][i / 4 % 2];
      }
      word[p] = _mm512_load_si512(at), two_bits[p] = _mm512_load_si512(of_line);
    }
  }
};

// A pair's codes of the line of two bits a weight, at bit 0 of their bytes (the other bits are not cleared).
INLINE __m512i two_bits_of(__m512i line, __m512i order) {
  const __m512i shift = _mm512_setr_epi32(0, 0, 2, 2, 0, 0, 2, 2, 4, 4, 6, 6, 4, 4, 6, 6);
  return _mm512_srlv_epi32(_mm512_permutexvar_epi32(order, line), shift);
}
INLINE __m512i nibbles_of(__m512i a, __m512i b, __m512i order) {
  const __m512i shift = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 4, 4, 4, 4, 4, 4, 4, 4);
  return _mm512_and_si512(_mm512_srlv_epi32(_mm512_permutex2var_epi32(a, order, b), shift), _mm512_set1_epi8(15));
}

// The four pairs of one superblock of a row.
template <class F>
INLINE void unpack_pairs(const uint8_t* at, const PairOrder& order, __m512i* out) {
  const __m512i a = _mm512_loadu_si512(at);
  if (std::is_same<F, Top>::value) {
#pragma GCC unroll 4
    for (int p = 0; p < kPairs; p++) out[p] = _mm512_and_si512(two_bits_of(a, order.two_bits[p]), _mm512_set1_epi8(3));
    return;
  }
  const __m512i b = _mm512_loadu_si512(at + 64);
  if (std::is_same<F, Rest>::value) {
    const __m512i c = _mm512_loadu_si512(at + 128);
#pragma GCC unroll 4
    for (int p = 0; p < kPairs; p++) {
      const __m512i middle = _mm512_and_si512(_mm512_slli_epi32(two_bits_of(a, order.two_bits[p]), 4), _mm512_set1_epi8(0x30));
      out[p] = _mm512_or_si512(nibbles_of(b, c, order.word[p]), middle);
    }
  } else if (Panel<F>::bytes) {
    const __m512i c = _mm512_loadu_si512(at + 128), d = _mm512_loadu_si512(at + 192);
#pragma GCC unroll 4
    for (int p = 0; p < kPairs; p++)
      out[p] = _mm512_mask_blend_epi32(0xFF00, _mm512_permutex2var_epi32(a, order.word[p], b), _mm512_permutex2var_epi32(c, order.word[p], d));
  } else {
#pragma GCC unroll 4
    for (int p = 0; p < kPairs; p++) out[p] = nibbles_of(a, b, order.word[p]);
  }
}

// Rows [first, first + count) of one superblock.
template <class F>
INLINE void unpack_eight_rows(const EightRowsAt& rows, const PairOrder& order, int s, int first, int count, EightPanel* m) {
  for (int r = first; r < first + count; r++) {
    const uint8_t* at = rows.codes[r] + static_cast<size_t>(s) * rows.bytes;
    if (rows.ahead) prefetch(at + rows.ahead, rows.bytes);
    if (std::is_same<F, Top>::value && s == 0) prefetch(rows.scales[r] + rows.ahead, rows.tail);
    __m512i pairs[kPairs];
    unpack_pairs<F>(at, order, pairs);
#pragma GCC unroll 4
    for (int p = 0; p < kPairs; p++) _mm512_store_si512(m->code[s % 2][r / 16][p][r % 16], pairs[p]);
    store8(m->scale[s % 2][r], scales_at<F>(rows.scales[r] + static_cast<size_t>(s) * rows.scales_bytes));
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

// One pair's integers join the sums of all rows.
template <class F>
INLINE void add_pair(const EightTokens& x, int s, int pair, EightPanel* m) {
  constexpr float offset = Panel<F>::bytes ? 0.0f : F::offset;
  const f32x16 scale = load16(x.scale[pair]);
  const f32x16 moved = mul(set16(offset), load16(x.sum[pair]));  // exact, and so is its sum with the product
  alignas(64) int32_t lanes[16];
  for (int i = 0; i < 16; i++) lanes[i] = kPairGroups[pair][i / 8];
  const __m512i both = _mm512_load_si512(lanes);
#pragma GCC unroll 4
  for (int r = 0; r < kEightRows; r++) {
    f32x16 value = _mm512_cvtepi32_ps(_mm512_load_si512(m->product[pair % 2][r]));
    if (offset != 0.0f) value = add(value, moved);
    const f32x16 weight = _mm512_permutexvar_ps(both, _mm512_castps256_ps512(load8(m->scale[s % 2][r])));
    float* sum = m->sum[pair][r];
    store16(sum, fma(mul(weight, scale), value, load16(sum)));
  }
}

INLINE void fetch_share(const Fetches& fetches, int blocks, int step) {  // of 4 * blocks steps
  const int lines = blocks * kRestBytes / kLineBytes, total = fetches.count * lines, steps = kPairs * blocks;
  for (int i = step * total / steps; i < (step + 1) * total / steps; i++)
    __builtin_prefetch(fetches.piece[i / lines] + i % lines * 64, 0, 2);
}

// Sums of kEightRows rows with eight tokens: unpacking, products and sums overlap, each one step behind the other.
template <class F>
static void multiply_eights(const EightRowsAt& rows, int blocks, const EightTokens* x, const Fetches& fetches, EightPanel* m) {
  const PairOrder order;
  memset(m->sum, 0, sizeof m->sum);
  unpack_eight_rows<F>(rows, order, 0, 0, kEightRows, m);
  for (int s = 0; s < blocks; s++) {
#pragma GCC unroll 4
    for (int p = 0; p < kPairs; p++) {
      eight_products<F>(m->code[s % 2][0][p][0], m->code[s % 2][1][p][0], x[s].code[p], m->product[p % 2][0]);
      fetch_share(fetches, blocks, s * kPairs + p);
      // The last pair of the superblock before uses scales that the unpacking of the next one overwrites, so it comes first.
      if (p > 0) add_pair<F>(x[s], s, p - 1, m);
      else if (s > 0) add_pair<F>(x[s - 1], s - 1, kPairs - 1, m);
      if (s + 1 < blocks) unpack_eight_rows<F>(rows, order, s + 1, p * (kEightRows / kPairs), kEightRows / kPairs, m);
    }
  }
  add_pair<F>(x[blocks - 1], blocks - 1, kPairs - 1, m);
}

// A row's eight tokens, lanes joined as by sum_lanes.
INLINE f32x8 join_pairs(const float (*pair)[kEightRows][16], int r) {
  const f32x8 even = add(fold(load16(pair[0][r])), fold(load16(pair[1][r])));
  return add(even, add(fold(load16(pair[2][r])), fold(load16(pair[3][r]))));
}
INLINE f32x8 eight_sums(const EightPanel& m, int r) { return join_pairs(m.sum, r); }
INLINE f32x8 eight_tops(const EightPanel& m, int r, const TopFacts& facts) { return mul(set8(Top::factor * facts.unit), eight_sums(m, r)); }
INLINE f32x8 eight_rests(const EightPanel& m, int r, const TopFacts& facts) { return mul(set8(facts.unit), eight_sums(m, r)); }
INLINE f32x8 eight_distances(const float* distances, int tokens) {
  float lanes[8] = {};
  for (int t = 0; t < tokens; t++) lanes[t] = distances[t];
  return load8(lanes);
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
    multiply_eights<F>(row_places<F, kEightRows>(a.weights, a.row_bytes, first, end), a.blocks, a.eights, {}, &m);
    for (int r = first; r < min_int(first + kEightRows, end); r++) finish_eights(a, r, eight_sums(m, r - first));
  }
}

static void eight_rows_of_planes(const RowsArgs& a, int begin, int end) {
  EightPanel m;
  for (int first = begin; first < end; first += kEightRows) {
    EightRowsAt rows = top_places<kEightRows>(a.weights, a.row_bytes, a.blocks, first, end);
    const int last = min_int(first + kEightRows, end);
    const auto facts = [&](int r) -> const TopFacts& { return top_facts(a.weights + static_cast<size_t>(r) * a.row_bytes, a.blocks); };
    f32x8 top[kEightRows];
    multiply_eights<Top>(rows, a.blocks, a.eights, {}, &m);
    for (int r = first; r < last; r++) top[r - first] = eight_tops(m, r - first, facts(r));
    go_to_rest(a.rest, a.rest_bytes, first, end, &rows);
    multiply_eights<Rest>(rows, a.blocks, a.eights, {}, &m);
    for (int r = first; r < last; r++) finish_eights(a, r, add(top[r - first], eight_rests(m, r - first, facts(r))));
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
  const f32x8 distances = eight_distances(a.distances, a.tokens);
  configure_eights();
  for (int first = begin; first < end; first += kEightRows) {
    multiply_eights<Top>(top_places<kEightRows>(a.weights, a.row_bytes, a.blocks, first, end), a.blocks, a.eights, {}, &m);
    for (int r = first; r < min_int(first + kEightRows, end); r++) {
      const TopFacts& facts = top_facts(a.weights + static_cast<size_t>(r) * a.row_bytes, a.blocks);
      const f32x8 value = add(eight_tops(m, r - first, facts), set8(facts.shift));
      float top[8], most[8];
      store8(top, value), store8(most, add(value, mul(set8(sigmas), mul(set8(facts.error), distances))));
      for (int t = 0; t < a.tokens; t++) estimate[t * stride + r] = top[t], bound[t * stride + r] = most[t];
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
  f32x8 product(const TopFacts& facts) const {
    float w[kOutliers];
    store16(w, load_half16(facts.outlier));
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
  const f32x8 distances = eight_distances(a.distances, a.tokens);
  found->count = 0;
  for (int r = first; r < end; r++) {
    const TopFacts& facts = top_facts(a.up + static_cast<size_t>(r) * a.up_bytes, a.blocks);
    const f32x8 p = add(add(eight_tops(m, r - first, facts), outliers.product(facts)), set8(a.bias[r]));
    const f32x8 least = mul(set8(-a.margin), mul(set8(facts.error), distances));
    const __mmask8 wanted = _mm256_cmp_ps_mask(add(p, set8(facts.shift)), least, _CMP_NLE_UQ);
    const int k = found->count;
    found->row[k] = r, found->tokens[k] = static_cast<uint8_t>(wanted & ((1 << a.tokens) - 1));
    store8(found->estimate[k], p);
    found->count += found->tokens[k] != 0;
  }
}

// The rest of one candidate with up to four tokens.
INLINE void rest_of(const MlpArgs& a, int r, const ActivationBlock* const* x, int count, float* rest) {
  const uint8_t *hot = a.up + static_cast<size_t>(r) * a.up_bytes, *cold = a.down + static_cast<size_t>(r) * a.down_bytes;
  switch (count) {
    case 1: rest_row<1>(cold, hot, a.blocks, x, rest); break;
    case 2: rest_row<2>(cold, hot, a.blocks, x, rest); break;
    case 3: rest_row<3>(cold, hot, a.blocks, x, rest); break;
    default: rest_row<4>(cold, hot, a.blocks, x, rest); break;
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
      float rest[4];
      rest_of(a, r, x, count, rest);
      counts->candidates += count;
      for (int i = 0; i < count; i++) {
        const float p = found.estimate[k][token[i]] + rest[i];
        if (p > 0.0f) append(out[token[i]], r % kNeuronBlock, p), counts->active++;
      }
    }
  }
}

// p44: the rest rows that a panel wants are fetched while the next panel is estimated.
static void eight_activate_planes(const MlpArgs& a, int begin, int end, ActiveBlock* const* out, MlpCounts* counts) {
  EightPanel m;
  const EightOutliers outliers(a);
  EightCandidates found;
  Fetches fetches;
  for (int first = begin; first < end; first += kEightRows) {
    multiply_eights<Top>(top_places<kEightRows>(a.up, a.up_bytes, a.blocks, first, end), a.blocks, a.eights, fetches, &m);
    if (first > begin) refine_candidates(a, found, out, counts);
    find_candidates(a, m, outliers, first, min_int(first + kEightRows, end), &found);
    fetches.count = found.count;
    for (int k = 0; k < found.count; k++) fetches.piece[k] = a.down + static_cast<size_t>(found.row[k]) * a.down_bytes;
  }
  for (int k = 0; k < fetches.count; k++) prefetch(fetches.piece[k], a.blocks * kRestBytes);
  refine_candidates(a, found, out, counts);
}

static void eight_activate_bytes(const MlpArgs& a, int begin, int end, ActiveBlock* const* out, MlpCounts* counts) {
  EightPanel m;
  for (int first = begin; first < end; first += kEightRows) {
    multiply_eights<Q8>(row_places<Q8, kEightRows>(a.up, a.up_bytes, first, end), a.blocks, a.eights, {}, &m);
    for (int r = first; r < min_int(first + kEightRows, end); r++) {
      float p[8];
      store8(p, add(eight_sums(m, r - first), set8(a.bias[r])));
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

// The MLP of q4: int4 weights on both sides, and only the rows of neurons that are not zero read from the down projection.
//
// The squared activations are rounded to int8 in groups of 32 neurons, as every input of packed weights is, and the 32
// weights of an output that meet them share a scale (layout.h: int4 record). So a group's sum is an integer: exact in any
// order, with zeros left out or not. A token that runs alone gathers the rows that it needs; many tokens share unpacked
// rows (tiled_int4.h). Both give the same bits.
// Sums: groups of a block of 256 neurons ascending, blocks ascending, as in sparse_mlp.h.
// Rows are added four at a time, as the dot products of bytes want four neurons side by side:
//   AVX-512 VNNI  four rows are interleaved while still packed, then nibbles are cut and multiplied by vpdpbusd
//   AVX2          the same with vpmaddubsw, whose 16-bit sums reach 8 * 2 * 15 * 127 = 30480
//   portable      plain loops
#pragma once
#include "activations.h"
#include "sparse_mlp.h"

namespace persimmon {
namespace PERSIMMON_ISA {

// The neurons of a group that a token needs, four by four; the last four are filled up with codes of zero.
struct NeededRows {
  const uint8_t* row[kGroup];
  int8_t code[kGroup];
  int count, quads;
  int offset;   // nibbles are stored + 8
  float scale;  // of the codes
};

// Returns how many neurons they are. rows: the first of the group's, `row_bytes` apart.
INLINE int find_needed(const ActivationBlock& x, int g, const uint8_t* rows, size_t row_bytes, NeededRows* out) {
  int found = 0;
  for (int v = 0; v < 8; v++) {
    const int8_t* code = x.code + 32 * v + 4 * g;
    if (!read_unaligned<int32_t>(code)) continue;
    for (int b = 0; b < 4; b++)
      if (code[b]) out->code[found] = code[b], out->row[found++] = rows + (4 * v + b) * row_bytes;
  }
  out->count = found, out->quads = (found + 3) / 4;
  for (int i = found; i < 4 * out->quads; i++) out->code[i] = 0, out->row[i] = out->row[found - 1];
  out->offset = -8 * static_cast<int>(x.sum[g]);
  out->scale = x.scale[g];
  return found;
}

#if defined(__AVX512VNNI__)

// Four rows' bytes side by side: r[j] has outputs 16 j .. and, in the high nibbles, 64 + 16 j ...
INLINE void interleave_rows(const uint8_t* const* row, size_t at, __m512i* r) {
  const __m512i r0 = _mm512_loadu_si512(row[0] + at), r1 = _mm512_loadu_si512(row[1] + at);
  const __m512i r2 = _mm512_loadu_si512(row[2] + at), r3 = _mm512_loadu_si512(row[3] + at);
  const __m512i l01 = _mm512_unpacklo_epi8(r0, r1), h01 = _mm512_unpackhi_epi8(r0, r1);
  const __m512i l23 = _mm512_unpacklo_epi8(r2, r3), h23 = _mm512_unpackhi_epi8(r2, r3);
  r[0] = _mm512_unpacklo_epi16(l01, l23), r[1] = _mm512_unpackhi_epi16(l01, l23);
  r[2] = _mm512_unpacklo_epi16(h01, h23), r[3] = _mm512_unpackhi_epi16(h01, h23);
}

// The same of four neurons from `base` on, of which only those of the mask `four`, not zero, are read: one of them stands for the others, whose
// codes are zero.
INLINE void interleave_needed(const uint8_t* base, size_t row_bytes, uint32_t four, size_t at, __m512i* r) {
  const uint8_t* row[4];
  for (int i = 0; i < 4; i++) row[i] = base + (four >> i & 1 ? i : __builtin_ctz(four)) * row_bytes;
  interleave_rows(row, at, r);
}

// The signed weights of low or high nibbles, which are stored + 8: an affine map of bits, as -8 is the upper bits all alike.
INLINE __m512i low_nibbles(__m512i r) {
#if defined(__GFNI__)
  return _mm512_gf2p8affine_epi64_epi8(r, _mm512_set1_epi64(0x0102040808080808), 0xF8);
#else
  return _mm512_sub_epi8(_mm512_and_si512(r, _mm512_set1_epi8(15)), _mm512_set1_epi8(8));
#endif
}
INLINE __m512i high_nibbles(__m512i r) {
#if defined(__GFNI__)
  return _mm512_gf2p8affine_epi64_epi8(r, _mm512_set1_epi64(0x1020408080808080u), 0xF8);
#else
  return low_nibbles(_mm512_srli_epi16(r, 4));
#endif
}

#elif defined(__AVX2__)

INLINE f32x8 pair_sums(__m256i sum, int offset) {
  return _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_madd_epi16(sum, _mm256_set1_epi16(1)), _mm256_set1_epi32(offset)));
}

// The group's integers for the 128 outputs whose nibbles lie `at` bytes into the rows: value[j] has outputs 16 j .. 16 j + 15.
INLINE void piece_values(const NeededRows& n, size_t at, f32x16* value) {
  const __m256i mask = _mm256_set1_epi8(15);
  for (int half = 0; half < 2; half++) {  // outputs 8 half .. 8 half + 7 of every sixteen
    __m256i sum[8];
    for (int j = 0; j < 8; j++) sum[j] = _mm256_setzero_si256();
    for (int q = 0; q < n.quads; q++) {
      const uint8_t* const* row = n.row + 4 * q;
      const size_t from = at + 32 * half;
      const __m256i code = _mm256_set1_epi32(read_unaligned<int32_t>(n.code + 4 * q));
      const __m256i r0 = load_vector(row[0] + from), r1 = load_vector(row[1] + from);
      const __m256i r2 = load_vector(row[2] + from), r3 = load_vector(row[3] + from);
      const __m256i l01 = _mm256_unpacklo_epi8(r0, r1), h01 = _mm256_unpackhi_epi8(r0, r1);
      const __m256i l23 = _mm256_unpacklo_epi8(r2, r3), h23 = _mm256_unpackhi_epi8(r2, r3);
      const __m256i r[4] = {_mm256_unpacklo_epi16(l01, l23), _mm256_unpackhi_epi16(l01, l23),
                            _mm256_unpacklo_epi16(h01, h23), _mm256_unpackhi_epi16(h01, h23)};
      for (int j = 0; j < 4; j++) {
        const __m256i low = _mm256_and_si256(r[j], mask), high = _mm256_and_si256(_mm256_srli_epi16(r[j], 4), mask);
        sum[j] = _mm256_add_epi16(sum[j], _mm256_maddubs_epi16(low, code));
        sum[4 + j] = _mm256_add_epi16(sum[4 + j], _mm256_maddubs_epi16(high, code));
      }
    }
    for (int j = 0; j < 8; j++) (half ? value[j].hi : value[j].lo) = pair_sums(sum[j], n.offset);
  }
}

#else

// The group's integers for the 128 outputs whose nibbles lie `at` bytes into the rows: value[j] has outputs 16 j .. 16 j + 15.
INLINE void piece_values(const NeededRows& n, size_t at, f32x16* value) {
  int32_t sum[kInt4Piece];
  for (int c = 0; c < kInt4Piece; c++) sum[c] = n.offset;
  for (int i = 0; i < 4 * n.quads; i++)
    for (int c = 0; c < 64; c++) {
      const int byte = n.row[i][at + 16 * (c % 16 / 4) + 4 * (c / 16) + c % 4];
      sum[c] += (byte & 15) * n.code[i];
      sum[64 + c] += (byte >> 4) * n.code[i];
    }
  for (int j = 0; j < 8; j++) {
    value[j].lo = gather8([&](int i) { return static_cast<float>(sum[16 * j + i]); });
    value[j].hi = gather8([&](int i) { return static_cast<float>(sum[16 * j + 8 + i]); });
  }
}

#endif

// What will be read next, fetched piece by piece beside what is read now.
struct Ahead {
  const uint8_t* const* row;
  int rows;
  const uint8_t* scales;  // or null
};
INLINE void fetch_piece(const Ahead& next, size_t at) {
  for (int i = 0; i < next.rows; i++) __builtin_prefetch(next.row[i] + at, 0, 2);
  if (next.scales) prefetch(next.scales + 4 * at, 4 * 64);
}

// Columns [begin, end) of a group: sum[0 ..) += its share. after: the first rows of the group that comes next.
#if defined(__AVX512VNNI__)

constexpr int kRowSoon = 256;  // bytes: from the second-level cache into the first

// Four rows after four, each from end to end: memory delivers streams faster than pieces of thirty-two rows.
template <bool kFirst, bool kLast>
static void add_quad(const NeededRows& n, int q, const uint8_t* scales, int begin, int end, const Ahead& next, int32_t* integers,
                     float* sum) {
  const __m512i mask = _mm512_set1_epi8(15), code = _mm512_set1_epi32(read_unaligned<int32_t>(n.code + 4 * q));
  for (int column = begin; column < end; column += kInt4Piece, integers += kInt4Piece, sum += kInt4Piece) {
    fetch_piece(next, column / 2);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) __builtin_prefetch(n.row[4 * q + i] + column / 2 + kRowSoon, 0, 3);
    __m512i r[4], z[8];
    interleave_rows(n.row + 4 * q, column / 2, r);
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) {
      z[j] = _mm512_and_si512(j < 4 ? r[j % 4] : _mm512_srli_epi16(r[j % 4], 4), mask);
      z[j] = _mm512_dpbusd_epi32(kFirst ? _mm512_set1_epi32(n.offset) : _mm512_loadu_si512(integers + 16 * j), z[j], code);
      if (!kLast) _mm512_storeu_si512(integers + 16 * j, z[j]);
    }
    if (!kLast) continue;
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) {
      const f32x16 scale = mul(load_half16(scales + 2 * column + 32 * j), set16(n.scale));
      store16(sum + 16 * j, fma(scale, _mm512_cvtepi32_ps(z[j]), load16(sum + 16 * j)));
    }
  }
}

constexpr int kStrip = 4096;  // outputs whose integers are kept: 16 KiB

static void add_group(const NeededRows& n, const uint8_t* scales, int begin, int end, const Ahead& after, float* sum) {
  alignas(64) int32_t integers[kStrip];
  for (int from = begin; from < end; from += kStrip) {
    const int to = min_int(from + kStrip, end);
    float* y = sum + from - begin;
    for (int q = 0; q < n.quads; q++) {
      const bool first = q == 0, last = q + 1 == n.quads;
      const Ahead own = {n.row + 4 * (q + 1), min_int(4, n.count - 4 * (q + 1)), q + 2 == n.quads ? scales : nullptr};
      const Ahead& next = last ? after : own;
      if (first && last) add_quad<true, true>(n, q, scales, from, to, next, integers, y);
      else if (first) add_quad<true, false>(n, q, scales, from, to, next, integers, y);
      else if (last) add_quad<false, true>(n, q, scales, from, to, next, integers, y);
      else add_quad<false, false>(n, q, scales, from, to, next, integers, y);
    }
  }
}

#else

// sum[0 .. 128) += what the group adds to those outputs. scales: of the first of them.
INLINE void add_piece(const NeededRows& n, size_t at, const uint8_t* scales, float* sum) {
  f32x16 value[8];
  piece_values(n, at, value);
#pragma GCC unroll 8
  for (int j = 0; j < 8; j++)
    store16(sum + 16 * j, fma(mul(load_half16(scales + 32 * j), set16(n.scale)), value[j], load16(sum + 16 * j)));
}

static void add_group(const NeededRows& n, const uint8_t* scales, int begin, int end, const Ahead& after, float* sum) {
  for (int column = begin; column < end; column += kInt4Piece) {
    fetch_piece(after, column / 2);
    add_piece(n, column / 2, scales + 2 * column, sum + column - begin);
  }
}

#endif

// The groups of a block of neurons that a token needs, ascending.
struct NeededGroups {
  NeededRows rows[kLanes];
  const uint8_t* scales[kLanes];
  int count = 0;

  // Group g of the block, whose record this is; returns its needed neurons.
  int append(const ActivationBlock& x, int g, const uint8_t* record, size_t row_bytes) {
    const int found = find_needed(x, g, record + 4 * row_bytes, row_bytes, &rows[count]);
    scales[count] = record;
    count += found > 0;
    return found;
  }
  // What is read first of group k.
  Ahead start(int k) const { return {rows[k].row, min_int(4, rows[k].count), rows[k].quads == 1 ? scales[k] : nullptr}; }
  // Columns [begin, end): sum[0 ..) += all groups in turn. behind: what is read after the last.
  void add(int begin, int end, const Ahead& behind, float* sum) const {
    for (int k = 0; k < count; k++)
      add_group(rows[k], scales[k], begin, end, k + 1 < count ? start(k + 1) : behind, sum);
  }
};

// ---- one token -----------------------------------------------------------------------------------------------------------

// Up and down of one block of neurons, as one_block does.
static void int4_block(const MlpArgs& a, int block, float* sum, MlpCounts* counts) {
  const ActivationBlock* input[1] = {static_cast<const ActivationBlock*>(a.x)};
  const size_t row_bytes = static_cast<size_t>(a.blocks) * kSuperblock / 2;
  const int first = block * kNeuronBlock, last = min_int(first + kNeuronBlock, a.neurons);
  ActivationBlock x;
  NeededGroups needed;
  for (int n = first, g = 0; n < last; n += kGroup, g++) {
    float squared[kGroup] = {};
    for (int r = n; r < min_int(n + kGroup, last); r++) {
      float p;
      packed_row<Q4, 1>(a.up + r * a.up_bytes, a.blocks, input, &p);
      p = max1(p + a.bias[r], 0.0f);
      squared[r - n] = p * p;
      const size_t at = 64 * static_cast<size_t>(r - n);
      if (g == 1 && needed.count && at < row_bytes) fetch_piece(needed.start(0), at);
    }
    if (!(quantize_group(squared, g, &x) < HUGE_VALF)) {
      sum[0] = HUGE_VALF, counts->active++;  // the norm behind it refuses that
      return;
    }
    const int found = needed.append(x, g, a.down + static_cast<size_t>(n / kGroup) * a.down_bytes, row_bytes);
    counts->active += found, counts->groups += found > 0;
  }
  counts->candidates += last - first;
  const uint8_t* up = a.up + last * a.up_bytes;  // where a thread most likely goes on
  const uint8_t* const row[4] = {up, up + a.up_bytes, up + 2 * a.up_bytes, up + 3 * a.up_bytes};
  needed.add(0, static_cast<int>(2 * row_bytes), {row, 4, nullptr}, sum);
}

// ---- many tokens ---------------------------------------------------------------------------------------------------------

// What the tokens of a block of neurons need together (a bit for each neuron of a group), and how much each by itself.
static void count_needed(const ActivationBlock* x, int tokens, uint32_t* needed, MlpCounts* counts) {
  uint8_t any[kSuperblock] = {};
  for (int t = 0; t < tokens; t++) {
    int32_t found = 0;
    uint32_t used[kLanes] = {};
    for (int i = 0; i < kSuperblock; i++) found += x[t].code[i] != 0, any[i] = static_cast<uint8_t>(any[i] | x[t].code[i]);
    for (int v = 0; v < 8; v++)
      for (int g = 0; g < kLanes; g++) used[g] |= read_unaligned<uint32_t>(x[t].code + 32 * v + 4 * g);
    for (int g = 0; g < kLanes; g++) counts->groups += used[g] != 0;
    counts->active += found;
  }
  for (int g = 0; g < kLanes; g++) {
    needed[g] = 0;
    for (int n = 0; n < kGroup; n++) needed[g] |= static_cast<uint32_t>(any[32 * (n / 4) + 4 * g + n % 4] != 0) << n;
  }
}

// Columns [begin, end), every token by itself with the rows that it needs.
static void int4_columns(const Int4DownArgs& a, int begin, int end, float* scratch) {
  const int columns = end - begin;
  float *block_sum = scratch, *total = scratch + columns;
  memset(total, 0, sizeof(float) * columns * a.tokens);
  const size_t row_bytes = static_cast<size_t>(a.blocks) * kSuperblock / 2;
  for (int first = 0, b = 0; first < a.groups; first += kLanes, b++)
    for (int t = 0; t < a.tokens; t++) {
      const ActivationBlock& x = a.x[static_cast<size_t>(b) * a.tokens + t];
      memset(block_sum, 0, sizeof(float) * columns);
      NeededGroups needed;
      for (int g = 0; g < min_int(kLanes, a.groups - first); g++)
        needed.append(x, g, a.records + (first + g) * a.record_bytes, row_bytes);
      needed.add(begin, end, {nullptr, 0, nullptr}, block_sum);
      float* sum = total + static_cast<size_t>(t) * columns;
      for (int i = 0; i < columns; i += 16) store16(sum + i, add(load16(sum + i), load16(block_sum + i)));
    }
  for (int t = 0; t < a.tokens; t++)
    for (int i = 0; i < columns; i++) a.y[t * a.y_stride + begin + i] += total[static_cast<size_t>(t) * columns + i] + a.bias[begin + i];
}

}  // namespace PERSIMMON_ISA
}  // namespace persimmon

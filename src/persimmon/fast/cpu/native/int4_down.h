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
  int quads;
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
  out->quads = (found + 3) / 4;
  for (int i = found; i < 4 * out->quads; i++) out->code[i] = 0, out->row[i] = out->row[found - 1];
  out->offset = -8 * static_cast<int>(x.sum[g]);
  out->scale = x.scale[g];
  return found;
}

// The group's integers for the 128 outputs whose nibbles lie `at` bytes into the rows: value[j] has outputs 16 j .. 16 j + 15.
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

INLINE void piece_values(const NeededRows& n, size_t at, f32x16* value) {
  const __m512i mask = _mm512_set1_epi8(15);
  __m512i sum[8];
#pragma GCC unroll 8
  for (int j = 0; j < 8; j++) sum[j] = _mm512_set1_epi32(n.offset);
  for (int q = 0; q < n.quads; q++) {
    const __m512i code = _mm512_set1_epi32(read_unaligned<int32_t>(n.code + 4 * q));
    __m512i r[4];
    interleave_rows(n.row + 4 * q, at, r);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      sum[j] = _mm512_dpbusd_epi32(sum[j], _mm512_and_si512(r[j], mask), code);
      sum[4 + j] = _mm512_dpbusd_epi32(sum[4 + j], _mm512_and_si512(_mm512_srli_epi16(r[j], 4), mask), code);
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < 8; j++) value[j] = _mm512_cvtepi32_ps(sum[j]);
}

#elif defined(__AVX2__)

INLINE f32x8 pair_sums(__m256i sum, int offset) {
  return _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_madd_epi16(sum, _mm256_set1_epi16(1)), _mm256_set1_epi32(offset)));
}

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

// sum[0 .. 128) += what the group adds to those outputs. scales: of the first of them.
INLINE void add_piece(const NeededRows& n, size_t at, const uint8_t* scales, float* sum) {
  f32x16 value[8];
  piece_values(n, at, value);
#pragma GCC unroll 8
  for (int j = 0; j < 8; j++)
    store16(sum + 16 * j, fma(mul(load_half16(scales + 32 * j), set16(n.scale)), value[j], load16(sum + 16 * j)));
}

// ---- one token -----------------------------------------------------------------------------------------------------------

// Asks for the scales and needed rows of a group a few lines at a time, while something else runs.
struct RowFetch {
  const uint8_t* at = nullptr;
  const uint8_t* end = nullptr;
  const NeededRows* needed;
  size_t row_bytes;
  int next, found;

  RowFetch() : needed(nullptr), row_bytes(0), next(0), found(0) {}
  RowFetch(const NeededRows& n, int found, const uint8_t* scales, size_t row_bytes)
      : at(scales), end(scales + 4 * row_bytes), needed(&n), row_bytes(row_bytes), next(0), found(found) {}
  // Lines to ask for beside each of a group's rows of the up projection.
  int lines_per_row() const { return static_cast<int>((4 + found) * row_bytes / 64 + kGroup - 1) / kGroup; }
  void fetch(int lines) {
    for (; lines > 0; lines--, at += 64) {
      if (at >= end) {
        if (next >= found) return;
        at = needed->row[next++], end = at + row_bytes;
      }
      __builtin_prefetch(at, 0, 2);
    }
  }
};

// Lines that memory delivers to a core while a piece is added, by the cycles of both: 5-6 bytes a cycle, about 20 cycles and 14 for
// each four rows.
constexpr int kLinesPerPiece = 1, kLinesPerQuad = 1;

// Up and down of one block of neurons, as one_block does. Memory never waits: a group's down rows are fetched while the next
// one's up rows are multiplied, and up rows further on while down rows are.
static void int4_block(const MlpArgs& a, int block, float* sum, MlpCounts* counts) {
  const ActivationBlock* input[1] = {static_cast<const ActivationBlock*>(a.x)};
  const size_t row_bytes = static_cast<size_t>(a.blocks) * kSuperblock / 2, outputs = 2 * row_bytes;
  const int first = block * kNeuronBlock, last = min_int(first + kNeuronBlock, a.neurons);
  ActivationBlock x;
  NeededRows needed[2];
  RowFetch fetch;
  int waiting = 0;  // neurons that the group before this one needs
  for (int n = first, g = 0; n < last + kGroup; n += kGroup, g++) {
    float squared[kGroup] = {};
    const int lines = fetch.lines_per_row();
    for (int r = n; r < min_int(n + kGroup, last); r++) {
      float p;
      packed_row<Q4, 1>(a.up + r * a.up_bytes, a.blocks, input, &p);
      p = max1(p + a.bias[r], 0.0f);
      squared[r - n] = p * p;
      fetch.fetch(lines);
    }
    if (waiting) {
      fetch.fetch(1 << 30);
      const uint8_t* scales = a.down + static_cast<size_t>(n / kGroup - 1) * a.down_bytes;
      const uint8_t* stream = a.up + min_int(n, last) * a.up_bytes + kStreamAhead;
      const int bytes = 64 * (kLinesPerPiece + needed[(g - 1) % 2].quads * kLinesPerQuad);
      for (size_t column = 0; column < outputs; column += kInt4Piece, stream += bytes) {
        prefetch(stream, bytes);
        add_piece(needed[(g - 1) % 2], column / 2, scales + 2 * column, sum + column);
      }
    }
    waiting = 0;
    fetch = RowFetch();
    if (n >= last) break;
    quantize_group(squared, g, &x);
    if (!(x.energy[g] < HUGE_VALF)) {
      sum[0] = HUGE_VALF, counts->active++;  // the norm behind it refuses that
      return;
    }
    const uint8_t* record = a.down + static_cast<size_t>(n / kGroup) * a.down_bytes;
    waiting = find_needed(x, g, record + 4 * row_bytes, row_bytes, &needed[g % 2]);
    counts->active += waiting, counts->groups += waiting > 0;
    fetch = RowFetch(needed[g % 2], waiting, record, row_bytes);
  }
  counts->candidates += last - first;
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

// Token t's share of fetching the columns of a group's rows that some token needs.
INLINE void fetch_share(const Int4DownArgs& a, int group, int t, int begin, int columns) {
  if (group >= a.groups || !a.needed[group]) return;
  const size_t row_bytes = static_cast<size_t>(a.blocks) * kSuperblock / 2;
  const uint8_t* record = a.records + group * a.record_bytes;
  if (t == 0) prefetch(record + 2 * begin, 2 * columns);
  for (uint32_t left = a.needed[group]; left; left &= left - 1) {
    const int n = __builtin_ctz(left);
    if (n % a.tokens == t) prefetch(record + (4 + n) * row_bytes + begin / 2, columns / 2);
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
      for (int g = 0; g < min_int(kLanes, a.groups - first); g++) {
        fetch_share(a, first + kLanes + g, t, begin, columns);
        const uint8_t* record = a.records + (first + g) * a.record_bytes;
        NeededRows mine;
        if (!find_needed(x, g, record + 4 * row_bytes, row_bytes, &mine)) continue;
        for (int column = begin; column < end; column += kInt4Piece)
          add_piece(mine, column / 2, record + 2 * column, block_sum + column - begin);
      }
      float* sum = total + static_cast<size_t>(t) * columns;
      for (int i = 0; i < columns; i += 16) store16(sum + i, add(load16(sum + i), load16(block_sum + i)));
    }
  for (int t = 0; t < a.tokens; t++)
    for (int i = 0; i < columns; i++) a.y[t * a.y_stride + begin + i] += total[static_cast<size_t>(t) * columns + i] + a.bias[begin + i];
}

}  // namespace PERSIMMON_ISA
}  // namespace persimmon

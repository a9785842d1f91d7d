// The q4 down projection of three to eight tokens on AMX.
//
// The right matrix of a tile product is four inputs of sixteen outputs side by side, which is what interleaving four neurons'
// rows gives (int4_down.h), so weights need no transposition; the left matrix is the tokens. A product spans two groups of 32
// neurons with a scale each, so its rows are the tokens twice: eight have the codes of one group and zeros for the other, eight
// the reverse. Products, sums and the unpacking of what comes next overlap, each one step behind the other.
// Memory wants long pieces: the rows of a block of 256 neurons that some token needs are fetched into the second-level cache one
// after the other, a range of columns of each, while the block before is multiplied. The bits are those of int4_down.h.
#pragma once
#include "eights.h"
#include "int4_down.h"

namespace persimmon {
namespace PERSIMMON_ISA {

#if defined(__AMX_INT8__)

constexpr int kPieceVectors = kInt4Piece / 16;  // sixteen outputs each

struct alignas(64) EightSquares {
  uint8_t weight[2][kPieceVectors][16][64];  // [pair of groups even, odd][16 outputs][four neurons]: signed bytes
  int32_t product[2][kPieceVectors][16][16]; // [pair even, odd][16 outputs][token of a group][output]
  int8_t code[kPairs][16][64];               // [pair][token of a group][neuron]
};
static_assert(sizeof(EightSquares) == kInt4PanelBytes, "what the caller has");

// One block of neurons, the groups of which are paired (0, 1), (2, 3), (4, 5), (6, 7).
struct EightBlock {
  const uint8_t* record[kLanes];  // null where no token needs one of the neurons
  uint32_t needed[kLanes];
  float scale[kPairs][16];
};

static void lay_out_block(const Int4DownArgs& a, int block, EightBlock* out, EightSquares* m) {
  memset(m->code, 0, sizeof m->code);
  memset(out->scale, 0, sizeof out->scale);
  for (int g = 0; g < kLanes; g++) {
    const int group = block * kLanes + g;
    out->needed[g] = group < a.groups ? a.needed[group] : 0;
    out->record[g] = out->needed[g] ? a.records + group * a.record_bytes : nullptr;
    for (int t = 0; out->needed[g] && t < a.tokens; t++) {
      const ActivationBlock& x = a.x[static_cast<size_t>(block) * a.tokens + t];
      const int row = g % 2 * 8 + t;
      for (int v = 0; v < 8; v++) memcpy(m->code[g / 2][row] + g % 2 * kGroup + 4 * v, x.code + 32 * v + 4 * g, 4);
      out->scale[g / 2][row] = x.scale[g];
    }
  }
}

// Four neurons of the pair, rows row .. row + 3 of its sixty-four, at the outputs of a piece. What is skipped keeps whatever bytes it had: they
// meet codes of zero.
INLINE void unpack_neurons(const EightBlock& b, int pair, int quad, size_t row_bytes, int column, EightSquares* m) {
  const int g = 2 * pair + quad / 8, v = quad % 8;
  const uint32_t four = b.needed[g] >> 4 * v & 15;
  if (!four) return;
  __m512i r[4];
  interleave_needed(b.record[g] + (4 + 4 * v) * row_bytes, row_bytes, four, column / 2, r);
  auto* out = m->weight[pair % 2];
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    _mm512_store_si512(out[j][quad], low_nibbles(r[j]));
    _mm512_store_si512(out[4 + j][quad], high_nibbles(r[j]));
  }
}

INLINE void load_tokens(const EightSquares& m, int pair) {
  asm volatile("tileloadd (%0,%1,1), %%tmm4" ::"r"(m.code[pair][0]), "r"(64L) : "memory");
}
#define PERSIMMON_EIGHT_PRODUCT(name, c, b)                                                                \
  INLINE void name(const void* weight, int32_t* product) {                                                 \
    asm volatile("tileloadd (%0,%1,1), %%tmm" #b ::"r"(weight), "r"(64L) : "memory");                      \
    asm volatile("tilezero %%tmm" #c "\n\ttdpbssd %%tmm" #b ", %%tmm4, %%tmm" #c ::: "memory");            \
    asm volatile("tilestored %%tmm" #c ", (%0,%1,1)" ::"r"(product), "r"(64L) : "memory");                 \
  }
PERSIMMON_EIGHT_PRODUCT(even_vector, 0, 2)
PERSIMMON_EIGHT_PRODUCT(odd_vector, 1, 3)
#undef PERSIMMON_EIGHT_PRODUCT

INLINE void multiply_vector(int pair, int j, EightSquares* m) {
  if (j % 2) odd_vector(m->weight[pair % 2][j], m->product[pair % 2][j][0]);
  else even_vector(m->weight[pair % 2][j], m->product[pair % 2][j][0]);
}

// sum[t][16 j ..) += both groups of a pair in turn, for all eight tokens.
INLINE void add_vector(const EightBlock& b, int pair, int j, int column, const EightSquares& m, float* sum) {
  f32x16 scale[2];
  for (int side = 0; side < 2; side++) {
    const uint8_t* record = b.record[2 * pair + side];
    scale[side] = record ? load_half16(record + 2 * column + 32 * j) : zero16();
  }
  const int32_t(*product)[16] = m.product[pair % 2][j];
  sum += 16 * j;
#pragma GCC unroll 8
  for (int t = 0; t < 8; t++, sum += kInt4Piece) {
    f32x16 y = load16(sum);
    y = fma(mul(scale[0], set16(b.scale[pair][t])), _mm512_cvtepi32_ps(_mm512_load_si512(product[t])), y);
    y = fma(mul(scale[1], set16(b.scale[pair][8 + t])), _mm512_cvtepi32_ps(_mm512_load_si512(product[8 + t])), y);
    store16(sum, y);
  }
}

// Columns [begin, end) of a block's scales and needed rows, in the order of memory.
struct BlockFetch {
  const Int4DownArgs& a;
  int group, last, begin, end;
  uint32_t left = 0;  // of the group before
  const uint8_t *at = nullptr, *stop = nullptr;

  BlockFetch(const Int4DownArgs& a, int block, int begin, int end)
      : a(a), group(block * kLanes), last(min_int(a.groups, group + kLanes)), begin(begin), end(end) {}
  int lines() const {
    int count = 0;
    for (int g = group; g < last; g++)
      if (a.needed[g]) count += (end - begin) / 32 + (end - begin) / 128 * __builtin_popcount(a.needed[g]);
    return count;
  }
};
INLINE void fetch_lines(BlockFetch* f, int count) {
  const size_t row_bytes = static_cast<size_t>(f->a.blocks) * kSuperblock / 2;
  for (; count > 0; count--, f->at += 64) {
    while (f->at == f->stop) {
      if (f->left) {
        f->at = f->a.records + (f->group - 1) * f->a.record_bytes + (4 + __builtin_ctz(f->left)) * row_bytes + f->begin / 2;
        f->stop = f->at + (f->end - f->begin) / 2;
        f->left &= f->left - 1;
      } else if (f->group < f->last) {
        f->left = f->a.needed[f->group];
        f->at = f->stop = f->a.records + f->group++ * f->a.record_bytes + 2 * f->begin;
        if (f->left) f->stop += 2 * (f->end - f->begin);
      } else {
        return;
      }
    }
    __builtin_prefetch(f->at, 0, 2);
  }
}

// sum[8][128] += a block's neurons at one piece of outputs, `lines` of what comes next fetched with each product.
static void multiply_piece(const EightBlock& b, size_t row_bytes, int column, BlockFetch* next, int lines, EightSquares* m, float* sum) {
  constexpr int quads = 16, share = quads / kPieceVectors;
  for (int q = 0; q < quads; q++) unpack_neurons(b, 0, q, row_bytes, column, m);
#pragma GCC unroll 4
  for (int p = 0; p < kPairs; p++) {
    load_tokens(*m, p);
#pragma GCC unroll 8
    for (int j = 0; j < kPieceVectors; j++) {
      multiply_vector(p, j, m);
      fetch_lines(next, lines);
      if (p > 0) add_vector(b, p - 1, j, column, *m, sum);
      for (int q = share * j; p + 1 < kPairs && q < share * (j + 1); q++) unpack_neurons(b, p + 1, q, row_bytes, column, m);
    }
  }
  for (int j = 0; j < kPieceVectors; j++) add_vector(b, kPairs - 1, j, column, *m, sum);
}

// Columns [begin, end) of at most eight tokens. scratch: 8 * (end - begin) + 8 * kInt4Piece; memory: kInt4PanelBytes, aligned to 64.
static void eight_int4_columns(const Int4DownArgs& a, int begin, int end, float* scratch, uint8_t* memory) {
  const size_t row_bytes = static_cast<size_t>(a.blocks) * kSuperblock / 2;
  const int pieces = (end - begin) / kInt4Piece, blocks = (a.groups + kLanes - 1) / kLanes;
  constexpr int size = kMostEights * kInt4Piece;
  EightSquares& m = *reinterpret_cast<EightSquares*>(memory);
  float *sum = scratch, *total = scratch + size;  // total: [piece][token][output]
  memset(memory, 0, sizeof m);
  memset(total, 0, sizeof(float) * size * pieces);
  configure_eights();
  BlockFetch first(a, 0, begin, end);
  fetch_lines(&first, first.lines());
  for (int block = 0; block < blocks; block++) {
    EightBlock b;
    lay_out_block(a, block, &b, &m);
    BlockFetch next(a, block + 1, begin, end);
    const int steps = pieces * kPairs * kPieceVectors, lines = (next.lines() + steps - 1) / steps;
    for (int piece = 0; piece < pieces; piece++) {
      memset(sum, 0, sizeof(float) * size);
      multiply_piece(b, row_bytes, begin + piece * kInt4Piece, &next, lines, &m, sum);
      float* y = total + piece * size;
      for (int i = 0; i < size; i += 16) store16(y + i, add(load16(y + i), load16(sum + i)));
    }
  }
  release();
  for (int t = 0; t < a.tokens; t++)
    for (int c = begin; c < end; c++)
      a.y[t * a.y_stride + c] += total[(c - begin) / kInt4Piece * size + t * kInt4Piece + (c - begin) % kInt4Piece] + a.bias[c];
}

#define PERSIMMON_EIGHT_INT4 eight_int4_columns
#else
#define PERSIMMON_EIGHT_INT4 nullptr
#endif

}  // namespace PERSIMMON_ISA
}  // namespace persimmon

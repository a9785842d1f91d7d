// The matrix products of linear layers in float32 on AMX: C [rows][columns] (+)= A B as six bfloat16 products (train_tiles.h).
//
// Operands are packed into cells of 32 x 32 numbers: three parts of two tiles each, 6 KiB in one piece. A panel is the cells of 32 rows of A
// or of 32 columns of B, one behind the other along the sum. Either operand may be read transposed: y = x W^T + b, the
// input's gradient g W and the weight's g^T x are the same product of different packings.
//
// A tile sum takes at most kSumAtOnce terms; such sums are added up by vectors, so that the six roundings of every 32 terms do not add up
// (docs/LOG.md, 2026-11-26).
#pragma once
#include "train_tiles.h"

#if defined(__AMX_BF16__)

namespace persimmon {
namespace PERSIMMON_ISA {

constexpr int kParts32 = 3;                       // of a float32 number
constexpr int kCellPart = 2 * kTile;              // numbers between the parts of a cell
constexpr int kCell = kParts32 * kCellPart;       // numbers of a cell
static_assert(kCell == kMatrixCell && kStep == kMatrixStep);

constexpr int kComing = 4;                        // cache lines of B fetched beside four tile products: a panel during four blocks of C
constexpr int kFetchCells = 2;                    // cells ahead that are fetched: 32 pieces of 128 bytes defeat the processor's own fetching

// Fetches the cell of rows [i, i + 32) and columns [c, c + 32), columns behind the last going on in the next rows.
INLINE void fetch_cell(const Matrix& m, int i, int c) {
  if (c >= m.columns) c = 0, i += 32;
  const float* at = m.data + static_cast<size_t>(i) * m.row + c;
  for (int r = i; r < i + 32 && r < m.count; r++, at += m.row) {
    _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(at + 16), _MM_HINT_T0);
  }
}
INLINE void fetch_for_writing(float* c) { __builtin_prefetch(c, 1), __builtin_prefetch(c + 16, 1); }

// The cell of rows [i, i + 32) and columns [c, c + 32) of a matrix. Lines of A have 32 numbers of the sum, lines of B two numbers of the sum
// for 16 columns.
template <bool kRight, bool kTurned>
static void pack_cell(const Matrix& m, int i, int c, uint16_t* cell) {
  fetch_cell(m, i, c + 32 * kFetchCells);
  if constexpr (!kRight && !kTurned) {
    for (int r = 0; r < 32; r++)
      store_lines(cell + r * kStep, kCellPart, split<kParts32>(m.along(i + r, c)), split<kParts32>(m.along(i + r, c + 16)));
  } else if constexpr (kRight && !kTurned) {
    for (int h = 0; h < 2; h++)
      for (int r = 0; r < 16; r++)
        store_lines(cell + h * kTile + r * kStep, kCellPart, split<kParts32>(m.along(i + r, c + 16 * h)),
                    split<kParts32>(m.along(i + 16 + r, c + 16 * h)));
  } else {
    f32x16 a[16], b[16];
    for (int h = 0; h < 2; h++) {
      const int row = kRight ? i + 16 * h : i, column = kRight ? c : c + 16 * h;
      m.turned(row, column, a), m.turned(kRight ? row : row + 16, kRight ? column + 16 : column, b);
      for (int j = 0; j < 16; j++)
        store_lines(cell + h * kTile + j * kStep, kCellPart, split<kParts32>(a[j]), split<kParts32>(b[j]));
    }
  }
}

// Packs lines [first, last) of panels (rows of A, columns of B), terms [from, to) of the sum; first and from are multiples of 32. `steps` is
// the number of cells of a panel of the packed array, whose first cell is that of `first` and `from`.
template <bool kRight, bool kTurned>
static void pack_panels(const Matrix& m, int first, int last, int from, int to, int steps, uint16_t* packed) {
  // Along the rows of the matrix as it lies in memory.
  auto pack = [&](int line, int term) {
    uint16_t* cell = packed + (static_cast<size_t>((line - first) / 32) * steps + (term - from) / kStep) * kCell;
    pack_cell<kRight, kTurned>(m, kRight == kTurned ? line : term, kRight == kTurned ? term : line, cell);
  };
  if (kRight == kTurned)
    for (int line = first; line < last; line += 32)
      for (int term = from; term < to; term += kStep) pack(line, term);
  else
    for (int term = from; term < to; term += kStep)
      for (int line = first; line < last; line += 32) pack(line, term);
}

static void pack_matrix(const MatrixView& v, bool right, int first, int last, int from, int to, int steps, uint16_t* packed) {
  const Matrix m = {v.data, static_cast<size_t>(v.columns), v.rows, v.columns};
  if (right && v.turned) pack_panels<true, true>(m, first, last, from, to, steps, packed);
  else if (right) pack_panels<true, false>(m, first, last, from, to, steps, packed);
  else if (v.turned) pack_panels<false, true>(m, first, last, from, to, steps, packed);
  else pack_panels<false, false>(m, first, last, from, to, steps, packed);
}

// A block of 32 x 32 sums on its way into C, a row at a time while the next block is multiplied.
class Settling {
 public:
  // `sums` are complete, and go to rows x columns of c, added to what is there or to the bias. What is left of the block before is done first.
  void next(const float* sums, float* c, size_t row, int rows, int columns, const float* bias, bool add_to) {
    finish();
    sums_ = sums, c_ = c, row_ = row, rows_ = rows, add_ = add_to;
    left_ = lanes_below(columns), right_ = lanes_below(columns - 16);
    bias_[0] = bias ? _mm512_maskz_loadu_ps(left_, bias) : zero16(), bias_[1] = bias ? _mm512_maskz_loadu_ps(right_, bias + 16) : zero16();
  }
  inline __attribute__((always_inline)) void operator()() {
    if (rows_ <= 0) return;
    const f32x16 a = add_ ? _mm512_maskz_loadu_ps(left_, c_) : bias_[0], b = add_ ? _mm512_maskz_loadu_ps(right_, c_ + 16) : bias_[1];
    _mm512_mask_storeu_ps(c_, left_, add(a, load16(sums_)));
    _mm512_mask_storeu_ps(c_ + 16, right_, add(b, load16(sums_ + 16)));
    c_ += row_, sums_ += 32, rows_--;
  }
  void finish() {
    while (rows_ > 0) (*this)();
  }

 private:
  const float* sums_;
  float* c_;
  size_t row_;
  int rows_ = 0;
  bool add_;
  __mmask16 left_, right_;
  f32x16 bias_[2];
};

// C of rows [first, last) and columns [left, right) (+)= `steps` cells of each panel. Both operands begin at the first of them.
static void multiply_panels(const MatrixProduct& p, int first, int last, int left, int right, int steps, Panels a, Panels b, bool add_to) {
  const TileRegisters registers;
  alignas(64) float sums[2][32 * 32];
  Settling settling;
  const size_t a_panel = static_cast<size_t>(a.steps) * kCell, b_panel = static_cast<size_t>(b.steps) * kCell;
  const TileOperand shape = {nullptr, kStep, kTile, kCell, kCellPart};
  TileOperand x = shape, y = shape;
  y.data = b.cells;
  int turn = 0;
  for (int j = left; j < right; j += 32, y.data += b_panel) {
    // The next panel of B comes in equal pieces during the panels of A.
    const char* coming = reinterpret_cast<const char*>(y.data + b_panel);
    x.data = a.cells;
    for (int i = first; i < last; i += 32, x.data += a_panel, turn ^= 1) {
      float* c = p.c + static_cast<size_t>(i) * p.columns + j;
      const int rows = min_int(32, last - i);
      int row = 0;
      tile_product<kParts32>(x, y, sums[turn], 32, 2, 2, steps, false, [&]() __attribute__((always_inline)) {
        settling();
        if (row < rows) fetch_for_writing(c + static_cast<size_t>(row++) * p.columns);
        for (int k = 0; k < kComing; k++, coming += 64) _mm_prefetch(coming, _MM_HINT_T1);
      });
      finish_stores();
      settling.next(sums[turn], c, p.columns, rows, min_int(32, right - j), p.bias ? p.bias + j : nullptr, add_to);
    }
  }
  settling.finish();
}

}  // namespace PERSIMMON_ISA
}  // namespace persimmon
#endif

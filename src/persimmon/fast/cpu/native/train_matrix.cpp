#include "train_matrix.h"

#include <algorithm>

#include "layout.h"
#include "train_scratch.h"
#include "train_threads.h"

namespace persimmon {
namespace {

constexpr int kBlockRows = 256;     // of C in a task: their share of A, 384 KiB packed, stays in the second-level cache
constexpr int kMostBlock = 512;     // rows and columns of C in a task that packs both operands: 1.5 MiB of them

constexpr int kMostPacked = 4096;   // cells of B that are packed at a time: 24 MiB
constexpr int kMostTerms = 8192;    // ... and terms of the sum, a multiple of kSumAtOnce

int steps_of(int n) { return (n + kMatrixStep - 1) / kMatrixStep; }

int pieces(int n, int size) { return (n + size - 1) / size; }

class Cells {
 public:
  explicit Cells(size_t n) : memory_(scratch_for(n * kMatrixCell / 2)) {}
  uint16_t* at(size_t cell) const { return reinterpret_cast<uint16_t*>(memory_.get()) + cell * kMatrixCell; }

 private:
  Scratch memory_;
};

// Columns [left, right) of C and terms [begin, end) of the sum: B is packed once, and every task packs its rows of A.
void multiply_rows(const TrainKernels& kernels, const MatrixView& a, const MatrixView& b, const MatrixProduct& p, int left, int right, int begin,
                   int end, bool add, int threads) {
  const int steps = steps_of(end - begin), panels = steps_of(right - left);
  const Cells packed(static_cast<size_t>(panels) * steps);
  for_tasks(threads, panels, [&](int i, int) {
    const int first = left + i * kMatrixStep;
    kernels.pack_matrix(b, true, first, std::min(first + kMatrixStep, right), begin, end, steps, packed.at(static_cast<size_t>(i) * steps));
  });
  int block = kBlockRows;
  while (block > kMatrixStep && pieces(p.rows, block) < threads) block /= 2;
  const size_t mine = static_cast<size_t>(steps_of(block)) * steps_of(kSumAtOnce);
  const Cells rows(mine * threads);
  for_tasks(threads, pieces(p.rows, block), [&](int i, int thread) {
    const int first = i * block, last = std::min(first + block, p.rows);
    for (int from = begin; from < end; from += kSumAtOnce) {
      const int to = std::min(from + kSumAtOnce, end), count = steps_of(to - from);
      kernels.pack_matrix(a, false, first, last, from, to, count, rows.at(mine * thread));
      kernels.multiply_panels(p, first, last, left, right, count, {rows.at(mine * thread), count},
                              {packed.at((from - begin) / kMatrixStep), steps}, add || from > 0);
    }
  });
}

// C is long. B is taken in pieces, so that what is packed of it stays small.
void multiply_rows(const TrainKernels& kernels, const MatrixView& a, const MatrixView& b, const MatrixProduct& p, bool add, int threads) {
  const int depth = a.terms(), terms = std::min(depth, kMostTerms), columns = kMostPacked / steps_of(terms) * kMatrixStep;
  for (int left = 0; left < p.columns; left += columns)
    for (int begin = 0; begin < depth; begin += terms)
      multiply_rows(kernels, a, b, p, left, std::min(left + columns, p.columns), begin, std::min(begin + terms, depth), add, threads);
}

// The sum is long: C is cut into blocks, and every task packs what its block needs.
void multiply_blocks(const TrainKernels& kernels, const MatrixView& a, const MatrixView& b, const MatrixProduct& p, bool add, int threads) {
  int rows = p.rows, columns = p.columns;
  while (std::max(rows, columns) > kMatrixStep &&
         (std::max(rows, columns) > kMostBlock || pieces(p.rows, rows) * pieces(p.columns, columns) < threads)) {
    int& longer = rows > columns ? rows : columns;
    longer = static_cast<int>(round_up((longer + 1) / 2, kMatrixStep));
  }
  const int depth = a.terms(), across = pieces(p.columns, columns);
  const size_t a_cells = static_cast<size_t>(steps_of(rows)) * steps_of(kSumAtOnce), b_cells = static_cast<size_t>(steps_of(columns)) * steps_of(kSumAtOnce);
  const Cells cells((a_cells + b_cells) * threads);
  for_tasks(threads, pieces(p.rows, rows) * across, [&](int i, int thread) {
    const int first = i / across * rows, last = std::min(first + rows, p.rows);
    const int left = i % across * columns, right = std::min(left + columns, p.columns);
    uint16_t *x = cells.at((a_cells + b_cells) * thread), *y = x + a_cells * kMatrixCell;
    for (int from = 0; from < depth; from += kSumAtOnce) {
      const int to = std::min(from + kSumAtOnce, depth), count = steps_of(to - from);
      kernels.pack_matrix(a, false, first, last, from, to, count, x);
      kernels.pack_matrix(b, true, left, right, from, to, count, y);
      kernels.multiply_panels(p, first, last, left, right, count, {x, count}, {y, count}, add || from > 0);
    }
  });
}

}  // namespace

void multiply(const TrainKernels& kernels, const MatrixView& a, const MatrixView& b, const MatrixProduct& p, bool add, int threads) {
  if (a.turned) multiply_blocks(kernels, a, b, p, add, threads);
  else multiply_rows(kernels, a, b, p, add, threads);
}

}  // namespace persimmon

// Products of small matrices that lie in the caches: C [rows][columns] (+)= A B, the building block of attention.
//
// A is read one number at a time at any stride, so that a product with a transposed A needs no transposition. Columns of B and C
// come in vectors of 16. A tile of C stays in registers over the whole sum: with AVX-512 24 of the 32 registers are sums, and
// a step of 24 multiply-adds needs about 10 loads.
#pragma once
#include "train_simd.h"

namespace persimmon {
namespace PERSIMMON_ISA {

#if defined(__AVX512F__)
constexpr int kMostVectors = 4;
constexpr int tile_rows(int vectors) { return vectors >= 4 ? 6 : vectors == 3 ? 8 : 12; }
#elif defined(__AVX2__)
constexpr int kMostVectors = 1;  // 6 x 2 of 16 registers
constexpr int tile_rows(int) { return 6; }
#else
constexpr int kMostVectors = 1;
constexpr int tile_rows(int) { return 2; }
#endif

struct Product {
  const float* a;              // a(row, i) = a[row * a_row + i * a_step]
  size_t a_row, a_step;
  const float* b;              // [length][b_row]
  size_t b_row;
  float* c;                    // [rows][c_row]
  size_t c_row;
  int length;
  bool add;                    // to what is in c
};

template <int R, int C>
INLINE void product_tile(const Product& p, int row, int column) {
  const float* a = p.a + row * p.a_row;
  const float* b = p.b + column;
  float* c = p.c + row * p.c_row + column;
  f32x16 sums[R][C];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < C; v++) sums[r][v] = p.add ? load16(c + r * p.c_row + 16 * v) : zero16();
  for (int i = 0; i < p.length; i++, a += p.a_step, b += p.b_row) {
    f32x16 bv[C];
#pragma GCC unroll 4
    for (int v = 0; v < C; v++) bv[v] = load16(b + 16 * v);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const f32x16 av = set16(a[r * p.a_row]);
#pragma GCC unroll 4
      for (int v = 0; v < C; v++) sums[r][v] = fma(av, bv[v], sums[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < C; v++) store16(c + r * p.c_row + 16 * v, sums[r][v]);
}

template <int R, int C>
static void product_rest(const Product& p, int rows, int row, int column) {
  if constexpr (R > 0) {
    if (rows == R) product_tile<R, C>(p, row, column);
    else product_rest<R - 1, C>(p, rows, row, column);
  }
}

template <int C>
static void product_columns(const Product& p, int rows, int column) {
  constexpr int R = tile_rows(C);
  int row = 0;
  for (; row + R <= rows; row += R) product_tile<R, C>(p, row, column);
  if (row < rows) product_rest<R - 1, C>(p, rows - row, row, column);
}

// rows x columns; columns is a multiple of 16.
static void product(const Product& p, int rows, int columns) {
  for (int column = 0; column < columns;) {
    const int vectors = (columns - column) / 16;
    if constexpr (kMostVectors == 1) {
      product_columns<1>(p, rows, column), column += 16;
    } else if (vectors == 3 || vectors == 6) {
      product_columns<3>(p, rows, column), column += 48;
    } else if (vectors >= 4) {
      product_columns<4>(p, rows, column), column += 64;
    } else if (vectors == 2) {
      product_columns<2>(p, rows, column), column += 32;
    } else {
      product_columns<1>(p, rows, column), column += 16;
    }
  }
}

}  // namespace PERSIMMON_ISA
}  // namespace persimmon

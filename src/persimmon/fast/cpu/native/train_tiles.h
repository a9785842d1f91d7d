// Products on AMX tiles: bfloat16 numbers with float32 sums, for operands that are bfloat16 or float32.
//
// A float32 number is the sum of three bfloat16 ones (8 + 8 + 8 = 24 bits), each the rounded rest of those before: x = x0 + x1 + x2.
// Of the nine products of two such sums the six largest are computed, x0 y0, x0 y1, x1 y0, x0 y2, x2 y0, x1 y1; what is
// left out is at most 2^-23 |x y|, and 2^-26 typically, of either sign. A multiplication costs six times as much as in bfloat16, which is
// 2.7 times as fast as AVX-512's float32. The same code with one part is the product of bfloat16 numbers.
//
// The unit takes denormal numbers for zero, so parts below 2^-126 are lost: numbers below 2^-110 have fewer than 24 bits.
// An infinity has no parts and becomes NaN.
//
// Layouts, with A and B the operands of C += A B (16 x 32 times 32 x 16 numbers per tile), all of 64-byte lines that hold two
// vectors of 16 numbers, (a, b) as a0 b0 a1 b1 ...: that is the order in which 32 numbers are summed, in both operands.
//   rows    [n][W]                  W: columns padded to 32; A, summed over columns
//   across  [n / 32][W][32]         the same transposed in blocks of 32 rows; A, summed over rows
//   lanes   [n / 16][W / 32][tile]  B, 16 rows as columns, summed over columns
//   pairs   [n / 32][W / 16][tile]  B, columns as columns, summed over rows
// where a tile is [16][16][2]. Each part of the numbers is such an array.
#pragma once
#include "train_simd.h"

#if defined(__AMX_BF16__)
#include <immintrin.h>

namespace persimmon {
namespace PERSIMMON_ISA {

constexpr int kTile = 512;  // numbers of a B tile
constexpr int kStep = 32;   // numbers summed by one tile product

struct alignas(64) TileShapes {  // eight tiles of 16 rows x 64 bytes
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static const volatile TileShapes kTileShapes;  // in memory whole: GCC believes that the instruction reads eight bytes

class TileRegisters {  // this thread has them while this lives
 public:
  TileRegisters() { _tile_loadconfig(const_cast<const TileShapes*>(&kTileShapes)); }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

// ---- parts ---------------------------------------------------------------------------------------------------------------

template <int kParts>
struct Split {  // a vector as bfloat16 parts, each in the upper halves of the lanes
  __m512i part[kParts];
};

// Rounds to the nearest bfloat16, halves away from zero.
template <int kParts>
INLINE Split<kParts> split(f32x16 x) {
  const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
  Split<kParts> s;
#pragma GCC unroll 3
  for (int i = 0; i < kParts; i++) {
    if (i == 2) {
      s.part[i] = _mm512_castps_si512(x);  // eight bits are left
    } else {
      s.part[i] = _mm512_add_epi32(_mm512_castps_si512(x), half);
      if (i + 1 < kParts) x = sub(x, _mm512_castsi512_ps(_mm512_and_si512(s.part[i], upper)));
    }
  }
  return s;
}

// Lines (a, b) of all parts, `part` numbers apart.
template <int kParts>
INLINE void store_lines(uint16_t* to, size_t part, const Split<kParts>& a, const Split<kParts>& b) {
  const __m512i down = _mm512_set4_epi32(0x0F0E, 0x0B0A, 0x0706, 0x0302);  // bytes of each lane's upper half
#pragma GCC unroll 3
  for (int i = 0; i < kParts; i++)
    _mm512_storeu_si512(to + i * part, _mm512_mask_shuffle_epi8(b.part[i], 0x3333333333333333ull, a.part[i], down));
}

// ---- layouts -------------------------------------------------------------------------------------------------------------

struct Matrix {  // float32 [count][row] from which `columns`, a multiple of 16, are taken; zeros behind either end
  const float* data;
  size_t row;
  int count, columns;

  inline __attribute__((always_inline)) f32x16 along(int i, int column) const {  // 16 columns of row i
    return i < count && column < columns ? load16(data + i * row + column) : zero16();
  }
  inline __attribute__((always_inline)) f32x16 down(int i, int column) const {  // a column of 16 rows from i
    const int rows = count - i;
    if (rows <= 0 || column >= columns) return zero16();
    const __mmask16 there = rows >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << rows) - 1);
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i at = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(static_cast<int>(row)));
    return _mm512_mask_i32gather_ps(zero16(), there, at, data + i * row + column, 4);
  }
};

// Each packs `n` rows, a multiple of 32, of W columns, a multiple of 32; `part` is the distance of the parts.
template <int kParts>
static void pack_rows(const Matrix& m, int n, int W, uint16_t* rows, size_t part) {
  for (int i = 0; i < n; i++)
    for (int c = 0; c < W; c += kStep, rows += kStep) store_lines(rows, part, split<kParts>(m.along(i, c)), split<kParts>(m.along(i, c + 16)));
}

template <int kParts>
static void pack_across(const Matrix& m, int n, int W, uint16_t* across, size_t part) {
  for (int i = 0; i < n; i += kStep)
    for (int c = 0; c < W; c++, across += kStep) store_lines(across, part, split<kParts>(m.down(i, c)), split<kParts>(m.down(i + 16, c)));
}

template <int kParts>
static void pack_lanes(const Matrix& m, int n, int W, uint16_t* lanes, size_t part) {
  for (int i = 0; i < n; i += 16)
    for (int s = 0; s < W; s += kStep)
      for (int c = s; c < s + 16; c++, lanes += kStep) store_lines(lanes, part, split<kParts>(m.down(i, c)), split<kParts>(m.down(i, c + 16)));
}

template <int kParts>
static void pack_pairs(const Matrix& m, int n, int W, uint16_t* pairs, size_t part) {
  for (int block = 0; block < n; block += kStep)
    for (int c = 0; c < W; c += 16)
      for (int i = block; i < block + 16; i++, pairs += kStep)
        store_lines(pairs, part, split<kParts>(m.along(i, c)), split<kParts>(m.along(i + 16, c)));
}

// ---- products ------------------------------------------------------------------------------------------------------------

struct TileOperand {
  const uint16_t* data;
  size_t row;   // numbers between the rows of a tile: A only, B has 32
  size_t tile;  // ... between neighbouring tiles of C's rows (A) or columns (B)
  size_t step;  // ... between steps of the sum
  size_t part;  // ... between the parts of the numbers
};

// The compiler does not know that the instructions on tiles read memory.
INLINE void finish_stores() { asm volatile("" ::: "memory"); }

// 2 x 2 tiles of C, in tile registers 0 to 3, += A B of one step. A and B change in turns, so that each product of parts needs two loads.
template <int kParts, class Beside>
INLINE void tile_step(const uint16_t* a, size_t a_row, size_t a_tile, size_t a_part, const uint16_t* b, size_t b_tile, size_t b_part,
                      Beside& beside) {
  constexpr int last = kParts - 1;
  auto with_a = [&](int i) __attribute__((always_inline)) {
    _tile_loadd(4, a + i * a_part, a_row * 2);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + i * a_part + a_tile, a_row * 2);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    beside();
  };
  auto with_b = [&](int i) __attribute__((always_inline)) {
    _tile_loadd(6, b + i * b_part, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    _tile_loadd(7, b + i * b_part + b_tile, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
    beside();
  };
  _tile_loadd(6, b, 64);
  _tile_loadd(7, b + b_tile, 64);
  with_a(last);  // small products first
  if constexpr (kParts == 3) {
    with_a(1);
    with_b(1);
    with_a(0);
    with_b(2);
    with_b(0);
  }
}

// C [16 m][16 n] (+)= A B; m and n are even. beside() is called after every four tile products (64 cycles of the tile unit), which vector
// code can fill.
template <int kParts, class Beside>
INLINE void tile_product(const TileOperand& a, const TileOperand& b, float* c, size_t c_row, int m, int n, int steps, bool add,
                         Beside&& beside) {
  finish_stores();
  for (int i = 0; i < m; i += 2)
    for (int j = 0; j < n; j += 2) {
      float* at = c + 16 * i * c_row + 16 * j;
      if (add) {
        _tile_loadd(0, at, c_row * 4);
        _tile_loadd(1, at + 16, c_row * 4);
        _tile_loadd(2, at + 16 * c_row, c_row * 4);
        _tile_loadd(3, at + 16 * c_row + 16, c_row * 4);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      for (int s = 0; s < steps; s++)
        tile_step<kParts>(a.data + i * a.tile + s * a.step, a.row, a.tile, a.part, b.data + j * b.tile + s * b.step, b.tile, b.part, beside);
      _tile_stored(0, at, c_row * 4);
      _tile_stored(1, at + 16, c_row * 4);
      _tile_stored(2, at + 16 * c_row, c_row * 4);
      _tile_stored(3, at + 16 * c_row + 16, c_row * 4);
    }
}

// ---- scratch memory ------------------------------------------------------------------------------------------------------

class Arena {  // hands out pieces of a thread's scratch memory, each on a cache line
 public:
  explicit Arena(float* memory) : next_(reinterpret_cast<char*>(memory)) {}
  template <class T>
  T* take(size_t n) {
    T* p = reinterpret_cast<T*>(next_);
    next_ += round_up(n * sizeof(T), 64);
    return p;
  }

 private:
  char* next_;
};

}  // namespace PERSIMMON_ISA
}  // namespace persimmon
#endif

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
constexpr int kApart = 96;  // numbers between parts, so that their lines do not meet in one set of the first-level cache

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
template <int kParts, int kCount>
INLINE void split(f32x16 (&x)[kCount], Split<kParts> (&s)[kCount]) {
  const __m512i half = _mm512_set1_epi32(0x8000), upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
#pragma GCC unroll 3
  for (int i = 0; i < kParts; i++) {
    const bool rest = i == 2;  // of eight bits
#pragma GCC unroll 8
    for (int v = 0; v < kCount; v++) s[v].part[i] = rest ? _mm512_castps_si512(x[v]) : _mm512_add_epi32(_mm512_castps_si512(x[v]), half);
    if (i + 1 == kParts) break;
#pragma GCC unroll 8
    for (int v = 0; v < kCount; v++) x[v] = sub(x[v], _mm512_castsi512_ps(_mm512_and_si512(s[v].part[i], upper)));
  }
}
template <int kParts>
INLINE Split<kParts> split(f32x16 x) {
  f32x16 one[1] = {x};
  Split<kParts> s[1];
  split<kParts>(one, s);
  return s[0];
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
  // 16 rows from i of 16 columns, transposed: by pairs of rows, of pairs, and then whole quarters of the registers.
  void turned(int i, int column, f32x16 (&out)[16]) const {
    __m512d two[16];
    f32x16 four[16];
#pragma GCC unroll 8
    for (int r = 0; r < 16; r += 2) {
      const f32x16 a = along(i + r, column), b = along(i + r + 1, column);
      two[r] = _mm512_castps_pd(_mm512_unpacklo_ps(a, b)), two[r + 1] = _mm512_castps_pd(_mm512_unpackhi_ps(a, b));
    }
#pragma GCC unroll 4
    for (int r = 0; r < 16; r += 4)
#pragma GCC unroll 2
      for (int j = 0; j < 2; j++) {
        four[r + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(two[r + j], two[r + j + 2]));
        four[r + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(two[r + j], two[r + j + 2]));
      }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {  // four[4 g + j]: rows 4 g .. 4 g + 3 of columns j, 4 + j, 8 + j, 12 + j
      const f32x16 even[2] = {_mm512_shuffle_f32x4(four[j], four[4 + j], 0x88), _mm512_shuffle_f32x4(four[8 + j], four[12 + j], 0x88)};
      const f32x16 odd[2] = {_mm512_shuffle_f32x4(four[j], four[4 + j], 0xDD), _mm512_shuffle_f32x4(four[8 + j], four[12 + j], 0xDD)};
      out[j] = _mm512_shuffle_f32x4(even[0], even[1], 0x88), out[8 + j] = _mm512_shuffle_f32x4(even[0], even[1], 0xDD);
      out[4 + j] = _mm512_shuffle_f32x4(odd[0], odd[1], 0x88), out[12 + j] = _mm512_shuffle_f32x4(odd[0], odd[1], 0xDD);
    }
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
  f32x16 a[16], b[16];
  for (int i = 0; i < n; i += kStep)
    for (int c = 0; c < W; c += 16) {
      m.turned(i, c, a), m.turned(i + 16, c, b);
      for (int j = 0; j < 16; j++, across += kStep) store_lines(across, part, split<kParts>(a[j]), split<kParts>(b[j]));
    }
}

template <int kParts>
static void pack_lanes(const Matrix& m, int n, int W, uint16_t* lanes, size_t part) {
  f32x16 a[16], b[16];
  for (int i = 0; i < n; i += 16)
    for (int c = 0; c < W; c += kStep) {
      m.turned(i, c, a), m.turned(i, c + 16, b);
      for (int j = 0; j < 16; j++, lanes += kStep) store_lines(lanes, part, split<kParts>(a[j]), split<kParts>(b[j]));
    }
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

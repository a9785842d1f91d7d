// Estimates of many float rows from their sketch (sketch.h), with bounds that hold for certain.
//
// Codes of sixteen rows lie side by side, four inputs of each, so that integer products need no folding: one 32-bit lane is a row.
// Codes of five bits become bytes in registers.
// Inputs are rounded to 14 bits, cut into two parts of 7 that AVX2's saturating products can take. Sums of integers are exact, so
// estimates and bounds are the same on every instruction set.
#pragma once
#include "activations.h"
#include "kernels.h"

namespace persimmon {
namespace PERSIMMON_ISA {

constexpr int kInputMost = 8128;    // largest rounded input: 63.5 * 128
constexpr int kInputOffset = 8192;  // added to rounded inputs, which so become two unsigned parts
constexpr int kPartBits = 7;
constexpr float kMoreThanRounded = 1 + 0x1p-12f;  // of a sum of up to kMostSketchInputs magnitudes or squares
constexpr int kMoreTerms = 64;      // roundings of a product beyond its terms: scales, folding of lanes

// Both parts of kSketchInputs rounded inputs.
INLINE void store_parts(const float* codes, uint8_t* high, uint8_t* low) {
  for (int j = 0; j < kSketchInputs; j++) {
    const uint32_t shifted = static_cast<uint32_t>(static_cast<int>(codes[j]) + kInputOffset);
    high[j] = static_cast<uint8_t>(shifted >> kPartBits & 127), low[j] = static_cast<uint8_t>(shifted & 127);
  }
}

// parts: [2][inputs rounded up to kSketchInputs], first the high ones.
static SketchInput sketch_input(const float* x, const float* center, int n, uint8_t* parts) {
  const int padded = static_cast<int>(round_up(n, kSketchInputs));
  uint8_t *high = parts, *low = parts + padded;
  // of(i, x and its center, eight of each) for all inputs; zeros behind the last.
  const auto each = [&](auto&& of) {
    int i = 0;
    for (; i + 8 <= n; i += 8) of(i, load8(x + i), load8(center + i));
    float rest[2][8] = {};
    for (int j = 0; i + j < n; j++) rest[0][j] = x[i + j], rest[1][j] = center[i + j];
    if (i < n) of(i, load8(rest[0]), load8(rest[1])), i += 8;
    for (; i < padded; i += 8) of(i, zero8(), zero8());
  };
  f32x8 most = zero8();
  each([&](int, f32x8 all, f32x8 middle) { most = maximum(magnitude(sub(all, middle)), most); });
  const float largest = max_lanes(most), step = largest / kInputMost, inverse = largest > kLeastSketched ? kInputMost / largest : 0.0f;
  f32x8 lengths[3] = {zero8(), zero8(), zero8()}, sum = zero8(), error = zero8();  // of x, its center and their difference
  alignas(64) float codes[kSketchInputs];
  each([&](int i, f32x8 all, f32x8 middle) {
    const f32x8 v = sub(all, middle), code = round_even(mul(v, set8(inverse))), lost = sub(v, mul(set8(step), code));
    lengths[0] = fma(all, all, lengths[0]), lengths[1] = fma(middle, middle, lengths[1]), lengths[2] = fma(v, v, lengths[2]);
    sum = add(magnitude(v), sum), error = fma(lost, lost, error);
    store8(codes + i % kSketchInputs, code);
    if (i % kSketchInputs == kSketchInputs - 8) store_parts(codes, high + i + 8 - kSketchInputs, low + i + 8 - kSketchInputs);
  });
  const auto root = [](f32x8 squares) { return sqrtf(sum_lanes(squares)) * kMoreThanRounded; };
  const float length = root(lengths[2]), all = root(lengths[0]), middle = root(lengths[1]);
  const bool in_range = largest > kLeastSketched && all < kMostSketched && middle < kMostSketched;
  // Of the exact product, of the product with the center, and of the difference and the estimate.
  const float rounding = static_cast<float>(n + kMoreTerms) * 0x1p-24f * (all + middle + 2 * length);
  return {high, low, padded / 4, step, length, sum_lanes(sum), root(error) + rounding, rounding,
          in_range ? 0.0f : HUGE_VALF};
}

// Integer sums of a block of sixteen rows with both parts, as floats: 128 * (high - 64) . w + low . w.
#if defined(__AVX512VNNI__)
// The codes of quadruple q of a stripe, [row][input].
template <int Bits>
INLINE __m512i stripe_codes(const uint8_t* stripe, int q) {
  if (Bits == 8) return _mm512_loadu_si512(stripe + kLineBytes * q);
  const __m512i pair = _mm512_loadu_si512(stripe + kLineBytes * (q / 2));
  const __m512i fifth = _mm512_loadu_si512(stripe + kLineBytes * (kSketchInputs / 8));
  const __m512i low = _mm512_and_si512(q % 2 ? _mm512_srli_epi16(pair, 4) : pair, _mm512_set1_epi8(15));
  const __mmask64 negative = _mm512_test_epi8_mask(fifth, _mm512_set1_epi8(static_cast<char>(1 << q)));
  return _mm512_mask_sub_epi8(low, negative, low, _mm512_set1_epi8(16));
}
template <int Bits>
INLINE f32x16 sketch_sums(const uint8_t* block, const SketchInput& x, const int32_t* row_sums) {
  __m512i h[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()}, l[2] = {h[0], h[0]};
  for (int first = 0; first < x.quads; first += kSketchInputs / 4, block += sketch_stripe_bytes(Bits)) {
    prefetch_stream(block, static_cast<int>(sketch_stripe_bytes(Bits)));
#pragma GCC unroll 8
    for (int q = 0; q < kSketchInputs / 4; q++) {
      const __m512i w = stripe_codes<Bits>(block, q);
      const int at = 4 * (first + q);
      h[q % 2] = _mm512_dpbusd_epi32(h[q % 2], _mm512_set1_epi32(read_unaligned<int>(x.high + at)), w);
      l[q % 2] = _mm512_dpbusd_epi32(l[q % 2], _mm512_set1_epi32(read_unaligned<int>(x.low + at)), w);
    }
  }
  const __m512i offset = _mm512_slli_epi32(_mm512_loadu_si512(row_sums), kPartBits - 1);
  const __m512i high = _mm512_sub_epi32(_mm512_add_epi32(h[0], h[1]), offset);
  return fma(set16(1 << kPartBits), _mm512_cvtepi32_ps(high), _mm512_cvtepi32_ps(_mm512_add_epi32(l[0], l[1])));
}
#elif defined(__AVX2__)
// Half `k` of the codes of quadruple q of a stripe: of eight rows.
template <int Bits>
INLINE __m256i stripe_codes(const uint8_t* stripe, int q, int k) {
  const auto line = [&](int i) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(stripe + kLineBytes * i + 32 * k)); };
  if (Bits == 8) return line(q);
  const __m256i low = _mm256_and_si256(q % 2 ? _mm256_srli_epi16(line(q / 2), 4) : line(q / 2), _mm256_set1_epi8(15));
  const __m256i bit = _mm256_set1_epi8(static_cast<char>(1 << q)), fifth = _mm256_and_si256(line(kSketchInputs / 8), bit);
  return _mm256_or_si256(low, _mm256_andnot_si256(_mm256_set1_epi8(15), _mm256_cmpeq_epi8(fifth, bit)));
}
INLINE __m256i add_products(__m256i sum, const uint8_t* x, __m256i w) {
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi32(read_unaligned<int>(x)), w);  // at most 2 * 127 * 127
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
template <int Bits>
INLINE f32x16 sketch_sums(const uint8_t* block, const SketchInput& x, const int32_t* row_sums) {
  __m256i h[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()}, l[2] = {h[0], h[0]};
  for (int first = 0; first < x.quads; first += kSketchInputs / 4, block += sketch_stripe_bytes(Bits)) {
    prefetch_stream(block, static_cast<int>(sketch_stripe_bytes(Bits)));
#pragma GCC unroll 8
    for (int q = 0; q < kSketchInputs / 4; q++)
#pragma GCC unroll 2
      for (int k = 0; k < 2; k++) {
        const __m256i w = stripe_codes<Bits>(block, q, k);
        h[k] = add_products(h[k], x.high + 4 * (first + q), w), l[k] = add_products(l[k], x.low + 4 * (first + q), w);
      }
  }
  f32x8 sums[2];
  for (int k = 0; k < 2; k++) {
    const __m256i offset = _mm256_slli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row_sums + 8 * k)), kPartBits - 1);
    sums[k] = fma(set8(1 << kPartBits), _mm256_cvtepi32_ps(_mm256_sub_epi32(h[k], offset)), _mm256_cvtepi32_ps(l[k]));
  }
  return {sums[0], sums[1]};
}
#else
template <int Bits>
INLINE int stripe_code(const uint8_t* stripe, int q, int place) {
  if (Bits == 8) return static_cast<int8_t>(stripe[kLineBytes * q + place]);
  const int low = stripe[kLineBytes * (q / 2) + place] >> 4 * (q % 2) & 15;
  return low - 16 * (stripe[kLineBytes * (kSketchInputs / 8) + place] >> q & 1);
}
template <int Bits>
INLINE f32x16 sketch_sums(const uint8_t* block, const SketchInput& x, const int32_t* row_sums) {
  int32_t high[kSketchRows] = {}, low[kSketchRows] = {};
  for (int first = 0; first < x.quads; first += kSketchInputs / 4, block += sketch_stripe_bytes(Bits))
    for (int q = 0; q < kSketchInputs / 4; q++)
      for (int r = 0; r < kSketchRows; r++)
        for (int i = 0; i < 4; i++) {
          const int w = stripe_code<Bits>(block, q, 4 * r + i), at = 4 * (first + q) + i;
          high[r] += w * x.high[at], low[r] += w * x.low[at];
        }
  float sums[kSketchRows];
  for (int r = 0; r < kSketchRows; r++)
    sums[r] = fma1(1 << kPartBits, static_cast<float>(high[r] - (row_sums[r] * (1 << (kPartBits - 1)))), static_cast<float>(low[r]));
  return load16(sums);
}
#endif

// Rows [begin, end), begin a multiple of kSketchRows, to estimate[0 ..) and bound[0 ..); whole blocks are written.
template <int Bits>
INLINE void sketch_rows_of(const uint8_t* sketch, const SketchInput& x, int begin, int end, float* estimate, float* bound) {
  const size_t codes = static_cast<size_t>(x.quads) * 4 / kSketchInputs * sketch_stripe_bytes(Bits);
  const uint8_t* block = sketch + begin / kSketchRows * (codes + sizeof(SketchFacts));
  for (int r = 0; r < end - begin; r += kSketchRows, block += codes + sizeof(SketchFacts)) {
    const SketchFacts* facts = reinterpret_cast<const SketchFacts*>(block + codes);
    const f32x16 scale = load16(facts->scale), error = load16(facts->error);
    const f32x16 about = fma(sketch_sums<Bits>(block, x, facts->sum), mul(scale, set16(x.step)), load16(facts->center));
    const f32x16 lost = minimum(mul(error, set16(x.length)), mul(scale, set16(0.5f * x.sum)));
    const f32x16 off = fma(error, set16(x.rounding), fma(load16(facts->length), set16(x.error), lost));
    store16(estimate + r, about), store16(bound + r, add(about, fma(off, set16(kMoreThanRounded), set16(x.more))));
  }
}

static void sketch_rows(const uint8_t* sketch, int bits, const SketchInput& x, int begin, int end, float* estimate, float* bound) {
  if (bits == kHeadBits) sketch_rows_of<kHeadBits>(sketch, x, begin, end, estimate, bound);
  else sketch_rows_of<kUpBits>(sketch, x, begin, end, estimate, bound);
}

}  // namespace PERSIMMON_ISA
}  // namespace persimmon

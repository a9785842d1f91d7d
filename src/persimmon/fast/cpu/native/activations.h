// What happens to activations between the matrices: LayerNorm, rotary positions, rounding to int8.
//
// All of it is a few microseconds of a token. Sums run in eight lanes (element i in lane i mod 8) and are folded in a fixed
// order, so that the result is the same on every instruction set.
// Rounding to int8 in groups of 32 adds about 0.65% noise to a dot product, as much as int8 weights and a tenth of int4
// weights. Inputs that are not finite are refused.
#pragma once
#include <cmath>

#include "simd.h"

namespace persimmon {
namespace PERSIMMON_ISA {

// Sum over i of f(i-th vector); a tail shorter than 8 is padded with `pad`.
template <class F>
INLINE f32x8 sum_vectors(const float* x, int n, float pad, F f) {
  f32x8 sum = zero8();
  int i = 0;
  for (; i + 8 <= n; i += 8) sum = f(load8(x + i), sum);
  if (i < n) {
    float tail[8] = {pad, pad, pad, pad, pad, pad, pad, pad};
    for (int j = 0; i + j < n; j++) tail[j] = x[i + j];
    sum = f(load8(tail), sum);
  }
  return sum;
}

static bool layer_norm(const float* x, int n, float eps, const float* weight, const float* bias, float* y) {
  const float mean = sum_lanes(sum_vectors(x, n, 0.0f, [](f32x8 v, f32x8 sum) { return add(v, sum); })) / n;
  const f32x8 m = set8(mean);
  const float squares = sum_lanes(sum_vectors(x, n, mean, [m](f32x8 v, f32x8 sum) {
    const f32x8 d = sub(v, m);
    return fma(d, d, sum);
  }));
  const float inverse = 1.0f / sqrtf(squares / n + eps);
  const f32x8 r = set8(inverse);
  int i = 0;
  for (; i + 8 <= n; i += 8)
    store8(y + i, fma(mul(sub(load8(x + i), m), r), load8(weight + i), load8(bias + i)));
  for (; i < n; i++) y[i] = fma1((x[i] - mean) * inverse, weight[i], bias[i]);
  return squares < HUGE_VALF;  // false for infinities and NaN alike
}

static void rotate(float* x, const float* cos, const float* sin, int half) {
  for (int i = 0; i < half; i++) {
    const float first = x[i], second = x[i + half];
    x[i] = first * cos[i] - second * sin[i];
    x[i + half] = second * cos[i] + first * sin[i];
  }
}

INLINE float largest_magnitude(const float* x, int n) {
  f32x8 largest = zero8();
  int i = 0;
  for (; i + 8 <= n; i += 8) largest = maximum(magnitude(load8(x + i)), largest);
  float result = max_lanes(largest);
  for (; i < n; i++) result = max1(__builtin_fabsf(x[i]), result);
  return result;
}

// Codes of one group of 32, and the sum of its squares; its lane is the 32-bit lane of the superblock's eight vectors.
INLINE float quantize_group(const float* x, int lane, ActivationBlock* out) {
  const float largest = largest_magnitude(x, kGroup);
  const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
  float codes[kGroup];
  f32x8 energy = zero8(), sum = zero8();
  for (int i = 0; i < kGroup; i += 8) {
    const f32x8 v = load8(x + i), code = round_even(mul(v, set8(inverse)));
    store8(codes + i, code);
    sum = add(code, sum);
    energy = fma(v, v, energy);
  }
  for (int i = 0; i < kGroup; i++) out->code[32 * (i / 4) + 4 * lane + i % 4] = static_cast<int8_t>(codes[i]);
  out->scale[lane] = largest / 127.0f;
  out->sum[lane] = sum_lanes(sum);
  return sum_lanes(energy);
}

static bool quantize(const float* x, int n, int blocks, ActivationBlock* out) {
  float padded[kGroup];
  float total = 0.0f;
  for (int g = 0; g < blocks * kLanes; g++) {
    const float* group = x + g * kGroup;
    if ((g + 1) * kGroup > n) {
      for (int i = 0; i < kGroup; i++) padded[i] = g * kGroup + i < n ? x[g * kGroup + i] : 0.0f;
      group = padded;
    }
    total += quantize_group(group, g % kLanes, out + g / kLanes);
  }
  return total < HUGE_VALF;
}

// Length of x - center.
static float distance(const float* x, const float* center, int n) {
  f32x8 sum = zero8();
  int i = 0;
  for (; i + 8 <= n; i += 8) {
    const f32x8 d = sub(load8(x + i), load8(center + i));
    sum = fma(d, d, sum);
  }
  float total = sum_lanes(sum);
  for (; i < n; i++) total = fma1(x[i] - center[i], x[i] - center[i], total);
  return sqrtf(total);
}

static float quantize_head(const float* x, int n, int8_t* codes) {
  const float largest = largest_magnitude(x, n), inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
  for (int i = 0; i < n; i++) codes[i] = static_cast<int8_t>(__builtin_nearbyintf(x[i] * inverse));
  return largest / 127.0f;
}

}  // namespace PERSIMMON_ISA
}  // namespace persimmon

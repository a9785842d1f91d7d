// The scale that loses least when 32 weights are rounded to int4 (codes -8 .. 7).
//
// The obvious scale, largest magnitude -> -8, costs up to a third more squared error than the best one. Tried are 34
// scales around it, of both signs; for the codes q of each the least-squares scale is sum(wq) / sum(qq), which removes
// sum(wq)^2 / sum(qq) of the squared error. `importance` weighs the error of each input.
#pragma once
#include "simd.h"

namespace persimmon {
namespace PERSIMMON_ISA {

constexpr int kSearchSteps = 8;       // candidates on each side of the obvious scale ...
constexpr float kSearchStep = 0.1f;   // ... this far apart, in codes

struct Int4Fit {
  float scale, removed;
};

INLINE Int4Fit fit_int4(const float* w, const float* importance, float inverse) {
  f32x8 cross = zero8(), square = zero8();
  for (int i = 0; i < kGroup; i += 8) {
    const f32x8 v = load8(w + i), code = maximum(round_even(mul(v, set8(inverse))), set8(-8.0f));
    const f32x8 q = sub(zero8(), maximum(sub(zero8(), code), set8(-7.0f)));  // minimum with 7
    const f32x8 weighted = mul(load8(importance + i), q);
    cross = fma(weighted, v, cross);
    square = fma(weighted, q, square);
  }
  const float c = sum_lanes(cross), s = sum_lanes(square);
  return s > 0.0f ? Int4Fit{c / s, c * c / s} : Int4Fit{0.0f, 0.0f};
}

static float int4_scale(const float* w, const float* importance) {
  float extreme = 0.0f;
  for (int i = 0; i < kGroup; i++)
    if (__builtin_fabsf(w[i]) > __builtin_fabsf(extreme)) extreme = w[i];
  Int4Fit best = {0.0f, 0.0f};
  for (int sign = -1; extreme != 0.0f && sign <= 1; sign += 2)
    for (int step = -kSearchSteps; step <= kSearchSteps; step++) {
      const Int4Fit fit = fit_int4(w, importance, sign * (8.0f + kSearchStep * step) / extreme);
      if (fit.removed > best.removed) best = fit;
    }
  return best.scale;
}

}  // namespace PERSIMMON_ISA
}  // namespace persimmon

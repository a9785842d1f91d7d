// Row-wise kernels of training, each one pass over memory where PyTorch takes several: QK LayerNorm with rotary, squared ReLU,
// and softmax with the gradient of the cross-entropy, all with float32 arithmetic.
#pragma once
#include <cmath>

#include "train_simd.h"

namespace persimmon {
namespace PERSIMMON_ISA {

// ---- QK LayerNorm and rotary ---------------------------------------------------------------------------------------------

// x[P] with zeros in the padding -> (x - mean) / deviation, zeros in the padding; returns 1 / deviation.
INLINE float normalize(float* x, int dim, int padded, float eps) {
  f32x16 total = zero16();
  for (int d = 0; d < padded; d += 16) total = add(total, load16(x + d));
  const float mean = sum_lanes(total) / static_cast<float>(dim);
  f32x16 squares = zero16();
  for (int d = 0; d < padded; d += 16) {
    const f32x16 centred = sub(load16(x + d), set16(mean));
    store16(x + d, centred);
    squares = fma(centred, centred, squares);
  }
  const float padding = static_cast<float>(padded - dim) * mean * mean;  // what the zeros behind the head have added
  const float share = 1.0f / std::sqrt((sum_lanes(squares) - padding) / static_cast<float>(dim) + eps);
  for (int d = 0; d < padded; d += 16) store16(x + d, mul(load16(x + d), set16(share)));
  for (int d = dim; d < padded; d++) x[d] = 0;
  return share;
}

INLINE void rotate_pairs(float* x, const float* cos, const float* sin, int half, float direction) {
  for (int i = 0; i < half; i++) {
    const float first = x[i], second = x[half + i], s = direction * sin[i];
    x[i] = first * cos[i] - second * s;
    x[half + i] = second * cos[i] + first * s;
  }
}

template <class T>
static void heads_forward_as(const HeadTensors& t, int first, int last) {
  const int D = t.dim, P = t.padded;
  const T* fused = static_cast<const T*>(t.fused);
  const float *weights[2] = {t.q_weight, t.k_weight}, *biases[2] = {t.q_bias, t.k_bias};
  float* results[2] = {t.q, t.k};
  for (int head = 0; head < t.heads; head++)
    for (int token = first; token < last; token++) {
      const T* from = fused + (static_cast<size_t>(token) * t.heads + head) * 3 * D;
      const size_t place = (static_cast<size_t>(head) * t.tokens + token) * P;
      for (int which = 0; which < 2; which++) {
        float* x = results[which] + place;
        read_padded(from + which * D, D, P, x);
        if (weights[which]) {
          normalize(x, D, P, t.eps);
          for (int d = 0; d < D; d++) x[d] = x[d] * weights[which][d] + biases[which][d];
        }
        rotate_pairs(x, t.cos + static_cast<size_t>(token) * t.half, t.sin + static_cast<size_t>(token) * t.half, t.half, 1.0f);
      }
      read_padded(from + 2 * D, D, P, t.v + place);
    }
}

// grad [P] of the normalized and scaled row -> that of x in place, given the normalized x.
INLINE void normalize_backward(float* grad, const float* normal, const float* weight, float share, int dim, int padded) {
  f32x16 total = zero16(), product = zero16();
  for (int d = 0; d < dim; d++) grad[d] *= weight[d];
  for (int d = 0; d < padded; d += 16) {
    total = add(total, load16(grad + d));
    product = fma(load16(grad + d), load16(normal + d), product);
  }
  const f32x16 mean = set16(sum_lanes(total) / static_cast<float>(dim)), slope = set16(sum_lanes(product) / static_cast<float>(dim));
  for (int d = 0; d < padded; d += 16) {
    const f32x16 rest = sub(sub(load16(grad + d), mean), mul(load16(normal + d), slope));
    store16(grad + d, mul(rest, set16(share)));
  }
}

template <class T>
static void heads_backward_as(const HeadTensors& t, int first, int last, int chunk) {
  const int D = t.dim, P = t.padded;
  const T* fused = static_cast<const T*>(t.fused);
  T* out = static_cast<T*>(t.grad_fused);
  const float *weights[2] = {t.q_weight, t.k_weight}, *gradients[2] = {t.q, t.k};
  float* sums = t.grad_norms + static_cast<size_t>(chunk) * 4 * P;
  for (int i = 0; i < 4 * P; i++) sums[i] = 0;
  alignas(64) float normal[kMostHeadDim], grad[kMostHeadDim];
  for (int head = 0; head < t.heads; head++)
    for (int token = first; token < last; token++) {
      const size_t from = (static_cast<size_t>(token) * t.heads + head) * 3 * D;
      const size_t place = (static_cast<size_t>(head) * t.tokens + token) * P;
      for (int which = 0; which < 2; which++) {
        for (int d = 0; d < P; d += 16) store16(grad + d, load16(gradients[which] + place + d));
        rotate_pairs(grad, t.cos + static_cast<size_t>(token) * t.half, t.sin + static_cast<size_t>(token) * t.half, t.half, -1.0f);
        if (weights[which]) {
          read_padded(fused + from + which * D, D, P, normal);
          const float share = normalize(normal, D, P, t.eps);
          float *scale = sums + 2 * which * P, *bias = scale + P;
          for (int d = 0; d < P; d += 16) {
            store16(scale + d, fma(load16(grad + d), load16(normal + d), load16(scale + d)));
            store16(bias + d, add(load16(bias + d), load16(grad + d)));
          }
          normalize_backward(grad, normal, weights[which], share, D, P);
        }
        write_unpadded(grad, D, out + from + which * D);
      }
      write_unpadded(t.v + place, D, out + from + 2 * D);
    }
}

static void heads_forward(const HeadTensors& t, int first, int last) {
  if (t.element == Element::f32) heads_forward_as<float>(t, first, last);
  else heads_forward_as<uint16_t>(t, first, last);
}

static void heads_backward(const HeadTensors& t, int first, int last, int chunk) {
  if (t.element == Element::f32) heads_backward_as<float>(t, first, last, chunk);
  else heads_backward_as<uint16_t>(t, first, last, chunk);
}

// ---- squared ReLU --------------------------------------------------------------------------------------------------------

template <class T>
static float squared_relu_as(const T* x, T* y, int neurons, int first, int last, int32_t* active) {
  for (int f = 0; f < neurons; f++) active[f] = 0;
  f32x16 sums = zero16();
  float sum = 0;
  for (int row = first; row < last; row++) {
    const T* from = x + static_cast<size_t>(row) * neurons;
    T* to = y + static_cast<size_t>(row) * neurons;
    int f = 0;
    for (; f + 16 <= neurons; f += 16) {
      const f32x16 a = read16(from + f), positive = maximum(a, zero16());
      count_positive(a, active + f);
      write16(to + f, mul(positive, positive));
      sums = add(sums, positive);
    }
    for (; f < neurons; f++) {
      const float a = read1(from + f);
      active[f] += a > 0;
      write1(to + f, a > 0 ? a * a : 0.0f);
      sum += max1(a, 0.0f);
    }
  }
  return sum + sum_lanes(sums);
}

template <class T>
static void squared_relu_backward_as(const T* x, T* grad, float extra, size_t first, size_t last) {
  size_t i = first;
  for (; i + 16 <= last; i += 16) {
    const f32x16 a = read16(x + i);
    write16(grad + i, keep_positive(a, fma(add(a, a), read16(grad + i), set16(extra))));
  }
  for (; i < last; i++) {
    const float a = read1(x + i);
    write1(grad + i, a > 0 ? fma1(2 * a, read1(grad + i), extra) : 0.0f);
  }
}

static float squared_relu(const void* x, void* y, Element element, int neurons, int first, int last, int32_t* active) {
  return element == Element::f32
             ? squared_relu_as(static_cast<const float*>(x), static_cast<float*>(y), neurons, first, last, active)
             : squared_relu_as(static_cast<const uint16_t*>(x), static_cast<uint16_t*>(y), neurons, first, last, active);
}

static void squared_relu_backward(const void* x, void* grad, Element element, float extra, size_t first, size_t last) {
  if (element == Element::f32) squared_relu_backward_as(static_cast<const float*>(x), static_cast<float*>(grad), extra, first, last);
  else squared_relu_backward_as(static_cast<const uint16_t*>(x), static_cast<uint16_t*>(grad), extra, first, last);
}

// ---- softmax and the gradient of the cross-entropy -------------------------------------------------------------------------

template <class T>
static float softmax_gradient_as(T* logits, int vocab, int64_t target, float scale) {
  constexpr float log2e = 1.44269504f;
  if (scale == 0) {
    for (int i = 0; i < vocab; i++) logits[i] = 0;
    return 0;
  }
  const float wanted = read1(logits + target);
  float most = -INFINITY;
  int i = 0;
  f32x16 maxima = set16(-INFINITY);
  for (; i + 16 <= vocab; i += 16) maxima = maximum(maxima, read16(logits + i));
  for (; i < vocab; i++) most = max1(most, read1(logits + i));
  most = max1(most, max_lanes(maxima));
  const f32x16 shift = set16(-most * log2e), by = set16(log2e);
  f32x16 sums = zero16();
  for (i = 0; i + 16 <= vocab; i += 16) sums = add(sums, exp2_nonpositive(fma(read16(logits + i), by, shift)));
  float total = sum_lanes(sums);
  for (; i < vocab; i++) total += std::exp(read1(logits + i) - most);
  const f32x16 share = set16(scale / total);
  for (i = 0; i + 16 <= vocab; i += 16)
    write16(logits + i, mul(exp2_nonpositive(fma(read16(logits + i), by, shift)), share));
  for (; i < vocab; i++) write1(logits + i, std::exp(read1(logits + i) - most) * scale / total);
  const float loss = std::log(total) - (wanted - most);
  // From the loss and not from what was stored, which may be rounded to bfloat16.
  write1(logits + target, scale * (std::exp(-loss) - 1.0f));
  return loss;
}

static float softmax_gradient(void* logits, Element element, int vocab, int64_t target, float scale) {
  return element == Element::f32 ? softmax_gradient_as(static_cast<float*>(logits), vocab, target, scale)
                                 : softmax_gradient_as(static_cast<uint16_t*>(logits), vocab, target, scale);
}

}  // namespace PERSIMMON_ISA
}  // namespace persimmon

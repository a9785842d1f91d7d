// Row-wise kernels of training, each one pass over memory where PyTorch takes several: QK LayerNorm with rotary, squared ReLU,
// and softmax with the gradient of the cross-entropy, all with float32 arithmetic.
#pragma once
#include <cmath>
#include <type_traits>

#include "train_simd.h"

namespace persimmon {
namespace PERSIMMON_ISA {

// ---- QK LayerNorm and rotary ---------------------------------------------------------------------------------------------

// A head's numbers in registers: V vectors, zeros behind the head dimension.
template <int V>
struct Head {
  f32x16 part[V];
};

template <int V, class T>
INLINE Head<V> read_head(const T* x, int dim) {
  Head<V> head;
  if (dim == 16 * V) {
    for (int v = 0; v < V; v++) head.part[v] = read16(x + 16 * v);
  } else {
    alignas(64) float padded[16 * V];
    read_padded(x, dim, 16 * V, padded);
    for (int v = 0; v < V; v++) head.part[v] = load16(padded + 16 * v);
  }
  return head;
}

template <int V>
INLINE float sum_of(const Head<V>& head) {
  f32x16 total = head.part[0];
  for (int v = 1; v < V; v++) total = add(total, head.part[v]);
  return sum_lanes(total);
}

template <int V>
INLINE float product_of(const Head<V>& a, const Head<V>& b) {
  f32x16 total = mul(a.part[0], b.part[0]);
  for (int v = 1; v < V; v++) total = fma(a.part[v], b.part[v], total);
  return sum_lanes(total);
}

// x -> (x - mean) / deviation, zeros in the padding; returns 1 / deviation.
template <int V>
INLINE float normalize(Head<V>& x, int dim, float eps) {
  const float mean = sum_of(x) / static_cast<float>(dim);
  for (int v = 0; v < V; v++) x.part[v] = sub(x.part[v], set16(mean));
  const float padding = static_cast<float>(16 * V - dim) * mean * mean;  // what the zeros behind the head have added
  const float share = 1.0f / std::sqrt((product_of(x, x) - padding) / static_cast<float>(dim) + eps);
  for (int v = 0; v < V; v++) x.part[v] = mul(x.part[v], set16(share));
  if (dim < 16 * V) {
    alignas(64) float line[16 * V];
    for (int v = 0; v < V; v++) store16(line + 16 * v, x.part[v]);
    for (int d = dim; d < 16 * V; d++) line[d] = 0;
    for (int v = 0; v < V; v++) x.part[v] = load16(line + 16 * v);
  }
  return share;
}

INLINE void rotate_pairs(float* x, const float* cos, const float* sin, int half, float direction) {
  int i = 0;
  for (; i + 8 <= half; i += 8) {
    const f32x8 first = load8(x + i), second = load8(x + half + i), c = load8(cos + i), s = mul(set8(direction), load8(sin + i));
    store8(x + i, sub(mul(first, c), mul(second, s)));
    store8(x + half + i, fma(first, s, mul(second, c)));
  }
  for (; i < half; i++) {
    const float first = x[i], second = x[half + i], s = direction * sin[i];
    x[i] = first * cos[i] - second * s;
    x[half + i] = second * cos[i] + first * s;
  }
}

template <int V, class T>
static void heads_forward_of(const HeadTensors& t, int first, int last) {
  const int D = t.dim;
  const T* fused = static_cast<const T*>(t.fused);
  const float *weights[2] = {t.q_weight, t.k_weight}, *biases[2] = {t.q_bias, t.k_bias};
  float* results[2] = {t.q, t.k};
  for (int which = 0; which < 2; which++) {
    const bool norm = weights[which] != nullptr;
    const Head<V> weight = norm ? read_head<V>(weights[which], D) : Head<V>{}, bias = norm ? read_head<V>(biases[which], D) : Head<V>{};
    for (int head = 0; head < t.heads; head++)
      for (int token = first; token < last; token++) {
        Head<V> x = read_head<V>(fused + ((static_cast<size_t>(token) * t.heads + head) * 3 + which) * D, D);
        if (norm) {
          normalize(x, D, t.eps);
          for (int v = 0; v < V; v++) x.part[v] = fma(x.part[v], weight.part[v], bias.part[v]);
        }
        float* to = results[which] + (static_cast<size_t>(head) * t.tokens + token) * 16 * V;
        for (int v = 0; v < V; v++) store16(to + 16 * v, x.part[v]);
        rotate_pairs(to, t.cos + static_cast<size_t>(token) * t.half, t.sin + static_cast<size_t>(token) * t.half, t.half, 1.0f);
      }
  }
  for (int head = 0; head < t.heads; head++)
    for (int token = first; token < last; token++) {
      const Head<V> x = read_head<V>(fused + ((static_cast<size_t>(token) * t.heads + head) * 3 + 2) * D, D);
      float* to = t.v + (static_cast<size_t>(head) * t.tokens + token) * 16 * V;
      for (int v = 0; v < V; v++) store16(to + 16 * v, x.part[v]);
    }
}

// Gradient of the normalized and scaled row -> that of x, given the normalized x.
template <int V>
INLINE void normalize_backward(Head<V>& grad, const Head<V>& normal, const Head<V>& weight, float share, int dim) {
  for (int v = 0; v < V; v++) grad.part[v] = mul(grad.part[v], weight.part[v]);
  const f32x16 mean = set16(sum_of(grad) / static_cast<float>(dim)), slope = set16(product_of(grad, normal) / static_cast<float>(dim));
  for (int v = 0; v < V; v++)
    grad.part[v] = mul(sub(sub(grad.part[v], mean), mul(normal.part[v], slope)), set16(share));
}

template <int V, class T>
INLINE void write_head(const Head<V>& head, int dim, T* out) {
  if (dim == 16 * V) {
    for (int v = 0; v < V; v++) write16(out + 16 * v, head.part[v]);
  } else {
    alignas(64) float line[16 * V];
    for (int v = 0; v < V; v++) store16(line + 16 * v, head.part[v]);
    write_unpadded(line, dim, out);
  }
}

template <int V, class T>
static void heads_backward_of(const HeadTensors& t, int first, int last, int chunk) {
  const int D = t.dim;
  const T* fused = static_cast<const T*>(t.fused);
  T* out = static_cast<T*>(t.grad_fused);
  const float *weights[2] = {t.q_weight, t.k_weight}, *gradients[2] = {t.q, t.k};
  alignas(64) float line[16 * V];
  for (int which = 0; which < 2; which++) {
    const bool norm = weights[which] != nullptr;
    const Head<V> weight = norm ? read_head<V>(weights[which], D) : Head<V>{};
    Head<V> scales, biases;
    for (int v = 0; v < V; v++) scales.part[v] = biases.part[v] = zero16();
    for (int head = 0; head < t.heads; head++)
      for (int token = first; token < last; token++) {
        const size_t place = ((static_cast<size_t>(token) * t.heads + head) * 3 + which) * D;
        const float* from = gradients[which] + (static_cast<size_t>(head) * t.tokens + token) * 16 * V;
        for (int v = 0; v < V; v++) store16(line + 16 * v, load16(from + 16 * v));
        rotate_pairs(line, t.cos + static_cast<size_t>(token) * t.half, t.sin + static_cast<size_t>(token) * t.half, t.half, -1.0f);
        Head<V> grad = read_head<V>(line, 16 * V);
        if (norm) {
          Head<V> normal = read_head<V>(fused + place, D);
          const float share = normalize(normal, D, t.eps);
          for (int v = 0; v < V; v++) {
            scales.part[v] = fma(grad.part[v], normal.part[v], scales.part[v]);
            biases.part[v] = add(biases.part[v], grad.part[v]);
          }
          normalize_backward(grad, normal, weight, share, D);
        }
        write_head(grad, D, out + place);
      }
    float* sums = t.grad_norms + (static_cast<size_t>(chunk) * 4 + 2 * which) * 16 * V;
    for (int v = 0; v < V; v++) store16(sums + 16 * v, scales.part[v]), store16(sums + 16 * (V + v), biases.part[v]);
  }
  for (int head = 0; head < t.heads; head++)
    for (int token = first; token < last; token++)
      write_head(read_head<V>(t.v + (static_cast<size_t>(head) * t.tokens + token) * 16 * V, 16 * V), D,
                 out + ((static_cast<size_t>(token) * t.heads + head) * 3 + 2) * D);
}

// Calls `work` with the head's number of vectors as a constant; `knows_head_dim` says which there are.
template <class Work>
INLINE void with_vectors(int padded, Work work) {
  switch (padded / 16) {
    case 1: return work(std::integral_constant<int, 1>());
    case 2: return work(std::integral_constant<int, 2>());
    case 3: return work(std::integral_constant<int, 3>());
    case 4: return work(std::integral_constant<int, 4>());
    case 5: return work(std::integral_constant<int, 5>());
    case 6: return work(std::integral_constant<int, 6>());
    case 8: return work(std::integral_constant<int, 8>());
    case 16: return work(std::integral_constant<int, 16>());
  }
}

static void heads_forward(const HeadTensors& t, int first, int last) {
  with_vectors(t.padded, [&](auto v) {
    if (t.element == Element::f32) heads_forward_of<decltype(v)::value, float>(t, first, last);
    else heads_forward_of<decltype(v)::value, uint16_t>(t, first, last);
  });
}

static void heads_backward(const HeadTensors& t, int first, int last, int chunk) {
  with_vectors(t.padded, [&](auto v) {
    if (t.element == Element::f32) heads_backward_of<decltype(v)::value, float>(t, first, last, chunk);
    else heads_backward_of<decltype(v)::value, uint16_t>(t, first, last, chunk);
  });
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

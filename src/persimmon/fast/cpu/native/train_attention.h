// Causal attention inside one document for one head, forward and backward, without ever holding more than a tile of scores.
//
// The method is FlashAttention's (Dao 2023, arXiv 2307.08691): tiles of kQueryBlock x kTrainKeyBlock scores, a running maximum in
// the forward pass, and in the backward pass scores computed again from the sums that the forward pass kept. Tiles above
// the diagonal are never computed, those on it only as far as their last query sees. Powers of two replace powers of e: the
// scale and log2 e are one factor.
//
// Rounding differs from the plain softmax by the order of sums and by an exponential good to 2e-7.
#pragma once
#include <cmath>

#include "train_products.h"

namespace persimmon {
namespace PERSIMMON_ISA {

constexpr float kLog2E = 1.44269504f;
constexpr int kTileScores = kQueryBlock * kTrainKeyBlock;

static size_t attention_scratch(int padded, int length) {
  const size_t keys = round_up(length, kTrainKeyBlock);
  // Forward: packed keys, scores, sums, maxima and totals. Backward: gradients of the output and their products with it, packed
  // keys and values, scores and their gradients, gradients of keys and values.
  const size_t forward = keys * padded + kTileScores + kQueryBlock * (padded + 2);
  const size_t backward = keys * (padded + 1) + 2 * kTileScores + 4 * static_cast<size_t>(kTrainKeyBlock) * padded;
  return round_up((forward > backward ? forward : backward) + 64, 64);
}

// rows [count][P] -> [P][kTrainKeyBlock], zeros behind.
static void transpose_block(const float* rows, int count, int padded, float* out) {
  for (int d = 0; d < padded; d++) {
    float* line = out + d * kTrainKeyBlock;
    for (int j = 0; j < count; j++) line[j] = rows[static_cast<size_t>(j) * padded + d];
    for (int j = count; j < kTrainKeyBlock; j++) line[j] = 0;
  }
}

// Columns of a tile that its last query needs, in whole vectors; queries begin at q, keys at k.
INLINE int needed_columns(int q, int queries, int k) {
  const int columns = min_int(q + queries - k, kTrainKeyBlock);
  return static_cast<int>(round_up(columns, kTrainVector));
}

// A tile's scores -> 2^(factor score - maximum), with the running maxima, totals and outputs brought up to date.
static void softmax_tile(float* scores, int queries, int columns, int visible, float factor, float* maxima, float* totals,
                         float* sums, int padded) {
  for (int i = 0; i < queries; i++) {
    float* row = scores + i * kTrainKeyBlock;
    const int seen = visible + i < 0 ? 0 : visible + i;  // keys of the tile that query i sees
    for (int j = seen; j < columns; j++) row[j] = -INFINITY;
    f32x16 most = load16(row);
    for (int j = 16; j < columns; j += 16) most = maximum(most, load16(row + j));
    const float maximum_now = max1(maxima[i], factor * max_lanes(most));
    const f32x16 shift = set16(-maximum_now), by = set16(factor);
    f32x16 total = zero16();
    for (int j = 0; j < columns; j += 16) {
      const f32x16 p = exp2_nonpositive(fma(load16(row + j), by, shift));
      store16(row + j, p);
      total = add(total, p);
    }
    for (int j = seen; j < columns; j++) row[j] = 0;  // their 2^kLeastPower is already in the total, where it weighs nothing
    const float shrink = std::exp2(maxima[i] - maximum_now);
    totals[i] = totals[i] * shrink + sum_lanes(total);
    if (shrink != 1.0f)
      for (int d = 0; d < padded; d += 16) store16(sums + i * padded + d, mul(load16(sums + i * padded + d), set16(shrink)));
    maxima[i] = maximum_now;
  }
}

template <class T>
static void attention_forward_as(const AttentionTensors& t, int head, int start, int first, int last, float* scratch) {
  const int P = t.padded;
  const size_t base = (static_cast<size_t>(head) * t.tokens + start) * P;
  const float *q = t.q + base, *k = t.k + base, *v = t.v + base;
  float* keys = scratch;  // [blocks][P][kTrainKeyBlock]
  const int blocks = (last + kTrainKeyBlock - 1) / kTrainKeyBlock;
  for (int b = 0; b < blocks; b++) {
    const int begin = b * kTrainKeyBlock;
    transpose_block(k + static_cast<size_t>(begin) * P, min_int(kTrainKeyBlock, last - begin), P, keys + static_cast<size_t>(begin) * P);
  }
  float* scores = keys + static_cast<size_t>(blocks) * kTrainKeyBlock * P;
  float *sums = scores + kTileScores, *maxima = sums + kQueryBlock * P, *totals = maxima + kQueryBlock;
  const float factor = t.scale * kLog2E;
  T* out = static_cast<T*>(t.out);
  for (int q0 = first; q0 < last; q0 += kQueryBlock) {
    const int queries = min_int(kQueryBlock, last - q0);
    for (int i = 0; i < queries; i++) maxima[i] = -INFINITY, totals[i] = 0;
    for (int i = 0; i < queries * P; i++) sums[i] = 0;
    for (int k0 = 0; k0 < q0 + queries; k0 += kTrainKeyBlock) {
      const int columns = needed_columns(q0, queries, k0);
      product({q + static_cast<size_t>(q0) * P, static_cast<size_t>(P), 1, keys + static_cast<size_t>(k0) * P, kTrainKeyBlock, scores,
               kTrainKeyBlock, P, false}, queries, columns);
      softmax_tile(scores, queries, columns, q0 + 1 - k0, factor, maxima, totals, sums, P);
      const int length = min_int(columns, last - k0);  // no values lie behind the last
      product({scores, kTrainKeyBlock, 1, v + static_cast<size_t>(k0) * P, static_cast<size_t>(P), sums, static_cast<size_t>(P), length,
               true}, queries, P);
    }
    for (int i = 0; i < queries; i++) {
      const size_t token = static_cast<size_t>(start) + q0 + i;
      const f32x16 share = set16(1.0f / totals[i]);
      for (int d = 0; d < P; d += 16) store16(sums + i * P + d, mul(load16(sums + i * P + d), share));
      write_unpadded(sums + i * P, t.dim, out + (token * t.heads + head) * t.dim);
      t.normalizer[static_cast<size_t>(head) * t.tokens + token] = maxima[i] + std::log2(totals[i]);
    }
  }
}

// Scores and their products with the output's gradient -> probabilities and gradients of the scores, in place.
static void gradient_tile(float* scores, float* products, int queries, int columns, int visible, float factor,
                          const float* normalizer, const float* dots) {
  for (int i = 0; i < queries; i++) {
    float *row = scores + i * kTrainKeyBlock, *grad = products + i * kTrainKeyBlock;
    const f32x16 shift = set16(-normalizer[i]), by = set16(factor), dot = set16(dots[i]);
    for (int j = 0; j < columns; j += 16) {
      const f32x16 p = exp2_nonpositive(fma(load16(row + j), by, shift));
      store16(row + j, p);
      store16(grad + j, mul(p, sub(load16(grad + j), dot)));
    }
    for (int j = visible + i < 0 ? 0 : visible + i; j < columns; j++) row[j] = grad[j] = 0;
  }
}

template <class T>
static void attention_backward_as(const AttentionTensors& t, int head, int start, int end, float* scratch) {
  const int P = t.padded, n = end - start;
  const size_t wide = P, base = (static_cast<size_t>(head) * t.tokens + start) * wide, block = kTrainKeyBlock * wide;
  const float *q = t.q + base, *k = t.k + base, *v = t.v + base;
  const float* normalizer = t.normalizer + static_cast<size_t>(head) * t.tokens + start;
  float *grads = scratch, *dots = grads + round_up(n, kTrainKeyBlock) * wide;  // [n][P], [n]
  float *keys = dots + round_up(n, kTrainKeyBlock), *values = keys + block, *grad_k = values + block, *grad_v = grad_k + block;
  float *scores = grad_v + block, *products = scores + kTileScores;
  const T *out = static_cast<const T*>(t.out), *grad_out = static_cast<const T*>(t.grad_out);
  for (int i = 0; i < n; i++) {
    const size_t place = ((static_cast<size_t>(start) + i) * t.heads + head) * t.dim;
    read_padded(grad_out + place, t.dim, P, grads + i * wide);
    float sum = 0;
    for (int d = 0; d < t.dim; d++) sum += grads[i * wide + d] * read1(out + place + d);
    dots[i] = sum;
  }
  float* grad_q = t.grad_q + base;
  for (size_t i = 0; i < n * wide; i++) grad_q[i] = 0;
  const float factor = t.scale * kLog2E;
  for (int k0 = 0; k0 < n; k0 += kTrainKeyBlock) {
    const int count = min_int(kTrainKeyBlock, n - k0);
    transpose_block(k + k0 * wide, count, P, keys);
    transpose_block(v + k0 * wide, count, P, values);
    for (size_t i = 0; i < block; i++) grad_k[i] = grad_v[i] = 0;
    for (int q0 = k0; q0 < n; q0 += kQueryBlock) {
      const int queries = min_int(kQueryBlock, n - q0), columns = needed_columns(q0, queries, k0), seen = min_int(columns, count);
      product({q + q0 * wide, wide, 1, keys, kTrainKeyBlock, scores, kTrainKeyBlock, P, false}, queries, columns);
      product({grads + q0 * wide, wide, 1, values, kTrainKeyBlock, products, kTrainKeyBlock, P, false}, queries, columns);
      gradient_tile(scores, products, queries, columns, q0 + 1 - k0, factor, normalizer + q0, dots + q0);
      product({scores, 1, kTrainKeyBlock, grads + q0 * wide, wide, grad_v, wide, queries, true}, seen, P);
      product({products, 1, kTrainKeyBlock, q + q0 * wide, wide, grad_k, wide, queries, true}, seen, P);
      product({products, kTrainKeyBlock, 1, k + k0 * wide, wide, grad_q + q0 * wide, wide, seen, true}, queries, P);
    }
    for (size_t i = 0; i < count * wide; i += 16) {
      store16(t.grad_k + base + k0 * wide + i, mul(load16(grad_k + i), set16(t.scale)));
      store16(t.grad_v + base + k0 * wide + i, load16(grad_v + i));
    }
  }
  for (size_t i = 0; i < n * wide; i += 16) store16(grad_q + i, mul(load16(grad_q + i), set16(t.scale)));
}

[[maybe_unused]] static void attention_forward(const AttentionTensors& t, int head, int start, int first, int last, float* scratch) {
  if (t.element == Element::f32) attention_forward_as<float>(t, head, start, first, last, scratch);
  else attention_forward_as<uint16_t>(t, head, start, first, last, scratch);
}

[[maybe_unused]] static void attention_backward(const AttentionTensors& t, int head, int start, int end, float* scratch) {
  if (t.element == Element::f32) attention_backward_as<float>(t, head, start, end, scratch);
  else attention_backward_as<uint16_t>(t, head, start, end, scratch);
}

}  // namespace PERSIMMON_ISA
}  // namespace persimmon

// One token and float rows of which there is a sketch, which says which rows are needed: neurons of the MLP that may be positive,
// logits that may be the largest. They become what they are without a sketch, to the bit.
#pragma once
#include "float_tile_rows.h"
#include "sketch_rows.h"
#include "sparse_mlp.h"

namespace persimmon {
namespace PERSIMMON_ISA {

// Neurons of a block that may be positive, ascending.
static int possible_neurons(const MlpArgs& a, int begin, int end, int* list) {
  alignas(64) float estimate[kNeuronBlock], bound[kNeuronBlock];
  sketch_rows(a.sketch, kUpBits, a.sketched, begin, end, estimate, bound);
  int count = 0;
  for (int r = begin; r < end; r++) {
    list[count] = r;
    count += !(bound[r - begin] + a.bias[r] <= 0.0f);  // rounding never turns the order of two sums with the same bias
  }
  return count;
}

// Fetches the rows of a list. Where AMX takes them, each(place in the list, product) for all of them, and true.
template <class Args, class Each>
INLINE bool gather_listed([[maybe_unused]] const Args& a, const uint8_t* weights, size_t row_bytes, const int* list, int count,
                          [[maybe_unused]] float* scratch, [[maybe_unused]] Each&& each) {
  for (int k = 0; k < count; k++) prefetch(weights + list[k] * row_bytes, static_cast<int>(row_bytes));
#if defined(__AMX_BF16__)
  if (a.format != Format::bf16) return false;
  const FloatTileArgs tiles = {weights, row_bytes, a.panels, 1, a.blocks * kSuperblock};
  listed_rows(tiles, list, count, scratch, [&](int k, f32x16 products) {
    float p[kPanelRows];
    store16(p, products);
    for (int i = 0; i < min_int(kPanelRows, count - k); i++) each(k + i, p[i]);
  });
  return true;
#else
  return false;
#endif
}

static void activate_listed(const MlpArgs& a, const int* list, int count, ActiveBlock* out, MlpCounts* counts, float* scratch) {
  const auto append_positive = [&](int k, float product) {
    const float p = product + a.bias[list[k]];
    if (p > 0.0f) append(out, list[k] % kNeuronBlock, p);
  };
  if (gather_listed(a, a.up, a.up_bytes, list, count, scratch, append_positive)) {
    counts->candidates += count, counts->active += out->count;
    return;
  }
  for (int k = 0; k < count; k++) activate(a, list[k], list[k] + 1, 0, 1, &out, counts);
}

// y[row] of the rows of a list, which have no bias.
static void listed_products(const RowsArgs& a, const int* list, int count, float* scratch) {
  if (gather_listed(a, a.weights, a.row_bytes, list, count, scratch, [&](int k, float product) { a.y[list[k]] = product; })) return;
  for (int k = 0; k < count; k++) rows(a, list[k], list[k] + 1);
}

static void sketched_block(const MlpArgs& a, int block, float* sum, MlpCounts* counts, float* scratch) {
  int list[kNeuronBlock];
  ActiveBlock active;
  active.count = 0;
  const int count = possible_neurons(a, block * kNeuronBlock, min_int((block + 1) * kNeuronBlock, a.neurons), list);
  activate_listed(a, list, count, &active, counts, scratch);
  add_neurons(a, block, active, 0, sum);
}

}  // namespace PERSIMMON_ISA
}  // namespace persimmon

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

static void activate_listed(const MlpArgs& a, const int* list, int count, ActiveBlock* out, MlpCounts* counts, [[maybe_unused]] float* scratch) {
  for (int k = 0; k < count; k++) prefetch(a.up + list[k] * a.up_bytes, static_cast<int>(a.up_bytes));
#if defined(__AMX_BF16__)
  if (a.format == Format::bf16) {
    const FloatTileArgs tiles = {a.up, a.up_bytes, a.panels, 1, a.blocks * kSuperblock};
    listed_rows(tiles, list, count, scratch, [&](int k, f32x16 products) {
      float p[kPanelRows];
      store16(p, products);
      for (int i = 0; i < min_int(kPanelRows, count - k); i++)
        if (p[i] + a.bias[list[k + i]] > 0.0f) append(out, list[k + i] % kNeuronBlock, p[i] + a.bias[list[k + i]]);
    });
    counts->candidates += count, counts->active += out->count;
    return;
  }
#endif
  for (int k = 0; k < count; k++) activate(a, list[k], list[k] + 1, 0, 1, &out, counts);
}

// y[row] of the rows of a list, which have no bias.
static void listed_products(const RowsArgs& a, const int* list, int count, [[maybe_unused]] float* scratch) {
  for (int k = 0; k < count; k++) prefetch(a.weights + list[k] * a.row_bytes, static_cast<int>(a.row_bytes));
#if defined(__AMX_BF16__)
  if (a.format == Format::bf16) {
    const FloatTileArgs tiles = {a.weights, a.row_bytes, a.panels, 1, a.blocks * kSuperblock};
    listed_rows(tiles, list, count, scratch, [&](int k, f32x16 products) {
      float p[kPanelRows];
      store16(p, products);
      for (int i = 0; i < min_int(kPanelRows, count - k); i++) a.y[list[k + i]] = p[i];
    });
    return;
  }
#endif
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

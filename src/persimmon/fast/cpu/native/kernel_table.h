// Gathers the kernels of one instruction set into a table; included once by each isa_*.cpp.
#pragma once
#include "activations.h"
#include "attention_tiles.h"
#include "eight_int4.h"
#include "eights.h"
#include "fingerprint.h"
#include "float_tile_rows.h"
#include "int4_scale.h"
#include "panels.h"
#include "sketched_mlp.h"
#include "tiled_int4.h"

namespace persimmon {
namespace PERSIMMON_ISA {

// One token, one block of neurons of any format.
static void any_block(const MlpArgs& a, int block, float* sum, MlpCounts* counts, [[maybe_unused]] float* scratch) {
  if (a.format == Format::q4) return int4_block(a, block, sum, counts);
  if (a.sketch) return sketched_block(a, block, sum, counts, scratch);
#if defined(__AMX_BF16__)
  if (a.format == Format::bf16) return float_tile_block(a, block, sum, counts, scratch);
#endif
  one_block(a, block, sum, counts);
}

static constexpr Kernels table(const char* name) {
#if defined(__AVX512VNNI__)
#define PERSIMMON_TILED kTiledTokens, make_tiles, tile_scratch_bytes, tiled_rows, tiled_estimates, tiled_activate
#define PERSIMMON_TILED_INT4 tiled_int4_columns
#else
#define PERSIMMON_TILED 0, nullptr, nullptr, nullptr, nullptr, nullptr
#define PERSIMMON_TILED_INT4 nullptr
#endif
  constexpr PanelKernels panels = {kFewestPanelTokens, 2, make_panels, panel_scratch_floats, panel_rows, panel_activate};
#if defined(__AMX_BF16__)
  constexpr PanelKernels bf16 = {1, kFloatParts, make_float_tiles, float_tile_scratch, float_tile_rows, float_tile_activate};
#else
  constexpr PanelKernels bf16 = panels;
#endif
  return {name,     quantize,    distance,   layer_norm,   rotate,      rows, PERSIMMON_TILED, PERSIMMON_EIGHTS, panels, bf16, sketch_input, sketch_rows, listed_products,
          estimate_rows, refine_row, activate, any_block, down_columns, count_needed, int4_columns, PERSIMMON_TILED_INT4, PERSIMMON_EIGHT_INT4, summarize, attend_int8_tiles,
          attend_float, quantize_head, int4_scale, fingerprint};
}

}  // namespace PERSIMMON_ISA
}  // namespace persimmon

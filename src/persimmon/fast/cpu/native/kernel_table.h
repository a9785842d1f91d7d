// Gathers the kernels of one instruction set into a table; included once by each isa_*.cpp.
#pragma once
#include "activations.h"
#include "attention.h"
#include "fingerprint.h"
#include "int4_scale.h"
#include "panels.h"
#include "sparse_mlp.h"
#include "tiled_int4.h"

namespace persimmon {
namespace PERSIMMON_ISA {

static constexpr Kernels table(const char* name) {
#if defined(__AVX512VNNI__)
#define PERSIMMON_TILED kTiledTokens, make_tiles, tile_scratch_bytes, tiled_rows, tiled_estimates, tiled_activate
#define PERSIMMON_TILED_INT4 tiled_int4_columns
#else
#define PERSIMMON_TILED 0, nullptr, nullptr, nullptr, nullptr, nullptr
#define PERSIMMON_TILED_INT4 nullptr
#endif
  return {name,     quantize,    layer_norm,   rotate,      rows, PERSIMMON_TILED,
          make_panels, panel_scratch_floats, panel_rows, panel_activate, estimate_rows, refine_row,
          activate, one_block, down_columns, int4_block, count_needed, int4_columns, PERSIMMON_TILED_INT4, summarize,
          attend_int8, attend_float, quantize_head, int4_scale, fingerprint};
}

}  // namespace PERSIMMON_ISA
}  // namespace persimmon

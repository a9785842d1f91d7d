// Float matrices -> packed rows (layout.h). Only the quantizer calls these; throws std::domain_error for weights that are
// not finite or too large for a float16 scale.
#pragma once
#include "layout.h"

namespace persimmon {

struct PackArgs {
  const float* weights;      // [rows][inputs]
  int rows, inputs;
  const float* importance;   // [inputs], weight of each input's squared error in q4, or null for equal
  int threads;
};

// q8 and q4 rows, `stride` bytes apart.
void pack_rows(const PackArgs& args, Format format, uint8_t* out, size_t stride);

// int8 weights as top rows, without outlier weights, and rest rows; `center` [inputs] of the inputs that they will meet, and
// in args.importance how far from it each is on average, squared.
void pack_planes(const PackArgs& args, const float* center, uint8_t* top, size_t top_stride, uint8_t* rest, size_t rest_stride);

// int8 superblocks in plain order: rows that are added to an output.
void pack_neurons(const PackArgs& args, uint8_t* out, size_t stride);

// Rows of a down projection, one per output from `first` on, into int4 records: `out` [neurons / 32, rounded up] records whose
// padding is zero, `stride` bytes apart and of `width` outputs. First and rows may be any, one call after the other.
void pack_int4_records(const PackArgs& args, int first, int width, uint8_t* out, size_t stride);

uint16_t float_to_half(float value);

}  // namespace persimmon

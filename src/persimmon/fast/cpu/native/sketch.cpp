#include "sketch.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "widen.h"

namespace persimmon {
namespace {

constexpr double kUp = 1 + 0x1p-20;  // more than rounding to float32 can take from a length

// The code of input i of row r of a block of zeros (layout.h).
void store_code(int code, int i, int r, int bits, uint8_t* block) {
  uint8_t* const stripe = block + i / kSketchInputs * sketch_stripe_bytes(bits);
  const int quad = i % kSketchInputs / 4, place = 4 * r + i % 4;
  if (bits == 8) {
    stripe[kLineBytes * quad + place] = static_cast<uint8_t>(code);
    return;
  }
  stripe[kLineBytes * (quad / 2) + place] |= (code & 15) << 4 * (quad % 2);
  stripe[kLineBytes * (kSketchInputs / 8) + place] |= (code >> 4 & 1) << quad;
}

// One row as row `r` of its block.
void sketch_row(const std::vector<float>& row, const float* center, int r, int bits, uint8_t* block, SketchFacts* facts) {
  float largest = 0;
  double product = 0;  // not finite if a number is not
  for (size_t i = 0; i < row.size(); i++) largest = std::max(largest, std::fabs(row[i])), product += static_cast<double>(row[i]) * center[i];
  const bool in_range = largest == 0.0f || (largest > kLeastSketched && largest < kMostSketched);
  if (!in_range || !(std::fabs(product) < std::numeric_limits<float>::max())) {
    facts->center[r] = std::numeric_limits<float>::quiet_NaN();
    return;
  }
  const float scale = largest / static_cast<float>((1 << (bits - 1)) - 1);
  double error = 0, length = 0;
  for (size_t i = 0; i < row.size(); i++) {
    const int code = scale > 0 ? static_cast<int>(std::nearbyint(row[i] / scale)) : 0;
    store_code(code, static_cast<int>(i), r, bits, block);
    const double kept = static_cast<double>(scale) * code, lost = row[i] - kept;
    length += kept * kept, error += lost * lost;
    facts->sum[r] += code;
  }
  facts->scale[r] = scale, facts->center[r] = static_cast<float>(product);
  facts->length[r] = static_cast<float>(std::sqrt(length) * kUp), facts->error[r] = static_cast<float>(std::sqrt(error) * kUp);
}

}  // namespace

void make_sketch(Format format, const uint8_t* weights, size_t row_bytes, int rows, int inputs, const float* center, int bits, uint8_t* out) {
  const size_t block_bytes = sketch_block_bytes(inputs, bits);
  std::vector<float> row(inputs);
  memset(out, 0, sketch_bytes(rows, inputs, bits));
  for (int r = 0; r < rows; r++) {
    uint8_t* block = out + r / kSketchRows * block_bytes;
    widen(format == Format::bf16, weights + r * row_bytes, inputs, row.data());
    sketch_row(row, center, r % kSketchRows, bits, block,
               reinterpret_cast<SketchFacts*>(block + block_bytes - sizeof(SketchFacts)));
  }
}

}  // namespace persimmon

#include "sketch.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "pack.h"

namespace persimmon {
namespace {

constexpr int kRowsAtOnce = 1024;          // rows that become floats to be packed
constexpr float kUp = 1.0f + 0x1p-20f;     // more than rounding can have taken from a length
constexpr int kMoreTerms = 64;             // of a sum, beyond its products: scales, folding of lanes, bias

void widen(Format format, const uint8_t* row, int count, float* out) {
  if (format == Format::f32) {
    memcpy(out, row, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  for (int i = 0; i < count; i++) {
    uint16_t bits;
    memcpy(&bits, row + 2 * i, 2);
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    memcpy(out + i, &wide, 4);
  }
}

// Input i of a row of superblocks in lane order: its group, and its place in the superblock.
int group_of(int i) { return i % kSuperblock / kGroup; }
int place_of(int i) { return 32 * (i % kGroup / 4) + 4 * group_of(i) + i % 4; }

float length_of(double squares) { return static_cast<float>(std::sqrt(squares)) * kUp; }

}  // namespace

Sketch::Sketch(Format format, const uint8_t* weights, size_t row_bytes, int rows, int inputs, int threads)
    : inputs_(inputs), blocks_(static_cast<int>(round_up(inputs, kSuperblock) / kSuperblock)),
      row_bytes_(static_cast<size_t>(blocks_) * kQ8Bytes), rows_(row_bytes_ * rows), errors_(rows), lengths_(rows) {
  std::vector<float> floats(static_cast<size_t>(kRowsAtOnce) * inputs);
  for (int first = 0; first < rows; first += kRowsAtOnce) {
    const int count = std::min(kRowsAtOnce, rows - first);
    for (int r = 0; r < count; r++) widen(format, weights + (first + r) * row_bytes, inputs, floats.data() + static_cast<size_t>(r) * inputs);
    pack_rows({floats.data(), count, inputs, nullptr, threads}, Format::q8, rows_.data() + first * row_bytes_, row_bytes_);
    for (int r = 0; r < count; r++) {
      double error = 0, length = 0;
      for (int i = 0; i < inputs; i++) {
        const uint8_t* block = rows_.data() + (first + r) * row_bytes_ + static_cast<size_t>(i) / kSuperblock * kQ8Bytes;
        uint16_t half;
        memcpy(&half, block + kSuperblock + 2 * group_of(i), 2);
        const double kept = static_cast<double>(half_value(half)) * static_cast<int8_t>(block[place_of(i)]);
        const double lost = floats[static_cast<size_t>(r) * inputs + i] - kept;
        length += kept * kept, error += lost * lost;
      }
      errors_[first + r] = length_of(error), lengths_[first + r] = length_of(length);
    }
  }
}

RowsArgs Sketch::args(const ActivationBlock* x, float* y) const {
  RowsArgs args = {};
  args.format = Format::q8, args.weights = rows_.data(), args.row_bytes = row_bytes_, args.blocks = blocks_;
  args.x = x, args.tokens = 1, args.y = y, args.epilogue = Epilogue::store;
  return args;
}

Sketch::Token Sketch::token(const float* x, const ActivationBlock* packed) const {
  double error = 0, length = 0;
  for (int i = 0; i < inputs_; i++) {
    const ActivationBlock& block = packed[i / kSuperblock];
    const double lost = x[i] - static_cast<double>(block.scale[group_of(i)]) * block.code[place_of(i)];
    length += static_cast<double>(x[i]) * x[i], error += lost * lost;
  }
  const float whole = length_of(length), off = length_of(error);
  const float rounding = static_cast<float>(inputs_ + kMoreTerms) * 0x1p-24f;  // of one sum; there are two, of at most |x| + |x - x'|
  return {whole * (1 + rounding), off + 2 * rounding * (whole + off)};
}

void Sketch::bounds(const Token& token, const float* estimates, int begin, int end, float* out) const {
  for (int r = begin; r < end; r++) out[r] = estimates[r] + (errors_[r] * token.length + lengths_[r] * token.error) * kUp;
}

}  // namespace persimmon

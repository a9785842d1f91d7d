// An int8 copy of float rows that says how far from the rows its products can be.
//
// With w a row and x an input, w' and x' what the copy holds of them: |w . x - w' . x'| <= |w - w'| |x| + |w'| |x - x'| (Cauchy-Schwarz),
// and float32 sums of n products are off by at most n 2^-24 |w| |x|. So who looks for the largest products reads half of the
// bytes or a quarter, and then only those rows whose bound reaches the largest: a handful. Nothing is left to chance.
#pragma once
#include <vector>

#include "kernels.h"

namespace persimmon {

class Sketch {
 public:
  // Rows of f32 or bf16, of which `inputs` numbers count, padded to 256 * blocks. Throws std::domain_error for rows that are not finite.
  Sketch(Format format, const uint8_t* weights, size_t row_bytes, int rows, int inputs, int threads);

  // Rows [begin, end) with one token: its rounded inputs, and y[begin .. end).
  RowsArgs args(const ActivationBlock* x, float* y) const;

  // What products of the token's inputs x (rounded to `packed`) and rows [begin, end) may be at most, given their estimates.
  struct Token {
    float length, error;  // |x| and |x - x'|, with what rounding of the sums adds
  };
  Token token(const float* x, const ActivationBlock* packed) const;
  void bounds(const Token& token, const float* estimates, int begin, int end, float* out) const;

  int blocks() const { return blocks_; }

 private:
  int inputs_, blocks_;
  size_t row_bytes_;
  std::vector<uint8_t> rows_;
  std::vector<float> errors_, lengths_;  // |w - w'| and |w'|
};

}  // namespace persimmon

// Sketches: int8 copies of float rows that say how far from the rows their products can be.
//
// With w a row, x an input less its center c, and w' and x' what the copies hold of them, w . (c + x) is w . c, which is known, plus w' . x',
// up to |w - w'| |x| + |w'| |x - x'| (Cauchy-Schwarz), where the first may be max|w - w'| sum|x| as well; and float32 sums of n
// products are off by at most n 2^-24 |w| |c + x|. Centers are the biases of the norms before: what all tokens have in common is large,
// and would make all bounds wide. So one token reads half or a quarter of the bytes, and then
// only the rows whose bound says that they may matter: neurons that may be positive, logits that may be the largest. What they are
// is computed from the rows themselves, as without a sketch: nothing is left to chance, and not a bit changes.
#pragma once
#include <cstddef>

#include "kernels.h"

namespace persimmon {

// Memory that large pages may back, of zeros.
class LargeMemory {
 public:
  explicit LargeMemory(size_t bytes);  // throws std::bad_alloc
  ~LargeMemory();
  LargeMemory(const LargeMemory&) = delete;
  LargeMemory& operator=(const LargeMemory&) = delete;
  uint8_t* data() const { return data_; }

 private:
  uint8_t *mapped_, *data_;
  size_t bytes_;
};

// Sketch `rows` rows (f32 or bf16, `row_bytes` apart) of which `inputs` numbers count, like those of `center`; out holds sketch_bytes. A
// row that is not finite gets a bound that is never below anything.
void make_sketch(Format format, const uint8_t* weights, size_t row_bytes, int rows, int inputs, const float* center, uint8_t* out);

}  // namespace persimmon

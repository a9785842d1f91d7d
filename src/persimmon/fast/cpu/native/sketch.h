// Sketches: copies of float rows in int8 or five bits that say how far from the rows their products can be.
//
// With w a row, x an input less its center c, and w' and x' what the copies hold of them, w . (c + x) is w . c, which is known, plus w' . x',
// up to |w - w'| |x| + |w'| |x - x'| (Cauchy-Schwarz), where the first may be max|w - w'| sum|x| as well. Float32 sums of n products are
// off by at most n 2^-24 |w| |c + x|, as long as nothing is so small or large that float32 ends. Centers are the biases of the norms
// before: what all tokens have in common is large, and would make all bounds wide.
// So one token reads half of the bytes or less (of float32 a quarter) and then only the rows whose bound says that they may matter: neurons that
// may be positive, logits that may be the largest. These are computed from the rows themselves, as without a sketch: nothing is left
// to chance, and not a bit changes.
#pragma once
#include "layout.h"

namespace persimmon {

// Sketch `rows` rows (f32 or bf16, `row_bytes` apart) of which `inputs` numbers count, like those of `center`; out holds sketch_bytes. A
// row that is not finite or of numbers out of kLeastSketched .. kMostSketched gets a bound that is not below anything (NaN).
void make_sketch(Format format, const uint8_t* weights, size_t row_bytes, int rows, int inputs, const float* center, int bits, uint8_t* out);

}  // namespace persimmon

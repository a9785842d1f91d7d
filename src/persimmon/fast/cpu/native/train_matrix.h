// Products of float32 matrices dealt out to threads.
#pragma once
#include "train.h"

namespace persimmon {

// C = A B + bias, or C += A B. In what order terms are summed follows from their number alone.
void multiply(const TrainKernels&, const MatrixView& a, const MatrixView& b, const MatrixProduct&, bool add, int threads);

}  // namespace persimmon

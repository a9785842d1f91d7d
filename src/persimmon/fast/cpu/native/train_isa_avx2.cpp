// The kernels of training compiled for avx2 (see CMakeLists.txt for the flags).
#define PERSIMMON_ISA train_avx2
#include "train_table.h"

namespace persimmon {
const TrainKernels* avx2_train_kernels() {
  static constexpr TrainKernels kernels = train_avx2::train_table("avx2");
  return &kernels;
}
}  // namespace persimmon

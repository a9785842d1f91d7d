// The kernels of training compiled for avx512 (see CMakeLists.txt for the flags).
#define PERSIMMON_ISA train_avx512
#include "train_table.h"

namespace persimmon {
const TrainKernels* avx512_train_kernels() {
  static constexpr TrainKernels kernels = train_avx512::train_table("avx512");
  return &kernels;
}
}  // namespace persimmon

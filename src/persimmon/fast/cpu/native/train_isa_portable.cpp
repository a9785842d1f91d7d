// The kernels of training compiled for portable (see CMakeLists.txt for the flags).
#define PERSIMMON_ISA train_portable
#include "train_table.h"

namespace persimmon {
const TrainKernels* portable_train_kernels() {
  static constexpr TrainKernels kernels = train_portable::train_table("portable");
  return &kernels;
}
}  // namespace persimmon

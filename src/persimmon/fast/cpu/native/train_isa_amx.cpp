// The kernels of training compiled for amx (see CMakeLists.txt for the flags).
#define PERSIMMON_ISA train_amx
#include "train_table.h"

namespace persimmon {
const TrainKernels* amx_train_kernels() {
  static constexpr TrainKernels kernels = train_amx::train_table("amx");
  return &kernels;
}
}  // namespace persimmon

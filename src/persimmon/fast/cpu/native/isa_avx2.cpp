// The kernels compiled for avx2 (see CMakeLists.txt for the flags).
#define PERSIMMON_ISA isa_avx2
#include "kernel_table.h"

namespace persimmon {
const Kernels* avx2_kernels() {
  static constexpr Kernels kernels = isa_avx2::table("avx2");
  return &kernels;
}
}  // namespace persimmon

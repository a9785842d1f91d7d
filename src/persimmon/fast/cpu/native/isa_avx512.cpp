// The kernels compiled for avx512 (see CMakeLists.txt for the flags).
#define PERSIMMON_ISA isa_avx512
#include "kernel_table.h"

namespace persimmon {
const Kernels* avx512_kernels() {
  static constexpr Kernels kernels = isa_avx512::table("avx512");
  return &kernels;
}
}  // namespace persimmon

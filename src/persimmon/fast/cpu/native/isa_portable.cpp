// The kernels compiled for portable (see CMakeLists.txt for the flags).
#define PERSIMMON_ISA isa_portable
#include "kernel_table.h"

namespace persimmon {
const Kernels* portable_kernels() {
  static constexpr Kernels kernels = isa_portable::table("portable");
  return &kernels;
}
}  // namespace persimmon

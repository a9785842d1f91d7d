// The kernels compiled for amx (see CMakeLists.txt for the flags).
#define PERSIMMON_ISA isa_amx
#include "kernel_table.h"

namespace persimmon {
const Kernels* amx_kernels() {
  static constexpr Kernels kernels = isa_amx::table("amx");
  return &kernels;
}
}  // namespace persimmon

#include "cpu.h"

#include <stdexcept>

#if defined(PERSIMMON_AMX)
#include <cpuid.h>
#endif
#if defined(PERSIMMON_AMX) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace persimmon {
namespace {

#if defined(PERSIMMON_AMX)
// CPUID leaf 7: AMX-BF16, AMX-TILE, AMX-INT8 and GFNI; all processors with AMX have had all four. The compiler's own check knows these names only in later versions.
bool has_amx() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  return (d >> 22 & 1) && (d >> 24 & 1) && (d >> 25 & 1) && (c >> 8 & 1);
}

// Tile registers make a thread's saved state 8 KiB larger, so Linux wants to be asked once before their first use. It refuses
// when a thread has too small a stack for signals; then there is no AMX.
bool amx_permitted() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool permitted = syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  return permitted;
#else
  return false;
#endif
}
#endif

std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> found = {portable_kernels()};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2) found.push_back(avx2_kernels());
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vnni");
  if (avx512) found.push_back(avx512_kernels());
#if defined(PERSIMMON_AMX)
  if (avx512 && has_amx() && amx_permitted()) found.push_back(amx_kernels());
#endif
#endif
  return found;
}

}  // namespace

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : supported()) names.emplace_back(kernels->name);
  return names;
}

const Kernels* find_kernels(const std::string& isa) {
  const std::vector<const Kernels*> all = supported();
  if (isa == "auto") return all.back();
  std::string known;
  for (const Kernels* kernels : all) {
    if (isa == kernels->name) return kernels;
    known += std::string(known.empty() ? "" : ", ") + kernels->name;
  }
  throw std::invalid_argument("instruction set '" + isa + "' is not supported here; there are: " + known);
}

}  // namespace persimmon

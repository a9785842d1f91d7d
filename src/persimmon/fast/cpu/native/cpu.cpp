#include "cpu.h"

#include <stdexcept>

namespace persimmon {
namespace {

std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> found = {portable_kernels()};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2) found.push_back(avx2_kernels());
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni"))
    found.push_back(avx512_kernels());
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

// Scratch memory of the kernels of training, on a cache line.
#pragma once
#include <cstddef>
#include <memory>
#include <new>

namespace persimmon {

struct FreeAligned {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t(64)); }
};
using Scratch = std::unique_ptr<float[], FreeAligned>;

inline Scratch scratch_for(size_t floats) {
  return Scratch(static_cast<float*>(::operator new[](floats * sizeof(float), std::align_val_t(64))));
}

}  // namespace persimmon

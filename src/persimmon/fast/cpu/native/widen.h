// Stored float32 or bfloat16 numbers as floats.
#pragma once
#include <cstdint>
#include <cstring>

namespace persimmon {

inline void widen(bool bf16, const uint8_t* stored, int count, float* out) {
  if (!bf16) {
    memcpy(out, stored, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  for (int i = 0; i < count; i++) {
    uint16_t bits;
    memcpy(&bits, stored + 2 * i, 2);
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    memcpy(out + i, &wide, 4);
  }
}

}  // namespace persimmon

#include "sketch.h"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <vector>

namespace persimmon {
namespace {

constexpr size_t kLargePage = 2 << 20;
constexpr int kLargestCode = 127;
constexpr double kUp = 1 + 0x1p-20;  // more than rounding to float32 can take from a length

void widen(Format format, const uint8_t* row, int count, float* out) {
  if (format == Format::f32) {
    memcpy(out, row, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  for (int i = 0; i < count; i++) {
    uint16_t bits;
    memcpy(&bits, row + 2 * i, 2);
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    memcpy(out + i, &wide, 4);
  }
}

// One row as row `r` of its block: codes at codes[4 * kSketchRows * quad + 4 * r + input % 4].
void sketch_row(const std::vector<float>& row, const float* center, int r, int8_t* codes, SketchFacts* facts) {
  float largest = 0;
  bool finite = true;
  for (const float v : row) largest = std::max(largest, std::fabs(v)), finite = finite && std::isfinite(v);
  const float scale = largest / kLargestCode;
  finite = finite && std::isfinite(1.0f / scale * largest);  // also false for rows of zeros and of the smallest numbers
  double error = 0, length = 0, product = 0;
  for (size_t i = 0; i < row.size(); i++) {
    const int code = finite ? static_cast<int>(std::nearbyint(row[i] / scale)) : 0;
    codes[4 * kSketchRows * (i / 4) + 4 * r + i % 4] = static_cast<int8_t>(code);
    const double kept = static_cast<double>(scale) * code, lost = row[i] - kept;
    length += kept * kept, error += lost * lost, product += static_cast<double>(row[i]) * center[i];
    facts->sum[r] += code;
  }
  const bool held = finite || largest == 0.0f;
  facts->scale[r] = finite ? scale : 0.0f;
  facts->length[r] = finite ? static_cast<float>(std::sqrt(length) * kUp) : 0.0f;
  facts->error[r] = finite ? static_cast<float>(std::sqrt(error) * kUp) : 0.0f;
  facts->center[r] = held ? static_cast<float>(product) : HUGE_VALF;
}

}  // namespace

LargeMemory::LargeMemory(size_t bytes) : bytes_(bytes + kLargePage) {
  void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mapped_ = static_cast<uint8_t*>(memory);
  data_ = reinterpret_cast<uint8_t*>(round_up(reinterpret_cast<size_t>(mapped_), kLargePage));
#if defined(MADV_HUGEPAGE)
  madvise(mapped_, bytes_, MADV_HUGEPAGE);  // a wish; small pages do as well
#endif
}

LargeMemory::~LargeMemory() { munmap(mapped_, bytes_); }

void make_sketch(Format format, const uint8_t* weights, size_t row_bytes, int rows, int inputs, const float* center, uint8_t* out) {
  const size_t block_bytes = sketch_block_bytes(inputs);
  std::vector<float> row(inputs);
  memset(out, 0, sketch_bytes(rows, inputs));
  for (int r = 0; r < rows; r++) {
    uint8_t* block = out + r / kSketchRows * block_bytes;
    widen(format, weights + r * row_bytes, inputs, row.data());
    sketch_row(row, center, r % kSketchRows, reinterpret_cast<int8_t*>(block),
               reinterpret_cast<SketchFacts*>(block + block_bytes - sizeof(SketchFacts)));
  }
}

}  // namespace persimmon

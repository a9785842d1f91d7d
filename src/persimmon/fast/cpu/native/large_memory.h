// Memory of zeros that large pages may back.
#pragma once
#include <cstddef>
#include <cstdint>

namespace persimmon {

class LargeMemory {
 public:
  LargeMemory(size_t bytes, bool large_pages);  // throws std::bad_alloc
  ~LargeMemory();
  LargeMemory(const LargeMemory&) = delete;
  LargeMemory& operator=(const LargeMemory&) = delete;
  uint8_t* data() const { return data_; }

 private:
  uint8_t* data_;
  size_t bytes_;
};

}  // namespace persimmon

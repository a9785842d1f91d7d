#include "large_memory.h"

#include <sys/mman.h>

#include <new>

namespace persimmon {

LargeMemory::LargeMemory(size_t bytes, bool large_pages) : bytes_(bytes) {
  void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  data_ = static_cast<uint8_t*>(memory);
#if defined(MADV_HUGEPAGE)
  if (large_pages) madvise(memory, bytes_, MADV_HUGEPAGE);  // a wish; small pages do as well
#endif
}

LargeMemory::~LargeMemory() { munmap(data_, bytes_); }

}  // namespace persimmon

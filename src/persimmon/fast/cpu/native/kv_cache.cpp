#include "kv_cache.h"

#include <sys/mman.h>

#include <cstring>
#include <new>

namespace persimmon {

constexpr int kKeysPerBlock = 8;

KvCache::KvCache(int layers, int heads, int head_dim, int capacity, bool int8)
    : layers_(layers), heads_(heads), head_dim_(head_dim), capacity_(capacity), int8_(int8),
      padded_(round_up(static_cast<size_t>(capacity), kKeysPerBlock)),
      matrix_bytes_(padded_ * head_dim * (int8 ? 1 : sizeof(float))), scale_bytes_(int8 ? padded_ * sizeof(float) : 0),
      head_bytes_(2 * (matrix_bytes_ + scale_bytes_)), total_bytes_(head_bytes_ * layers * heads) {
  void* memory = mmap(nullptr, total_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  base_ = static_cast<uint8_t*>(memory);
}

KvCache::~KvCache() { munmap(base_, total_bytes_); }

void KvCache::locate(int layer, int head, AttentionArgs* args) const {
  const uint8_t* p = region(layer, head);
  args->keys = p;
  args->key_scales = reinterpret_cast<const float*>(p + matrix_bytes_);
  args->values = p + matrix_bytes_ + scale_bytes_;
  args->value_scales = reinterpret_cast<const float*>(p + 2 * matrix_bytes_ + scale_bytes_);
}

void KvCache::store(const Kernels& kernels, int layer, int head, int position, const float* key, const float* value) {
  uint8_t* p = region(layer, head);
  const size_t block = static_cast<size_t>(position / kKeysPerBlock) * kKeysPerBlock * head_dim_;
  const int lane = position % kKeysPerBlock;
  if (!int8_) {
    float* keys = reinterpret_cast<float*>(p) + block;
    for (int d = 0; d < head_dim_; d++) keys[kKeysPerBlock * d + lane] = key[d];
    float* values = reinterpret_cast<float*>(p + matrix_bytes_);
    memcpy(values + static_cast<size_t>(position) * head_dim_, value, head_dim_ * sizeof(float));
    return;
  }
  int8_t codes[256];
  float* key_scales = reinterpret_cast<float*>(p + matrix_bytes_);
  key_scales[position] = kernels.quantize_head(key, head_dim_, codes);
  for (int j = 0; j < head_dim_ / 4; j++) memcpy(p + block + 32 * j + 4 * lane, codes + 4 * j, 4);
  int8_t* values = reinterpret_cast<int8_t*>(p + matrix_bytes_ + scale_bytes_);
  float* value_scales = reinterpret_cast<float*>(p + 2 * matrix_bytes_ + scale_bytes_);
  value_scales[position] = kernels.quantize_head(value, head_dim_, values + static_cast<size_t>(position) * head_dim_);
}

}  // namespace persimmon

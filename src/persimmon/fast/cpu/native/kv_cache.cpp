#include "kv_cache.h"

#include <cstring>

namespace persimmon {
namespace {

// Layers from this size on take memory in large pages: a head's pieces lie far apart, and each would need a page of its own.
constexpr size_t kLargePagesFrom = 128 << 20;

}  // namespace

KvCache::KvCache(int layers, int heads, int head_dim, int num_blocks, int block_size, bool int8)
    : layers_(layers), heads_(heads), head_dim_(head_dim), num_blocks_(num_blocks), block_size_(block_size), int8_(int8),
      group_bytes_(key_group_bytes(head_dim, int8)), piece_bytes_(block_size / kKeyGroup * group_bytes_),
      block_bytes_(heads * piece_bytes_), layer_bytes_(num_blocks * block_bytes_),
      memory_(layers * layer_bytes_, layer_bytes_ >= kLargePagesFrom) {}

void KvCache::locate(int layer, int head, const int32_t* table, AttentionArgs* args) const {
  args->base = piece(layer, 0, head);
  args->table = table;
  args->groups_per_block = block_size_ / kKeyGroup;
  args->group_bytes = group_bytes_;
  args->block_bytes = block_bytes_;
}

void KvCache::store(const Kernels& kernels, int layer, int head, const int32_t* table, int position, const float* key,
                    const float* value) {
  uint8_t* p = group(layer, table, position / kKeyGroup, head);
  const int token = position % kKeyGroup, dim = head_dim_;
  if (!int8_) {
    float *keys = reinterpret_cast<float*>(p), *values = keys + kKeyGroup * dim;
    for (int d = 0; d < dim; d++) keys[kKeyGroup * d + token] = key[d];
    memcpy(values + token * dim, value, dim * sizeof(float));
    return;
  }
  int8_t codes[kMaxHeadDim];
  uint8_t* values = p + int8_values_offset(dim);
  reinterpret_cast<float*>(p + kKeyGroup * dim)[token] = kernels.quantize_head(key, dim, codes);
  for (int j = 0; j < dim / 4; j++) memcpy(p + 4 * (kKeyGroup * j + token), codes + 4 * j, 4);
  reinterpret_cast<float*>(values + kKeyGroup * dim)[token] = kernels.quantize_head(value, dim, codes);
  for (int d = 0; d < dim; d++) values[4 * (token / 4 * dim + d) + token % 4] = static_cast<uint8_t>(codes[d]);
}

void KvCache::copy_block(int source, int target) {
  for (int layer = 0; source != target && layer < layers_; layer++)
    memcpy(piece(layer, target, 0), piece(layer, source, 0), block_bytes_);
}

void KvCache::save(int layer, const int32_t* table, int tokens, uint8_t* out) const {
  for (int index = 0; index * kKeyGroup < tokens; index++)
    for (int head = 0; head < heads_; head++, out += group_bytes_) memcpy(out, group(layer, table, index, head), group_bytes_);
}

void KvCache::restore(int layer, const int32_t* table, int tokens, const uint8_t* in) {
  for (int index = 0; index * kKeyGroup < tokens; index++)
    for (int head = 0; head < heads_; head++, in += group_bytes_) memcpy(group(layer, table, index, head), in, group_bytes_);
}

}  // namespace persimmon

// Keys and values of one sequence, in float32 or in int8 with one scale per token and head.
//
// Memory: for every layer and head one region [keys | key scales | values | value scales], so that attention of a head
// streams through two contiguous arrays. Keys lie eight to a block, one per lane (kernels.h: AttentionArgs). The memory is
// reserved at once and only taken as tokens arrive.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace persimmon {

class KvCache {
 public:
  // Throws std::bad_alloc when the address space cannot be reserved.
  KvCache(int layers, int heads, int head_dim, int capacity, bool int8);
  ~KvCache();
  KvCache(const KvCache&) = delete;
  KvCache& operator=(const KvCache&) = delete;

  int capacity() const { return capacity_; }
  int length() const { return length_; }
  void set_length(int length) { length_ = length; }
  bool int8() const { return int8_; }
  size_t bytes_per_token() const { return head_bytes_ / padded_ * heads_ * layers_; }

  // Store the key and value [D] of one token and head.
  void store(const Kernels& kernels, int layer, int head, int position, const float* key, const float* value);
  // Fill in where the keys and values of a head are.
  void locate(int layer, int head, AttentionArgs* args) const;

 private:
  uint8_t* region(int layer, int head) const { return base_ + (static_cast<size_t>(layer) * heads_ + head) * head_bytes_; }

  int layers_, heads_, head_dim_, capacity_, length_ = 0;
  bool int8_;
  size_t padded_;       // capacity rounded up to whole blocks of keys
  size_t matrix_bytes_, scale_bytes_, head_bytes_;
  size_t total_bytes_;
  uint8_t* base_;
};

}  // namespace persimmon

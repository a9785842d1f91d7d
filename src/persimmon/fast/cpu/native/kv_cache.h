// Keys and values in blocks that sequences hold by tables, in float32 or in int8 with one scale per token and head.
//
// A block holds `block_size` consecutive tokens of a sequence in all layers and heads; token p of a sequence is in block
// table[p / block_size]. Who owns which block is decided outside: any block may be in several tables.
//
// Memory is [layer][block][head][group], a group being one record of 16 tokens of one head:
//   int8     [keys, byte 64 j + 4 t + b = dimension 4 j + b of token t][16 key scales]
//            [values, byte 4 D u + 4 d + b = dimension d of token 4 u + b][16 value scales]
//   float32  [keys, [D][16]][values, [16][D]]
// so that a key has a lane of its own and scores need no sums across lanes (nor have sums of int8 values, whose products are
// taken by fours), a head's tokens of a block are one piece, and the memory of a long sequence grows evenly. It is reserved
// at once and only taken as blocks are first written.
#pragma once
#include <cstddef>
#include <cstdint>

#include "kernels.h"
#include "large_memory.h"

namespace persimmon {

class KvCache {
 public:
  // block_size: a multiple of kKeyGroup. Throws std::bad_alloc when the address space cannot be reserved.
  KvCache(int layers, int heads, int head_dim, int num_blocks, int block_size, bool int8);

  int layers() const { return layers_; }
  int num_blocks() const { return num_blocks_; }
  int block_size() const { return block_size_; }
  bool int8() const { return int8_; }
  // Bytes of the groups that `tokens` tokens take in one layer.
  size_t state_bytes(int tokens) const { return round_up(tokens, kKeyGroup) / kKeyGroup * heads_ * group_bytes_; }

  // Store the key and value [D] of the token at `position` of the sequence in `table`.
  void store(const Kernels& kernels, int layer, int head, const int32_t* table, int position, const float* key,
             const float* value);
  // From a head's records in a block to the next head's.
  size_t head_bytes() const { return piece_bytes_; }
  // Fill in where the keys and values of a head are.
  void locate(int layer, int head, const int32_t* table, AttentionArgs* args) const;
  void copy_block(int source, int target);

  // The groups of the first `tokens` tokens of a layer, [group][head], whatever the size of blocks: out, and back in.
  void save(int layer, const int32_t* table, int tokens, uint8_t* out) const;
  void restore(int layer, const int32_t* table, int tokens, const uint8_t* in);

 private:
  uint8_t* piece(int layer, int block, int head) const {
    return memory_.data() + layer * layer_bytes_ + block * block_bytes_ + head * piece_bytes_;
  }
  uint8_t* group(int layer, const int32_t* table, int index, int head) const {
    const int groups = block_size_ / kKeyGroup;
    return piece(layer, table[index / groups], head) + index % groups * group_bytes_;
  }

  int layers_, heads_, head_dim_, num_blocks_, block_size_;
  bool int8_;
  size_t group_bytes_, piece_bytes_, block_bytes_, layer_bytes_;
  LargeMemory memory_;
};

}  // namespace persimmon

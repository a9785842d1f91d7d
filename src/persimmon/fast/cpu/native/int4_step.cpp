// The MLP of q4 for many tokens: blocks of neurons go through the up projection and are rounded to int8 while they are in a cache,
// then the down projection takes ranges of columns. One token runs in Model::mlp_one.
#include <algorithm>

#include "model.h"

namespace persimmon {
namespace {

// Work of a down projection in which every token gathers its rows, in groups of neurons with one needed row for one token; all
// 32 rows cost about six times what the group costs by its scales. From kSharedWork on, rows are unpacked once for all tokens.
constexpr double kRowWork = 6, kSharedWork = 24;
constexpr int kMostColumns = 1024;  // outputs that a thread takes at a time

// Outputs in whole pieces, the sums of which fit into the scratch memory.
int most_outputs(int tokens) {
  const size_t sums = round_up(tokens, kTileTokens) + 1, room = down_scratch_floats(tokens) / sums;
  return std::clamp(static_cast<int>(room) / kInt4Piece * kInt4Piece, kInt4Piece, kMostColumns);
}

}  // namespace

// Outputs in whole pieces, so that every thread has some `chunks` times.
int Model::share_of_outputs(int chunks) const {
  return static_cast<int>(round_up((width_ + chunks * pool_.threads() - 1) / (chunks * pool_.threads()), kInt4Piece));
}

// q4: the same sums from squared activations that are rounded to int8, block by block of neurons.
MlpCounts Model::mlp_many_int4(const Layer& layer, int tokens) {
  square_blocks(layer, tokens);
  const Int4DownArgs args = {layer.neurons, layer.neuron_bytes, neuron_groups_, width_ / kSuperblock, packed_squared_.get(),
                       squared_tiles_.data(), needed_.data(), tokens, layer.down_bias, x_.data(), static_cast<size_t>(width_)};
  const MlpCounts total = total_counts();
  const double work = kRowWork * total.active / shape_.intermediate + static_cast<double>(total.groups) / neuron_groups_;
  const bool eights = in_eights(tokens), tiles = kernels_->tiled_int4_columns && work >= kSharedWork;
  const int columns = eights ? std::min(kMostFewColumns, share_of_outputs(1)) : std::min(most_outputs(tokens), share_of_outputs(2));
  pool_.parallel_for(width_, columns, [&](int begin, int end, int thread) {
    float* scratch = scratch_.data() + thread * down_scratch_floats(reserved_tokens_);
    for (int from = begin; from < end; from += columns) {  // a single thread gets all at once
      const int to = std::min(from + columns, end);
      if (eights) kernels_->eight_int4_columns(args, from, to, scratch, tile_scratch(thread));
      else if (tiles) kernels_->tiled_int4_columns(args, from, to, scratch, tile_scratch(thread));
      else kernels_->int4_columns(args, from, to, scratch);
    }
  });
  return total;
}

// Up projection, squares, and their codes, in tiles where the kernels want them.
void Model::square_blocks(const Layer& layer, int tokens) {
  const size_t tiles = kernels_->tiled_int4_columns && !in_eights(tokens) ? (tokens + kTileTokens - 1) / kTileTokens * kLanes : 0;
  const RowsArgs whole = rows_args(layer.up, input(), tokens, nullptr, kNeuronBlock, Epilogue::squared_relu);
  std::vector<TokenGroup>& out = squared_tiles_;
  if (out.size() < tiles * neuron_blocks_) out.resize(tiles * neuron_blocks_);
  pool_.parallel_for(neuron_blocks_, 1, [&](int begin, int end, int thread) {
    for (int b = begin; b < end; b++) {
      const int first = b * kNeuronBlock, count = std::min(kNeuronBlock, shape_.intermediate - first);
      RowsArgs args = whole;
      args.weights += first * args.row_bytes, args.bias += first;
      args.y = squared_.data() + static_cast<size_t>(thread) * tokens * kNeuronBlock;
      multiply_range(args, 0, count, thread);
      ActivationBlock* codes = packed_squared_.get() + static_cast<size_t>(b) * tokens;
      for (int t = 0; t < tokens; t++)
        if (!kernels_->quantize(args.y + static_cast<size_t>(t) * kNeuronBlock, count, 1, codes + t)) finite_ = false;
      block_counts_[b] = {static_cast<int64_t>(count) * tokens, 0, 0};
      kernels_->count_needed(codes, tokens, needed_.data() + b * kLanes, &block_counts_[b]);
      if (tiles) kernels_->make_tiles(codes, tokens, 1, 0, static_cast<int>(tiles / kLanes), out.data() + b * tiles);
    }
  });
}

}  // namespace persimmon

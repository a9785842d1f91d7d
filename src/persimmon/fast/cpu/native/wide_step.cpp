// A step of many tokens over float weights: each thread takes tokens through a whole layer.
//
// Between the attentions of two layers a token needs nothing of the others, so a thread carries a group of them from one
// attention to the next: attention and MLP of a layer, then queries, keys and values of the next one. There is one parallel
// region per layer instead of seven, and what belongs to a token stays in one core's caches. Every thread reads all weights,
// which costs a twentieth of the products with 64 tokens, less with 128; packed weights cost more to unpack and have no such step.
// The kernels are those of the other steps, so are the results, bit for bit.
#include <algorithm>

#include "model.h"

namespace persimmon {
namespace {

constexpr int kMostGroupTokens = 4 * kPanelTokens;

}  // namespace

// Tokens of a group: enough groups for every thread, in whole panels.
int Model::group_tokens(int tokens) const {
  int size = kMostGroupTokens;
  while (size > kPanelTokens && size * pool_.threads() > tokens) size /= 2;
  return size;
}

bool Model::wide(int tokens) const { return !packed_inputs_ && tokens >= 2 * kPanelTokens; }

void Model::run_wide(const std::vector<Token>& tokens) {
  const int count = static_cast<int>(tokens.size()), size = group_tokens(count), groups = (count + size - 1) / size;
  reserve_panels(count);
  std::vector<MlpCounts> found(groups);
  for (int i = 0; i <= shape_.layers; i++) {
    pool_.parallel_for(groups, 1, [&](int begin, int end, int thread) {
      for (int g = begin; g < end; g++) {
        const Group group = {g * size, std::min(size, count - g * size), thread};
        if (i > 0) found[g] = finish_layer(layers_[i - 1], i - 1, tokens, group);
        if (i < shape_.layers) begin_layer(layers_[i], i, tokens, group);
      }
    });
    if (i == 0) continue;
    counts[i - 1].tokens += count;
    for (const MlpCounts& one : found) counts[i - 1].candidates += one.candidates, counts[i - 1].active += one.active;
  }
}

// Queries, keys and values of a group; keys and values are stored.
void Model::begin_layer(const Layer& layer, int index, const std::vector<Token>& tokens, const Group& group) {
  normalize_group(layer.input, group);
  multiply_group(layer.qkv, normed_.data(), group, qkv_.data(), 3 * shape_.hidden, Epilogue::store);
  for (int t = group.first; t < group.first + group.count; t++)
    for (int head = 0; head < shape_.heads; head++) prepare_head(layer, index, tokens[t], t, head);
}

// Attention and MLP of a group, once the keys and values of all tokens are stored.
MlpCounts Model::finish_layer(const Layer& layer, int index, const std::vector<Token>& tokens, const Group& group) {
  const int end = group.first + group.count;
  const auto before = [](const Queries& queries, int token) { return queries.first < token; };
  for (int head = 0; head < shape_.heads; head++)  // a group's queries are its own: no run of them crosses its edge
    for (auto it = std::lower_bound(queries_.begin(), queries_.end(), group.first, before); it != queries_.end() && it->first < end; ++it)
      attend_heads(index, tokens, *it, head, 1);
  panels_of_group(attended_.data(), group);
  multiply_group(layer.dense, attended_.data(), group, x_.data(), width_, Epilogue::add);
  normalize_group(layer.post, group);
  return mlp_group(layer, group);
}

void Model::normalize_group(const Norm& norm, const Group& group) {
  for (int t = group.first; t < group.first + group.count; t++) {
    const size_t at = static_cast<size_t>(t) * width_;
    if (!kernels_->layer_norm(x_.data() + at, shape_.hidden, shape_.eps, norm.weight, norm.bias, normed_.data() + at))
      finite_ = false;
  }
  panels_of_group(normed_.data(), group);
}

void Model::panels_of_group(const float* x, const Group& group) {
  const int first = group.first / kPanelTokens, end = (group.first + group.count + kPanelTokens - 1) / kPanelTokens;
  panel_kernels_->make(x, width_, group.first + group.count, first, end, panels());
}

// `x`: what panels_of_group was last given; rows that fill no block of a panel are read from there.
void Model::multiply_group(const Linear& linear, const float* x, const Group& group, float* y, size_t stride, Epilogue epilogue) {
  const size_t at = static_cast<size_t>(group.first) * width_;
  RowsArgs args = rows_args(linear, x + at, group.count, y + group.first * stride, stride, epilogue);
  args.panels += panel_offset(group.first);
  panel_kernels_->rows(args, 0, linear.rows, panel_scratch(group.thread));
}

MlpCounts Model::mlp_group(const Layer& layer, const Group& group) {
  const size_t at = static_cast<size_t>(group.first) * width_;
  MlpArgs args = mlp_args(layer, group.count);
  args.x = normed_.data() + at;
  args.panels += panel_offset(group.first);
  ActiveBlock* lists = active_.data() + static_cast<size_t>(group.first) * neuron_blocks_;
  MlpCounts found = {};
  std::vector<ActiveBlock*> out(group.count);
  for (int b = 0; b < neuron_blocks_; b++) {
    for (int t = 0; t < group.count; t++) {
      out[t] = lists + static_cast<size_t>(b) * group.count + t;
      out[t]->count = 0;
    }
    const int last = std::min((b + 1) * kNeuronBlock, args.neurons);
    panel_kernels_->activate(args, b * kNeuronBlock, last, out.data(), &found, panel_scratch(group.thread));
  }
  kernels_->down_columns(args, lists, 0, width_, layer.down_bias, x_.data() + at, width_,
                         scratch_.data() + group.thread * down_scratch_floats(reserved_tokens_));
  return found;
}

}  // namespace persimmon

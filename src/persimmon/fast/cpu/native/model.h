// A whole Persimmon decoder over packed weights: one call runs any number of tokens of any number of sequences.
#pragma once
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "kernels.h"
#include "kv_cache.h"
#include "large_memory.h"
#include "pool.h"
#include "resolver.h"
#include "sketch.h"

namespace persimmon {

constexpr int kFewestRanked = 4097;  // rows of a head that is ranked before it is computed

struct Shape {
  int vocab, hidden, intermediate, layers, heads, head_dim, rotary_dim, max_positions;
  float eps;
  bool qk_norm;
};

// Formats of the three kinds of matrices.
struct Formats {
  Format attention, mlp, head;
  bool embedding_bf16;
};

// New tokens behind the first `start` of the sequence that `table` holds; the last `wanted` of them want logits.
struct Chunk {
  KvCache* cache;
  const int32_t* table;
  int table_size;
  int start;
  const int32_t* ids;
  int count;
  int wanted;
};

// What a call is asked about its wanted tokens: all logits, or what they say about one token each.
struct Output {
  int exact_top = 0;       // logits: how many of the largest must be exact, 0 all
  float* logits = nullptr; // [wanted][vocab]
  const int32_t* targets = nullptr;  // scores: a token for each
  double* scores = nullptr;          // its log-probability
  int32_t* likeliest = nullptr;      // the token with the largest logit, the first of equals
};

struct LayerCounts {
  int64_t tokens, candidates, active, groups;      // over all tokens run (MlpCounts)
  int64_t audited, audited_active, audited_missed;  // over audited tokens
  double audited_error, audited_norm;               // squared norms of output error and output
};

class Model {
 public:
  // `tensors` by the names of docs/sparsity.md; they must stay where they are for the life of the model.
  // Throws std::invalid_argument naming a tensor that is missing or has the wrong size.
  Model(const Shape& shape, const Formats& formats, const std::map<std::string, Bytes>& tensors, const float* cos,
        const float* sin, const Kernels* kernels, int threads);

  const Shape& shape() const { return shape_; }
  int threads() const { return pool_.threads(); }
  const char* isa() const { return kernels_->name; }
  size_t held_by_sketches() const { return held_by_sketches_; }

  std::unique_ptr<KvCache> new_cache(int num_blocks, int block_size, bool int8) const;

  // Store the chunks in their blocks and fill in the output, wanted tokens in order. With exact_top > 0 only that many
  // largest logits of a row are exact and the others may be -inf. Throws std::domain_error when a value is not
  // finite; what the new places hold is then undefined.
  void forward(const std::vector<Chunk>& chunks, Output output);

  // Store the one token of `chunk` and pick the likeliest behind it (the first of equals, never one of `banned`), then store that one,
  // until `count` are picked or one is `stop`: the picked ones, of which the last is not stored. Throws as forward.
  std::vector<int32_t> greedy(Chunk chunk, int count, const std::vector<int32_t>& banned, int32_t stop);

  float margin = 0;       // standard deviations; infinite reads everything
  int audit_every = 0;    // recompute one decoded token in this many exactly; 0 never
  std::vector<LayerCounts> counts;

 private:
  void run(const std::vector<Chunk>& chunks, Output output);  // forward, under its lock

  struct Linear {
    Format format;
    const uint8_t *weights, *rest;
    size_t row_bytes, rest_bytes;
    int rows, blocks;
    const float* bias;
  };
  struct Norm {
    const float *weight, *bias;
  };
  struct Layer {
    Norm input, post, q, k;
    Linear qkv, dense, up;
    const uint8_t* up_sketch;  // of float rows, or null
    int dense_tokens;          // that will not look at it, as it did not help
    const uint8_t* neurons;  // neuron-major rows; q4: records
    size_t neuron_bytes;
    int neuron_offset;
    const float *up_bias, *down_bias;
    const int32_t* outlier_columns;  // p44: or null
    const float* center;             // p44: [hidden] of the MLP's inputs without the outlier columns, or null
  };
  struct Token {
    KvCache* cache;
    const int32_t* table;
    int32_t id;
    int position;
    bool wanted;
  };
  struct Queries {  // tokens of a step that follow each other in one sequence
    int first, count;
  };

  Linear resolve_linear(const Resolver& tensors, const std::string& name, Format format, int rows, int inputs) const;
  Norm resolve_norm(const Resolver& tensors, const std::string& name, int size) const;
  Layer resolve_layer(const Resolver& tensors, int index);
  void resolve_neurons(const Resolver& tensors, const std::string& prefix, Layer* layer);
  const float* padded(const float* values, int count);
  const float* center_of(const Norm& norm, const int32_t* outlier_columns);

  struct Group {  // consecutive tokens of a step that one thread has, from a multiple of kPanelTokens on
    int first, count, thread;
  };

  void run_step(const std::vector<Token>& tokens, const Output& output);
  bool wide(int tokens) const;
  int group_tokens(int tokens) const;
  void run_wide(const std::vector<Token>& tokens);
  void begin_layer(const Layer& layer, int index, const std::vector<Token>& tokens, const Group& group);
  MlpCounts finish_layer(const Layer& layer, int index, const std::vector<Token>& tokens, const Group& group);
  void normalize_group(const Norm& norm, const Group& group);
  uint16_t* panels() { return reinterpret_cast<uint16_t*>(panels_.data()); }
  const uint16_t* panels() const { return reinterpret_cast<const uint16_t*>(panels_.data()); }
  void panels_of_group(const float* x, const Group& group);
  void multiply_group(const Linear& linear, const float* x, const Group& group, float* y, size_t stride, Epilogue epilogue);
  MlpCounts mlp_group(const Layer& layer, const Group& group);
  void reserve(int tokens);
  void embed(const std::vector<Token>& tokens);
  void normalize(const Norm& norm, const float* x, int tokens, const int32_t* outlier_columns, const float* center);
  void pack(const float* x, int tokens, int size, int blocks, ActivationBlock* out);
  const void* input() const;
  int grain(const Linear& linear, int tokens) const;
  uint8_t* tile_scratch(int thread) { return reinterpret_cast<uint8_t*>(tile_scratch_.data() + thread * tile_scratch_stride_); }
  float* panel_scratch(int thread) { return reinterpret_cast<float*>(panel_scratch_.data() + thread * panel_scratch_stride_); }
  bool in_panels(int tokens) const { return tokens >= panel_kernels_->fewest_tokens; }
  size_t panel_offset(int token) const { return persimmon::panel_offset(*panel_kernels_, width_, token); }
  void reserve_panels(int tokens);
  void reserve_tiles(size_t bytes);
  void make_panels(const float* x, int tokens);
  bool in_eights(int tokens) const { return kernels_->fewest_eights && tokens >= kernels_->fewest_eights && tokens <= kMostEights; }
  bool tiled(int tokens) const { return kernels_->tiled_tokens && tokens >= kernels_->tiled_tokens; }
  void multiply(const Linear& linear, const void* x, int tokens, float* y, size_t y_stride, Epilogue epilogue);
  void multiply_range(const RowsArgs& args, int begin, int end, int thread);
  void attention_one(const Layer& layer, int index, const std::vector<Token>& tokens);
  void attention(const Layer& layer, int index, const std::vector<Token>& tokens);
  void prepare_head(const Layer& layer, int index, const Token& token, int t, int head);
  void attend_heads(int index, const std::vector<Token>& tokens, const Queries& queries, int head, int heads);
  MlpArgs mlp_args(const Layer& layer, int tokens) const;
  void mlp(int index, int tokens);
  MlpCounts mlp_one(const MlpArgs& args, float* output);
  MlpCounts mlp_many(const MlpArgs& args, const float* bias);
  MlpCounts mlp_many_int4(const Layer& layer, int tokens);
  void square_blocks(const Layer& layer, int tokens);
  int share_of_outputs(int chunks) const;
  MlpCounts total_counts() const;
  void audit(const MlpArgs& args, const MlpCounts& found, LayerCounts* counts);
  void head(const std::vector<int>& wanted, const Output& output);
  void head_scores(int tokens, const Output& output);
  void score_pieces(const Group& group, int begin, int end, const Output& output);
  template <class Estimate, class Exact>
  void two_passes(int tokens, int top, int tried, float* logits, Estimate&& estimate, Exact&& exact);
  void head_top(const RowsArgs& args, int top, float* logits);
  void make_sketches();
  SketchInput sketch_input(const Norm& norm);
  void head_top_float(int top, float* logits);
  RowsArgs rows_args(const Linear& linear, const void* x, int tokens, float* y, size_t stride, Epilogue epilogue) const;

  Shape shape_;
  Formats formats_;
  const Kernels* kernels_;
  const PanelKernels* panel_kernels_;  // of float weights
  const float *cos_, *sin_;
  const uint8_t* embedding_;
  std::vector<Layer> layers_;
  Norm final_norm_;
  Linear lm_head_;
  std::unique_ptr<LargeMemory> sketches_;  // of float up projections and head, or null
  size_t held_by_sketches_ = 0;  // bytes
  const uint8_t* head_sketch_ = nullptr;
  int width_;          // hidden size padded to 256
  int neuron_blocks_;  // blocks of kNeuronBlock neurons
  int neuron_groups_;  // groups of kGroup neurons
  bool packed_inputs_;  // int8 activations; else float32

  Pool pool_;
  std::mutex mutex_;
  std::atomic<bool> finite_{true};
  int64_t decoded_ = 0;  // tokens run alone, for audit_every

  std::vector<std::vector<float>> owned_;  // padded copies of small vectors

  // Scratch of one step, T tokens.
  std::vector<float> x_;           // [T][width] residual stream
  std::vector<float> normed_;      // [T][width]
  std::vector<float> qkv_;         // [T][3 * hidden], [head, 3, head_dim]
  std::vector<float> attended_;    // [T][width]
  std::vector<float> squared_;     // q4: per thread, [T][kNeuronBlock]
  std::vector<uint8_t> sketch_parts_;  // of one token, SketchInput
  std::vector<float> outliers_;    // [T][kOutliers]
  std::vector<float> distances_;   // [T] of normed_ from its center, where planes need it
  std::vector<float> block_sums_;  // one token: [blocks of neurons][width]
  std::vector<float> output_, audited_output_;  // [width]
  std::vector<float> scratch_;     // per thread, down_columns
  std::vector<Queries> queries_;   // all tokens, in order
  std::vector<float> score_logits_;        // per thread, [wanted][kScoreRows]
  std::vector<RowSummary> summaries_;      // [wanted][pieces of the vocabulary]
  std::vector<float> estimates_, bounds_;  // [wanted][vocab], two-pass head
  std::vector<ActiveBlock> active_;        // [blocks of neurons][T]
  std::vector<MlpCounts> block_counts_;
  std::unique_ptr<ActivationBlock[]> packed_, packed_squared_;  // packed_squared_: q4, [blocks of neurons][T]
  std::vector<uint32_t> needed_;           // q4: [groups of neurons], Int4DownArgs
  std::vector<TokenGroup> squared_tiles_;  // q4: packed_squared_ in tiles
  std::vector<TokenGroup> tiles_;          // of the inputs packed last, when the kernels want them
  std::vector<EightTokens> eights_;        // likewise, of few tokens
  std::vector<TokenGroup> tile_scratch_;   // per thread; any type that is aligned
  size_t tile_scratch_stride_ = 0;         // elements
  std::vector<PanelLine> panels_;          // of float inputs, when the kernels want them
  std::vector<PanelLine> panel_scratch_;   // per thread
  size_t panel_scratch_stride_ = 0;        // lines
  int reserved_tokens_ = 0;
};

}  // namespace persimmon

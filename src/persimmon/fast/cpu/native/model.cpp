#include "model.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "widen.h"

namespace persimmon {
namespace {

constexpr int kStepTokens = 256;       // tokens run through all layers together; bounds the scratch memory
constexpr int kChunkBytes = 64 << 10;  // weights a thread takes at a time
constexpr int kTiledRows = 64;         // rows a thread takes at a time when tokens lie in tiles: four panels (tiles.h)
constexpr int kPanelGrain = 128;       // ... when they lie in panels: what float_tiles.h reads together
constexpr int kMostHeads = 4;          // whose rows a thread multiplies before it attends
constexpr int kNormInline = 4096;      // inputs that one thread normalises sooner than two, 1-2 us
constexpr size_t kMostSketchBytes = 64 << 20;  // of all sketches of a model (fast/cpu/memory.py)
constexpr int kDenseTokens = 32;  // for which a layer does without its sketch when that left half of the rows: as many bytes as all of them
constexpr int kSumPiece = 16;          // outputs of a cache line
constexpr int kSumInline = 1024;       // outputs whose blocks of neurons one thread adds up sooner than two

size_t row_bytes(Format format, int blocks) {
  switch (format) {
    case Format::f32: return static_cast<size_t>(blocks) * kSuperblock * 4;
    case Format::bf16: return static_cast<size_t>(blocks) * kSuperblock * 2;
    case Format::q8: return static_cast<size_t>(blocks) * kQ8Bytes;
    case Format::q4: return static_cast<size_t>(blocks) * kQ4Bytes;
    case Format::planes: return top_row_bytes(blocks);
  }
  return 0;
}

bool is_packed(Format format) { return format != Format::f32 && format != Format::bf16; }

}  // namespace

// ---- finding the weights -----------------------------------------------------------------------------------------------

Model::Model(const Shape& shape, const Formats& formats, const std::map<std::string, Bytes>& tensors, const float* cos,
             const float* sin, const Kernels* kernels, int threads)
    : counts(shape.layers), shape_(shape), formats_(formats), kernels_(kernels),
      panel_kernels_(formats.attention == Format::bf16 ? &kernels->bf16_panels : &kernels->float_panels), cos_(cos), sin_(sin),
      width_(static_cast<int>(round_up(shape.hidden, kSuperblock))),
      neuron_blocks_(static_cast<int>(round_up(shape.intermediate, kNeuronBlock) / kNeuronBlock)),
      neuron_groups_(static_cast<int>(round_up(shape.intermediate, kGroup) / kGroup)), 
      packed_inputs_(is_packed(formats.attention)), pool_(threads) {
  if (!packed_inputs_ && (formats.mlp != formats.attention || formats.head != formats.attention))
    throw std::invalid_argument("float32 and bfloat16 matrices in one model");
  const Resolver resolver(tensors);
  const size_t element = formats.embedding_bf16 ? 2 : 4;
  embedding_ = resolver.bytes("embed_tokens.weight", element * shape.vocab * shape.hidden);
  for (int i = 0; i < shape.layers; i++) layers_.push_back(resolve_layer(resolver, i));
  final_norm_ = resolve_norm(resolver, "final_layernorm", shape.hidden);
  lm_head_ = resolve_linear(resolver, "lm_head", formats.head, shape.vocab, shape.hidden);
  make_sketches();
}

Model::Linear Model::resolve_linear(const Resolver& tensors, const std::string& name, Format format, int rows,
                                    int inputs) const {
  Linear linear = {};
  linear.format = format, linear.rows = rows;
  linear.blocks = static_cast<int>(round_up(inputs, kSuperblock) / kSuperblock);
  linear.row_bytes = row_bytes(format, linear.blocks);
  const bool planes = format == Format::planes;
  linear.weights = tensors.aligned(name + (planes ? ".top" : ".weight"), linear.row_bytes * rows, planes ? alignof(TopFacts) : 1);
  if (planes) {
    linear.rest_bytes = static_cast<size_t>(linear.blocks) * kRestBytes;
    linear.rest = tensors.bytes(name + ".rest", linear.rest_bytes * rows);
  }
  return linear;
}

Model::Norm Model::resolve_norm(const Resolver& tensors, const std::string& name, int size) const {
  return {tensors.array<float>(name + ".weight", size), tensors.array<float>(name + ".bias", size)};
}

const float* Model::padded(const float* values, int count) {
  owned_.emplace_back(round_up(count, kSuperblock), 0.0f);
  std::copy(values, values + count, owned_.back().begin());
  return owned_.back().data();
}

// The bias of a norm is the center of what it yields; outlier inputs are taken out of both.
const float* Model::center_of(const Norm& norm, const int32_t* outlier_columns) {
  owned_.emplace_back(norm.bias, norm.bias + shape_.hidden);
  for (int i = 0; i < kOutliers; i++)
    if (outlier_columns[i] >= 0) owned_.back()[outlier_columns[i]] = 0.0f;
  return owned_.back().data();
}

Model::Layer Model::resolve_layer(const Resolver& tensors, int index) {
  const std::string prefix = "layers." + std::to_string(index) + ".", attention = prefix + "self_attn.";
  const int hidden = shape_.hidden;
  Layer layer = {};
  layer.input = resolve_norm(tensors, prefix + "input_layernorm", hidden);
  layer.post = resolve_norm(tensors, prefix + "post_attention_layernorm", hidden);
  if (shape_.qk_norm) {
    layer.q = resolve_norm(tensors, attention + "q_layernorm", shape_.head_dim);
    layer.k = resolve_norm(tensors, attention + "k_layernorm", shape_.head_dim);
  }
  layer.qkv = resolve_linear(tensors, attention + "query_key_value", formats_.attention, 3 * hidden, hidden);
  layer.qkv.bias = tensors.array<float>(attention + "query_key_value.bias", 3 * hidden);
  layer.dense = resolve_linear(tensors, attention + "dense", formats_.attention, hidden, hidden);
  layer.dense.bias = tensors.array<float>(attention + "dense.bias", hidden);
  layer.up_bias = tensors.array<float>(prefix + "mlp.dense_h_to_4h.bias", shape_.intermediate);
  layer.down_bias = padded(tensors.array<float>(prefix + "mlp.dense_4h_to_h.bias", hidden), hidden);
  resolve_neurons(tensors, prefix + "mlp.", &layer);
  return layer;
}

void Model::resolve_neurons(const Resolver& tensors, const std::string& prefix, Layer* layer) {
  const int hidden = shape_.hidden, neurons = shape_.intermediate, blocks = width_ / kSuperblock;
  if (formats_.mlp == Format::planes) {
    layer->neuron_offset = blocks * kRestBytes;
    layer->neuron_bytes = static_cast<size_t>(blocks) * (kRestBytes + kInt8Bytes);
    layer->up = {};
    layer->up.row_bytes = top_row_bytes(blocks);
    layer->up.weights = tensors.aligned(prefix + "hot", layer->up.row_bytes * neurons, alignof(TopFacts));
    layer->neurons = tensors.bytes(prefix + "cold", layer->neuron_bytes * neurons);
    layer->outlier_columns = tensors.array<int32_t>(prefix + "outlier_columns", kOutliers);
    for (int i = 0; i < kOutliers; i++)
      if (layer->outlier_columns[i] < -1 || layer->outlier_columns[i] >= hidden)
        throw std::invalid_argument("tensor " + prefix + "outlier_columns names a column outside the model");
    layer->center = center_of(layer->post, layer->outlier_columns);
    return;
  }
  layer->up = resolve_linear(tensors, prefix + "dense_h_to_4h", formats_.mlp, neurons, hidden);
  if (formats_.mlp == Format::q4) {
    layer->up.bias = layer->up_bias;
    layer->neuron_bytes = int4_record_bytes(blocks);
    layer->neurons = tensors.bytes(prefix + "dense_4h_to_h.records", layer->neuron_bytes * neuron_groups_);
    return;
  }
  layer->neuron_bytes = formats_.mlp == Format::q8 ? static_cast<size_t>(blocks) * kInt8Bytes : row_bytes(formats_.mlp, blocks);
  layer->neurons = tensors.bytes(prefix + "dense_4h_to_h.neurons", layer->neuron_bytes * neurons);
}

// Float rows that a token need not all read get a sketch each, if all of them are small.
void Model::make_sketches() {
  const size_t up = sketch_bytes(shape_.intermediate, shape_.hidden, kUpBits);
  const size_t head = shape_.vocab < kFewestRanked ? 0 : sketch_bytes(shape_.vocab, shape_.hidden, kHeadBits);
  const size_t bytes = up * shape_.layers + head;
  if (packed_inputs_ || bytes > kMostSketchBytes || shape_.hidden > kMostSketchInputs) return;
  held_by_sketches_ = bytes;
  sketches_ = std::make_unique<LargeMemory>(bytes, true);
  sketch_parts_.resize(2 * round_up(shape_.hidden, kSketchInputs));
  const auto at = [&](int layer) { return sketches_->data() + up * layer; };
  pool_.parallel_for(shape_.layers + (head > 0), 1, [&](int begin, int end, int) {
    for (int i = begin; i < end; i++) {
      const Linear& linear = i < shape_.layers ? layers_[i].up : lm_head_;
      const Norm& norm = i < shape_.layers ? layers_[i].post : final_norm_;
      const int bits = i < shape_.layers ? kUpBits : kHeadBits;
      make_sketch(linear.format, linear.weights, linear.row_bytes, linear.rows, shape_.hidden, norm.bias, bits, at(i));
    }
  });
  for (int i = 0; i < shape_.layers; i++) layers_[i].up_sketch = at(i);
  if (head) head_sketch_ = at(shape_.layers);
}

std::unique_ptr<KvCache> Model::new_cache(int num_blocks, int block_size, bool int8) const {
  return std::make_unique<KvCache>(shape_.layers, shape_.heads, shape_.head_dim, num_blocks, block_size, int8);
}

// ---- one call ----------------------------------------------------------------------------------------------------------

void Model::forward(const std::vector<Chunk>& chunks, Output output) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const Pool::Awake awake(pool_);
  run(chunks, output);
}

std::vector<int32_t> Model::greedy(Chunk chunk, int count, const std::vector<int32_t>& banned, int32_t stop) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const Pool::Awake awake(pool_);
  std::vector<float> logits(shape_.vocab);
  std::vector<int32_t> picked;
  Output output;
  output.exact_top = static_cast<int>(banned.size()) + 1, output.logits = logits.data();
  while (static_cast<int>(picked.size()) < count && (picked.empty() || picked.back() != stop)) {
    if (!picked.empty()) chunk.ids = &picked.back(), chunk.start++;
    run({chunk}, output);
    for (const int32_t id : banned) logits[id] = -HUGE_VALF;
    const RowSummary best = kernels_->summarize(logits.data(), shape_.vocab);
    bool usable = std::isfinite(best.top);
    for (const float logit : logits) usable &= logit == logit;
    if (!usable) throw std::domain_error("the model returned no usable logits");
    picked.push_back(best.at);
  }
  return picked;
}

void Model::run(const std::vector<Chunk>& chunks, Output output) {
  std::vector<Token> tokens;
  const auto flush = [&] {
    run_step(tokens, output);
    const auto wanted = std::count_if(tokens.begin(), tokens.end(), [](const Token& token) { return token.wanted; });
    if (output.targets) output.targets += wanted, output.scores += wanted, output.likeliest += wanted;
    else output.logits += wanted * shape_.vocab;
    tokens.clear();
  };
  finite_ = true;
  for (const Chunk& chunk : chunks) {
    const int64_t end = static_cast<int64_t>(chunk.start) + chunk.count;
    const int64_t room = static_cast<int64_t>(chunk.table_size) * chunk.cache->block_size();
    if (chunk.start < 0 || end > std::min<int64_t>(room, shape_.max_positions)) throw std::length_error("the sequence is full");
    for (int i = 0; i < chunk.table_size; i++)
      if (chunk.table[i] < 0 || chunk.table[i] >= chunk.cache->num_blocks()) throw std::out_of_range("no such block");
    for (int i = 0; i < chunk.count; i++) {
      if (chunk.ids[i] < 0 || chunk.ids[i] >= shape_.vocab) throw std::out_of_range("token id outside the vocabulary");
      tokens.push_back({chunk.cache, chunk.table, chunk.ids[i], chunk.start + i, i >= chunk.count - chunk.wanted});
      if (tokens.size() == kStepTokens) flush();
    }
  }
  if (!tokens.empty()) flush();
  if (!finite_) throw std::domain_error("an activation is not finite: the weights are damaged or overflow");
}

void Model::reserve(int tokens) {
  const size_t blocks = width_ / kSuperblock;
  if (tokens > reserved_tokens_) {
    reserved_tokens_ = tokens;
    const size_t n = tokens;
    x_.assign(n * width_, 0.0f), normed_.assign(n * width_, 0.0f), attended_.assign(n * width_, 0.0f);
    qkv_.resize(n * 3 * shape_.hidden), outliers_.resize(n * kOutliers), distances_.resize(n);
    if (packed_inputs_) packed_ = std::make_unique<ActivationBlock[]>(n * blocks);
    if (formats_.mlp == Format::q4 && tokens > 1) {
      squared_.resize(n * kNeuronBlock * pool_.threads());
      packed_squared_ = std::make_unique<ActivationBlock[]>(n * neuron_blocks_);
      needed_.resize(neuron_blocks_ * kLanes);
      reserve_tiles(kInt4PanelBytes);
    } else if (tokens > 1) {
      active_.resize(n * neuron_blocks_);
    }
    scratch_.resize(pool_.threads() * down_scratch_floats(tokens));
  }
  block_sums_.resize(static_cast<size_t>(neuron_blocks_) * width_);
  block_counts_.resize(neuron_blocks_);
  output_.resize(width_), audited_output_.resize(width_);
}

void Model::run_step(const std::vector<Token>& tokens, const Output& output) {
  const int count = static_cast<int>(tokens.size());
  std::vector<int> wanted;
  queries_.clear();
  for (int t = 0; t < count; t++) {
    if (tokens[t].wanted) wanted.push_back(t);
    const bool follows = t > 0 && tokens[t].table == tokens[t - 1].table && tokens[t].position == tokens[t - 1].position + 1;
    const bool edge = wide(count) && t % group_tokens(count) == 0;  // of what one thread attends to
    if (!follows || edge || queries_.back().count == kQueryTile) queries_.push_back({t, 0});
    queries_.back().count++;
  }
  reserve(count);
  embed(tokens);
  if (wide(count)) run_wide(tokens);
  for (int i = 0; !wide(count) && i < shape_.layers; i++) {
    const Layer& layer = layers_[i];
    normalize(layer.input, x_.data(), count, nullptr, nullptr);
    if (count == 1 && !packed_inputs_) {
      attention_one(layer, i, tokens);
    } else {
      multiply(layer.qkv, input(), count, qkv_.data(), 3 * shape_.hidden, Epilogue::store);
      attention(layer, i, tokens);
    }
    if (packed_inputs_) pack(attended_.data(), count, shape_.hidden, width_ / kSuperblock, packed_.get());
    else make_panels(attended_.data(), count);
    multiply(layer.dense, packed_inputs_ ? input() : attended_.data(), count, x_.data(), width_, Epilogue::add);
    normalize(layer.post, x_.data(), count, layer.outlier_columns, layer.center);
    mlp(i, count);
  }
  if (count == 1) decoded_++;
  if (!wanted.empty()) head(wanted, output);
}

void Model::embed(const std::vector<Token>& tokens) {
  const int hidden = shape_.hidden;
  for (size_t t = 0; t < tokens.size(); t++) {
    float* x = x_.data() + t * width_;
    const size_t first = static_cast<size_t>(tokens[t].id) * hidden;
    widen(formats_.embedding_bf16, embedding_ + first * (formats_.embedding_bf16 ? 2 : 4), hidden, x);
  }
}

const void* Model::input() const {
  return packed_inputs_ ? static_cast<const void*>(packed_.get()) : normed_.data();
}

// LayerNorm of every token into normed_, outlier inputs taken out, and rounded to int8 where the weights are packed; with a
// center also its distance from it.
void Model::normalize(const Norm& norm, const float* x, int tokens, const int32_t* outlier_columns, const float* center) {
  const int inline_tokens = std::max(1, kNormInline / width_);
  pool_.parallel_for(tokens, tokens <= inline_tokens ? tokens : 1, [&](int begin, int end, int) {
    for (int t = begin; t < end; t++) {
      float* y = normed_.data() + static_cast<size_t>(t) * width_;
      if (!kernels_->layer_norm(x + static_cast<size_t>(t) * width_, shape_.hidden, shape_.eps, norm.weight, norm.bias, y))
        finite_ = false;
      for (int i = 0; outlier_columns && i < kOutliers; i++) {
        const int column = outlier_columns[i];
        outliers_[t * kOutliers + i] = column < 0 ? 0.0f : y[column];
        if (column >= 0) y[column] = 0.0f;
      }
      if (center) distances_[t] = kernels_->distance(y, center, shape_.hidden);
    }
  });
  if (packed_inputs_) pack(normed_.data(), tokens, shape_.hidden, width_ / kSuperblock, packed_.get());
  else make_panels(normed_.data(), tokens);
}

void Model::reserve_panels(int tokens) {
  panels_.resize(std::max(panels_.size(), panel_lines(*panel_kernels_, width_, tokens)));
  panel_scratch_stride_ = std::max(panel_scratch_stride_, panel_kernels_->scratch_floats(width_, tokens) / 16 + 1);
  panel_scratch_.resize(panel_scratch_stride_ * pool_.threads());
}

void Model::make_panels(const float* x, int tokens) {
  if (!in_panels(tokens)) return;
  reserve_panels(tokens);
  pool_.parallel_for((tokens + kPanelTokens - 1) / kPanelTokens, 1, [&](int begin, int end, int) {
    panel_kernels_->make(x, width_, tokens, begin, end, panels());
  });
}

// Round tokens of `size` inputs (rows padded to 256 * blocks floats) to int8.
void Model::pack(const float* x, int tokens, int size, int blocks, ActivationBlock* out) {
  pool_.parallel_for(tokens * blocks, tokens > 1 ? blocks : 16, [&](int begin, int end, int) {
    for (int i = begin; i < end; i++) {
      const int left = size - i % blocks * kSuperblock;
      if (!kernels_->quantize(x + static_cast<size_t>(i) * kSuperblock, std::min(left, kSuperblock), 1, out + i))
        finite_ = false;
    }
  });
  if (in_eights(tokens)) {
    eights_.resize(std::max<size_t>(eights_.size(), blocks));
    pool_.parallel_for(blocks, std::max(1, blocks / pool_.threads()), [&](int begin, int end, int) {
      kernels_->make_eights(out, tokens, blocks, begin, end, eights_.data());
    });
  }
  if (!tiled(tokens)) return;
  const int tiles = (tokens + kTileTokens - 1) / kTileTokens;
  tiles_.resize(static_cast<size_t>(tiles) * kLanes * blocks);
  reserve_tiles(kernels_->tile_scratch_bytes(blocks, tokens));
  pool_.parallel_for(tiles, 1, [&](int begin, int end, int) { kernels_->make_tiles(out, tokens, blocks, begin, end, tiles_.data()); });
}

void Model::reserve_tiles(size_t bytes) {
  tile_scratch_stride_ = std::max(tile_scratch_stride_, bytes / sizeof(TokenGroup) + 1);
  if (tile_scratch_.size() < tile_scratch_stride_ * pool_.threads()) tile_scratch_.resize(tile_scratch_stride_ * pool_.threads());
}

RowsArgs Model::rows_args(const Linear& linear, const void* x, int tokens, float* y, size_t stride,
                          Epilogue epilogue) const {
  return {linear.format, linear.weights, linear.row_bytes, linear.rest, linear.rest_bytes, linear.blocks,
          x,             tokens,         linear.bias,      y,           stride,            epilogue, distances_.data(), tiles_.data(), panels(),
          in_eights(tokens) ? eights_.data() : nullptr};
}

int Model::grain(const Linear& linear, int tokens) const {
  if (is_packed(linear.format) ? tiled(tokens) || in_eights(tokens) : in_panels(tokens)) return is_packed(linear.format) ? kTiledRows : kPanelGrain;
  const int rows = static_cast<int>(kChunkBytes / linear.row_bytes);
  if (is_packed(linear.format)) return std::max(1, rows);
  const int share = (linear.rows + 4 * pool_.threads() - 1) / (4 * pool_.threads());  // small matrices: some for everybody
  return std::max(8, std::min(rows, static_cast<int>(round_up(share, 8))));
}

// Rows [begin, end) by the kernel for that many tokens.
void Model::multiply_range(const RowsArgs& args, int begin, int end, int thread) {
  const bool packed = is_packed(args.format);
  if (packed && args.eights) kernels_->eight_rows(args, begin, end);
  else if (packed && tiled(args.tokens)) kernels_->tiled_rows(args, begin, end, tile_scratch(thread));
  else if (!packed && in_panels(args.tokens)) panel_kernels_->rows(args, begin, end, panel_scratch(thread));
  else kernels_->rows(args, begin, end);
}

void Model::multiply(const Linear& linear, const void* x, int tokens, float* y, size_t y_stride, Epilogue epilogue) {
  const RowsArgs args = rows_args(linear, x, tokens, y, y_stride, epilogue);
  pool_.parallel_for(linear.rows, grain(linear, tokens),
                     [&](int begin, int end, int thread) { multiply_range(args, begin, end, thread); });
}

// ---- attention ---------------------------------------------------------------------------------------------------------

// One token: a head's query, key and value are rows that follow each other, so the thread that has them goes on to attend.
void Model::attention_one(const Layer& layer, int index, const std::vector<Token>& tokens) {
  const RowsArgs args = rows_args(layer.qkv, input(), 1, qkv_.data(), 3 * shape_.hidden, Epilogue::store);
  const int rows = 3 * shape_.head_dim;
  const int grain = std::clamp(shape_.heads / (2 * pool_.threads()), 1, kMostHeads);
  pool_.parallel_for(shape_.heads, grain, [&](int begin, int end, int thread) {
    multiply_range(args, begin * rows, end * rows, thread);
    for (int h = begin; h < end; h++) {
      prepare_head(layer, index, tokens[0], 0, h);
      attend_heads(index, tokens, queries_[0], h, 1);
    }
  });
}

void Model::attention(const Layer& layer, int index, const std::vector<Token>& tokens) {
  const int count = static_cast<int>(tokens.size()), heads = shape_.heads, groups = static_cast<int>(queries_.size());
  const auto chunk = [&](int items) { return std::max(1, items / (pool_.threads() * 8)); };
  if (count == 1) {
    // One piece of heads for each thread: their keys lie behind each other, and long pieces are read faster than threads that help
    // each other make up for.
    const int grain = std::min((heads + pool_.threads() - 1) / pool_.threads(), kQueryTile);
    pool_.parallel_for(heads, grain, [&](int begin, int end, int) {
      for (int h = begin; h < end; h++) prepare_head(layer, index, tokens[0], 0, h);
      for (int h = begin; h < end; h += kQueryTile) attend_heads(index, tokens, queries_[0], h, std::min(kQueryTile, end - h));
    });
    return;
  }
  if (groups == count) {  // all of different sequences: nobody waits for another's keys
    pool_.parallel_for(heads * count, chunk(heads * count), [&](int begin, int end, int) {
      for (int i = begin; i < end; i++) {
        const int t = i % count, head = i / count;
        prepare_head(layer, index, tokens[t], t, head);
        attend_heads(index, tokens, queries_[t], head, 1);
      }
    });
    return;
  }
  // Every key of the step is stored before any token attends; heads outermost, so that a head's keys stay in cache.
  pool_.parallel_for(heads * count, chunk(heads * count), [&](int begin, int end, int) {
    for (int i = begin; i < end; i++) prepare_head(layer, index, tokens[i % count], i % count, i / count);
  });
  pool_.parallel_for(heads * groups, chunk(heads * groups), [&](int begin, int end, int) {
    for (int i = begin; i < end; i++) attend_heads(index, tokens, queries_[i % groups], i / groups, 1);
  });
}

// Normalise and rotate a head's query and key in place, and store key and value.
void Model::prepare_head(const Layer& layer, int index, const Token& token, int t, int head) {
  const int dim = shape_.head_dim, half = shape_.rotary_dim / 2;
  float* q = qkv_.data() + (static_cast<size_t>(t) * shape_.heads + head) * 3 * dim;
  float *k = q + dim, *v = k + dim;
  if (shape_.qk_norm) {
    if (!kernels_->layer_norm(q, dim, shape_.eps, layer.q.weight, layer.q.bias, q)) finite_ = false;
    if (!kernels_->layer_norm(k, dim, shape_.eps, layer.k.weight, layer.k.bias, k)) finite_ = false;
  }
  const float *cos = cos_ + static_cast<size_t>(token.position) * half, *sin = sin_ + static_cast<size_t>(token.position) * half;
  kernels_->rotate(q, cos, sin, half);
  kernels_->rotate(k, cos, sin, half);
  token.cache->store(*kernels_, index, head, token.table, token.position, k, v);
}

// Queries of one head, or of several heads where there is one query.
void Model::attend_heads(int index, const std::vector<Token>& tokens, const Queries& queries, int head, int heads) {
  const int dim = shape_.head_dim, row = 3 * shape_.hidden;
  const Token& token = tokens[queries.first];
  AttentionArgs args = {};
  token.cache->locate(index, head, token.table, &args);
  args.q = qkv_.data() + static_cast<size_t>(queries.first) * row + head * 3 * dim;
  args.q_stride = row;
  args.out = attended_.data() + static_cast<size_t>(queries.first) * width_ + head * dim;
  args.out_stride = width_;
  args.queries = queries.count;
  if (heads > 1) {
    args.queries = heads, args.head_bytes = token.cache->head_bytes();
    args.q_stride = 3 * dim, args.out_stride = dim;
  }
  args.position = token.position;
  args.head_dim = dim;
  args.scale = 1.0f / std::sqrt(static_cast<float>(dim));
  token.cache->int8() ? kernels_->attend_int8(args) : kernels_->attend_float(args);
}

// ---- MLP ---------------------------------------------------------------------------------------------------------------

MlpArgs Model::mlp_args(const Layer& layer, int tokens) const {
  return {formats_.mlp,        layer.up.weights, layer.up.row_bytes,  layer.neurons,        layer.neuron_bytes,
          layer.neuron_offset, layer.up_bias,    shape_.intermediate, width_ / kSuperblock, input(),
          outliers_.data(),    distances_.data(), margin,          tokens,              tiles_.data(),        panels(),
          in_eights(tokens) ? eights_.data() : nullptr, nullptr, {}};
}

void Model::mlp(int index, int tokens) {
  Layer& layer = layers_[index];
  counts[index].tokens += tokens;
  MlpArgs args = mlp_args(layer, tokens);
  const bool sketched = tokens == 1 && layer.up_sketch && layer.dense_tokens == 0;
  if (sketched) args.sketch = layer.up_sketch, args.sketched = sketch_input(layer.post);
  MlpCounts found;
  if (tokens > 1) {
    found = formats_.mlp == Format::q4 ? mlp_many_int4(layer, tokens) : mlp_many(args, layer.down_bias);
  } else {
    found = mlp_one(args, output_.data());
    for (int i = 0; i < width_; i++) x_[i] += output_[i] + layer.down_bias[i];
    layer.dense_tokens = sketched ? (2 * found.candidates > args.neurons ? kDenseTokens : 0) : std::max(0, layer.dense_tokens - 1);
    if (audit_every > 0 && decoded_ % audit_every == 0) audit(args, found, &counts[index]);
  }
  counts[index].candidates += found.candidates;
  counts[index].active += found.active;
  counts[index].groups += found.groups;
}

// The token that `norm` has normalised, for sketches; its bias is the center.
SketchInput Model::sketch_input(const Norm& norm) {
  return kernels_->sketch_input(normed_.data(), norm.bias, shape_.hidden, sketch_parts_.data());
}

// One token: up and down in one region, block by block. output[0 .. width) = sum of the neurons' contributions.
MlpCounts Model::mlp_one(const MlpArgs& args, float* output) {
  pool_.parallel_for(neuron_blocks_, 1, [&](int begin, int end, int thread) {
    for (int b = begin; b < end; b++) {
      float* sum = block_sums_.data() + static_cast<size_t>(b) * width_;
      std::fill(sum, sum + width_, 0.0f);
      MlpCounts found = {};
      kernels_->one_block(args, b, sum, &found, panel_scratch(thread));
      block_counts_[b] = found;
    }
  });
  pool_.parallel_for(width_, std::max(kSumInline, width_ / (pool_.threads() * 2)), [&](int begin, int end, int) {
    std::fill(output + begin, output + end, 0.0f);
    for (int b = 0; b < neuron_blocks_; b++) {
      const float* sum = block_sums_.data() + static_cast<size_t>(b) * width_;
      for (int from = begin; block_counts_[b].active && from < end; from += kSumPiece) {
        __builtin_prefetch(sum + 2 * width_ + from);  // the weights have driven the sums out of the caches
        for (int i = from; i < std::min(from + kSumPiece, end); i++) output[i] += sum[i];
      }
    }
  });
  return total_counts();
}

// Many tokens: all activations first, then the down projection by columns; the same sums in the same order as mlp_one.
MlpCounts Model::mlp_many(const MlpArgs& args, const float* bias) {
  const int tokens = args.tokens;
  const bool in_tiles = tiled(tokens) && is_packed(args.format), panels = in_panels(tokens) && !is_packed(args.format);
  pool_.parallel_for(neuron_blocks_, 1, [&](int begin, int end, int thread) {
    std::vector<ActiveBlock*> out(tokens);
    for (int b = begin; b < end; b++) {
      for (int t = 0; t < tokens; t++) {
        out[t] = &active_[static_cast<size_t>(b) * tokens + t];
        out[t]->count = 0;
      }
      MlpCounts found = {};
      const int last = std::min((b + 1) * kNeuronBlock, args.neurons);
      if (is_packed(args.format) && args.eights) kernels_->eight_activate(args, b * kNeuronBlock, last, out.data(), &found);
      else if (panels) panel_kernels_->activate(args, b * kNeuronBlock, last, out.data(), &found, panel_scratch(thread));
      else if (in_tiles) kernels_->tiled_activate(args, b * kNeuronBlock, last, out.data(), &found, tile_scratch(thread));
      else kernels_->activate(args, b * kNeuronBlock, last, 0, tokens, out.data(), &found);
      block_counts_[b] = found;
    }
  });
  // Few tokens: long pieces of rows. Else wide chunks as long as there are some for every thread.
  const int share = width_ / pool_.threads();
  int columns = share >= 4 * kMostDownColumns ? kMostDownColumns : kDownColumns;
  if (tokens < kFewestShared && share >= kMostDownColumns)
    columns = std::min(kMostFewColumns, static_cast<int>(round_up(share, kMostDownColumns)));
  pool_.parallel_for(width_, columns, [&](int begin, int end, int thread) {
    kernels_->down_columns(args, active_.data(), begin, end, bias, x_.data(), width_,
                           scratch_.data() + thread * down_scratch_floats(reserved_tokens_));
  });
  return total_counts();
}

MlpCounts Model::total_counts() const {
  MlpCounts total = {};
  for (const MlpCounts& found : block_counts_)
    total.candidates += found.candidates, total.active += found.active, total.groups += found.groups;
  return total;
}

// The same token without skipping: what the margin missed and what that did to the output.
void Model::audit(const MlpArgs& args, const MlpCounts& found, LayerCounts* counts) {
  MlpArgs exact = args;
  exact.margin = HUGE_VALF, exact.sketch = nullptr;
  const MlpCounts all = mlp_one(exact, audited_output_.data());
  counts->audited++;
  counts->audited_active += all.active;
  counts->audited_missed += all.active - found.active;
  for (int i = 0; i < width_; i++) {
    const double difference = static_cast<double>(output_[i]) - audited_output_[i];
    counts->audited_error += difference * difference;
    counts->audited_norm += static_cast<double>(audited_output_[i]) * audited_output_[i];
  }
}

}  // namespace persimmon

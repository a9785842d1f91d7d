// The Python module `persimmon.fast.cpu._native`: models and caches, the packers, and every kernel by itself for tests.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "cpu.h"
#include "model.h"
#include "pack.h"
#include "sketch.h"
#include "train_binding.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace persimmon {
namespace {

template <class T, int N>
using In = nb::ndarray<const T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
template <class T, int N>
using Out = nb::ndarray<T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
using AnyArray = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;

template <class T>
struct Owned {  // memory handed to numpy
  explicit Owned(size_t n) : data(new T[n ? n : 1]) {}
  nb::ndarray<nb::numpy, T> array(std::vector<size_t> shape) {
    T* p = data;
    data = nullptr;
    nb::capsule owner(p, [](void* q) noexcept { delete[] static_cast<T*>(q); });
    return nb::ndarray<nb::numpy, T>(p, shape.size(), shape.data(), owner);
  }
  ~Owned() { delete[] data; }
  T* data;
};
using FloatArray = nb::ndarray<nb::numpy, float>;

Format parse_format(const std::string& name) {
  if (name == "float32") return Format::f32;
  if (name == "bfloat16") return Format::bf16;
  if (name == "q8") return Format::q8;
  if (name == "q4") return Format::q4;
  if (name == "planes") return Format::planes;
  throw std::invalid_argument("unknown format '" + name + "'");
}

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

// ---- models ------------------------------------------------------------------------------------------------------------

using Table = In<int32_t, 1>;

// A cache that Python may close while calls that got it before are running.
struct Cache {
  std::shared_ptr<KvCache> kv;

  KvCache& open() const {
    require(kv != nullptr, "the cache is closed");
    return *kv;
  }
  void copy_block(int source, int target) {
    const int blocks = open().num_blocks();
    require(std::min(source, target) >= 0 && std::max(source, target) < blocks, "no such block");
    kv->copy_block(source, target);
  }
  void check(int layer, const Table& table, int tokens, size_t bytes) const {
    const int blocks = open().num_blocks();
    require(layer >= 0 && layer < kv->layers(), "no such layer");
    for (size_t i = 0; i < table.size(); i++) require(table.data()[i] >= 0 && table.data()[i] < blocks, "no such block");
    require(tokens >= 0 && static_cast<size_t>(tokens) <= table.size() * kv->block_size(), "more tokens than blocks");
    require(bytes == kv->state_bytes(tokens), "the state has the wrong size");
  }
  nb::ndarray<nb::numpy, uint8_t> save(int layer, Table table, int tokens) const {
    check(layer, table, tokens, open().state_bytes(tokens));
    Owned<uint8_t> out(kv->state_bytes(tokens));
    kv->save(layer, table.data(), tokens, out.data);
    return out.array({kv->state_bytes(tokens)});
  }
  void restore(int layer, Table table, int tokens, In<uint8_t, 1> state) {
    check(layer, table, tokens, state.size());
    kv->restore(layer, table.data(), tokens, state.data());
  }
};

class PyModel {
 public:
  PyModel(const Shape& shape, const Formats& formats, nb::dict tensors, In<float, 2> cos, In<float, 2> sin,
          const std::string& isa, int threads)
      : kept_(tensors), cos_(cos), sin_(sin),
        model_(shape, formats, collect(tensors), check(cos, shape), check(sin, shape), find_kernels(isa), threads) {}

  Model& model() { return model_; }

  Cache new_cache(int num_blocks, int block_size, bool int8) {
    require(num_blocks > 0 && block_size > 0 && block_size % kKeyGroup == 0, "block_size must be a multiple of 16");
    return Cache{model_.new_cache(num_blocks, block_size, int8)};
  }

  void forward(nb::list chunks, int exact_top, Out<float, 2> logits) {
    const Call call(chunks);
    require(logits.shape(0) == call.wanted && (call.wanted == 0 || static_cast<int>(logits.shape(1)) == model_.shape().vocab),
            "logits have the wrong shape");
    Output output;
    output.exact_top = exact_top, output.logits = logits.data();
    nb::gil_scoped_release release;
    model_.forward(call.list, output);
  }

  void score(nb::list chunks, In<int32_t, 1> targets, Out<double, 1> scores, Out<int32_t, 1> likeliest) {
    const Call call(chunks);
    require(targets.size() == call.wanted && scores.size() == call.wanted && likeliest.size() == call.wanted,
            "targets or scores have the wrong shape");
    for (size_t i = 0; i < targets.size(); i++)
      require(targets.data()[i] >= 0 && targets.data()[i] < model_.shape().vocab, "a target is outside the vocabulary");
    Output output;
    output.targets = targets.data(), output.scores = scores.data(), output.likeliest = likeliest.data();
    nb::gil_scoped_release release;
    model_.forward(call.list, output);
  }

  std::vector<int32_t> greedy(const Cache& cache, Table table, int start, int32_t token_id, int count, In<int32_t, 1> banned,
                              int32_t stop) {
    const std::shared_ptr<KvCache> kv = (cache.open(), cache.kv);
    const std::vector<int32_t> never(banned.data(), banned.data() + banned.size());
    const int vocab = model_.shape().vocab;
    for (const int32_t id : never) require(id >= 0 && id < vocab, "a banned token is outside the vocabulary");
    require(static_cast<int>(never.size()) < vocab, "every token is banned");
    const Chunk chunk = {kv.get(), table.data(), static_cast<int>(table.size()), start, &token_id, 1, 1};
    nb::gil_scoped_release release;
    return model_.greedy(chunk, count, never, stop);
  }

  nb::list counts() const {
    nb::list result;
    for (const LayerCounts& c : model_.counts) {
      nb::dict row;
      row["tokens"] = c.tokens, row["candidates"] = c.candidates, row["active"] = c.active, row["groups"] = c.groups;
      row["audited"] = c.audited, row["audited_active"] = c.audited_active, row["audited_missed"] = c.audited_missed;
      row["audited_error"] = c.audited_error, row["audited_norm"] = c.audited_norm;
      result.append(row);
    }
    return result;
  }
  void reset_counts() {
    for (LayerCounts& c : model_.counts) c = {};
  }

 private:
  // The chunks of a call, and what keeps their memory while it runs without the interpreter's lock.
  struct Call {
    explicit Call(nb::list chunks) {
      for (nb::handle item : chunks) {
        const auto [cache, table, start, ids, count] = nb::cast<std::tuple<Cache*, Table, int, In<int32_t, 1>, int>>(item);
        cache->open();
        caches.push_back(cache->kv);
        kept.push_back(table), kept.push_back(ids);
        const int blocks = static_cast<int>(table.size()), tokens = static_cast<int>(ids.size());
        require(count >= 0 && count <= tokens, "more logits than tokens");
        list.push_back({cache->kv.get(), table.data(), blocks, start, ids.data(), tokens, count});
        wanted += count;
      }
    }
    std::vector<Chunk> list;
    std::vector<std::shared_ptr<KvCache>> caches;
    std::vector<In<int32_t, 1>> kept;
    size_t wanted = 0;
  };

  static std::map<std::string, Bytes> collect(nb::dict tensors) {
    std::map<std::string, Bytes> result;
    for (auto [name, value] : tensors) {
      const AnyArray array = nb::cast<AnyArray>(value);
      result[nb::cast<std::string>(name)] = {static_cast<const uint8_t*>(array.data()), array.nbytes()};
    }
    return result;
  }
  static const float* check(const In<float, 2>& table, const Shape& shape) {
    require(static_cast<int>(table.shape(0)) >= shape.max_positions && static_cast<int>(table.shape(1)) * 2 == shape.rotary_dim,
            "rotary table has the wrong shape");
    return table.data();
  }

  nb::dict kept_;  // the arrays stay alive, and with them the mapped files
  In<float, 2> cos_, sin_;
  Model model_;
};

// ---- kernels by themselves -----------------------------------------------------------------------------------------------

std::vector<ActivationBlock> packed_inputs(const Kernels* kernels, const float* x, int tokens, int inputs) {
  const int blocks = static_cast<int>(round_up(inputs, kSuperblock)) / kSuperblock;
  std::vector<ActivationBlock> packed(static_cast<size_t>(tokens) * blocks);
  for (int t = 0; t < tokens; t++)
    if (!kernels->quantize(x + static_cast<size_t>(t) * inputs, inputs, blocks, packed.data() + static_cast<size_t>(t) * blocks))
      throw std::domain_error("an input is not finite");
  return packed;
}

std::vector<float> padded_inputs(const float* x, int tokens, int inputs) {
  const size_t width = round_up(inputs, kSuperblock);
  std::vector<float> padded(tokens * width, 0.0f);
  for (int t = 0; t < tokens; t++) std::copy_n(x + static_cast<size_t>(t) * inputs, inputs, padded.data() + t * width);
  return padded;
}

// Inputs rounded to int8, as floats again.
FloatArray round_trip(In<float, 2> x, const std::string& isa) {
  const int tokens = static_cast<int>(x.shape(0)), inputs = static_cast<int>(x.shape(1));
  const int blocks = static_cast<int>(round_up(inputs, kSuperblock)) / kSuperblock;
  const auto packed = packed_inputs(find_kernels(isa), x.data(), tokens, inputs);
  Owned<float> out(x.size());
  for (int t = 0; t < tokens; t++)
    for (int i = 0; i < inputs; i++) {
      const int g = i % kSuperblock / kGroup, j = i % kGroup;
      const ActivationBlock& block = packed[static_cast<size_t>(t) * blocks + i / kSuperblock];
      out.data[static_cast<size_t>(t) * inputs + i] = block.scale[g] * block.code[32 * (j / 4) + 4 * g + j % 4];
    }
  return out.array({x.shape(0), x.shape(1)});
}

FloatArray layer_norm(In<float, 1> x, In<float, 1> weight, In<float, 1> bias, float eps, const std::string& isa) {
  require(x.size() == weight.size() && x.size() == bias.size(), "sizes differ");
  Owned<float> out(x.size());
  if (!find_kernels(isa)->layer_norm(x.data(), static_cast<int>(x.size()), eps, weight.data(), bias.data(), out.data))
    throw std::domain_error("an input is not finite");
  return out.array({x.size()});
}

// Inputs in the form that a format wants.
struct Inputs {
  Inputs() = default;
  Inputs(const Kernels* kernels, Format format, const In<float, 2>& x) {
    const int tokens = static_cast<int>(x.shape(0)), inputs = static_cast<int>(x.shape(1));
    if (format == Format::f32 || format == Format::bf16) floats = padded_inputs(x.data(), tokens, inputs);
    else packed = packed_inputs(kernels, x.data(), tokens, inputs);
  }
  const void* data() const { return packed.empty() ? static_cast<const void*>(floats.data()) : packed.data(); }
  std::vector<float> floats;
  std::vector<ActivationBlock> packed;
};

std::vector<float> distances_of(const Kernels* kernels, const In<float, 2>& x, const float* center, size_t inputs) {
  require(x.shape(1) == inputs, "the center has the wrong size");
  std::vector<float> distances(x.shape(0));
  for (size_t t = 0; t < distances.size(); t++) distances[t] = kernels->distance(x.data() + t * inputs, center, static_cast<int>(inputs));
  return distances;
}

// The same inputs for the kernels that take many tokens at once, and their scratch memory.
struct Tiles {
  Tiles(const Kernels* kernels, const Inputs& inputs, int blocks, int tokens) {
    require(kernels->tiled_tokens > 0 && !inputs.packed.empty(), "this instruction set or format has no tiled kernels");
    const int count = (tokens + kTileTokens - 1) / kTileTokens;
    groups.resize(static_cast<size_t>(count) * kLanes * blocks);
    kernels->make_tiles(inputs.packed.data(), tokens, blocks, 0, count, groups.data());
    memory.resize(kernels->tile_scratch_bytes(blocks, tokens) / sizeof(TokenGroup) + 1);
  }
  uint8_t* scratch() const { return reinterpret_cast<uint8_t*>(memory.data()); }
  std::vector<TokenGroup> groups;
  mutable std::vector<TokenGroup> memory;  // any type that is aligned
};

// Likewise for float rows.
struct Panels {
  Panels(const Kernels* table, Format format, const Inputs& inputs, int blocks, int tokens)
      : kernels(format == Format::bf16 ? &table->bf16_panels : &table->float_panels) {
    require(!inputs.floats.empty(), "packed formats have no panels");
    const int count = (tokens + kPanelTokens - 1) / kPanelTokens, width = blocks * kSuperblock;
    lines.resize(panel_lines(*kernels, width, tokens));
    kernels->make(inputs.floats.data(), width, tokens, 0, count, lines.data()->halves);
    memory.resize(kernels->scratch_floats(width, tokens) / 16 + 1);
  }
  // Whether the model takes them for any number of tokens.
  static bool always(const Kernels* table, Format format) { return format == Format::bf16 && table->bf16_panels.fewest_tokens == 1; }
  const uint16_t* data() const { return lines.data()->halves; }
  float* scratch() { return reinterpret_cast<float*>(memory.data()); }
  const PanelKernels* kernels;
  std::vector<PanelLine> lines, memory;
};

// Inputs of few tokens for the kernels on AMX.
struct Eights {
  Eights(const Kernels* kernels, const Inputs& inputs, int blocks, int tokens) : inputs(blocks) {
    require(kernels->fewest_eights && tokens <= kMostEights && !inputs.packed.empty(),
            "this instruction set, format or number of tokens has no kernels for few tokens");
    kernels->make_eights(static_cast<const ActivationBlock*>(inputs.data()), tokens, blocks, 0, blocks, this->inputs.data());
  }
  std::vector<EightTokens> inputs;
};

FloatArray rows(const std::string& format_name, In<uint8_t, 2> weights, std::optional<In<uint8_t, 2>> rest, In<float, 2> x,
                const std::string& isa, bool tiled, bool in_panels, bool in_eights) {
  const Kernels* kernels = find_kernels(isa);
  const Format format = parse_format(format_name);
  const Inputs inputs(kernels, format, x);
  const size_t tokens = x.shape(0), count = weights.shape(0);
  Owned<float> out(tokens * count);
  RowsArgs args = {format, weights.data(), weights.shape(1), rest ? rest->data() : nullptr, rest ? rest->shape(1) : 0,
                         static_cast<int>(round_up(x.shape(1), kSuperblock) / kSuperblock), inputs.data(), static_cast<int>(tokens),
                         nullptr, out.data, count, Epilogue::store, nullptr, nullptr, nullptr, nullptr};
  if (tiled) {
    const Tiles tiles(kernels, inputs, args.blocks, args.tokens);
    args.tiles = tiles.groups.data();
    kernels->tiled_rows(args, 0, static_cast<int>(count), tiles.scratch());
  } else if (in_eights) {
    const Eights eights(kernels, inputs, args.blocks, args.tokens);
    args.eights = eights.inputs.data();
    kernels->eight_rows(args, 0, static_cast<int>(count));
  } else if (in_panels || Panels::always(kernels, format)) {
    Panels panels(kernels, format, inputs, args.blocks, args.tokens);
    args.panels = panels.data();
    panels.kernels->rows(args, 0, static_cast<int>(count), panels.scratch());
  } else {
    kernels->rows(args, 0, static_cast<int>(count));
  }
  return out.array({tokens, count});
}

// The vocabulary head's two passes over rows in planes: estimates, their bounds, and every row refined, [T, R] each.
std::tuple<FloatArray, FloatArray, FloatArray> head_rows(In<uint8_t, 2> top, In<uint8_t, 2> rest, In<float, 2> x, In<float, 1> center,
                                                         float sigmas, const std::string& isa, bool tiled, bool in_eights) {
  const Kernels* kernels = find_kernels(isa);
  const Inputs inputs(kernels, Format::planes, x);
  const size_t tokens = x.shape(0), count = top.shape(0);
  const std::vector<float> distances = distances_of(kernels, x, center.data(), center.size());
  Owned<float> estimate(tokens * count), bound(tokens * count), exact(tokens * count);
  RowsArgs args = {};
  args.format = Format::planes, args.weights = top.data(), args.row_bytes = top.shape(1);
  args.rest = rest.data(), args.rest_bytes = rest.shape(1), args.distances = distances.data();
  args.blocks = static_cast<int>(round_up(x.shape(1), kSuperblock) / kSuperblock);
  args.x = inputs.data(), args.tokens = static_cast<int>(tokens);
  const int rows = static_cast<int>(count);
  if (tiled) {
    const Tiles tiles(kernels, inputs, args.blocks, args.tokens);
    args.tiles = tiles.groups.data();
    kernels->tiled_estimates(args, 0, rows, sigmas, estimate.data, bound.data, count, tiles.scratch());
  } else if (in_eights) {
    const Eights eights(kernels, inputs, args.blocks, args.tokens);
    args.eights = eights.inputs.data();
    kernels->eight_estimates(args, 0, rows, sigmas, estimate.data, bound.data, count);
  } else {
    kernels->estimate_rows(args, 0, rows, sigmas, estimate.data, bound.data, count);
  }
  for (size_t i = 0; i < tokens * count; i++)
    exact.data[i] = kernels->refine_row(args, static_cast<int>(i / count), static_cast<int>(i % count));
  return {estimate.array({tokens, count}), bound.array({tokens, count}), exact.array({tokens, count})};
}

// What the sketch of float rows says of one token: estimates of weights . x and bounds that they are not above, [R] each.
std::tuple<FloatArray, FloatArray> sketched_rows(const std::string& format, In<uint8_t, 2> weights, In<float, 1> center, In<float, 1> x,
                                                 const std::string& isa, int bits) {
  const Kernels* kernels = find_kernels(isa);
  require(bits == kUpBits || bits == kHeadBits, "codes of a sketch have 8 or 5 bits");
  const int rows = static_cast<int>(weights.shape(0)), inputs = static_cast<int>(x.size());
  require(center.size() == x.size(), "the center has the wrong size");
  const size_t element = format == "bfloat16" ? 2 : 4;
  require(format == "bfloat16" || format == "float32", "only float rows have sketches");
  require(weights.shape(1) >= element * inputs && inputs <= kMostSketchInputs, "rows and inputs do not fit together");
  std::vector<PanelLine> sketch(sketch_bytes(rows, inputs, bits) / sizeof(PanelLine));
  uint8_t* const memory = reinterpret_cast<uint8_t*>(sketch.data());
  make_sketch(parse_format(format), weights.data(), weights.shape(1), rows, inputs, center.data(), bits, memory);
  std::vector<uint8_t> parts(2 * round_up(inputs, kSketchInputs));
  Owned<float> estimate(round_up(rows, kSketchRows)), bound(round_up(rows, kSketchRows));
  const SketchInput token = kernels->sketch_input(x.data(), center.data(), inputs, parts.data());
  kernels->sketch_rows(memory, bits, token, 0, rows, estimate.data, bound.data);
  return {estimate.array({weights.shape(0)}), bound.array({weights.shape(0)})};
}

// The MLP of all tokens of a call together, as for batches and prompts; `tiles` is scratch memory of the tiled kernels or null.
void mlp_together(const Kernels* kernels, const MlpArgs& args, uint8_t* tiles, Panels* panels, float* y, MlpCounts* counts) {
  const int tokens = args.tokens, width = args.blocks * kSuperblock;
  const int blocks = (args.neurons + kNeuronBlock - 1) / kNeuronBlock;
  std::vector<ActiveBlock> active(static_cast<size_t>(blocks) * tokens);
  for (int b = 0; b < blocks; b++) {
    std::vector<ActiveBlock*> out(tokens);
    for (int t = 0; t < tokens; t++) {
      out[t] = &active[static_cast<size_t>(b) * tokens + t];
      out[t]->count = 0;
    }
    const int last = std::min((b + 1) * kNeuronBlock, args.neurons);
    if (args.eights) kernels->eight_activate(args, b * kNeuronBlock, last, out.data(), counts);
    else if (tiles) kernels->tiled_activate(args, b * kNeuronBlock, last, out.data(), counts, tiles);
    else if (panels) panels->kernels->activate(args, b * kNeuronBlock, last, out.data(), counts, panels->scratch());
    else kernels->activate(args, b * kNeuronBlock, last, 0, tokens, out.data(), counts);
  }
  const std::vector<float> no_bias(width, 0.0f);
  std::vector<float> scratch(down_scratch_floats(tokens));
  kernels->down_columns(args, active.data(), 0, width, no_bias.data(), y, width, scratch.data());
}

// Likewise for q4, whose up projection is a product of rows like any other.
void int4_together(const Kernels* kernels, const MlpArgs& args, bool tiled, float* y, MlpCounts* counts) {
  const int tokens = args.tokens, width = args.blocks * kSuperblock, neurons = args.neurons;
  const int blocks = (neurons + kNeuronBlock - 1) / kNeuronBlock, tiles = (tokens + kTileTokens - 1) / kTileTokens;
  std::vector<float> squared(static_cast<size_t>(tokens) * neurons), zeros(width, 0.0f);
  kernels->rows({args.format, args.up, args.up_bytes, nullptr, 0, args.blocks, args.x, tokens, args.bias, squared.data(),
                 static_cast<size_t>(neurons), Epilogue::squared_relu, nullptr, nullptr, nullptr, nullptr}, 0, neurons);
  std::vector<ActivationBlock> codes(static_cast<size_t>(blocks) * tokens);
  std::vector<TokenGroup> groups(tiled ? static_cast<size_t>(blocks) * tiles * kLanes : 0);
  std::vector<uint32_t> needed(blocks * kLanes);
  for (int b = 0; b < blocks; b++) {
    ActivationBlock* x = codes.data() + static_cast<size_t>(b) * tokens;
    for (int t = 0; t < tokens; t++)
      kernels->quantize(squared.data() + static_cast<size_t>(t) * neurons + b * kNeuronBlock, std::min(kNeuronBlock, neurons - b * kNeuronBlock), 1, x + t);
    kernels->count_needed(x, tokens, needed.data() + b * kLanes, counts);
    if (tiled) kernels->make_tiles(x, tokens, 1, 0, tiles, groups.data() + static_cast<size_t>(b) * tiles * kLanes);
  }
  counts->candidates += static_cast<int64_t>(tokens) * neurons;
  const Int4DownArgs down = {args.down, args.down_bytes, (neurons + kGroup - 1) / kGroup, args.blocks, codes.data(), groups.data(),
                             needed.data(), tokens, zeros.data(), y, static_cast<size_t>(width)};
  std::vector<float> sums(static_cast<size_t>(tiles * kTileTokens + 1) * width);
  std::vector<TokenGroup> panels(kInt4PanelBytes / sizeof(TokenGroup) + 1);
  if (args.eights) kernels->eight_int4_columns(down, 0, width, sums.data(), reinterpret_cast<uint8_t*>(panels.data()));
  else if (tiled) kernels->tiled_int4_columns(down, 0, width, sums.data(), reinterpret_cast<uint8_t*>(panels.data()));
  else kernels->int4_columns(down, 0, width, sums.data());
}

// The same token by token, as in decoding; with a sketch whose center is the first token.
void mlp_one_by_one(const Kernels* kernels, const MlpArgs& args, const In<float, 2>& x, bool sketched, float* y, MlpCounts* counts) {
  const bool packed = args.format != Format::f32 && args.format != Format::bf16;
  const size_t width = static_cast<size_t>(args.blocks) * kSuperblock;
  const size_t input_bytes = args.blocks * (packed ? sizeof(ActivationBlock) : kSuperblock * sizeof(float));
  const int inputs = static_cast<int>(x.shape(1));
  std::vector<PanelLine> sketch(sketched ? sketch_bytes(args.neurons, inputs, kUpBits) / sizeof(PanelLine) : 0);
  uint8_t* const memory = reinterpret_cast<uint8_t*>(sketch.data());
  if (sketched) make_sketch(args.format, args.up, args.up_bytes, args.neurons, inputs, x.data(), kUpBits, memory);
  std::vector<uint8_t> parts(2 * round_up(inputs, kSketchInputs));
  std::vector<float> sum(width);
  for (int t = 0; t < args.tokens; t++) {
    MlpArgs one = args;
    if (sketched) one.sketch = memory, one.sketched = kernels->sketch_input(x.data() + t * x.shape(1), x.data(), inputs, parts.data());
    one.tokens = 1, one.x = static_cast<const uint8_t*>(args.x) + t * input_bytes, one.outliers = args.outliers + t * kOutliers;
    one.distances = args.distances + t;
    std::optional<Panels> panels;
    if (Panels::always(kernels, args.format)) {
      Inputs input;
      input.floats = padded_inputs(x.data() + t * x.shape(1), 1, static_cast<int>(x.shape(1)));
      one.panels = panels.emplace(kernels, args.format, input, args.blocks, 1).data();
    }
    for (int b = 0; b * kNeuronBlock < args.neurons; b++) {
      std::fill(sum.begin(), sum.end(), 0.0f);
      kernels->one_block(one, b, sum.data(), counts, panels ? panels->scratch() : nullptr);
      for (size_t i = 0; i < width; i++) y[t * width + i] += sum[i];
    }
  }
}

// relu(up . x + bias)^2 through the neurons of `down`: as one token at a time, or as many together.
std::tuple<FloatArray, int64_t, int64_t> sparse_mlp(const std::string& format_name, In<uint8_t, 2> up, In<uint8_t, 2> down, int down_offset,
                                                    In<float, 1> bias, In<float, 2> x, In<float, 2> outliers,
                                                    float margin, std::optional<In<float, 1>> center, bool together,
                                                    const std::string& isa, bool tiled, bool in_panels, bool in_eights, bool sketched) {
  const Kernels* kernels = find_kernels(isa);
  const Format format = parse_format(format_name);
  const Inputs inputs(kernels, format, x);
  const int tokens = static_cast<int>(x.shape(0)), neurons = static_cast<int>(up.shape(0));
  const size_t width = round_up(x.shape(1), kSuperblock);
  require(static_cast<int>(outliers.shape(0)) == tokens && outliers.shape(1) == kOutliers, "outliers have the wrong shape");
  const std::vector<float> zeros(x.shape(1), 0.0f);
  const std::vector<float> distances = distances_of(kernels, x, center ? center->data() : zeros.data(), center ? center->size() : zeros.size());
  MlpArgs args = {format, up.data(), up.shape(1), down.data(), down.shape(1), down_offset, bias.data(), neurons,
                  static_cast<int>(width / kSuperblock), inputs.data(), outliers.data(), distances.data(), margin, tokens, nullptr, nullptr, nullptr, nullptr, {}};
  require(!sketched || (!together && (format == Format::f32 || format == Format::bf16)), "only single tokens and float rows have sketches");
  std::optional<Tiles> tiles;
  if (tiled) args.tiles = tiles.emplace(kernels, inputs, args.blocks, tokens).groups.data();
  std::optional<Panels> panels;
  if (in_panels || Panels::always(kernels, format)) args.panels = panels.emplace(kernels, format, inputs, args.blocks, tokens).data();
  std::optional<Eights> eights;
  if (in_eights) args.eights = eights.emplace(kernels, inputs, args.blocks, tokens).inputs.data();
  MlpCounts counts = {};
  Owned<float> y(tokens * width);
  std::fill_n(y.data, tokens * width, 0.0f);
  if (together && format == Format::q4) int4_together(kernels, args, tiled, y.data, &counts);
  else if (together) mlp_together(kernels, args, tiles ? tiles->scratch() : nullptr, panels ? &*panels : nullptr, y.data, &counts);
  else mlp_one_by_one(kernels, args, x, sketched, y.data, &counts);
  return {y.array({static_cast<size_t>(tokens), width}), counts.candidates, counts.active};
}

// The last T positions of a sequence as queries [T, D] against its keys and values [L, D], in the blocks of a table.
FloatArray attend(In<float, 2> q, In<float, 2> k, In<float, 2> v, Table table, int block_size, bool int8, const std::string& isa) {
  const Kernels* kernels = find_kernels(isa);
  const int queries = static_cast<int>(q.shape(0)), dim = static_cast<int>(q.shape(1)), length = static_cast<int>(k.shape(0));
  require(block_size > 0 && block_size % kKeyGroup == 0 && dim <= kMaxHeadDim && queries <= length, "wrong shape");
  require(length <= static_cast<int>(table.size()) * block_size, "more tokens than blocks");
  const int blocks = *std::max_element(table.data(), table.data() + table.size()) + 1;
  KvCache cache(1, 1, dim, blocks, block_size, int8);
  for (int i = 0; i < length; i++)
    cache.store(*kernels, 0, 0, table.data(), i, k.data() + static_cast<size_t>(i) * dim, v.data() + static_cast<size_t>(i) * dim);
  Owned<float> out(q.size());
  AttentionArgs args = {};
  cache.locate(0, 0, table.data(), &args);
  args.head_dim = dim, args.scale = 1.0f / std::sqrt(static_cast<float>(dim)), args.q_stride = args.out_stride = dim;
  for (int first = 0; first < queries; first += kQueryTile) {
    args.q = q.data() + static_cast<size_t>(first) * dim, args.out = out.data + static_cast<size_t>(first) * dim;
    args.queries = std::min(kQueryTile, queries - first), args.position = length - queries + first;
    int8 ? kernels->attend_int8(args) : kernels->attend_float(args);
  }
  return out.array({q.shape(0), q.shape(1)});
}

// ---- packing -------------------------------------------------------------------------------------------------------------

PackArgs pack_args(const In<float, 2>& w, const std::optional<In<float, 1>>& importance, int threads) {
  require(!importance || importance->size() == w.shape(1), "importance has the wrong size");
  return {w.data(), static_cast<int>(w.shape(0)), static_cast<int>(w.shape(1)), importance ? importance->data() : nullptr, threads};
}

void check_out(const Out<uint8_t, 2>& out, const In<float, 2>& w, int superblock_bytes, size_t offset) {
  const size_t needed = offset + round_up(w.shape(1), kSuperblock) / kSuperblock * superblock_bytes;
  require(out.shape(0) == w.shape(0) && out.shape(1) >= needed, "output has the wrong shape");
}

void py_pack_rows(const std::string& format_name, In<float, 2> w, Out<uint8_t, 2> out, std::optional<In<float, 1>> importance, int threads) {
  const Format format = parse_format(format_name);
  check_out(out, w, format == Format::q4 ? kQ4Bytes : kQ8Bytes, 0);
  const PackArgs args = pack_args(w, importance, threads);
  nb::gil_scoped_release release;
  pack_rows(args, format, out.data(), out.shape(1));
}

void py_pack_planes(In<float, 2> w, In<float, 1> center, std::optional<In<float, 1>> importance, Out<uint8_t, 2> top,
                    Out<uint8_t, 2> rest, int threads) {
  require(center.size() == w.shape(1), "the center has the wrong size");
  const int blocks = static_cast<int>(round_up(w.shape(1), kSuperblock) / kSuperblock);
  require(top.shape(0) == w.shape(0) && top.shape(1) >= top_row_bytes(blocks), "output has the wrong shape");
  check_out(rest, w, kRestBytes, 0);
  const PackArgs args = pack_args(w, importance, threads);
  nb::gil_scoped_release release;
  pack_planes(args, center.data(), top.data(), top.shape(1), rest.data(), rest.shape(1));
}

void py_pack_neurons(In<float, 2> w, Out<uint8_t, 2> out, int offset, int threads) {
  check_out(out, w, kInt8Bytes, offset);
  const PackArgs args = pack_args(w, std::nullopt, threads);
  nb::gil_scoped_release release;
  pack_neurons(args, out.data() + offset, out.shape(1));
}

void py_pack_int4_records(In<float, 2> w, int first, int width, Out<uint8_t, 2> out, int threads) {
  require(width % kSuperblock == 0 && first >= 0 && first + static_cast<int>(w.shape(0)) <= width, "outputs outside the records");
  require(out.shape(0) * kGroup >= w.shape(1) && out.shape(1) >= int4_record_bytes(width / kSuperblock), "output has the wrong shape");
  const PackArgs args = pack_args(w, std::nullopt, threads);
  nb::gil_scoped_release release;
  pack_int4_records(args, first, width, out.data(), out.shape(1));
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Kernels, packers and decoder of the CPU engine (C++).";
  m.def("supported_isas", &supported_isas, "Instruction sets of this build that this processor runs, slowest first.");
  m.attr("GROUP") = kGroup;
  m.attr("SUPERBLOCK") = kSuperblock;
  m.attr("OUTLIERS") = kOutliers;
  m.attr("NEURON_BLOCK") = kNeuronBlock;

  m.attr("KEY_GROUP") = kKeyGroup;

  nb::class_<Cache>(m, "Cache", "Keys and values in blocks.")
      .def("copy_block", &Cache::copy_block, "source"_a, "target"_a)
      .def("state_bytes", [](const Cache& c, int tokens) { return c.open().state_bytes(tokens); }, "tokens"_a)
      .def("save", &Cache::save, "layer"_a, "table"_a, "tokens"_a, "Bytes of the first tokens of a sequence in a layer.")
      .def("restore", &Cache::restore, "layer"_a, "table"_a, "tokens"_a, "state"_a, "What `save` gave, back in place.")
      .def("close", [](Cache& c) { c.kv.reset(); });

  nb::class_<PyModel>(m, "Model", "A decoder over packed weights.")
      .def("__init__",
           [](PyModel* self, int vocab, int hidden, int intermediate, int layers, int heads, int head_dim, int rotary_dim,
              int max_positions, float eps, bool qk_norm, const std::string& attention, const std::string& mlp,
              const std::string& head, bool embedding_bf16, nb::dict tensors, In<float, 2> cos, In<float, 2> sin,
              const std::string& isa, int threads) {
             const Shape shape = {vocab, hidden, intermediate, layers, heads, head_dim, rotary_dim, max_positions, eps, qk_norm};
             const Formats formats = {parse_format(attention), parse_format(mlp), parse_format(head), embedding_bf16};
             require(head_dim % 4 == 0 && head_dim <= 256, "head_dim must be a multiple of 4, at most 256");
             require(threads >= 1, "threads must be positive");
             new (self) PyModel(shape, formats, tensors, cos, sin, isa, threads);
           },
           nb::kw_only(), "vocab"_a, "hidden"_a, "intermediate"_a, "layers"_a, "heads"_a, "head_dim"_a, "rotary_dim"_a,
           "max_positions"_a, "eps"_a, "qk_norm"_a, "attention"_a, "mlp"_a, "head"_a, "embedding_bf16"_a, "tensors"_a, "cos"_a,
           "sin"_a, "isa"_a, "threads"_a)
      .def_prop_ro("threads", [](PyModel& p) { return p.model().threads(); })
      .def_prop_ro("sketch_bytes", [](PyModel& p) { return p.model().held_by_sketches(); })
      .def_prop_ro("isa", [](PyModel& p) { return std::string(p.model().isa()); })
      .def_prop_rw("margin", [](PyModel& p) { return p.model().margin; }, [](PyModel& p, float k) { p.model().margin = k; })
      .def_prop_rw("audit_every", [](PyModel& p) { return p.model().audit_every; },
                   [](PyModel& p, int n) { p.model().audit_every = n; })
      .def("new_cache", &PyModel::new_cache, "num_blocks"_a, "block_size"_a, "int8"_a)
      .def("forward", &PyModel::forward, "chunks"_a, "exact_top"_a, "logits"_a.noconvert(),
           "Store (cache, table, start, ids, wanted) chunks; logits [sum of wanted, vocab] receives the last `wanted` rows of each.")
      .def("score", &PyModel::score, "chunks"_a, "targets"_a, "scores"_a.noconvert(), "likeliest"_a.noconvert(),
           "Store such chunks; for every wanted row the log-probability of its target, and the likeliest token.")
      .def("greedy", &PyModel::greedy, "cache"_a, "table"_a, "start"_a, "token_id"_a, "count"_a, "banned"_a, "stop"_a,
           "Store a token and then the likeliest behind it, one after the other: up to `count` that were picked, the last not stored.")
      .def("counts", &PyModel::counts)
      .def("reset_counts", &PyModel::reset_counts);

  m.def("round_trip", &round_trip, "x"_a, "isa"_a = "auto", "Inputs rounded to int8 in groups of 32, as floats.");
  m.def("layer_norm", &layer_norm, "x"_a, "weight"_a, "bias"_a, "eps"_a, "isa"_a = "auto");
  m.def("rows", &rows, "format"_a, "weights"_a, "rest"_a.none(), "x"_a, "isa"_a = "auto", "tiled"_a = false, "panels"_a = false,
        "eights"_a = false, "x [T, K] . weights^T -> [T, R]; tiled, panels: by the kernels for many tokens of packed or float rows; "
        "eights: by those for up to 8 tokens of packed rows.");
  m.def("head_rows", &head_rows, "top"_a, "rest"_a, "x"_a, "center"_a, "sigmas"_a, "isa"_a = "auto", "tiled"_a = false,
        "eights"_a = false, "The head's estimates of x . weights^T, their bounds, and the refined products, [T, R] each.");
  m.def("sketched_rows", &sketched_rows, "format"_a, "weights"_a, "center"_a, "x"_a, "isa"_a = "auto", "bits"_a = kUpBits,
        "Estimates of weights . x from the sketch of float rows, and bounds that the products are not above, [R] each.");
  m.def("tiled_tokens", [](const std::string& isa) { return find_kernels(isa)->tiled_tokens; }, "isa"_a = "auto",
        "Fewest tokens for which the tiled kernels are used; 0 where there are none.");
  m.def("fewest_eights", [](const std::string& isa) { return find_kernels(isa)->fewest_eights; }, "isa"_a = "auto",
        "Fewest tokens for which the kernels for few tokens are used, up to 8; 0 where there are none.");
  m.def("sparse_mlp", &sparse_mlp, "format"_a, "up"_a, "down"_a, "down_offset"_a, "bias"_a, "x"_a, "outliers"_a, "margin"_a,
        "center"_a.none(), "together"_a, "isa"_a = "auto", "tiled"_a = false, "panels"_a = false, "eights"_a = false,
        "sketched"_a = false, "MLP output without its bias, candidates, active.");
  m.def("attend", &attend, "q"_a, "k"_a, "v"_a, "table"_a, "block_size"_a, "int8"_a, "isa"_a = "auto");
  m.def("fingerprint", [](In<uint8_t, 1> data, const std::string& isa) {
          const Kernels* kernels = find_kernels(isa);
          nb::gil_scoped_release release;
          return kernels->fingerprint(data.data(), data.size());
        }, "data"_a, "isa"_a = "auto", "64 bits that change when the data is damaged.");

  m.def("pack_rows", &py_pack_rows, "format"_a, "weights"_a, "out"_a.noconvert(), "importance"_a.none(), "threads"_a);
  m.def("pack_planes", &py_pack_planes, "weights"_a, "center"_a, "importance"_a.none(), "top"_a.noconvert(), "rest"_a.noconvert(), "threads"_a);
  m.def("pack_neurons", &py_pack_neurons, "weights"_a, "out"_a.noconvert(), "offset"_a, "threads"_a);

  m.def("pack_int4_records", &py_pack_int4_records, "weights"_a, "first"_a, "width"_a, "out"_a.noconvert(), "threads"_a,
        "Rows of a down projection from output `first` on into records that were zero.");

  bind_training(m);
}

}  // namespace persimmon

// The table of kernels that one instruction set offers, and the arguments they take.
//
// T tokens, K inputs of a row padded to 256 * blocks, H hidden size padded likewise, F neurons, D head dimension.
// No kernel starts threads or allocates: the model cuts work into ranges and calls them from its pool.
// The result for a token never depends on the other tokens of a call, on the range, or on the instruction set.
#pragma once
#include "layout.h"

namespace persimmon {

enum class Epilogue : int { store = 0, add = 1, squared_relu = 2 };

// y[t, r] = epilogue(weights[r] . x[t] + bias[r])
struct RowsArgs {
  Format format;
  const uint8_t* weights;  // planes: top rows
  size_t row_bytes;
  const uint8_t* rest;     // planes only
  size_t rest_bytes;
  int blocks;
  const void* x;           // q8, q4, planes: ActivationBlock[T][blocks]; f32, bf16: float[T][256 * blocks]
  int tokens;
  const float* bias;       // or null
  float* y;
  size_t y_stride;
  Epilogue epilogue;
  const float* distances;  // planes, estimates: [T], of the inputs from the center that the shifts are made for
  const TokenGroup* tiles; // tiled kernels: x by make_tiles
  const uint16_t* panels;  // panel kernels: x by PanelKernels::make
  const EightTokens* eights;  // kernels for few tokens: x by make_eights
};

// The non-zero squared activations of one block of kNeuronBlock neurons, ascending.
struct ActiveBlock {
  int count;
  uint8_t index[kNeuronBlock];  // neuron - first neuron of the block
  float value[kNeuronBlock];    // relu(pre-activation)^2
};

// One token as a sketch meets it: its inputs, rounded and cut into two parts (sketch_rows.h).
struct SketchInput {
  const uint8_t *high, *low;
  int quads;            // of inputs, padded
  float step;           // x - center = step * (128 * (high - 64) + low), about
  float length, sum;    // of x - center: its length and the sum of its magnitudes
  float error;          // length of what the parts do not hold, with what rounding adds
  float rounding;       // what rounding adds for each unit of the length of a row
  float more;           // what every bound is above the rest: 0, or infinite for inputs that have no sketch
};

struct MlpArgs {
  Format format;         // f32, bf16, q8, q4, or planes for p44
  const uint8_t* up;     // rows of the up projection; p44: hot rows
  size_t up_bytes;
  const uint8_t* down;   // neuron-major rows of the down projection; p44: cold rows; q4: int4 records of 32 neurons
  size_t down_bytes;
  int down_offset;       // of the int8 superblocks inside a cold row
  const float* bias;     // [F] of the up projection
  int neurons;
  int blocks;            // H / 256, inputs and outputs
  const void* x;         // as in RowsArgs, [T]
  const float* outliers; // p44: float[T][kOutliers], the outlier inputs
  const float* distances;  // p44: [T], of the other inputs from the center that the shifts are made for
  float margin;          // p44: a neuron is skipped when estimate + shift <= -margin * error * distance; infinite never skips
  int tokens;
  const TokenGroup* tiles; // tiled kernels: x by make_tiles
  const uint16_t* panels;  // panel kernels: x by PanelKernels::make
  const EightTokens* eights;  // kernels for few tokens: x by make_eights
  const uint8_t* sketch;      // f32 and bf16, one token: of the up projection (sketch.h), or null
  SketchInput sketched;       // ... and x for it
};

struct MlpCounts {
  int64_t candidates;  // neurons whose exact pre-activation was computed
  int64_t active;      // of them positive; q4: not zero once rounded to int8
  int64_t groups;      // q4: groups of 32 neurons that have an active one
};

// The q4 down projection of many tokens (int4_down.h): y[t, c] += (sum over neurons) + bias[c].
struct Int4DownArgs {
  const uint8_t* records;    // of 32 neurons each (layout.h)
  size_t record_bytes;
  int groups;                // records
  int blocks;                // H / 256, outputs
  const ActivationBlock* x;  // [blocks of kNeuronBlock neurons][T], the squared activations
  const TokenGroup* tiles;   // tiled kernel: [blocks of neurons][tiles of tokens][kLanes]
  const uint32_t* needed;    // [groups], bit i: neuron i of the group is not zero for some token
  int tokens;
  const float* bias;         // [256 * blocks]
  float* y;
  size_t y_stride;
};
constexpr size_t kInt4PanelBytes = 36864;  // scratch of the tiled kernel: 128 outputs of a block of neurons, unpacked

// Logits of some rows, for a softmax over all of them.
struct RowSummary {
  float top;   // the largest
  int at;      // the first that is as large
  float sum;   // of e^(logit - top)
};

constexpr int kKeyGroup = 16;    // tokens of a record of the cache (kv_cache.h)
constexpr int kMaxHeadDim = 256;

// Where the values begin in an int8 record: behind keys and their scales.
constexpr size_t int8_values_offset(int head_dim) { return kKeyGroup * (head_dim + sizeof(float)); }
constexpr size_t key_group_bytes(int head_dim, bool int8) {
  return 2 * kKeyGroup * (int8 ? head_dim + sizeof(float) : head_dim * sizeof(float));
}

// Consecutive tokens of one sequence, at most kQueryTile, as queries of one head against all keys up to themselves; or, with
// head_bytes, one token's queries of as many consecutive heads.
struct AttentionArgs {
  const float* q;           // [queries] rows of [D], normalised and rotated, `q_stride` floats apart
  size_t q_stride;
  float* out;               // likewise
  size_t out_stride;
  int queries;
  int position;             // of the first query: query i sees keys 0 .. position + i, every head 0 .. position
  int head_dim;
  float scale;              // 1 / sqrt(D)
  const uint8_t* base;      // records of the head: base + table[g / groups_per_block] * block_bytes
  const int32_t* table;     //                      + g % groups_per_block * group_bytes
  int groups_per_block;
  size_t group_bytes, block_bytes;
  size_t head_bytes;        // from a head's records in a block to the next head's; 0: queries of one head
};
constexpr int kQueryTile = 32;

// float32 or bfloat16 rows with many tokens, which lie in panels of kPanelTokens.
struct PanelKernels {
  int fewest_tokens;  // from this many tokens on they are taken; 1: always, as `rows` and `activate` sum in another order
  int input_halves;   // 16-bit words of a panel for each of its inputs and tokens
  // x [tokens][inputs] -> panels [begin, end); panels begin at a multiple of 64 bytes.
  void (*make)(const float* x, int inputs, int tokens, int begin, int end, uint16_t* panels);
  size_t (*scratch_floats)(int inputs, int tokens);
  void (*rows)(const RowsArgs& args, int begin, int end, float* scratch);  // scratch: likewise aligned
  // The active neurons among [begin, end) (inside one block) of all tokens, appended to out.
  void (*activate)(const MlpArgs& args, int begin, int end, ActiveBlock* const* out, MlpCounts* counts, float* scratch);
};

struct Kernels {
  const char* name;
  // int8 codes of n inputs (padded with zeros to 256 * blocks); false when an input is not finite.
  bool (*quantize)(const float* x, int n, int blocks, ActivationBlock* out);
  // Length of x - center, n numbers each.
  float (*distance)(const float* x, const float* center, int n);
  // y = (x - mean) / sqrt(variance + eps) * weight + bias over n elements; false when x is not finite.
  bool (*layer_norm)(const float* x, int n, float eps, const float* weight, const float* bias, float* y);
  // Rotate dimensions i and i + half of x by cos[i], sin[i].
  void (*rotate)(float* x, const float* cos, const float* sin, int half);
  void (*rows)(const RowsArgs& args, int begin, int end);
  // Packed rows and many tokens (tiles.h): pays from `tiled_tokens` tokens on; never (and the functions are null) when 0.
  int tiled_tokens;
  void (*make_tiles)(const ActivationBlock* x, int tokens, int blocks, int begin, int end, TokenGroup* tiles);
  size_t (*tile_scratch_bytes)(int blocks, int tokens);
  void (*tiled_rows)(const RowsArgs& args, int begin, int end, uint8_t* scratch);  // scratch: aligned to 64
  void (*tiled_estimates)(const RowsArgs& args, int begin, int end, float sigmas, float* estimate, float* bound,
                          size_t stride, uint8_t* scratch);
  void (*tiled_activate)(const MlpArgs& args, int begin, int end, ActiveBlock* const* out, MlpCounts* counts,
                         uint8_t* scratch);
  // Packed rows and few tokens (eights.h): from `fewest_eights` to kMostEights; never (and the functions are null) when 0.
  int fewest_eights;
  void (*make_eights)(const ActivationBlock* x, int tokens, int blocks, int begin, int end, EightTokens* eights);
  void (*eight_rows)(const RowsArgs& args, int begin, int end);
  void (*eight_estimates)(const RowsArgs& args, int begin, int end, float sigmas, float* estimate, float* bound, size_t stride);
  void (*eight_activate)(const MlpArgs& args, int begin, int end, ActiveBlock* const* out, MlpCounts* counts);
  PanelKernels float_panels, bf16_panels;  // panels.h, float_tiles.h
  // Sketches: parts [2][inputs rounded up to kSketchInputs] of x, whose center is that of the sketch; then estimates of rows
  // [begin, end), begin a multiple of kSketchRows, and bounds that their products are not above, to estimate[0 ..) and bound[0 ..).
  // Whole blocks of rows are written.
  SketchInput (*sketch_input)(const float* x, const float* center, int n, uint8_t* parts);
  void (*sketch_rows)(const uint8_t* sketch, int bits, const SketchInput& x, int begin, int end, float* estimate, float* bound);
  // One token and float rows: y[row] of those of a list, without bias. Scratch: of PanelKernels.
  void (*listed_products)(const RowsArgs& args, const int* list, int count, float* scratch);
  // Planes: estimate[t * stride + r] from the top bits, and bound = estimate + sigmas standard deviations of its error.
  void (*estimate_rows)(const RowsArgs& args, int begin, int end, float sigmas, float* estimate, float* bound,
                        size_t stride);
  // Planes: the exact product of one row and token.
  float (*refine_row)(const RowsArgs& args, int token, int row);
  // Append the active neurons among [begin, end) (inside one block) of tokens [token, token + count) to out[0 .. count).
  void (*activate)(const MlpArgs& args, int begin, int end, int token, int count, ActiveBlock* const* out,
                   MlpCounts* counts);
  // One token, up and down in one: sum[0 .. H) += what the neurons of block `block` contribute.
  // Scratch: of PanelKernels, for float rows.
  void (*one_block)(const MlpArgs& args, int block, float* sum, MlpCounts* counts, float* panel_scratch);
  // y[t, c] += (sum over blocks of their neurons' contributions) + bias[c] for columns [begin, end), multiples of 64.
  // active[block * tokens + t]; scratch holds down_scratch_floats.
  void (*down_columns)(const MlpArgs& args, const ActiveBlock* active, int begin, int end, const float* bias, float* y,
                       size_t y_stride, float* scratch);
  // Fill in what the tokens x[T] of a block of neurons need together, needed[kLanes], and add up their active neurons and groups.
  void (*count_needed)(const ActivationBlock* x, int tokens, uint32_t* needed, MlpCounts* counts);
  // Columns [begin, end), multiples of kInt4Piece, of all tokens; scratch holds (T rounded up to tiles + 1) * (end - begin).
  void (*int4_columns)(const Int4DownArgs& args, int begin, int end, float* scratch);
  void (*tiled_int4_columns)(const Int4DownArgs& args, int begin, int end, float* scratch, uint8_t* panels);  // or null
  void (*eight_int4_columns)(const Int4DownArgs& args, int begin, int end, float* scratch, uint8_t* panels);  // up to kMostEights; or null
  RowSummary (*summarize)(const float* logits, int count);
  void (*attend_int8)(const AttentionArgs& args);
  void (*attend_float)(const AttentionArgs& args);
  // Round [D] floats to int8 with one scale, returned.
  float (*quantize_head)(const float* x, int n, int8_t* codes);
  // The best int4 scale of 32 weights (int4_scale.h).
  float (*int4_scale)(const float* w, const float* importance);
  // Fingerprint of memory (see fingerprint.h).
  uint64_t (*fingerprint)(const uint8_t* p, size_t n);
};

constexpr int kPanelTokens = 32;
struct alignas(64) PanelLine {  // of the memory of panels and their scratch
  uint16_t halves[32];
};
// Words before the panel of token `token`, a multiple of kPanelTokens.
constexpr size_t panel_offset(const PanelKernels& kernels, int inputs, int token) {
  return static_cast<size_t>(token) * inputs * kernels.input_halves;
}
constexpr size_t panel_lines(const PanelKernels& kernels, int inputs, int tokens) {
  return panel_offset(kernels, inputs, static_cast<int>(round_up(tokens, kPanelTokens))) / 32;
}

constexpr int kDownColumns = 64;
constexpr int kMostDownColumns = 256;  // columns that a kernel may take at a time: a whole superblock
constexpr int kFewestShared = 9;      // tokens from which the rows they share are unpacked once for all of them
constexpr int kMostFewColumns = 2048; // columns that a kernel takes at a time for fewer tokens
// down_columns: rows as floats [256][256], scales [256][8], totals [T][256].
constexpr size_t down_scratch_floats(int tokens) {
  return static_cast<size_t>(kNeuronBlock) * (kMostDownColumns + kMostDownColumns / kGroup) +
         static_cast<size_t>(tokens) * kMostDownColumns;
}

// The table of an instruction set, or null when it was not compiled in.
const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* amx_kernels();

}  // namespace persimmon

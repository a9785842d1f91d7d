// The packed formats: sizes and record layouts, shared by the packer, the kernels and the model. No code here, so that
// every translation unit may include it whatever its instruction set.
//
// Everything is built from superblocks of 256 weights, 8 groups of 32 that share one float16 scale each. Lane order puts
// weight 32 g + 4 v + b of a superblock at byte 32 v + 4 g + b: group g owns the g-th 32-bit lane of eight 32-byte vectors,
// so that a dot product needs no shuffles and its eight lanes end as the eight group sums.
//
//   q8   superblock   [256 int8, lane order][8 float16 scales]                                            272 bytes
//   q4   superblock   [128 bytes][8 float16 scales]; byte i = lane-order weight i (low nibble, stored + 8)
//                     and weight 128 + i (high nibble, stored + 8)                                        144 bytes
//   rest superblock   the lower six bits of w + 128, w an int8 weight: [64 bytes; bits 2 k of byte i = upper two bits of lane-order
//                     weight 64 k + i][128 bytes; nibbles as in q4 = lower four bits]                     192 bytes
//   int8 superblock   [256 int8 in plain order][8 float16 scales], of a row that is added to an output    272 bytes
//   int4 record   32 neurons of a q4 down projection with W outputs, padded to 256: [W float16 scales][32 rows of W / 2 bytes]; a
//                 scale is shared by an output's 32 weights. Byte 16 l + 4 j + i of 64 is output 16 j + 4 l + i of 128 (low nibble,
//                 stored + 8) and output 64 + 16 j + 4 l + i (high nibble, stored + 8)                 18 W bytes
//
// A q8 or q4 row is its superblocks one after the other; a row is padded with zero weights to a multiple of 256.
// Planes: an int8 row cut into its top two bits and the rest, so that the top is a stream of a quarter of the bytes.
//   top row   [64 bytes a superblock; bits 2 k of byte i = (w + 128) >> 6 of lane-order weight 64 k + i]
//             [8 bytes a superblock: scales of its groups, in units of the row][TopFacts], padded with zeros to cache lines
//   rest row  rest superblocks, whose scales are those of the top row
// p44, one neuron: hot row = top row of its up row, cold row = [rest row of its up row][int8 superblocks of its down column]
// Head: top rows of the vocabulary in one array, rest rows in another.
// Sketch of float rows, in memory alone: blocks of 16 rows, [codes of their inputs, see sketch_stripe_bytes][SketchFacts].
#pragma once
#include <cstddef>
#include <cstdint>

namespace persimmon {

constexpr int kGroup = 32;          // weights that share a scale
constexpr int kSuperblock = 256;    // weights of a superblock
constexpr int kLanes = 8;           // groups of a superblock = lanes of a dot product
constexpr int kScaleBytes = 16;     // 8 float16
constexpr int kQ8Bytes = 272;
constexpr int kQ4Bytes = 144;
constexpr int kTopBytes = 64;       // of the codes; the scales follow behind those of the whole row
constexpr int kRestBytes = 192;
constexpr int kInt8Bytes = 272;
constexpr int kInt4Piece = 128;      // outputs of 64 bytes of a row of an int4 record
constexpr int kOutliers = 16;       // input columns of an up projection kept in float16
constexpr int kNeuronBlock = 256;   // neurons whose contributions are summed on their own before they join the output

constexpr int kSketchRows = 16;     // rows of a block of a sketch
constexpr int kUpBits = 8, kHeadBits = 5;  // of its codes: of the bytes read, what fewer save and what more rows cost
constexpr int kSketchInputs = 32;   // inputs are padded to a multiple ...
constexpr int kMostSketchInputs = 16384;  // ... and no more are allowed for in what rounding adds
constexpr float kLeastSketched = 1e-15f, kMostSketched = 1e15f;  // largest magnitudes between which no square or product is lost

// What is known of the rows of a block: row = scale * codes + what was lost, of each number at most half a scale.
struct alignas(64) SketchFacts {
  float scale[kSketchRows];
  float error[kSketchRows];   // length of what was lost, rounded up
  float length[kSketchRows];  // of scale * codes, likewise
  float center[kSketchRows];  // product of the row with the center of its inputs; NaN for a row that has no sketch
  int32_t sum[kSketchRows];   // of the codes
};
static_assert(sizeof(SketchFacts) == 320, "five cache lines");

// What the top row says beside its codes. A unit is a power of two, so that a scale is exact in any order of products.
struct TopFacts {
  uint16_t outlier[kOutliers];  // float16 weights of the outlier columns
  float unit;                   // scale of a group = unit * its byte
  float shift;                  // product of what the top bits leave out with the center of the inputs
  float error;                  // root of the mean square of what they leave out, inputs weighted by their mean squared distance
                                // from the center: error * distance is a standard deviation if distances and losses are independent
  float unused;
};
static_assert(sizeof(TopFacts) == 48, "three quarters of a cache line");
constexpr int kLineBytes = 64;

enum class Format : int { f32 = 0, bf16 = 1, q8 = 2, q4 = 3, planes = 4 };

// 256 inputs of one token, rounded to int8 in groups of 32.
struct alignas(64) ActivationBlock {
  int8_t code[kSuperblock];  // lane order
  float scale[kLanes];       // input = scale * code
  float sum[kLanes];         // sum of the group's codes (an integer)
};
static_assert(sizeof(ActivationBlock) == 320, "five cache lines");

constexpr int kTileTokens = 16;     // tokens of a tile

// One group of 32 inputs of a tile of tokens: the same numbers, cut for products with many tokens (tiles.h).
struct alignas(64) TokenGroup {
  int8_t code[kTileTokens][kGroup];  // plain order
  float scale[kTileTokens], sum[kTileTokens];
};
static_assert(sizeof(TokenGroup) == 640, "ten cache lines");

constexpr size_t int4_record_bytes(int blocks) { return static_cast<size_t>(blocks) * kSuperblock * (2 + kGroup / 2); }

constexpr int kMostEights = 8;      // tokens of an EightTokens
constexpr int kPairs = 4;           // of groups of a superblock

// 256 inputs of up to eight tokens, for products with few tokens on AMX (eights.h): a column is a token of one group of a pair.
struct alignas(64) EightTokens {
  int8_t code[kPairs][16][16][4];   // [pair][four inputs][column]; zero where inputs and column are of different groups
  float scale[kPairs][16], sum[kPairs][16];
};
static_assert(sizeof(EightTokens) == 4608, "72 cache lines");

constexpr size_t round_up(size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

constexpr size_t top_row_bytes(int blocks) {
  return round_up(static_cast<size_t>(blocks) * (kTopBytes + kLanes) + sizeof(TopFacts), kLineBytes);
}

// The codes of kSketchInputs inputs of a block of a sketch. With eight bits: [four inputs][row][input]. With five: lines of those four
// bits of two quadruples of inputs each, the first in the lower half of a byte, then one of the fifth bits, bit i of quadruple i.
constexpr size_t sketch_stripe_bytes(int bits) { return static_cast<size_t>(kSketchInputs) * kSketchRows * bits / 8; }
constexpr size_t sketch_block_bytes(int inputs, int bits) {
  return round_up(inputs, kSketchInputs) / kSketchInputs * sketch_stripe_bytes(bits) + sizeof(SketchFacts);
}
constexpr size_t sketch_bytes(int rows, int inputs, int bits) {
  return round_up(rows, kSketchRows) / kSketchRows * sketch_block_bytes(inputs, bits);
}

}  // namespace persimmon

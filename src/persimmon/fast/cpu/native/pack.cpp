// Rounding weights to int8 and int4 in groups of 32 with one float16 scale.
//
// int8: scale = largest magnitude / 127; in planes rounded up to a multiple of the row's unit, a power of two. int4: the scale
// is searched (int4_scale.h). Codes are always taken with the scale as stored.
#include "pack.h"

#include <atomic>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu.h"

namespace persimmon {
namespace {

constexpr float kLargestHalf = 65504.0f;
constexpr float kLeastUnit = 1.0f / (1 << 24);  // the smallest float16, so that every scale of planes is one

float half_value(uint16_t half) {
  const int exponent = half >> 10 & 31, mantissa = half & 1023;
  const float magnitude = exponent ? std::ldexp(1024.0f + mantissa, exponent - 25) : std::ldexp(static_cast<float>(mantissa), -24);
  return half & 0x8000 ? -magnitude : magnitude;
}

// Nearest integer, ties to even, within [low, high]; the constant's last mantissa bit is worth 1. Unlike a library call it
// is turned into vector code.
float round_clamped(float value, float low, float high) {
  constexpr float shift = 12582912.0f;  // 1.5 * 2^23, for |value| < 2^22
  const float clamped = value < low ? low : value > high ? high : value;
  return (clamped + shift) - shift;
}

struct Group {
  int8_t code[kGroup];
  uint16_t scale;
};

// Codes of a group for a float16 scale; a scale of zero (all weights tiny) gives zeros.
Group encode(const float* w, float scale, float low, float high) {
  Group group;
  group.scale = float_to_half(scale);
  const float stored = half_value(group.scale);
  for (int i = 0; i < kGroup; i++) group.code[i] = static_cast<int8_t>(stored == 0 ? 0 : round_clamped(w[i] / stored, low, high));
  return group;
}

Group encode_int8(const float* w, const float*) {
  float largest = 0;
  for (int i = 0; i < kGroup; i++) largest = std::fmax(largest, std::fabs(w[i]));
  return encode(w, largest / 127, -127, 127);
}

Group encode_int4(const float* w, const float* importance) {
  static const Kernels* kernels = find_kernels("auto");  // all instruction sets find the same scale
  return encode(w, kernels->int4_scale(w, importance), -8, 7);
}

// Byte of weight i of group g in lane order.
int lane_order(int g, int i) { return 32 * (i / 4) + 4 * g + i % 4; }

void put_nibble(uint8_t* block, int position, int value) {
  block[position % 128] = static_cast<uint8_t>(block[position % 128] | value << (position < 128 ? 0 : 4));
}

void put_scale(uint8_t* scales, int g, uint16_t scale) { memcpy(scales + 2 * g, &scale, 2); }

using Encoder = Group (*)(const float*, const float*);

// body(i) for i in [0, count), shared among threads.
template <class Body>
void share(int count, int num_threads, Body body) {
  std::atomic<int> next{0};
  const auto work = [&] {
    for (int i; (i = next.fetch_add(1)) < count;) body(i);
  };
  std::vector<std::thread> threads;
  for (int i = 1; i < num_threads; i++) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
}

// Codes of group g of row r, padded with zeros; `refused` when a weight cannot be packed.
Group encoded(const PackArgs& a, Encoder encode_group, int r, int g, std::atomic<bool>* refused) {
  float w[kGroup] = {}, importance[kGroup] = {};
  for (int i = 0; i < kGroup && g * kGroup + i < a.inputs; i++) {
    w[i] = a.weights[static_cast<size_t>(r) * a.inputs + g * kGroup + i];
    importance[i] = a.importance ? a.importance[g * kGroup + i] : 1;
    if (!(std::fabs(w[i]) < 7 * kLargestHalf)) *refused = true;
  }
  return encode_group(w, importance);
}

void check(const std::atomic<bool>& refused) {
  if (refused) throw std::domain_error("a weight is not finite or larger than 458528");
}

// Call put(row, superblock, group in superblock, codes) for every group of every row, rows shared among threads.
template <class Put>
void for_each_group(const PackArgs& a, Encoder encode_group, Put put) {
  const int groups = static_cast<int>(round_up(a.inputs, kSuperblock)) / kGroup;
  std::atomic<bool> refused{false};
  share(a.rows, a.threads, [&](int r) {
    for (int g = 0; g < groups; g++) put(r, g / kLanes, g % kLanes, encoded(a, encode_group, r, g, &refused));
  });
  check(refused);
}

}  // namespace

uint16_t float_to_half(float value) {
  const float magnitude = std::fabs(value);
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (!(magnitude < 65520.0f)) return sign | 0x7C00;
  int exponent;
  std::frexp(magnitude, &exponent);  // magnitude in [2^(exponent - 1), 2^exponent)
  const int unit = exponent - 11 > -24 ? exponent - 11 : -24;  // exponent of the last bit kept
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(magnitude, -unit)));
  // steps counts units; a normal number has 1024 .. 2048 of them, and 2048 carries into the next exponent by itself.
  return static_cast<uint16_t>(sign | (steps < 1024 ? steps : ((unit + 24) << 10) + steps));
}

void pack_rows(const PackArgs& args, Format format, uint8_t* out, size_t stride) {
  const bool q4 = format == Format::q4;
  if (!q4 && format != Format::q8) throw std::invalid_argument("pack_rows takes q8 or q4");
  const int bytes = q4 ? kQ4Bytes : kQ8Bytes;
  memset(out, 0, stride * args.rows);
  for_each_group(args, q4 ? encode_int4 : encode_int8, [=](int r, int s, int g, const Group& group) {
    uint8_t* block = out + r * stride + static_cast<size_t>(s) * bytes;
    for (int i = 0; i < kGroup; i++) {
      const int position = lane_order(g, i);
      if (q4) put_nibble(block, position, group.code[i] + 8);
      else block[position] = static_cast<uint8_t>(group.code[i]);
    }
    put_scale(block + bytes - kScaleBytes, g, group.scale);
  });
}

namespace {

// Scales of a row in planes: unit * code, where unit is a power of two.
struct RowScales {
  float unit;
  std::vector<uint8_t> code;
};

RowScales row_scales(const float* w, int inputs) {
  const int groups = (inputs + kGroup - 1) / kGroup;
  std::vector<float> wanted(groups, 0.0f);
  float most = 0;
  for (int i = 0; i < inputs; i++) wanted[i / kGroup] = std::fmax(wanted[i / kGroup], std::fabs(w[i]) / 127);
  for (float scale : wanted) most = std::fmax(most, scale);
  RowScales scales = {kLeastUnit, std::vector<uint8_t>(groups)};
  while (most > 255 * scales.unit) scales.unit *= 2;
  for (int g = 0; g < groups; g++) scales.code[g] = static_cast<uint8_t>(std::ceil(wanted[g] / scales.unit));
  return scales;
}

void put_two_bits(uint8_t* line, int position, int value) {
  line[position % 64] = static_cast<uint8_t>(line[position % 64] | value << position / 64 * 2);
}

void pack_planes_row(const float* w, int inputs, const float* center, const float* importance, uint8_t* top, uint8_t* rest) {
  const size_t blocks = round_up(inputs, kSuperblock) / kSuperblock;
  memset(top, 0, top_row_bytes(static_cast<int>(blocks)));
  memset(rest, 0, blocks * kRestBytes);
  const RowScales scales = row_scales(w, inputs);
  uint8_t* const codes = top + blocks * kTopBytes;
  double shift = 0, squares = 0, all = 0;
  for (int i = 0; i < static_cast<int>(blocks) * kSuperblock; i++) {
    const int g = i / kGroup;
    const uint8_t code = g * kGroup < inputs ? scales.code[g] : 0;
    const float scale = scales.unit * code;
    const int value = (code && i < inputs ? static_cast<int>(round_clamped(w[i] / scale, -127, 127)) : 0) + 128, left = value % 64;
    uint8_t *t = top + static_cast<size_t>(i / kSuperblock) * kTopBytes, *r = rest + static_cast<size_t>(i / kSuperblock) * kRestBytes;
    const int position = lane_order(g % kLanes, i % kGroup);
    put_two_bits(t, position, value / 64);
    put_two_bits(r, position, left / 16);
    put_nibble(r + kRestBytes - kSuperblock / 2, position, left % 16);
    codes[g] = code;
    if (i >= inputs) continue;
    const double lost = scale * (left - 31.5), weight = importance ? importance[i] : 1;
    shift += lost * center[i], squares += lost * lost * weight, all += weight;
  }
  TopFacts facts = {};
  facts.unit = scales.unit, facts.shift = static_cast<float>(shift), facts.error = static_cast<float>(std::sqrt(all > 0 ? squares / all : 0));
  memcpy(codes + blocks * kLanes, &facts, sizeof facts);
}

}  // namespace

void pack_planes(const PackArgs& args, const float* center, uint8_t* top, size_t top_stride, uint8_t* rest, size_t rest_stride) {
  std::atomic<bool> refused{false};
  share(args.rows, args.threads, [&](int r) {
    const float* w = args.weights + static_cast<size_t>(r) * args.inputs;
    for (int i = 0; i < args.inputs; i++)
      if (!(std::fabs(w[i]) < 7 * kLargestHalf)) return void(refused = true);
    pack_planes_row(w, args.inputs, center, args.importance, top + r * top_stride, rest + r * rest_stride);
  });
  check(refused);
}

void pack_neurons(const PackArgs& args, uint8_t* out, size_t stride) {
  for_each_group(args, encode_int8, [=](int r, int s, int g, const Group& group) {
    uint8_t* block = out + r * stride + static_cast<size_t>(s) * kInt8Bytes;
    memcpy(block + kGroup * g, group.code, kGroup);
    put_scale(block + kSuperblock, g, group.scale);
  });
}

void pack_int4_records(const PackArgs& args, int first, int width, uint8_t* out, size_t stride) {
  std::atomic<bool> refused{false};
  // A record has one writer, as two outputs share a byte.
  share(static_cast<int>(round_up(args.inputs, kGroup)) / kGroup, args.threads, [&](int g) {
    uint8_t* record = out + g * stride;
    for (int r = 0; r < args.rows; r++) {
      const Group group = encoded(args, encode_int4, r, g, &refused);
      const int output = first + r, j = output % 64 / 16, l = output % 16 / 4, i = output % 4;
      uint8_t* byte = record + 2 * width + output / kInt4Piece * 64 + 16 * l + 4 * j + i;
      memcpy(record + 2 * output, &group.scale, 2);
      for (int n = 0; n < kGroup; n++, byte += width / 2)
        *byte = static_cast<uint8_t>(*byte | (group.code[n] + 8) << (output % kInt4Piece < 64 ? 0 : 4));
    }
  });
  check(refused);
}

}  // namespace persimmon

// The attention of train_attention.h on AMX: bfloat16 as one product of tiles, float32 as six (train_tiles.h).
//
// Scores are computed transposed, keys by queries: then queries lie along the vector lanes, running maxima, totals and the
// forward pass's normalizers are plain vectors, and no sum across lanes is needed. Queries, keys, values and gradients are split (in
// bfloat16: rounded, as under PyTorch's autocast) once, probabilities and gradients of scores right after they are made.
//
// While the scores of one block are multiplied the exponentials of the block before are computed, a few vectors after every four tile
// products, so that the tile unit and the vector units can work at the same time.
#pragma once
#include "train_attention_amx_backward.h"
#include "train_attention_amx_forward.h"

#if defined(__AMX_BF16__)

namespace persimmon {
namespace PERSIMMON_ISA {

// In float32 the vectors are faster where tiles would be mostly padding: heads of up to 16, documents of a few tokens.
constexpr int kTilesFrom = 64;  // tokens; measured break-even (docs/LOG.md, 2026-11-26)
INLINE bool worth_tiles(const AttentionTensors& t, int length) {
  return t.element == Element::bf16 || (t.padded > kTrainVector && length >= kTilesFrom);
}

static size_t amx_scratch(int padded, int length) {
  const size_t n = round_up(length, kAmxKeys), W = round_up(padded, kStep), size = n * W + kApart, stretch = kAmxStretch * kAmxKeys * W + kApart;
  // Backward, which needs more than forward: four packed arrays of three parts and grad_q, two vectors; for a stretch of keys three packed
  // arrays and four of gradients; twice two blocks of scores and three of results; the rounding of each to a cache line.
  const size_t bytes = size * (4 * 3 * 2 + 4) + n * 8 + stretch * (3 * 3 * 2 + 4 * 4) + 2 * kPart * (2 * 4 + 3 * 3 * 2) + 32 * 64;
  const size_t plain = attention_scratch(padded, length);
  return bytes / 4 > plain ? round_up(bytes / 4, 64) : plain;
}

template <int kParts, class T>
static void amx_forward(const AttentionTensors& t, int head, int start, int first, int last, float* scratch) {
  AmxForward<kParts, T> pass(t, head, start, last, scratch);
  constexpr int most = kAmxGroups * kAmxQueries;
  for (; first < last; first += most) pass.queries(first, min_int(most, last - first));
}

static void amx_attention_forward(const AttentionTensors& t, int head, int start, int first, int last, float* scratch) {
  if (t.element == Element::bf16) amx_forward<1, uint16_t>(t, head, start, first, last, scratch);
  else if (worth_tiles(t, last)) amx_forward<3, float>(t, head, start, first, last, scratch);
  else attention_forward_as<float>(t, head, start, first, last, scratch);
}

static void amx_attention_backward(const AttentionTensors& t, int head, int start, int end, float* scratch) {
  if (t.element == Element::bf16) AmxBackward<1, uint16_t>(t, head, start, end, scratch).run();
  else if (worth_tiles(t, end - start)) AmxBackward<3, float>(t, head, start, end, scratch).run();
  else attention_backward_as<float>(t, head, start, end, scratch);
}

}  // namespace PERSIMMON_ISA
}  // namespace persimmon
#endif

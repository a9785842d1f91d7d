// Queries of a prompt against int8 keys and values on AMX: sixteen queries meet a tile of 64 keys at once.
//
// A record's keys are the right matrix of a tile product as they lie in memory (four dimensions of sixteen tokens a row), the codes of
// sixteen queries the left one. The values of a tile, four keys of every dimension a row, are put together from its records; their left
// matrices are the two planes of the rounded weights. What lies between, the softmax, is that of attention.h, query by query. All
// sums of integers are exact, so the result has the bits of attention.h.
#pragma once
#include "attention.h"
#include "tiles.h"

namespace persimmon {
namespace PERSIMMON_ISA {

#if defined(__AMX_INT8__)

constexpr int kTileQueries = 16;
constexpr int kFewestTileQueries = 8;  // fewer are as fast without: 4 on 4,096 keys take 1.45 ms with and 1.33 without, 8 1.88 and 2.14
constexpr int kQuads = kTileKeys / 4;  // rows of the values

struct alignas(64) TileBuffers {
  uint8_t values[kQuads * 4 * kMaxHeadDim];  // [quad of keys][dimension][key]
  int32_t scores[kTileQueries][kTileKeys];
  uint8_t high[kTileQueries][kTileKeys], low[kTileQueries][kTileKeys];
  int32_t sums[2][kTileQueries][16];
  float unit[kTileQueries];
};

INLINE void configure_attention() {
  TileShapes shapes = {};
  shapes.palette = 1;
  for (int i = 0; i < 8; i++) shapes.row_bytes[i] = 64, shapes.rows[i] = 16;
  asm volatile("ldtilecfg %0" ::"m"(shapes));
}

// Keys of a record times sixteen queries, `steps` times 64 dimensions.
INLINE void record_scores(const int32_t* queries, const uint8_t* keys, int steps, int32_t* scores) {
  constexpr long query_bytes = kMaxHeadDim;
  asm volatile("tilezero %%tmm0" ::: "memory");
  for (int s = 0; s < steps; s++) {
    asm volatile("tileloadd (%0,%1,1), %%tmm2" ::"r"(queries + 16 * s), "r"(query_bytes) : "memory");
    asm volatile("tileloadd (%0,%1,1), %%tmm3" ::"r"(keys + 1024 * s), "r"(64L) : "memory");
    asm volatile("tdpbssd %%tmm3, %%tmm2, %%tmm0" ::: "memory");
  }
  asm volatile("tilestored %%tmm0, (%0,%1,1)" ::"r"(scores), "r"(4L * kTileKeys) : "memory");
}

// Sixteen dimensions from `d` on of all queries: both planes of weights times values.
INLINE void tile_sums(TileBuffers* m, int d, int dim) {
  asm volatile("tileloadd (%0,%1,1), %%tmm3" ::"r"(m->values + 4 * d), "r"(4L * dim) : "memory");
  asm volatile("tilezero %%tmm0\n\ttdpbusd %%tmm3, %%tmm4, %%tmm0" ::: "memory");
  asm volatile("tilezero %%tmm1\n\ttdpbusd %%tmm3, %%tmm5, %%tmm1" ::: "memory");
  asm volatile("tilestored %%tmm0, (%0,%1,1)" ::"r"(m->sums[0]), "r"(64L) : "memory");
  asm volatile("tilestored %%tmm1, (%0,%1,1)" ::"r"(m->sums[1]), "r"(64L) : "memory");
}

// Queries [first, first + count) against one tile, whose first key is key `start`.
INLINE void attend_tile_queries(const AttentionArgs& a, const Int8Cache& cache, const KeyTile& tile, int start, int first, int count,
                                Softmax* states, TileBuffers* m) {
  for (int g = 0; g < kTileGroups; g++)
    record_scores(cache.words[first], tile.group[g], a.head_dim / 64, &m->scores[0][kKeyGroup * g]);
  for (int i = 0; i < count; i++) {
    const int visible = a.position + first + i + 1 - start;
    m->unit[i] = 0.0f;
    if (visible <= 0) continue;
    float weights[kTileKeys];
    for (int g = 0; g < kTileGroups; g++) {
      const f32x16 key_scales = load16(reinterpret_cast<const float*>(tile.group[g] + kKeyGroup * a.head_dim));
      const f32x16 scores = to_floats(_mm512_load_si512(&m->scores[i][kKeyGroup * g]));
      store16(weights + kKeyGroup * g, mul(scores, mul(set16(cache.scale[first + i]), key_scales)));
    }
    to_weights(visible, weights, states + first + i, a.out + (first + i) * a.out_stride, a.head_dim);
    m->unit[i] = cache.round_weights(tile, weights, m->high[i], m->low[i]);
  }
  asm volatile("tileloadd (%0,%1,1), %%tmm4" ::"r"(m->high), "r"(64L) : "memory");
  asm volatile("tileloadd (%0,%1,1), %%tmm5" ::"r"(m->low), "r"(64L) : "memory");
  for (int d = 0; d < a.head_dim; d += 16) {
    tile_sums(m, d, a.head_dim);
    for (int i = 0; i < count; i++) {
      if (m->unit[i] == 0.0f) continue;
      float* sum = a.out + (first + i) * a.out_stride + d;
      const WeightedSums sums = {_mm512_load_si512(m->sums[0][i]), _mm512_load_si512(m->sums[1][i])};
      store16(sum, fma(set16(m->unit[i]), to_floats(sums), load16(sum)));
    }
  }
}

static void attend_int8_tiles(const AttentionArgs& a) {
  if (a.head_bytes || a.queries < kFewestTileQueries || a.head_dim % 64) return attend_int8(a);
  const Int8Cache cache(a);
  Softmax states[kQueryTile];
  TileBuffers m = {};
  KeyTile tile;
  clear_output(a);
  configure_attention();
  const int length = a.position + a.queries, quad_bytes = 4 * a.head_dim;
  find_groups(a, 0, length, tile.next);
  for (int start = 0; start < length; start += kTileKeys) {
    memcpy(tile.group, tile.next, sizeof tile.group);
    if (start + kTileKeys < length) find_groups(a, start + kTileKeys, length - start - kTileKeys, tile.next);
    for (int k = 0; k < kTileKeys; k += 4) memcpy(m.values + k * a.head_dim, cache.values(tile, k), quad_bytes);
    for (int g = 0; g < kTileGroups; g++) prefetch(tile.next[g], static_cast<int>(a.group_bytes));
    const int unseeing = start > a.position ? start - a.position : 0;  // earlier queries do not see this tile
    for (int first = unseeing / kTileQueries * kTileQueries; first < a.queries; first += kTileQueries)
      attend_tile_queries(a, cache, tile, start, first, min_int(kTileQueries, a.queries - first), states, &m);
  }
  release();
  divide_by_sums(a, states);
}

#else

static void attend_int8_tiles(const AttentionArgs& a) { attend_int8(a); }

#endif

}  // namespace PERSIMMON_ISA
}  // namespace persimmon

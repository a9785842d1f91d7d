// The MLP with its zeros: y = down . relu(up . x + b)^2, reading only what the zeros leave.
//
// Exact part. The down projection is stored neuron-major: a neuron whose activation is zero contributes nothing and its row
// is never read. At 10% active this reads a tenth of the matrix.
// Margin part (p44 only). The int8 up projection is cut into its top two bits and the rest. The top of every neuron is read
// as one stream and gives an estimate; its error is taken for normal with the standard deviation error * distance, where
// `error` is the root mean square of what the row's top bits leave out and `distance` how far the inputs are from their center
// (what is left out of the center's product is known: `shift`). A neuron whose estimate + shift is at most -margin
// deviations is taken for inactive. Only the others read their cold row: [rest | int8 down row], contiguous. With an
// infinite margin every rest is read, and the result is that of the int8 weights.
// Estimate + rest is always computed in this order, so that a neuron that is kept has the same value for every margin.
//
// Sums: each block of 256 neurons is summed on its own, neurons ascending, and blocks join the output in ascending order.
// This order does not depend on threads, so neither does the result; one token and many tokens use the same order.
// When it does not pay: p44 above about 30% active against dense int4 weights, 70% against int8 (row kernels); for long prefills every
// row is read.
#pragma once
#include "rows.h"

namespace persimmon {
namespace PERSIMMON_ISA {

INLINE void append(ActiveBlock* out, int index, float pre_activation) {
  out->index[out->count] = static_cast<uint8_t>(index);
  out->value[out->count] = pre_activation * pre_activation;
  out->count++;
}

INLINE float outlier_product(const TopFacts& facts, const float* x) {
  return sum_lanes(mul(load_half16(facts.outlier), load16(x)));
}

// p44: estimates of a neuron for N tokens from its top bits, and which of them (a bit each) may find it active.
template <int N>
INLINE int estimate_neuron(const MlpArgs& a, int r, const ActivationBlock* const* x, int token, float* p) {
  const uint8_t* hot = a.up + r * a.up_bytes;
  const TopFacts& facts = top_facts(hot, a.blocks);
  top_row<N>(hot, a.blocks, x, p);
  int wanted = 0;
  for (int t = 0; t < N; t++) {
    p[t] = p[t] + outlier_product(facts, a.outliers + (token + t) * kOutliers) + a.bias[r];
    wanted |= static_cast<int>(!(p[t] + facts.shift <= -a.margin * (facts.error * a.distances[token + t]))) << t;
  }
  return wanted;
}

// p44: neurons [begin, end) for N tokens.
template <int N>
static void activate_planes(const MlpArgs& a, int begin, int end, int token, ActiveBlock* const* out, MlpCounts* counts) {
  const ActivationBlock* x[N];
  for (int t = 0; t < N; t++) x[t] = token_input(static_cast<const ActivationBlock*>(a.x), token + t, a.blocks);
  // Estimates first, in one stream; the cold rows that are needed are fetched meanwhile.
  float pre[kNeuronBlock][N];
  uint8_t wanted[kNeuronBlock];
  for (int r = begin; r < end; r++) {
    wanted[r - begin] = static_cast<uint8_t>(estimate_neuron<N>(a, r, x, token, pre[r - begin]));
    if (wanted[r - begin]) prefetch(a.down + r * a.down_bytes, 512);
  }
  for (int r = begin; r < end; r++) {
    const int mask = wanted[r - begin];
    if (!mask) continue;
    const uint8_t *hot = a.up + r * a.up_bytes, *cold = a.down + r * a.down_bytes;
    for (int t = 0; t < N; t++) {
      if (!(mask >> t & 1)) continue;
      float rest;
      rest_row<1>(cold, hot, a.blocks, x + t, &rest);
      const float p = pre[r - begin][t] + rest;
      counts->candidates++;
      if (p > 0.0f) append(out[t], r % kNeuronBlock, p), counts->active++;
    }
  }
}

// Every other format: the exact pre-activation of every neuron.
template <class R, int N>
static void activate_rows(const MlpArgs& a, int begin, int end, int token, ActiveBlock* const* out, MlpCounts* counts) {
  RowsArgs row = {};
  row.weights = a.up, row.row_bytes = a.up_bytes, row.blocks = a.blocks;
  const typename R::Input* x[N];
  for (int t = 0; t < N; t++) x[t] = token_input(static_cast<const typename R::Input*>(a.x), token + t, a.blocks);
  for_rows<R, N>(row, begin, end, x, [&](int r, const float* products) {
    float p[N];
    uint32_t active = 0;  // most rows have none: one branch for all tokens
    for (int t = 0; t < N; t++) p[t] = products[t] + a.bias[r], active |= static_cast<uint32_t>(p[t] > 0.0f) << t;
    for (; active; active &= active - 1) {
      const int t = __builtin_ctz(active);
      append(out[t], r % kNeuronBlock, p[t]), counts->active++;
    }
  });
  counts->candidates += static_cast<int64_t>(end - begin) * N;
}

template <int N>
static void activate_tile(const MlpArgs& a, int begin, int end, int token, ActiveBlock* const* out, MlpCounts* counts) {
  switch (a.format) {
    case Format::f32: activate_rows<FloatRows<float>, N>(a, begin, end, token, out, counts); break;
    case Format::bf16: activate_rows<FloatRows<uint16_t>, N>(a, begin, end, token, out, counts); break;
    case Format::q8: activate_rows<PackedQ8, N>(a, begin, end, token, out, counts); break;
    case Format::planes: activate_planes<N>(a, begin, end, token, out, counts); break;
    case Format::q4: break;  // int4_down.h
  }
}

static void activate(const MlpArgs& a, int begin, int end, int token, int count, ActiveBlock* const* out,
                     MlpCounts* counts) {
  int t = 0;
  for (; t + kTile <= count; t += kTile) activate_tile<kTile>(a, begin, end, token + t, out + t, counts);
  for (; t + 4 <= count; t += 4) activate_tile<4>(a, begin, end, token + t, out + t, counts);
  switch (count - t) {
    case 3: activate_tile<3>(a, begin, end, token + t, out + t, counts); break;
    case 2: activate_tile<2>(a, begin, end, token + t, out + t, counts); break;
    case 1: activate_tile<1>(a, begin, end, token + t, out + t, counts); break;
    default: break;
  }
}

// ---- down rows ---------------------------------------------------------------------------------------------------------

// An int8 row: superblocks of 256 outputs in plain order, a scale per 32.
struct Int8Down {
  static constexpr bool scaled = true;
  INLINE size_t at(int column) {  // column: a multiple of 32
    return static_cast<size_t>(column / kSuperblock) * kInt8Bytes + column % kSuperblock;
  }
  INLINE f32x16 load(const uint8_t* row, int column, int i) {
    return load_int8x16(reinterpret_cast<const int8_t*>(row + at(column)) + i);
  }
  // Where columns begin in a row, and the bytes that some of them take.
  INLINE size_t offset(int column) { return at(column); }
  INLINE size_t bytes(int column, int count) { return at(column + count) - at(column) + kScaleBytes; }
  // value * scale of N groups of one superblock.
  template <int N>
  INLINE void factors(const uint8_t* row, int column, float value, float* out) {
    const uint8_t* scales = row + static_cast<size_t>(column / kSuperblock) * kInt8Bytes + kSuperblock;
    if (N == kLanes) return store8(out, mul(set8(value), load_half8(scales)));
    for (int g = 0; g < N; g++)
      out[g] = value * half_to_float(read_unaligned<uint16_t>(scales + (column % kSuperblock / kGroup + g) * 2));
  }
  INLINE float scale(const uint8_t* row, int column) {
    const uint8_t* scales = row + static_cast<size_t>(column / kSuperblock) * kInt8Bytes + kSuperblock;
    return half_to_float(read_unaligned<uint16_t>(scales + column % kSuperblock / kGroup * 2));
  }
};
template <class T>
struct FloatDown {
  static constexpr bool scaled = false;
  INLINE f32x16 load(const uint8_t* row, int column, int i) {
    return load_weights16(reinterpret_cast<const T*>(row) + column + i);
  }
  INLINE size_t offset(int column) { return column * sizeof(T); }
  INLINE size_t bytes(int, int count) { return count * sizeof(T); }
  INLINE float scale(const uint8_t*, int) { return 1.0f; }
  template <int N>
  INLINE void factors(const uint8_t*, int, float value, float* out) {
    for (int g = 0; g < N; g++) out[g] = value;
  }
};

constexpr int kRowsAtOnce = 4;  // neurons added in one pass over the output, which so stays in registers between them

template <class D, int N>
INLINE void add_rows(const uint8_t* const* row, const float* value, const uint8_t* const* next, int blocks, float* sum) {
  for (int column = 0; column < blocks * kSuperblock; column += kGroup) {
    f32x16 y0 = load16(sum + column), y1 = load16(sum + column + 16);
    for (int k = 0; k < N; k++) {
      const f32x16 a = set16(D::scaled ? value[k] * D::scale(row[k], column) : value[k]);
      y0 = fma(a, D::load(row[k], column, 0), y0);
      y1 = fma(a, D::load(row[k], column, 16), y1);
      if (D::scaled && column % 64 == 0 && next[k]) __builtin_prefetch(next[k] + Int8Down::at(column));
    }
    store16(sum + column, y0), store16(sum + column + 16, y1);
  }
}

template <class D>
static void add_neurons_of(const MlpArgs& a, int block, const ActiveBlock& active, int from, float* sum) {
  const uint8_t* base = a.down + a.down_offset + static_cast<size_t>(block) * kNeuronBlock * a.down_bytes;
  for (int i = from; i < active.count; i += kRowsAtOnce) {
    const uint8_t *row[kRowsAtOnce], *next[kRowsAtOnce];
    for (int k = 0; k < kRowsAtOnce; k++) {
      row[k] = i + k < active.count ? base + active.index[i + k] * a.down_bytes : nullptr;
      const int after = i + kRowsAtOnce + k;
      next[k] = after < active.count ? base + active.index[after] * a.down_bytes : nullptr;
    }
    switch (active.count - i) {
      case 1: add_rows<D, 1>(row, active.value + i, next, a.blocks, sum); break;
      case 2: add_rows<D, 2>(row, active.value + i, next, a.blocks, sum); break;
      case 3: add_rows<D, 3>(row, active.value + i, next, a.blocks, sum); break;
      default: add_rows<D, 4>(row, active.value + i, next, a.blocks, sum); break;
    }
  }
}

static void add_neurons(const MlpArgs& a, int block, const ActiveBlock& active, int from, float* sum) {
  switch (a.format) {
    case Format::f32: add_neurons_of<FloatDown<float>>(a, block, active, from, sum); break;
    case Format::bf16: add_neurons_of<FloatDown<uint16_t>>(a, block, active, from, sum); break;
    case Format::q8:
    case Format::planes: add_neurons_of<Int8Down>(a, block, active, from, sum); break;
    case Format::q4: break;
  }
}

// p44, one token: the estimates of a block in one stream, without a branch between its rows; then the rest of those that are
// wanted; then the down rows of what is active. Each of the three knows what it reads next, and fetches it while it works:
// records lie far apart, and the processor's own prefetchers begin anew with each (docs/LOG.md, 2026-11-26).
static void planes_block(const MlpArgs& a, int block, float* sum, MlpCounts* counts) {
  const ActivationBlock* x[1] = {static_cast<const ActivationBlock*>(a.x)};
  const int begin = block * kNeuronBlock, end = min_int(begin + kNeuronBlock, a.neurons);
  float pre[kNeuronBlock];
  int list[kNeuronBlock], candidates = 0;
  for (int r = begin; r < end; r++) {
    float p;
    const int wanted = estimate_neuron<1>(a, r, x, 0, &p);
    pre[candidates] = p, list[candidates] = r;
    candidates += wanted;
  }
  ActiveBlock active;
  active.count = 0;
  for (int k = 0; k < candidates; k++) {
    const uint8_t *hot = a.up + list[k] * a.up_bytes, *cold = a.down + list[k] * a.down_bytes;
    const uint8_t* next = k + 1 < candidates ? a.down + list[k + 1] * a.down_bytes : nullptr;
    float rest;
    rest_row<1>(cold, hot, a.blocks, x, &rest, next);
    const float p = pre[k] + rest;
    if (p > 0.0f) append(&active, list[k] - begin, p);
  }
  add_neurons(a, block, active, 0, sum);
  counts->candidates += candidates, counts->active += active.count;
}

constexpr int kNeuronsAtOnce = 64;  // rows of the up projection between two looks at the down projection

// One token and one block of neurons, up and down: sum[0 .. H) += their contributions.
static void one_block(const MlpArgs& a, int block, float* sum, MlpCounts* counts) {
  if (a.format == Format::planes) return planes_block(a, block, sum, counts);
  ActiveBlock active;
  active.count = 0;
  ActiveBlock* out = &active;
  const int last = min_int((block + 1) * kNeuronBlock, a.neurons);
  for (int n = block * kNeuronBlock; n < last; n += kNeuronsAtOnce) {
    const int before = active.count;
    activate(a, n, min_int(n + kNeuronsAtOnce, last), 0, 1, &out, counts);
    add_neurons(a, block, active, before, sum);
  }
}

// Many tokens: C columns of a block's rows become floats once, then every token adds its own neurons from them, its
// sums in registers. `total` [T][C] gathers the blocks.
constexpr int kFewTokens = 32;  // with more, nearly every neuron is needed by one of them

// Neurons of a block that some token adds, ascending; returns how many.
static int needed_neurons(const MlpArgs& a, int block, const ActiveBlock* active, uint8_t* list) {
  const int count = min_int(kNeuronBlock, a.neurons - block * kNeuronBlock);
  bool needed[kNeuronBlock] = {};
  for (int t = 0; a.tokens <= kFewTokens && t < a.tokens; t++)
    for (int i = 0; i < active[t].count; i++) needed[active[t].index[i]] = true;
  int found = 0;
  for (int n = 0; n < count; n++)
    if (a.tokens > kFewTokens || needed[n]) list[found++] = static_cast<uint8_t>(n);
  return found;
}

template <class D, int C>
static void unpack_columns(const MlpArgs& a, int block, const ActiveBlock* active, int column, float* rows, float* scales) {
  constexpr int ahead = 8;  // the pieces of rows lie far apart, so no hardware prefetcher finds the next
  const uint8_t* base = a.down + a.down_offset + static_cast<size_t>(block) * kNeuronBlock * a.down_bytes;
  uint8_t list[kNeuronBlock];
  const int count = needed_neurons(a, block, active, list);
  for (int k = 0; k < count; k++) {
    const int n = list[k];
    if (k + ahead < count) prefetch(base + list[k + ahead] * a.down_bytes + D::offset(column), static_cast<int>(D::bytes(column, C)));
    const uint8_t* row = base + n * a.down_bytes;
    for (int i = 0; i < C; i += kGroup) {
      store16(rows + n * C + i, D::load(row, column + i, 0)), store16(rows + n * C + i + 16, D::load(row, column + i, 16));
      scales[n * (C / kGroup) + i / kGroup] = D::scale(row, column + i);
    }
  }
}

template <class D, int C>
static void add_block_columns(const MlpArgs& a, const ActiveBlock* active, const float* rows, const float* scales, float* total) {
  constexpr int groups = C / kGroup;
  for (int t = 0; t < a.tokens; t++) {
    const ActiveBlock& mine = active[t];
    if (!mine.count) continue;
    f32x16 y[C / 16];
#pragma GCC unroll 16
    for (int k = 0; k < C / 16; k++) y[k] = zero16();
    for (int i = 0; i < mine.count; i++) {
      const float *row = rows + mine.index[i] * C, *scale = scales + mine.index[i] * groups;
#pragma GCC unroll 8
      for (int g = 0; g < groups; g++) {
        const f32x16 p = set16(D::scaled ? mine.value[i] * scale[g] : mine.value[i]);
        y[2 * g] = fma(p, load16(row + g * kGroup), y[2 * g]);
        y[2 * g + 1] = fma(p, load16(row + g * kGroup + 16), y[2 * g + 1]);
      }
    }
    float* sum = total + t * C;
#pragma GCC unroll 16
    for (int k = 0; k < C / 16; k++) store16(sum + 16 * k, add(load16(sum + 16 * k), y[k]));
  }
}

template <class D, int C>
static void down_chunk(const MlpArgs& a, const ActiveBlock* active, int column, const float* bias, float* y, size_t y_stride,
                       float* scratch) {
  float *rows = scratch, *scales = rows + kNeuronBlock * C, *total = scales + kNeuronBlock * (C / kGroup);
  const int num_blocks = (a.neurons + kNeuronBlock - 1) / kNeuronBlock;
  for (int i = 0; i < a.tokens * C; i += 16) store16(total + i, zero16());
  for (int b = 0; b < num_blocks; b++) {
    const ActiveBlock* mine = active + static_cast<size_t>(b) * a.tokens;
    unpack_columns<D, C>(a, b, mine, column, rows, scales);
    add_block_columns<D, C>(a, mine, rows, scales, total);
  }
  for (int t = 0; t < a.tokens; t++)
    for (int i = 0; i < C; i++) y[t * y_stride + column + i] += total[t * C + i] + bias[column + i];
}

// Lines of memory to fetch, asked for a few at a time between other work: in bursts they wait for the few line buffers, and the
// work with them (docs/LOG.md, 2026-11-27).
struct PieceFetcher {
  const uint8_t* piece[kNeuronBlock];
  int count = 0, at = 0;
  size_t bytes = 0, offset = 0;  // of each piece; into the piece at hand
  int lines = 0;                 // at a time

  void spread_over(int visits) {
    const int all = count * static_cast<int>((bytes + kLineBytes - 1) / kLineBytes);
    lines = visits ? (all + visits - 1) / visits : all;
  }
  inline __attribute__((always_inline)) void fetch(int wanted) {
    for (; wanted > 0 && at < count; wanted--) {
      __builtin_prefetch(piece[at] + offset, 0, 2);
      offset += kLineBytes;
      if (offset >= bytes) at++, offset = 0;
    }
  }
};

// Sums of one token's neurons of a block, C columns of one superblock.
template <class D, int C>
INLINE void add_own_columns(const uint8_t* base, size_t row_bytes, const ActiveBlock& mine, int column, PieceFetcher* fetcher, float* total) {
  constexpr int groups = C / kGroup;
  f32x16 y[C / 16];
#pragma GCC unroll 16
  for (int k = 0; k < C / 16; k++) y[k] = zero16();
  for (int i = 0; i < mine.count; i++) {
    const uint8_t* row = base + mine.index[i] * row_bytes;
    float factor[groups];
    D::template factors<groups>(row, column, mine.value[i], factor);
#pragma GCC unroll 8
    for (int g = 0; g < groups; g++) {
      const f32x16 p = set16(factor[g]);
      y[2 * g] = fma(p, D::load(row, column + g * kGroup, 0), y[2 * g]);
      y[2 * g + 1] = fma(p, D::load(row, column + g * kGroup, 16), y[2 * g + 1]);
    }
    fetcher->fetch(fetcher->lines);
  }
#pragma GCC unroll 16
  for (int k = 0; k < C / 16; k++) store16(total + 16 * k, add(load16(total + 16 * k), y[k]));
}

// Few tokens: hardly a row is wanted by two of them, so every token reads its rows as they are, C columns of them at a time,
// its sums in registers. The pieces that the next block of neurons wants, each as long as the range, are fetched meanwhile.
template <class D, int C>
static void down_few(const MlpArgs& a, const ActiveBlock* active, int begin, int end, const float* bias, float* y, size_t y_stride,
                     float* total) {
  const int num_blocks = (a.neurons + kNeuronBlock - 1) / kNeuronBlock, columns = end - begin;
  for (int i = 0; i < a.tokens * columns; i += 16) store16(total + i, zero16());
  const auto base = [&](int b) { return a.down + a.down_offset + static_cast<size_t>(b) * kNeuronBlock * a.down_bytes; };
  const auto fetcher_of = [&](int b) {
    PieceFetcher fetcher;
    uint8_t list[kNeuronBlock];
    if (b < num_blocks) fetcher.count = needed_neurons(a, b, active + static_cast<size_t>(b) * a.tokens, list);
    for (int k = 0; k < fetcher.count; k++) fetcher.piece[k] = base(b) + list[k] * a.down_bytes + D::offset(begin);
    fetcher.bytes = D::bytes(begin, columns);
    return fetcher;
  };
  PieceFetcher first = fetcher_of(0);
  first.spread_over(0), first.fetch(first.lines);
  for (int b = 0; b < num_blocks; b++) {
    const ActiveBlock* mine = active + static_cast<size_t>(b) * a.tokens;
    PieceFetcher next = fetcher_of(b + 1);
    int visits = 0;
    for (int t = 0; t < a.tokens; t++) visits += mine[t].count * (columns / C);
    next.spread_over(visits);
    for (int column = begin; column < end; column += C)
      for (int t = 0; t < a.tokens; t++)
        if (mine[t].count) add_own_columns<D, C>(base(b), a.down_bytes, mine[t], column, &next, total + t * columns + (column - begin));
    if (!visits) next.fetch(next.lines);
  }
  for (int t = 0; t < a.tokens; t++)
    for (int i = 0; i < columns; i++) y[t * y_stride + begin + i] += total[t * columns + i] + bias[begin + i];
}

// Wide chunks read the lists of active neurons less often; they want thirty-two wide registers.
#if defined(__AVX512F__)
constexpr int kWideColumns = kMostDownColumns;
#else
constexpr int kWideColumns = kDownColumns;
#endif

template <class D>
static void down_columns_of(const MlpArgs& a, const ActiveBlock* active, int begin, int end, const float* bias, float* y,
                            size_t y_stride, float* scratch) {
  for (; a.tokens < kFewestShared && begin < end; begin += kMostFewColumns) {
    const int last = min_int(begin + kMostFewColumns, end);
    if ((begin | last) % kWideColumns == 0) down_few<D, kWideColumns>(a, active, begin, last, bias, y, y_stride, scratch);
    else down_few<D, kDownColumns>(a, active, begin, last, bias, y, y_stride, scratch);
  }
  int column = begin;
  for (; column + kWideColumns <= end; column += kWideColumns)
    down_chunk<D, kWideColumns>(a, active, column, bias, y, y_stride, scratch);
  for (; column < end; column += kDownColumns) down_chunk<D, kDownColumns>(a, active, column, bias, y, y_stride, scratch);
}

static void down_columns(const MlpArgs& a, const ActiveBlock* active, int begin, int end, const float* bias, float* y,
                         size_t y_stride, float* scratch) {
  switch (a.format) {
    case Format::f32: down_columns_of<FloatDown<float>>(a, active, begin, end, bias, y, y_stride, scratch); break;
    case Format::bf16: down_columns_of<FloatDown<uint16_t>>(a, active, begin, end, bias, y, y_stride, scratch); break;
    case Format::q8:
    case Format::planes: down_columns_of<Int8Down>(a, active, begin, end, bias, y, y_stride, scratch); break;
    case Format::q4: break;
  }
}

}  // namespace PERSIMMON_ISA
}  // namespace persimmon

// The attention of train_attention.h on AMX: bfloat16 as one product of tiles, float32 as six (train_tiles.h).
//
// Scores are computed transposed, keys by queries: then queries lie along the vector lanes, running maxima, totals and the
// forward pass's normalizers are plain vectors, and no sum across lanes is needed. Queries, keys, values and gradients are split (in
// bfloat16: rounded, as under PyTorch's autocast) once, probabilities and gradients of scores right after they are made.
//
// The tile unit and the vector units work at the same time: while the scores of one block are multiplied, the exponentials of the
// block before are computed, a few vectors after every four tile products.
#pragma once
#include "train_attention.h"
#include "train_tiles.h"

#if defined(__AMX_BF16__)

namespace persimmon {
namespace PERSIMMON_ISA {

constexpr int kAmxQueries = 32, kAmxKeys = 64;  // a block of scores: with its parts and operands about the first-level cache
constexpr int kAmxGroups = 4;                   // blocks of queries that share one passage over the keys (forward)
constexpr int kAmxStretch = 4;                  // blocks of keys that share one passage over the queries (backward)
constexpr int kBlock = kAmxKeys * kAmxQueries;
constexpr int kPieces = kBlock / 64;            // of vector work: two keys, 32 queries
constexpr int kBesides = 6;                     // calls of beside() in a step of 2 x 2 tiles of float32

// Of sixteen queries from `query`, those that see `key`.
INLINE __mmask16 seeing(int query, int key) {
  const int hidden = key - query;
  return hidden <= 0 ? 0xFFFF : hidden >= 16 ? 0 : static_cast<__mmask16>(0xFFFFu << hidden);
}

struct Block {  // of scores: queries from q0 and keys from k0
  int q0, k0, keys;
  bool masked() const { return k0 + keys > q0 + 1; }
};

template <int kParts>
INLINE f32x16 exp2_of(f32x16 x) { return exp2_nonpositive<kParts == 1 ? 3 : 6>(x); }  // as good as the parts

// Vector work in pieces of two keys, 16 apart: they share a line of the results.
class Pieces {
 public:
  // In how many calls all pieces are to be done.
  void start(int keys, int calls) { next_ = 0, end_ = keys / 2, at_once_ = calls > 0 ? (end_ + calls - 1) / calls : end_; }

 protected:
  static int key_of(int piece) { return piece / 16 * kStep + piece % 16; }
  int next_ = 0, end_ = 0, at_once_ = 0;
};

// ---- forward -----------------------------------------------------------------------------------------------------------------

struct Running {  // of a block of queries
  float maxima[kAmxQueries], totals[kAmxQueries], shrink[kAmxQueries];
};

// Transposed scores -> probabilities as B tiles [keys / 32][queries / 16].
template <int kParts>
class SoftmaxPieces : public Pieces {
 public:
  SoftmaxPieces(float factor) : factor_(set16(factor)) {}

  // Brings maxima up to date; `shrink` receives what earlier totals and outputs are to be multiplied with. Whether that is not one.
  bool begin(const Block& block, const float* scores, Running& running, uint16_t* tiles, int calls) {
    start(block.keys, calls);
    block_ = block, scores_ = scores, running_ = &running, tiles_ = tiles;
    bool changed = false;
    for (int h = 0; h < 2; h++) {
      f32x16 most[2] = {set16(-INFINITY), set16(-INFINITY)};
      const float* column = scores + 16 * h;
      for (int i = 0; i < block.keys; i += 2)
        for (int both = 0; both < 2; both++) {
          const f32x16 x = load16(column + (i + both) * kAmxQueries);
          most[both] = block.masked() ? _mm512_mask_max_ps(most[both], seeing(block.q0 + 16 * h, block.k0 + i + both), most[both], x)
                                      : maximum(most[both], x);
        }
      const f32x16 before = load16(running.maxima + 16 * h), now = maximum(before, mul(maximum(most[0], most[1]), factor_));
      const __mmask16 other = _mm512_cmp_ps_mask(before, now, _CMP_NEQ_UQ);
      const f32x16 less = _mm512_mask_mov_ps(set16(1.0f), other, exp2_nonpositive(sub(before, now)));
      store16(running.maxima + 16 * h, now);
      store16(running.shrink + 16 * h, less);
      shift_[h] = sub(zero16(), now), total_[h] = mul(load16(running.totals + 16 * h), less);
      changed |= other != 0;
    }
    return changed;
  }

  inline __attribute__((always_inline)) void operator()() {
    for (int i = 0; i < at_once_ && next_ < end_; i++) piece(key_of(next_++));
  }

  void finish() {
    while (next_ < end_) piece(key_of(next_++));
    for (int h = 0; h < 2; h++) store16(running_->totals + 16 * h, total_[h]);
  }

 private:
  inline __attribute__((always_inline)) void piece(int key) {
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
      f32x16 a = exp2_of<kParts>(fma(load16(scores_ + key * kAmxQueries + 16 * h), factor_, shift_[h]));
      f32x16 b = exp2_of<kParts>(fma(load16(scores_ + (key + 16) * kAmxQueries + 16 * h), factor_, shift_[h]));
      if (block_.masked()) {
        a = _mm512_maskz_mov_ps(seeing(block_.q0 + 16 * h, block_.k0 + key), a);
        b = _mm512_maskz_mov_ps(seeing(block_.q0 + 16 * h, block_.k0 + key + 16), b);
      }
      total_[h] = add(total_[h], add(a, b));
      uint16_t* line = tiles_ + (key / kStep * 2 + h) * kTile + key % kStep * kStep;
      store_lines(line, kBlock, split<kParts>(a), split<kParts>(b));
    }
  }

  f32x16 factor_, shift_[2], total_[2];
  Block block_;
  const float* scores_;
  Running* running_;
  uint16_t* tiles_;
};

template <int kParts, class T>
class AmxForward {
 public:
  AmxForward(const AttentionTensors& t, int head, int start, int last, float* scratch)
      : t_(t), head_(head), start_(start), last_(last), W_(static_cast<int>(round_up(t.padded, kStep))), pieces_(t.scale * kLog2E) {
    const int n = static_cast<int>(round_up(last, kAmxKeys));
    size_ = static_cast<size_t>(n) * W_, base_ = (static_cast<size_t>(head) * t.tokens + start) * t.padded;
    Arena arena(scratch);
    keys_ = arena.take<uint16_t>(kParts * size_), values_ = arena.take<uint16_t>(kParts * size_);
    lanes_ = arena.take<uint16_t>(kParts * kAmxGroups * kAmxQueries * W_);
    sums_ = arena.take<float>(kAmxGroups * kAmxQueries * W_);
    running_ = arena.take<Running>(kAmxGroups);
    for (int i = 0; i < 2; i++) scores_[i] = arena.take<float>(kBlock), shares_[i] = arena.take<uint16_t>(kParts * kBlock);
    const size_t row = t.padded;
    pack_rows<kParts>(Matrix{t.k + base_, row, last, t.padded}, n, W_, keys_, size_);
    pack_across<kParts>(Matrix{t.v + base_, row, last, t.padded}, n, W_, values_, size_);
  }

  // Queries [first, first + count) of the document, at most kAmxGroups blocks.
  void queries(int first, int count) {
    begin(first, count);
    Block now = {first, 0, 0};
    now.keys = keys_seen(now);
    multiply_scores(now, 0, [] {});
    Block before;
    bool there = false, more = true;
    for (int i = 0; more; i ^= 1) {
      Block next = now;
      more = advance(next, first, count);
      Running& running = running_[group_of(now)];
      const int calls = kBesides * ((more ? products(next.keys) : 0) + (there ? products(before.keys) : 0));
      const bool changed = pieces_.begin(now, scores_[i], running, shares_[i], kParts == 3 ? calls : calls / kBesides);
      if (more) multiply_scores(next, i ^ 1, pieces_);
      if (there) multiply_values(before, i ^ 1, pieces_);
      pieces_.finish();
      if (changed && now.k0 > 0) shrink(sums_of(now), running.shrink);
      before = now, there = true, now = next;
      if (!more) multiply_values(before, i, [] {});
    }
    for (int i = 0; i < count; i++) write(first + i, sums_ + (i / kAmxQueries * W_) * kAmxQueries + i % kAmxQueries, i);
  }

 private:
  void begin(int first, int count) {
    first_ = first;
    const Matrix q = {t_.q + base_ + static_cast<size_t>(first) * t_.padded, static_cast<size_t>(t_.padded), count, t_.padded};
    pack_lanes<kParts>(q, static_cast<int>(round_up(count, kAmxQueries)), W_, lanes_, lanes_part());
    for (int g = 0; g < kAmxGroups; g++)
      for (int i = 0; i < kAmxQueries; i++) running_[g].maxima[i] = -INFINITY, running_[g].totals[i] = 0;
  }

  int group_of(const Block& b) const { return (b.q0 - first_) / kAmxQueries; }
  float* sums_of(const Block& b) const { return sums_ + group_of(b) * W_ * kAmxQueries; }  // [W][queries]
  size_t lanes_part() const { return static_cast<size_t>(kAmxGroups) * kAmxQueries * W_; }
  int products(int keys) const { return keys / kStep * (W_ / kStep); }  // steps of 2 x 2 tiles in a product
  int keys_seen(const Block& b) const { return min_int(kAmxKeys, static_cast<int>(round_up(b.q0 + kAmxQueries - b.k0, kStep))); }

  // The next block of queries that sees these keys, else the first that sees the next keys; false: there is none.
  bool advance(Block& b, int first, int count) const {
    b.q0 += kAmxQueries;
    if (b.q0 >= first + count) {
      b.k0 += kAmxKeys;
      b.q0 = b.k0 < first + kAmxQueries ? first : first + (b.k0 - first) / kAmxQueries * kAmxQueries;
    }
    b.keys = keys_seen(b);
    return b.q0 < first + count && b.k0 < last_;
  }

  template <class Beside>
  void multiply_scores(const Block& b, int slot, Beside&& beside) {
    const size_t w = W_, steps = w / kStep;
    tile_product<kParts>({keys_ + b.k0 * w, w, 16 * w, kStep, size_},
                         {lanes_ + (b.q0 - first_) * w, kStep, steps * kTile, kTile, lanes_part()}, scores_[slot], kAmxQueries,
                         b.keys / 16, 2, static_cast<int>(steps), false, beside);
  }

  template <class Beside>
  void multiply_values(const Block& b, int slot, Beside&& beside) {
    const size_t w = W_;
    tile_product<kParts>({values_ + b.k0 * w, kStep, 16 * kStep, w * kStep, size_}, {shares_[slot], kStep, kTile, 2 * kTile, kBlock},
                         sums_of(b), kAmxQueries, W_ / 16, 2, b.keys / kStep, b.k0 > 0, beside);
  }

  void shrink(float* sums, const float* by) const {
    for (int d = 0; d < W_; d++, sums += kAmxQueries)
      for (int h = 0; h < kAmxQueries; h += 16) store16(sums + h, mul(load16(sums + h), load16(by + h)));
  }

  void write(int query, const float* sums, int i) const {
    alignas(64) float line[kMostHeadDim];
    const Running& running = running_[i / kAmxQueries];
    const size_t token = static_cast<size_t>(start_) + query;
    const float total = running.totals[i % kAmxQueries], share = 1.0f / total;
    for (int d = 0; d < t_.padded; d++) line[d] = sums[d * kAmxQueries] * share;
    write_unpadded(line, t_.dim, static_cast<T*>(t_.out) + (token * t_.heads + head_) * t_.dim);
    t_.normalizer[static_cast<size_t>(head_) * t_.tokens + token] = running.maxima[i % kAmxQueries] + std::log2(total);
  }

  const AttentionTensors& t_;
  int head_, start_, last_, W_, first_ = 0;
  size_t size_, base_;
  uint16_t *keys_, *values_, *lanes_, *shares_[2];
  float *sums_, *scores_[2];
  Running* running_;
  SoftmaxPieces<kParts> pieces_;
  const TileRegisters registers_;
};

// ---- backward ----------------------------------------------------------------------------------------------------------------

// Transposed scores and products with the output's gradient -> probabilities and gradients of scores as A (a row per key), and
// the latter as B tiles [keys / 32][queries / 16] too.
template <int kParts>
class GradientPieces : public Pieces {
 public:
  GradientPieces(float factor) : factor_(set16(factor)) {}

  // scores, products and the results lie one after the other.
  void begin(const Block& block, const float* scores, const float* normalizer, const float* dots, uint16_t* results, int calls) {
    start(block.keys, calls);
    block_ = block, scores_ = scores, results_ = results;
    for (int h = 0; h < 2; h++) shift_[h] = sub(zero16(), load16(normalizer + block.q0 + 16 * h)), dots_[h] = load16(dots + block.q0 + 16 * h);
  }

  inline __attribute__((always_inline)) void operator()() {
    for (int i = 0; i < at_once_ && next_ < end_; i++) piece(key_of(next_++));
  }
  void finish() {
    while (next_ < end_) piece(key_of(next_++));
  }

 private:
  inline __attribute__((always_inline)) void piece(int key) {
    uint16_t *shares = results_, *grads = shares + kParts * kBlock, *tiles = grads + kParts * kBlock;
    Split<kParts> gradient[2][2];
#pragma GCC unroll 2
    for (int both = 0; both < 2; both++) {
      const int k = key + 16 * both, at = k * kAmxQueries;
      Split<kParts> share[2];
#pragma GCC unroll 2
      for (int h = 0; h < 2; h++) {
        f32x16 p = exp2_of<kParts>(fma(load16(scores_ + at + 16 * h), factor_, shift_[h]));
        if (block_.masked()) p = _mm512_maskz_mov_ps(seeing(block_.q0 + 16 * h, block_.k0 + k), p);
        share[h] = split<kParts>(p);
        gradient[both][h] = split<kParts>(mul(p, sub(load16(scores_ + kBlock + at + 16 * h), dots_[h])));
      }
      store_lines(shares + at, kBlock, share[0], share[1]);
      store_lines(grads + at, kBlock, gradient[both][0], gradient[both][1]);
    }
    uint16_t* line = tiles + key / kStep * 2 * kTile + key % kStep * kStep;
    store_lines(line, kBlock, gradient[0][0], gradient[1][0]);
    store_lines(line + kTile, kBlock, gradient[0][1], gradient[1][1]);
  }

  f32x16 factor_, shift_[2], dots_[2];
  Block block_;
  const float* scores_;
  uint16_t* results_;
};

template <int kParts, class T>
class AmxBackward {
 public:
  AmxBackward(const AttentionTensors& t, int head, int start, int end, float* scratch)
      : t_(t), head_(head), start_(start), count_(end - start), W_(static_cast<int>(round_up(t.padded, kStep))),
        n_(static_cast<int>(round_up(count_, kAmxQueries))), pieces_(t.scale * kLog2E) {
    size_ = static_cast<size_t>(n_) * W_, base_ = (static_cast<size_t>(head) * t.tokens + start) * t.padded;
    Arena arena(scratch);
    auto packed = [&](size_t n) { return arena.take<uint16_t>(kParts * n); };
    q_lanes_ = packed(size_), q_pairs_ = packed(size_), g_lanes_ = packed(size_), g_pairs_ = packed(size_);
    grad_q_ = arena.take<float>(size_), normalizer_ = arena.take<float>(n_), dots_ = arena.take<float>(n_);
    keys_ = packed(stretch()), across_ = packed(stretch()), values_ = packed(stretch());
    grad_k_ = arena.take<float>(stretch()), grad_v_ = arena.take<float>(stretch());
    for (int i = 0; i < 2; i++) scores_[i] = arena.take<float>(2 * kBlock), results_[i] = arena.take<uint16_t>(3 * kParts * kBlock);
    pack_gradients(grad_q_);  // for a moment
    const Matrix q = {t.q + base_, static_cast<size_t>(t.padded), count_, t.padded};
    pack_lanes<kParts>(q, n_, W_, q_lanes_, size_);
    pack_pairs<kParts>(q, n_, W_, q_pairs_, size_);
    memset(grad_q_, 0, size_ * sizeof(float));
  }

  void run() {
    for (int k0 = 0; k0 < count_; k0 += kAmxStretch * kAmxKeys) keys(k0, min_int(kAmxStretch * kAmxKeys, count_ - k0));
    for (int i = 0; i < count_; i++) {
      const float* from = grad_q_ + static_cast<size_t>(i / kAmxQueries) * kAmxQueries * W_ + i % kAmxQueries;
      for (int d = 0; d < t_.padded; d++) t_.grad_q[base_ + static_cast<size_t>(i) * t_.padded + d] = from[d * kAmxQueries] * t_.scale;
    }
  }

 private:
  size_t stretch() const { return static_cast<size_t>(kAmxStretch) * kAmxKeys * W_; }
  int products(const Block& b) const { return 2 * (b.keys / kStep) * (W_ / kStep); }  // steps of 2 x 2 tiles for a block of scores
  int keys_seen(const Block& b) const { return min_int(kAmxKeys, b.q0 + kAmxQueries - b.k0); }

  // The output's gradient as both kinds of B, its product with the output, and the normalizers; `rows` is [n][W] of memory.
  void pack_gradients(float* rows) {
    const T *out = static_cast<const T*>(t_.out), *grad_out = static_cast<const T*>(t_.grad_out);
    alignas(64) float line[kMostHeadDim];
    for (int i = 0; i < n_; i++) {
      const size_t place = ((static_cast<size_t>(start_) + i) * t_.heads + head_) * t_.dim;
      float* row = rows + static_cast<size_t>(i) * W_;
      normalizer_[i] = dots_[i] = 0;
      if (i >= count_) continue;
      read_padded(grad_out + place, t_.dim, W_, row);
      read_padded(out + place, t_.dim, W_, line);
      f32x16 sum = zero16();
      for (int d = 0; d < W_; d += 16) sum = fma(load16(row + d), load16(line + d), sum);
      dots_[i] = sum_lanes(sum);
      normalizer_[i] = t_.normalizer[static_cast<size_t>(head_) * t_.tokens + start_ + i];
    }
    const Matrix g = {rows, static_cast<size_t>(W_), count_, W_};
    pack_lanes<kParts>(g, n_, W_, g_lanes_, size_);
    pack_pairs<kParts>(g, n_, W_, g_pairs_, size_);
  }

  // Gradients of the keys and values [first, first + count), and what they add to those of the queries.
  void keys(int first, int count) {
    const size_t row = t_.padded, from = base_ + first * row;
    const int padded = static_cast<int>(round_up(count, kAmxKeys));
    pack_rows<kParts>(Matrix{t_.k + from, row, count, t_.padded}, padded, W_, keys_, stretch());
    pack_across<kParts>(Matrix{t_.k + from, row, count, t_.padded}, padded, W_, across_, stretch());
    pack_rows<kParts>(Matrix{t_.v + from, row, count, t_.padded}, padded, W_, values_, stretch());
    memset(grad_k_, 0, stretch() * sizeof(float));
    memset(grad_v_, 0, stretch() * sizeof(float));
    first_ = first;
    Block now = {first, first, kAmxQueries}, before;
    multiply_scores(now, 0, [] {});
    bool there = false, more = true;
    for (int i = 0; more; i ^= 1) {
      Block next = now;
      more = advance(next, first + count);
      const int steps = (more ? products(next) : 0) + (there ? products(before) * 3 / 2 : 0);
      pieces_.begin(now, scores_[i], normalizer_, dots_, results_[i], kParts == 3 ? kBesides * steps : steps);
      if (more) multiply_scores(next, i ^ 1, pieces_);
      if (there) multiply_gradients(before, i ^ 1, pieces_);
      pieces_.finish();
      before = now, there = true, now = next;
      if (!more) multiply_gradients(before, i, [] {});
    }
    for (int i = 0; i < count; i++)
      for (int d = 0; d < t_.padded; d += 16) {
        const size_t to = from + i * row + d;
        store16(t_.grad_k + to, mul(load16(grad_k_ + i * W_ + d), set16(t_.scale)));
        store16(t_.grad_v + to, load16(grad_v_ + i * W_ + d));
      }
  }

  // The next keys before `end` that the queries see, else the next queries; false: there are none.
  bool advance(Block& b, int end) const {
    b.k0 += kAmxKeys;
    if (b.k0 >= end || b.k0 >= b.q0 + kAmxQueries) b.k0 = first_, b.q0 += kAmxQueries;
    b.keys = keys_seen(b);
    return b.q0 < n_;
  }

  template <class Beside>
  void multiply_scores(const Block& b, int slot, Beside&& beside) {
    const size_t w = W_, steps = w / kStep, at = (b.k0 - first_) * w;
    const TileOperand lanes = {q_lanes_ + b.q0 * w, kStep, steps * kTile, kTile, size_};
    const TileOperand grads = {g_lanes_ + b.q0 * w, kStep, steps * kTile, kTile, size_};
    const int m = b.keys / 16, s = static_cast<int>(steps);
    tile_product<kParts>({keys_ + at, w, 16 * w, kStep, stretch()}, lanes, scores_[slot], kAmxQueries, m, 2, s, false, beside);
    tile_product<kParts>({values_ + at, w, 16 * w, kStep, stretch()}, grads, scores_[slot] + kBlock, kAmxQueries, m, 2, s, false, beside);
  }

  template <class Beside>
  void multiply_gradients(const Block& b, int slot, Beside&& beside) {
    const size_t w = W_, at = (b.k0 - first_) * w, tiles = w / 16;
    const uint16_t *shares = results_[slot], *grads = shares + kParts * kBlock, *turned = grads + kParts * kBlock;
    const TileOperand g = {g_pairs_ + b.q0 * w, kStep, kTile, tiles * kTile, size_}, q = {q_pairs_ + b.q0 * w, kStep, kTile, tiles * kTile, size_};
    const int m = b.keys / 16, n = static_cast<int>(tiles);
    tile_product<kParts>({shares, kAmxQueries, 16 * kAmxQueries, kStep, kBlock}, g, grad_v_ + at, w, m, n, 1, true, beside);
    tile_product<kParts>({grads, kAmxQueries, 16 * kAmxQueries, kStep, kBlock}, q, grad_k_ + at, w, m, n, 1, true, beside);
    tile_product<kParts>({across_ + at, kStep, 16 * kStep, w * kStep, stretch()}, {turned, kStep, kTile, 2 * kTile, kBlock},
                         grad_q_ + b.q0 * w, kAmxQueries, n, 2, b.keys / kStep, true, beside);
  }

  const AttentionTensors& t_;
  int head_, start_, count_, W_, n_, first_ = 0;
  size_t size_, base_;
  uint16_t *q_lanes_, *q_pairs_, *g_lanes_, *g_pairs_, *keys_, *across_, *values_, *results_[2];
  float *grad_q_, *normalizer_, *dots_, *grad_k_, *grad_v_, *scores_[2];  // grad_q [n / 32][W][32]
  GradientPieces<kParts> pieces_;
  const TileRegisters registers_;
};

// ---- the choice --------------------------------------------------------------------------------------------------------------

// Where tiles would be mostly padding the vectors are faster: heads of up to 16 and, in float32, documents of a few tokens.
INLINE bool worth_tiles(const AttentionTensors& t, int length) { return t.element == Element::bf16 || (t.padded > 16 && length > 16); }

static size_t amx_scratch(int padded, int length) {
  const size_t n = round_up(length, kAmxKeys), W = round_up(padded, kStep), stretch = kAmxStretch * kAmxKeys * W;
  // Backward, which needs more than forward: four packed arrays of three parts and grad_q, two vectors; for a stretch of keys three packed
  // arrays and two of gradients; twice two blocks of scores and three of results.
  const size_t bytes = n * W * (4 * 3 * 2 + 4) + n * 8 + stretch * (3 * 3 * 2 + 2 * 4) + 2 * kBlock * (2 * 4 + 3 * 3 * 2);
  const size_t floats = bytes / 4 + 1024, plain = attention_scratch(padded, length);
  return floats > plain ? round_up(floats, 64) : plain;
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

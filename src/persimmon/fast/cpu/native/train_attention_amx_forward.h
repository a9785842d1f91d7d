// The forward pass of train_attention_amx.h, and the blocks of scores that both passes work on.
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
constexpr int kPart = kBlock + kApart;           // distance of the parts of a block, and of two blocks of scores
template <int kParts>
constexpr int kBesides = kParts == 3 ? 6 : 1;   // calls of beside() in a step of 2 x 2 tiles

// Of sixteen queries from `query`, those that see `key`.
INLINE __mmask16 seeing(int query, int key) {
  const int hidden = key - query;
  return hidden <= 0 ? 0xFFFF : hidden >= 16 ? 0 : static_cast<__mmask16>(0xFFFFu << hidden);
}

struct Block {  // of scores: queries from q0 and keys from k0
  int q0, k0, keys;
  bool masked() const { return k0 + keys > q0 + 1; }
};

constexpr int degree_of(int parts) { return parts == 1 ? 3 : 6; }  // of the exponential: as good as the parts

// Vector work in pieces of two keys, 16 apart: they share a line of the results.
class Pieces {
 public:
  // In how many calls all pieces are to be done.
  void start(int keys, int calls) { next_ = 0, end_ = keys / 2, at_once_ = calls > 0 ? (end_ + calls - 1) / calls : end_; }

 protected:
  static int key_of(int piece) { return piece / 16 * kStep + piece % 16; }
  int next_ = 0, end_ = 0, at_once_ = 0;
};

// ---- the pass ----------------------------------------------------------------------------------------------------------------

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
  // Not inlined: the copies beside each product would not fit the first-level instruction cache.
  __attribute__((noinline)) void piece(int key) {  // by queries, then keys
    const float* at = scores_ + key * kAmxQueries;
    f32x16 p[4] = {load16(at), load16(at + 16 * kAmxQueries), load16(at + 16), load16(at + 16 * kAmxQueries + 16)};
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) p[v] = fma(p[v], factor_, shift_[v / 2]);
    exp2_nonpositive<degree_of(kParts)>(p);
    if (block_.masked())
      for (int v = 0; v < 4; v++) p[v] = _mm512_maskz_mov_ps(seeing(block_.q0 + 16 * (v / 2), block_.k0 + key + 16 * (v % 2)), p[v]);
    for (int h = 0; h < 2; h++) total_[h] = add(total_[h], add(p[2 * h], p[2 * h + 1]));
    Split<kParts> s[4];
    split<kParts>(p, s);
    uint16_t* line = tiles_ + key / kStep * 2 * kTile + key % kStep * kStep;
    store_lines(line, kPart, s[0], s[1]);
    store_lines(line + kTile, kPart, s[2], s[3]);
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
    size_ = static_cast<size_t>(n) * W_ + kApart, base_ = (static_cast<size_t>(head) * t.tokens + start) * t.padded;
    Arena arena(scratch);
    keys_ = arena.take<uint16_t>(kParts * size_), values_ = arena.take<uint16_t>(kParts * size_);
    lanes_ = arena.take<uint16_t>(kParts * lanes_part());
    sums_ = arena.take<float>(kAmxGroups * kAmxQueries * W_);
    running_ = arena.take<Running>(kAmxGroups);
    for (int i = 0; i < 2; i++) scores_[i] = arena.take<float>(kPart), shares_[i] = arena.take<uint16_t>(kParts * kPart);
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
      const int calls = kBesides<kParts> * ((more ? products(next.keys) : 0) + (there ? products(before.keys) : 0));
      const bool changed = pieces_.begin(now, scores_[i], running, shares_[i], calls);
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
  size_t lanes_part() const { return static_cast<size_t>(kAmxGroups) * kAmxQueries * W_ + kApart; }
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
    tile_product<kParts>({values_ + b.k0 * w, kStep, 16 * kStep, w * kStep, size_}, {shares_[slot], kStep, kTile, 2 * kTile, kPart},
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

}  // namespace PERSIMMON_ISA
}  // namespace persimmon
#endif

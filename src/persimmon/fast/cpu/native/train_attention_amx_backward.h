// The backward pass of train_attention_amx.h.
#pragma once
#include "train_attention_amx_forward.h"

#if defined(__AMX_BF16__)

namespace persimmon {
namespace PERSIMMON_ISA {

constexpr int kSettled = 16 * kAmxQueries;  // queries whose shares of the gradients of keys and values are summed by themselves

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
  __attribute__((noinline)) void piece(int key) {  // by keys, then queries
    uint16_t *shares = results_, *grads = shares + kParts * kPart, *tiles = grads + kParts * kPart;
    f32x16 p[4], d[4];
    const int lower = key * kAmxQueries, upper = lower + 16 * kAmxQueries;
    const int at[4] = {lower, lower + 16, upper, upper + 16};
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) p[v] = fma(load16(scores_ + at[v]), factor_, shift_[v % 2]);
    exp2_nonpositive<degree_of(kParts)>(p);
    if (block_.masked())
      for (int v = 0; v < 4; v++) p[v] = _mm512_maskz_mov_ps(seeing(block_.q0 + 16 * (v % 2), block_.k0 + key + 16 * (v / 2)), p[v]);
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) d[v] = mul(p[v], sub(load16(scores_ + kPart + at[v]), dots_[v % 2]));
    Split<kParts> s[4];
    split<kParts>(p, s);
    store_lines(shares + lower, kPart, s[0], s[1]);
    store_lines(shares + upper, kPart, s[2], s[3]);
    split<kParts>(d, s);
    store_lines(grads + lower, kPart, s[0], s[1]);
    store_lines(grads + upper, kPart, s[2], s[3]);
    uint16_t* line = tiles + key / kStep * 2 * kTile + key % kStep * kStep;
    store_lines(line, kPart, s[0], s[2]);
    store_lines(line + kTile, kPart, s[1], s[3]);
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
    size_ = static_cast<size_t>(n_) * W_ + kApart, base_ = (static_cast<size_t>(head) * t.tokens + start) * t.padded;
    Arena arena(scratch);
    auto packed = [&](size_t n) { return arena.take<uint16_t>(kParts * n); };
    q_lanes_ = packed(size_), q_pairs_ = packed(size_), g_lanes_ = packed(size_), g_pairs_ = packed(size_);
    grad_q_ = arena.take<float>(size_), normalizer_ = arena.take<float>(n_), dots_ = arena.take<float>(n_);
    keys_ = packed(stretch()), across_ = packed(stretch()), values_ = packed(stretch());
    recent_ = arena.take<float>(2 * stretch()), grads_ = arena.take<float>(2 * stretch());
    for (int i = 0; i < 2; i++) scores_[i] = arena.take<float>(2 * kPart), results_[i] = arena.take<uint16_t>(3 * kParts * kPart);
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
  size_t stretch() const { return static_cast<size_t>(kAmxStretch) * kAmxKeys * W_ + kApart; }
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
    memset(recent_, 0, 2 * stretch() * sizeof(float));
    memset(grads_, 0, 2 * stretch() * sizeof(float));
    first_ = first;
    Block now = {first, first, kAmxQueries}, before;
    multiply_scores(now, 0, [] {});
    bool there = false, more = true;
    for (int i = 0; more; i ^= 1) {
      Block next = now;
      more = advance(next, first + count);
      const int calls = kBesides<kParts> * ((more ? products(next) : 0) + (there ? products(before) * 3 / 2 : 0));
      pieces_.begin(now, scores_[i], normalizer_, dots_, results_[i], calls);
      if (more) multiply_scores(next, i ^ 1, pieces_);
      if (there) multiply_gradients(before, i ^ 1, pieces_);
      if (there && now.q0 > before.q0 && (now.q0 - first) % kSettled == 0) settle();
      pieces_.finish();
      before = now, there = true, now = next;
      if (!more) multiply_gradients(before, i, [] {});
    }
    settle();
    for (int i = 0; i < count; i++)
      for (int d = 0; d < t_.padded; d += 16) {
        const size_t to = from + i * row + d;
        store16(t_.grad_k + to, mul(load16(grads_ + i * W_ + d), set16(t_.scale)));
        store16(t_.grad_v + to, load16(grads_ + stretch() + i * W_ + d));
      }
  }

  // Six roundings for every 32 queries would add up to more than float32's products do: sums of a few queries are added to the rest.
  void settle() {
    for (size_t i = 0; i < 2 * stretch(); i += 16) {
      store16(grads_ + i, add(load16(grads_ + i), load16(recent_ + i)));
      store16(recent_ + i, zero16());
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
    tile_product<kParts>({values_ + at, w, 16 * w, kStep, stretch()}, grads, scores_[slot] + kPart, kAmxQueries, m, 2, s, false, beside);
  }

  template <class Beside>
  void multiply_gradients(const Block& b, int slot, Beside&& beside) {
    const size_t w = W_, at = (b.k0 - first_) * w, tiles = w / 16;
    const uint16_t *shares = results_[slot], *grads = shares + kParts * kPart, *turned = grads + kParts * kPart;
    const TileOperand g = {g_pairs_ + b.q0 * w, kStep, kTile, tiles * kTile, size_}, q = {q_pairs_ + b.q0 * w, kStep, kTile, tiles * kTile, size_};
    const int m = b.keys / 16, n = static_cast<int>(tiles);
    tile_product<kParts>({shares, kAmxQueries, 16 * kAmxQueries, kStep, kPart}, g, recent_ + stretch() + at, w, m, n, 1, true, beside);
    tile_product<kParts>({grads, kAmxQueries, 16 * kAmxQueries, kStep, kPart}, q, recent_ + at, w, m, n, 1, true, beside);
    tile_product<kParts>({across_ + at, kStep, 16 * kStep, w * kStep, stretch()}, {turned, kStep, kTile, 2 * kTile, kPart},
                         grad_q_ + b.q0 * w, kAmxQueries, n, 2, b.keys / kStep, true, beside);
  }

  const AttentionTensors& t_;
  int head_, start_, count_, W_, n_, first_ = 0;
  size_t size_, base_;
  uint16_t *q_lanes_, *q_pairs_, *g_lanes_, *g_pairs_, *keys_, *across_, *values_, *results_[2];
  float *grad_q_, *normalizer_, *dots_, *recent_, *grads_, *scores_[2];  // grad_q [n / 32][W][32]; keys, then values
  GradientPieces<kParts> pieces_;
  const TileRegisters registers_;
};

}  // namespace PERSIMMON_ISA
}  // namespace persimmon
#endif

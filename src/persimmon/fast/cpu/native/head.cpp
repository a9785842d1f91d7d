// The vocabulary head: all logits, in two passes only the largest, or log-probabilities of given tokens.
//
// Two passes (head stored in planes): the top two bits of every row give an estimate and the standard deviation of its
// error. The exact logits of the rows with the largest estimates, kTried more than wanted, give a value that the top-th
// largest exact logit cannot be below: the top-th largest of them. Every row whose estimate plus kHeadSigmas deviations
// reaches it is computed exactly. A row among the true top is lost only if its error is beyond kHeadSigmas deviations: 1e-9
// for a normal distribution, which a sum of thousands of roundings is where the inputs' distances from their center do not
// depend on the scales of the weights they meet. An infinite sparsity margin always reads all.
// Float weights and one token: the estimates are those of a sketch (sketch.h), whose bounds are certain; the exact logits are those of
// the full head, bit for bit.
#include <algorithm>
#include <cmath>

#include "model.h"

namespace persimmon {
namespace {

constexpr float kHeadSigmas = 6.0f;
constexpr int kHeadChunk = 1024;     // rows a thread ranks at a time
constexpr int kGlance = 64;         // values that are compared at a time before one by one; divides kHeadChunk
constexpr int kScoreRows = 256;      // rows whose logits are kept at a time when only scores are wanted
constexpr int kTried = 63;           // of planes: the higher threshold saves many times as many rows of the last pass
constexpr int kMostTop = 256;        // above this many wanted logits the full head is as fast
constexpr int kTokensAtOnce = kTileTokens;  // bounds the estimates to 16 * vocabulary

struct Ranked {
  float value;
  int row;
};
bool better(const Ranked& a, const Ranked& b) { return a.value > b.value || (a.value == b.value && a.row < b.row); }

void keep_best(std::vector<Ranked>* ranked, int count) {
  if (static_cast<int>(ranked->size()) <= count) return;
  std::nth_element(ranked->begin(), ranked->begin() + count, ranked->end(), better);
  ranked->resize(count);
}

// The first of the stretches of kGlance rows from `row` on that may hold a value of `least` or more; a rest of fewer may always.
int next_to_reach(const float* values, int row, int end, float least) {
  for (; row + kGlance <= end; row += kGlance) {
    int reach = 0;
    for (int i = 0; i < kGlance; i++) reach |= !(values[row + i] < least);
    if (reach) return row;
  }
  return row;  // fewer are looked at one by one
}

}  // namespace

void Model::head(const std::vector<int>& wanted, const Output& output) {
  const int count = static_cast<int>(wanted.size());
  for (int i = 0; i < count; i++)  // wanted ascends, so rows move to the front without overwriting later ones
    if (wanted[i] != i) std::copy_n(x_.data() + static_cast<size_t>(wanted[i]) * width_, width_, x_.data() + static_cast<size_t>(i) * width_);
  normalize(final_norm_, x_.data(), count, nullptr, lm_head_.format == Format::planes ? final_norm_.bias : nullptr);
  if (output.targets) return head_scores(count, output);
  const int exact_top = output.exact_top;
  float* logits = output.logits;
  const bool few = exact_top > 0 && exact_top <= kMostTop && shape_.vocab >= kFewestRanked;
  if (few && head_sketch_ && count == 1) return head_top_float(exact_top, logits);
  const bool two_pass = few && lm_head_.format == Format::planes && std::isfinite(margin);
  if (!two_pass) return multiply(lm_head_, input(), count, logits, shape_.vocab, Epilogue::store);
  for (int first = 0; first < count; first += kTokensAtOnce) {
    RowsArgs args = rows_args(lm_head_, packed_.get() + static_cast<size_t>(first) * lm_head_.blocks,
                              std::min(kTokensAtOnce, count - first), nullptr, shape_.vocab, Epilogue::store);
    if (count > kTokensAtOnce) args.eights = nullptr;  // the tokens were packed into tiles
    args.tiles += static_cast<size_t>(first / kTileTokens) * kLanes * lm_head_.blocks;
    args.distances += first;
    head_top(args, exact_top, logits + static_cast<size_t>(first) * shape_.vocab);
  }
}

// Log-probabilities without keeping the logits: each piece of the vocabulary leaves its largest logit and its sum of
// exponentials, and these are put together in double precision. The pieces are the same whatever runs them.
void Model::head_scores(int tokens, const Output& output) {
  const int vocab = shape_.vocab, pieces = (vocab + kScoreRows - 1) / kScoreRows;
  // Float rows: a thread takes tokens through all pieces (see wide_step.cpp); else it takes pieces, for all tokens.
  const int size = wide(tokens) ? group_tokens(tokens) : tokens, groups = (tokens + size - 1) / size;
  const int stretch = groups > 1 ? pieces : 1, stretches = pieces / stretch;
  score_logits_.resize(static_cast<size_t>(pool_.threads()) * size * kScoreRows);
  summaries_.resize(static_cast<size_t>(tokens) * pieces);
  pool_.parallel_for(groups * stretches, 1, [&](int begin, int end, int thread) {
    for (int i = begin; i < end; i++) {
      const int first = i / stretches * size, at = i % stretches * stretch;
      score_pieces({first, std::min(size, tokens - first), thread}, at, at + stretch, output);
    }
  });
  for (int t = 0; t < tokens; t++) {
    const RowSummary* found = summaries_.data() + static_cast<size_t>(t) * pieces;
    int best = 0;
    for (int p = 1; p < pieces; p++) best = found[p].top > found[best].top ? p : best;
    double sum = 0;
    for (int p = 0; p < pieces; p++) sum += found[p].sum * std::exp(static_cast<double>(found[p].top) - found[best].top);
    output.scores[t] -= found[best].top + std::log(sum);
    output.likeliest[t] = best * kScoreRows + found[best].at;
  }
}

// Pieces [begin, end) of the vocabulary for a group of tokens; groups other than all tokens are in panels.
void Model::score_pieces(const Group& group, int begin, int end, const Output& output) {
  const int vocab = shape_.vocab, pieces = (vocab + kScoreRows - 1) / kScoreRows;
  float* logits = score_logits_.data() + score_logits_.size() / pool_.threads() * group.thread;
  for (int p = begin; p < end; p++) {
    const int first = p * kScoreRows, count = std::min(kScoreRows, vocab - first);
    RowsArgs args = rows_args(lm_head_, input(), group.count, logits, kScoreRows, Epilogue::store);
    args.weights += first * args.row_bytes;  // so that the logits of the piece begin at 0
    if (args.rest) args.rest += first * args.rest_bytes;
    if (group.first) args.x = normed_.data() + static_cast<size_t>(group.first) * width_;
    if (group.first) args.panels += panel_offset(group.first);
    multiply_range(args, 0, count, group.thread);
    for (int t = 0; t < group.count; t++) {
      const float* row = logits + static_cast<size_t>(t) * kScoreRows;
      summaries_[static_cast<size_t>(group.first + t) * pieces + p] = kernels_->summarize(row, count);
      const int target = output.targets[group.first + t] - first;
      if (target >= 0 && target < count) output.scores[group.first + t] = row[target];
    }
  }
}

// estimate(first, last, thread) fills in estimates_ and bounds_ of these rows, exact(token, list, count, thread) the logits of those of
// a list.
template <class Estimate, class Exact>
void Model::two_passes(int tokens, int top, int tried, float* logits, Estimate&& estimate, Exact&& exact) {
  const int vocab = shape_.vocab, chunks = (vocab + kHeadChunk - 1) / kHeadChunk;
  const size_t stride = vocab, size = round_up(tokens * stride, kSketchRows);
  estimates_.resize(size), bounds_.resize(size);
  std::vector<std::vector<Ranked>> ranked(static_cast<size_t>(tokens) * chunks);
  const int kept = std::max(top, 2 * (top + tried) / chunks);  // of each chunk
  pool_.parallel_for(chunks, 1, [&](int begin, int end, int thread) {
    for (int c = begin; c < end; c++) {
      const int first = c * kHeadChunk, last = std::min(first + kHeadChunk, vocab);
      estimate(first, last, thread);
      for (int t = 0; t < tokens; t++) {
        std::vector<Ranked>& best = ranked[static_cast<size_t>(t) * chunks + c];
        float least = -HUGE_VALF;  // the worst of the best so far
        for (int r = first; r < last; r++) {
          if (r % kGlance == 0) r = next_to_reach(estimates_.data() + t * stride, r, last, least);
          if (r == last) break;
          const float value = estimates_[t * stride + r];
          if (!(value >= least)) continue;
          best.push_back({value, r});
          if (static_cast<int>(best.size()) < 2 * kept) continue;
          keep_best(&best, kept);
          least = std::max_element(best.begin(), best.end(), better)->value;
        }
        keep_best(&best, kept);
      }
    }
  });
  std::vector<float> threshold(tokens);
  std::vector<std::vector<Ranked>> found(tokens);  // rows that were tried
  pool_.parallel_for(tokens, 1, [&](int begin, int end, int thread) {
    for (int t = begin; t < end; t++) {
      std::vector<Ranked>& best = found[t];
      for (int c = 0; c < chunks; c++)
        best.insert(best.end(), ranked[static_cast<size_t>(t) * chunks + c].begin(), ranked[static_cast<size_t>(t) * chunks + c].end());
      keep_best(&best, top + tried);
      bool damaged = static_cast<int>(best.size()) < top;  // weights whose products are no numbers: all are read
      for (Ranked& row : best) {
        exact(t, &row.row, 1, thread);
        row.value = logits[t * stride + row.row], damaged |= std::isnan(row.value);
      }
      if (!damaged) std::nth_element(best.begin(), best.begin() + (top - 1), best.end(), better);
      threshold[t] = damaged ? -HUGE_VALF : best[top - 1].value;
    }
  });
  pool_.parallel_for(chunks, 1, [&](int begin, int end, int thread) {
    int list[kHeadChunk];
    for (int c = begin; c < end; c++) {
      const int first = c * kHeadChunk, last = std::min(first + kHeadChunk, vocab);
      for (int t = 0; t < tokens; t++) {
        const float* bounds = bounds_.data() + t * stride;
        std::fill(logits + t * stride + first, logits + t * stride + last, -HUGE_VALF);
        int count = 0;
        for (int r = first; r < last; r++) {
          if (r % kGlance == 0) r = next_to_reach(bounds, r, last, threshold[t]);
          if (r < last && !(bounds[r] < threshold[t])) list[count++] = r;
        }
        exact(t, list, count, thread);
      }
    }
  });
  for (int t = 0; t < tokens; t++)  // those that were tried are known, whatever their bounds say
    for (const Ranked& row : found[t])
      if (row.value >= threshold[t]) logits[t * stride + row.row] = row.value;
}

// Rows in planes.
void Model::head_top(const RowsArgs& args, int top, float* logits) {
  const size_t stride = shape_.vocab;
  const bool in_tiles = tiled(args.tokens);
  const auto estimate = [&](int first, int last, int thread) {
    float *estimates = estimates_.data(), *bounds = bounds_.data();
    if (args.eights) kernels_->eight_estimates(args, first, last, kHeadSigmas, estimates, bounds, stride);
    else if (in_tiles) kernels_->tiled_estimates(args, first, last, kHeadSigmas, estimates, bounds, stride, tile_scratch(thread));
    else kernels_->estimate_rows(args, first, last, kHeadSigmas, estimates, bounds, stride);
  };
  two_passes(args.tokens, top, kTried, logits, estimate, [&](int t, const int* list, int count, int) {
    for (int k = 0; k < count; k++) logits[t * stride + list[k]] = kernels_->refine_row(args, t, list[k]);
  });
}

// Float rows and one token; normalize() has left its input in normed_ and, where the kernels want it, in panels.
void Model::head_top_float(int top, float* logits) {
  const SketchInput x = sketch_input(final_norm_);
  const RowsArgs rows = rows_args(lm_head_, input(), 1, logits, shape_.vocab, Epilogue::store);
  const auto estimate = [&](int first, int last, int) {
    kernels_->sketch_rows(head_sketch_, kHeadBits, x, first, last, estimates_.data() + first, bounds_.data() + first);
  };
  two_passes(1, top, 0, logits, estimate, [&](int, const int* list, int count, int thread) {
    kernels_->listed_products(rows, list, count, panel_scratch(thread));
  });
}

}  // namespace persimmon

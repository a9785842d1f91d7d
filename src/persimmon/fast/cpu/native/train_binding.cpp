// The kernels of training as Python functions over PyTorch's tensors: shapes are checked here, tasks dealt out, memory lent.
#include "train_binding.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "cpu.h"
#include "train.h"
#include "train_matrix.h"
#include "train_scratch.h"
#include "train_threads.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace persimmon {
namespace {

constexpr int kForwardQueries = 1920;  // of a forward task: a multiple of both kernels' blocks, long enough to pay for packing keys

using Array = nb::ndarray<nb::c_contig, nb::device::cpu>;
using ReadArray = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;
template <int N>
using Floats = nb::ndarray<float, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
using Weight = std::optional<nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>>;
using ConstMatrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Boundaries = std::vector<int64_t>;

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

template <class A>
Element element_of(const A& array) {
  if (array.dtype() == nb::dtype<float>()) return Element::f32;
  require(array.dtype().code == static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat) && array.dtype().bits == 16,
          "tensors must be float32 or bfloat16");
  return Element::bf16;
}

#if defined(PERSIMMON_AMX)
// AMX-BF16 of CPUID leaf 7.0 and AVX512-BF16 of leaf 7.1; the compiler's own check knows these names only in later versions.
bool has_amx_bf16() {
  unsigned a, b, c, d, e;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && __get_cpuid_count(7, 1, &a, &b, &c, &e) && (a >> 5 & 1);
}
#endif

// Kernels by the name of their instruction set; "auto" and those without kernels of their own mean the best one here.
const TrainKernels* find_train_kernels(const std::string& isa) {
#if defined(__x86_64__)
  const std::string found = find_kernels(isa)->name;
  if (found == "avx2") return avx2_train_kernels();
#if defined(PERSIMMON_AMX)
  if (found == "amx" && has_amx_bf16()) return amx_train_kernels();
#endif
  if (found != "portable") return avx512_train_kernels();
#else
  find_kernels(isa);
#endif
  return portable_train_kernels();
}

struct Task {
  int head, start, end, first, last;
};

// Documents by heads, longest first so that no thread is left with the last long one.
std::vector<Task> attention_tasks(const Boundaries& documents, int tokens, int heads, int queries) {
  require(documents.size() >= 2 && documents.front() == 0 && documents.back() == tokens, "documents must run over all tokens");
  std::vector<Task> tasks;
  for (size_t i = 0; i + 1 < documents.size(); i++) {
    require(documents[i] < documents[i + 1], "documents must ascend");
    const int start = static_cast<int>(documents[i]), end = static_cast<int>(documents[i + 1]);
    for (int first = 0; first < end - start; first += queries)
      for (int head = 0; head < heads; head++) tasks.push_back({head, start, end, first, std::min(first + queries, end - start)});
  }
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.last > b.last; });
  return tasks;
}

int longest(const Boundaries& documents) {
  int64_t most = 0;
  for (size_t i = 0; i + 1 < documents.size(); i++) most = std::max(most, documents[i + 1] - documents[i]);
  return static_cast<int>(most);
}

template <class A>
void check_packed(const A& packed, int heads, int tokens, int padded) {
  require(static_cast<int>(packed.shape(0)) == 3 && static_cast<int>(packed.shape(1)) == heads &&
              static_cast<int>(packed.shape(2)) == tokens && static_cast<int>(packed.shape(3)) == padded,
          "packed heads have the wrong shape");
}

AttentionTensors attention_tensors(const Floats<4>& packed, const Floats<2>& normalizer, const ReadArray& out) {
  require(out.ndim() == 3, "the output must be [tokens, heads, dim]");
  AttentionTensors t = {};
  t.tokens = static_cast<int>(out.shape(0)), t.heads = static_cast<int>(out.shape(1)), t.dim = static_cast<int>(out.shape(2));
  t.padded = static_cast<int>(packed.shape(3));
  require(t.padded % kTrainVector == 0 && t.dim <= t.padded && t.padded <= kMostHeadDim, "head dimension does not fit");
  check_packed(packed, t.heads, t.tokens, t.padded);
  require(static_cast<int>(normalizer.shape(0)) == t.heads && static_cast<int>(normalizer.shape(1)) == t.tokens, "normalizer has the wrong shape");
  const size_t part = static_cast<size_t>(t.heads) * t.tokens * t.padded;
  t.q = packed.data(), t.k = t.q + part, t.v = t.k + part;
  t.normalizer = normalizer.data(), t.scale = 1.0f / std::sqrt(static_cast<float>(t.dim));
  t.element = element_of(out);
  return t;
}

void attention_forward(Floats<4> packed, Boundaries documents, Array out, Floats<2> normalizer, int threads, const std::string& isa) {
  const TrainKernels* kernels = find_train_kernels(isa);
  AttentionTensors t = attention_tensors(packed, normalizer, ReadArray(out));
  t.out = out.data();
  const std::vector<Task> tasks = attention_tasks(documents, t.tokens, t.heads, kForwardQueries);
  const size_t floats = kernels->attention_scratch(t.padded, longest(documents));
  const Scratch scratch = scratch_for(floats * threads);
  nb::gil_scoped_release release;
  for_tasks(threads, static_cast<int>(tasks.size()), [&](int i, int thread) {
    const Task& task = tasks[i];
    kernels->attention_forward(t, task.head, task.start, task.first, task.last, scratch.get() + floats * thread);
  });
}

void attention_backward(Floats<4> packed, Boundaries documents, ReadArray out, Floats<2> normalizer, ReadArray grad_out,
                        Floats<4> grad_packed, int threads, const std::string& isa) {
  const TrainKernels* kernels = find_train_kernels(isa);
  AttentionTensors t = attention_tensors(packed, normalizer, out);
  check_packed(grad_packed, t.heads, t.tokens, t.padded);
  require(grad_out.size() == out.size() && element_of(grad_out) == t.element, "output and its gradient differ");
  const size_t part = static_cast<size_t>(t.heads) * t.tokens * t.padded;
  t.out = const_cast<void*>(out.data()), t.grad_out = grad_out.data();  // only read
  t.grad_q = grad_packed.data(), t.grad_k = t.grad_q + part, t.grad_v = t.grad_k + part;
  const std::vector<Task> tasks = attention_tasks(documents, t.tokens, t.heads, t.tokens);
  const size_t floats = kernels->attention_scratch(t.padded, longest(documents));
  const Scratch scratch = scratch_for(floats * threads);
  nb::gil_scoped_release release;
  for_tasks(threads, static_cast<int>(tasks.size()), [&](int i, int thread) {
    kernels->attention_backward(t, tasks[i].head, tasks[i].start, tasks[i].end, scratch.get() + floats * thread);
  });
}

HeadTensors head_tensors(const ReadArray& fused, const Floats<4>& packed, const Floats<2>& cos, const Floats<2>& sin, const Weight& q_weight,
                         const Weight& q_bias, const Weight& k_weight, const Weight& k_bias, float eps) {
  require(fused.ndim() == 4 && fused.shape(2) == 3, "the fused projection must be [tokens, heads, 3, dim]");
  HeadTensors t = {};
  t.tokens = static_cast<int>(fused.shape(0)), t.heads = static_cast<int>(fused.shape(1)), t.dim = static_cast<int>(fused.shape(3));
  t.padded = static_cast<int>(round_up(t.dim, kTrainVector)), t.half = static_cast<int>(cos.shape(1));
  require(knows_head_dim(t.padded), "there are no kernels for this head dimension");
  require(2 * t.half <= t.dim, "the rotary dimension is larger than the head's");
  check_packed(packed, t.heads, t.tokens, t.padded);
  require(static_cast<int>(cos.shape(0)) == t.tokens && cos.size() == sin.size(), "rotary tables have the wrong shape");
  for (const Weight* weight : {&q_weight, &q_bias, &k_weight, &k_bias})
    require(weight->has_value() == q_weight.has_value() && (!*weight || static_cast<int>((*weight)->size()) == t.dim),
            "LayerNorm parameters have the wrong shape");
  const size_t part = static_cast<size_t>(t.heads) * t.tokens * t.padded;
  t.eps = eps, t.element = element_of(fused), t.fused = fused.data(), t.cos = cos.data(), t.sin = sin.data();
  if (q_weight) t.q_weight = q_weight->data(), t.q_bias = q_bias->data(), t.k_weight = k_weight->data(), t.k_bias = k_bias->data();
  t.q = packed.data(), t.k = t.q + part, t.v = t.k + part;
  return t;
}

int chunks_of(int tokens) { return (tokens + kTokenChunk - 1) / kTokenChunk; }

void heads_forward(ReadArray fused, Floats<2> cos, Floats<2> sin, Weight q_weight, Weight q_bias, Weight k_weight, Weight k_bias,
                   float eps, Floats<4> packed, int threads, const std::string& isa) {
  const TrainKernels* kernels = find_train_kernels(isa);
  const HeadTensors t = head_tensors(fused, packed, cos, sin, q_weight, q_bias, k_weight, k_bias, eps);
  nb::gil_scoped_release release;
  for_tasks(threads, chunks_of(t.tokens), [&](int chunk, int) {
    kernels->heads_forward(t, chunk * kTokenChunk, std::min((chunk + 1) * kTokenChunk, t.tokens));
  });
}

void heads_backward(ReadArray fused, Floats<2> cos, Floats<2> sin, Weight q_weight, Weight q_bias, Weight k_weight, Weight k_bias,
                    float eps, Floats<4> grad_packed, Array grad_fused, Floats<3> grad_norms, int threads, const std::string& isa) {
  const TrainKernels* kernels = find_train_kernels(isa);
  HeadTensors t = head_tensors(fused, grad_packed, cos, sin, q_weight, q_bias, k_weight, k_bias, eps);
  require(grad_fused.size() == fused.size() && element_of(grad_fused) == t.element, "the gradient has the wrong shape");
  require(static_cast<int>(grad_norms.shape(0)) == chunks_of(t.tokens) && grad_norms.shape(1) == 4 &&
              static_cast<int>(grad_norms.shape(2)) == t.padded, "partial sums have the wrong shape");
  t.grad_fused = grad_fused.data(), t.grad_norms = grad_norms.data();
  nb::gil_scoped_release release;
  for_tasks(threads, chunks_of(t.tokens), [&](int chunk, int) {
    kernels->heads_backward(t, chunk * kTokenChunk, std::min((chunk + 1) * kTokenChunk, t.tokens), chunk);
  });
}

void squared_relu(ReadArray x, Array y, nb::ndarray<int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu> active,
                  Floats<1> sums, int threads, const std::string& isa) {
  const TrainKernels* kernels = find_train_kernels(isa);
  require(x.ndim() == 2 && y.size() == x.size() && element_of(x) == element_of(y), "x and y must be [tokens, neurons] alike");
  const int tokens = static_cast<int>(x.shape(0)), neurons = static_cast<int>(x.shape(1));
  require(static_cast<int>(active.shape(0)) == chunks_of(tokens) && static_cast<int>(active.shape(1)) == neurons, "counts have the wrong shape");
  require(static_cast<int>(sums.size()) == chunks_of(tokens), "sums have the wrong shape");
  nb::gil_scoped_release release;
  for_tasks(threads, chunks_of(tokens), [&](int chunk, int) {
    const int last = std::min((chunk + 1) * kTokenChunk, tokens);
    sums.data()[chunk] = kernels->squared_relu(x.data(), y.data(), element_of(x), neurons, chunk * kTokenChunk, last,
                                               active.data() + static_cast<size_t>(chunk) * neurons);
  });
}

void squared_relu_backward(ReadArray x, Array grad, float extra, int threads, const std::string& isa) {
  const TrainKernels* kernels = find_train_kernels(isa);
  require(x.size() == grad.size() && element_of(x) == element_of(grad), "x and its gradient differ");
  constexpr size_t piece = 1 << 16;
  nb::gil_scoped_release release;
  for_tasks(threads, static_cast<int>((x.size() + piece - 1) / piece), [&](int i, int) {
    kernels->squared_relu_backward(x.data(), grad.data(), element_of(x), extra, i * piece, std::min((i + 1) * piece, x.size()));
  });
}

void softmax_gradient(Array logits, nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu> targets, int64_t ignore,
                      float scale, Floats<1> losses, int threads, const std::string& isa) {
  const TrainKernels* kernels = find_train_kernels(isa);
  require(logits.ndim() == 2 && targets.size() == logits.shape(0) && losses.size() == targets.size(), "logits, targets and losses differ in rows");
  const int64_t vocab = static_cast<int64_t>(logits.shape(1));
  const int rows = static_cast<int>(logits.shape(0));
  for (int i = 0; i < rows; i++)
    require(targets.data()[i] == ignore || (targets.data()[i] >= 0 && targets.data()[i] < vocab), "a target is outside the vocabulary");
  const Element element = element_of(logits);
  char* memory = static_cast<char*>(logits.data());
  nb::gil_scoped_release release;
  for_tasks(threads, rows, [&](int row, int) {
    const int64_t target = targets.data()[row];
    const bool kept = target != ignore;
    losses.data()[row] = kernels->softmax_gradient(memory + static_cast<size_t>(row) * vocab * (element == Element::f32 ? 4 : 2), element,
                                                   static_cast<int>(vocab), kept ? target : 0, kept ? scale : 0.0f);
  });
}

// ---- products of matrices ------------------------------------------------------------------------------------------------

MatrixView view_of(const ConstMatrix& a, bool turned) {
  return {a.data(), static_cast<int>(a.shape(0)), static_cast<int>(a.shape(1)), turned};
}

void matrix_product(ConstMatrix a, ConstMatrix b, Weight bias, Floats<2> c, bool a_turned, bool b_turned, bool add, int threads, const std::string& isa) {
  const TrainKernels* kernels = find_train_kernels(isa);
  require(kernels->multiply_panels != nullptr, "there are no products of matrices for this instruction set");
  const MatrixView x = view_of(a, a_turned), y = view_of(b, b_turned);
  const MatrixProduct p = {bias ? bias->data() : nullptr, c.data(), static_cast<int>(c.shape(0)), static_cast<int>(c.shape(1))};
  require(x.lines() == p.rows && y.terms() == p.columns && x.terms() == y.lines(), "the shapes of the matrices do not fit");
  require(!bias || static_cast<int>(bias->size()) == p.columns, "the bias has the wrong length");
  nb::gil_scoped_release release;
  multiply(*kernels, x, y, p, add, threads);
}

}  // namespace

void bind_training(nb::module_& m) {
  m.attr("TOKEN_CHUNK") = kTokenChunk;
  m.attr("HEAD_VECTOR") = kTrainVector;
  m.def("knows_head_dim", [](int dim) { return dim > 0 && knows_head_dim(static_cast<int>(round_up(dim, kTrainVector))); }, "dim"_a,
        "Whether the kernels are compiled for this head dimension.");
  m.def("attention_forward", &attention_forward, "packed"_a.noconvert(), "documents"_a, "out"_a.noconvert(), "normalizer"_a.noconvert(),
        "threads"_a, "isa"_a = "auto", "Causal attention in documents of packed [3, N, M, P] into out [M, N, D].");
  m.def("attention_backward", &attention_backward, "packed"_a.noconvert(), "documents"_a, "out"_a.noconvert(), "normalizer"_a.noconvert(),
        "grad_out"_a.noconvert(), "grad_packed"_a.noconvert(), "threads"_a, "isa"_a = "auto", "Its gradients into grad_packed.");
  m.def("heads_forward", &heads_forward, "fused"_a.noconvert(), "cos"_a.noconvert(), "sin"_a.noconvert(), "q_weight"_a.noconvert().none(),
        "q_bias"_a.noconvert().none(), "k_weight"_a.noconvert().none(), "k_bias"_a.noconvert().none(), "eps"_a, "packed"_a.noconvert(),
        "threads"_a, "isa"_a = "auto", "QK LayerNorm and rotary of fused [M, N, 3, D] into packed [3, N, M, P].");
  m.def("heads_backward", &heads_backward, "fused"_a.noconvert(), "cos"_a.noconvert(), "sin"_a.noconvert(), "q_weight"_a.noconvert().none(),
        "q_bias"_a.noconvert().none(), "k_weight"_a.noconvert().none(), "k_bias"_a.noconvert().none(), "eps"_a,
        "grad_packed"_a.noconvert(), "grad_fused"_a.noconvert(), "grad_norms"_a.noconvert(), "threads"_a, "isa"_a = "auto",
        "Its gradients; grad_norms [chunks, 4, P] receives one partial sum per TOKEN_CHUNK tokens.");
  m.def("squared_relu", &squared_relu, "x"_a.noconvert(), "y"_a.noconvert(), "active"_a.noconvert(), "sums"_a.noconvert(), "threads"_a, "isa"_a = "auto",
        "y = relu(x)^2 [M, F]; active [chunks, F] counts tokens per neuron, sums [chunks] are those of relu(x).");
  m.def("squared_relu_backward", &squared_relu_backward, "x"_a.noconvert(), "grad"_a.noconvert(), "extra"_a, "threads"_a, "isa"_a = "auto",
        "The gradient of y into that of x, in place; `extra` is the gradient of the sum of relu(x).");
  m.def("softmax_gradient", &softmax_gradient, "logits"_a.noconvert(), "targets"_a.noconvert(), "ignore"_a, "scale"_a,
        "losses"_a.noconvert(), "threads"_a, "isa"_a = "auto",
        "Logits [M, V] into `scale` times the gradient of the cross-entropy, in place; losses [M] in nats.");
  m.def("has_matrix_product", [](const std::string& isa) { return find_train_kernels(isa)->multiply_panels != nullptr; }, "isa"_a = "auto",
        "Whether this instruction set has products of float32 matrices.");
  m.def("matrix_product", &matrix_product, "a"_a.noconvert(), "b"_a.noconvert(), "bias"_a.noconvert().none(), "c"_a.noconvert(),
        "a_turned"_a, "b_turned"_a, "add"_a, "threads"_a, "isa"_a = "auto",
        "c = a b + bias, or c += a b, of float32 matrices; turned: the transpose is meant.");
}

}  // namespace persimmon

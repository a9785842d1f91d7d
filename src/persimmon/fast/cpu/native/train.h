// The kernels of training: document-masked causal attention, QK LayerNorm with rotary, squared ReLU and softmax, each with
// its gradient, and on AMX the products of float32 matrices. Other products with weights stay with PyTorch.
//
// M tokens of all rows laid end to end, N heads, D head dimension, P = D padded to a multiple of 16, V vocabulary, F neurons.
// Packed heads are float32 [N][M][P], zeros in the padding. Outer tensors are float32 or bfloat16; sums are float32.
//
// A kernel does one task and starts no threads; train_threads.h deals the tasks out. What a task computes does not depend on
// the thread, nor on how many there are, so that a run resumed from a checkpoint repeats the same bits. Between instruction
// sets results may differ by rounding.
#pragma once
#include <cstddef>
#include <cstdint>

namespace persimmon {

constexpr int kQueryBlock = 48;    // queries of a tile of scores: a multiple of the rows of every product tile
constexpr int kTrainKeyBlock = 96; // keys of it: two tiles of scores (36 KiB) and their operands stay in the second-level cache
constexpr int kTokenChunk = 128;   // tokens of a task of the row-wise kernels, and of one partial sum of their gradients
constexpr int kTrainVector = 16;   // floats by which head dimensions are padded
constexpr int kMostHeadDim = 256;

// Padded head dimensions that the row-wise kernels are compiled for.
constexpr bool knows_head_dim(int padded) {
  const int vectors = padded / kTrainVector;
  return padded % kTrainVector == 0 && ((vectors >= 1 && vectors <= 6) || vectors == 8 || vectors == 16);
}

enum class Element : int { f32 = 0, bf16 = 1 };

struct AttentionTensors {
  int tokens, heads, dim, padded;  // M, N, D, P
  const float* q;                  // packed heads
  const float* k;
  const float* v;
  float* normalizer;               // [N][M]: log2 of the sum of 2^(score log2 e), what the backward pass needs of the forward
  float scale;                     // of the scores
  Element element;                 // of out and grad_out
  void* out;                       // [M][N][D]
  const void* grad_out;            // [M][N][D]
  float* grad_q;                   // packed heads
  float* grad_k;
  float* grad_v;
};

// QK LayerNorm and rotary. Weights are null where there is no LayerNorm.
struct HeadTensors {
  int tokens, heads, dim, padded, half;  // half: rotated pairs
  float eps;
  Element element;                 // of fused and grad_fused
  const void* fused;               // [M][N][3][D]
  const float* cos;                // [M][half]
  const float* sin;
  const float* q_weight;           // [D]
  const float* q_bias;
  const float* k_weight;
  const float* k_bias;
  float* q;                        // packed heads: results, or in the backward pass their gradients
  float* k;
  float* v;
  void* grad_fused;                // [M][N][3][D]
  float* grad_norms;               // [chunks][4][P]: q weight, q bias, k weight, k bias, one partial sum per chunk of tokens
};

constexpr int kMatrixStep = 32;    // rows or columns of a packed cell of a matrix
constexpr int kMatrixCell = 3072;  // bfloat16 numbers of a cell: three parts
constexpr int kSumAtOnce = 256;    // terms that are summed before the sum is added to the others

struct MatrixView {  // [rows][columns] without gaps; turned: its transpose is meant
  const float* data;
  int rows, columns;
  bool turned;

  int lines() const { return turned ? columns : rows; }
  int terms() const { return turned ? rows : columns; }
};

struct MatrixProduct {
  const float* bias;  // [columns], or null
  float* c;           // [rows][columns]
  int rows, columns;
};

struct Panels {
  const uint16_t* cells;
  int steps;  // cells of a panel
};

struct TrainKernels {
  const char* name;
  // Floats of scratch memory of a thread for documents of up to `length` tokens.
  size_t (*attention_scratch)(int padded, int length);
  // Queries [first, last) of the document that begins at token `start`, one head.
  void (*attention_forward)(const AttentionTensors&, int head, int start, int first, int last, float* scratch);
  // The whole document [start, end), one head.
  void (*attention_backward)(const AttentionTensors&, int head, int start, int end, float* scratch);
  // Tokens [first, last); `chunk` is where the partial sums go.
  void (*heads_forward)(const HeadTensors&, int first, int last);
  void (*heads_backward)(const HeadTensors&, int first, int last, int chunk);
  // y = relu(x)^2 of rows [first, last) of [M][F], the number of active tokens of each neuron [F]; returns the sum of relu(x).
  float (*squared_relu)(const void* x, void* y, Element, int neurons, int first, int last, int32_t* active);
  // grad = (2 relu(x) grad + extra) where x > 0, else 0, in place; `extra` is the gradient of the sum of relu(x).
  void (*squared_relu_backward)(const void* x, void* grad, Element, float extra, size_t first, size_t last);
  // Logits of one row -> in place `scale` (softmax - one at the target); returns the loss in nats. Scale 0: all zero.
  float (*softmax_gradient)(void* logits, Element, int vocab, int64_t target, float scale);
  // Products of float32 matrices; null where PyTorch's are as fast. Packing: lines [first, last) (rows of the left, columns of the right
  // matrix), terms [from, to) of the sum, into panels of 32 lines of `steps` cells. `first` and `from` are multiples of kMatrixStep.
  void (*pack_matrix)(const MatrixView&, bool right, int first, int last, int from, int to, int steps, uint16_t* packed);
  // Rows [first, last) and columns [left, right) = or += `steps` cells of panels that begin there, at most kSumAtOnce terms.
  void (*multiply_panels)(const MatrixProduct&, int first, int last, int left, int right, int steps, Panels a, Panels b, bool add);
};

const TrainKernels* portable_train_kernels();
#if defined(__x86_64__)
const TrainKernels* avx2_train_kernels();
const TrainKernels* avx512_train_kernels();
const TrainKernels* amx_train_kernels();
#endif

}  // namespace persimmon

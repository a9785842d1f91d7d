// Gathers the kernels of training of one instruction set into a table; included once by each train_isa_*.cpp.
#pragma once
#include "train_attention.h"
#include "train_attention_amx.h"
#include "train_matrix_amx.h"
#include "train_rows.h"

namespace persimmon {
namespace PERSIMMON_ISA {

static constexpr TrainKernels train_table(const char* name) {
#if defined(__AMX_BF16__)
  return {name, amx_scratch, amx_attention_forward, amx_attention_backward, heads_forward, heads_backward,
          squared_relu, squared_relu_backward, softmax_gradient, pack_matrix, multiply_panels};
#else
  return {name, attention_scratch, attention_forward, attention_backward, heads_forward, heads_backward,
          squared_relu, squared_relu_backward, softmax_gradient, nullptr, nullptr};
#endif
}

}  // namespace PERSIMMON_ISA
}  // namespace persimmon

// Adds the kernels of training to the Python module.
#pragma once
#include <nanobind/nanobind.h>

namespace persimmon {
void bind_training(nanobind::module_& m);
}  // namespace persimmon

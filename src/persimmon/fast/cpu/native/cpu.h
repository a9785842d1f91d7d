// Which instruction sets this build has and this processor runs.
#pragma once
#include <string>
#include <vector>

#include "kernels.h"

namespace persimmon {

// Names, slowest first; always at least "portable".
std::vector<std::string> supported_isas();

// The kernels of an instruction set, or of the best one for "auto". Throws std::invalid_argument for one that is not supported.
const Kernels* find_kernels(const std::string& isa);

}  // namespace persimmon

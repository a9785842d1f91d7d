// Finds the tensors of a model by name and refuses those that are missing or have another size than the shape says, so that
// no kernel ever reads outside a file.
#pragma once
#include <map>
#include <stdexcept>
#include <string>

#include "layout.h"

namespace persimmon {

struct Bytes {
  const uint8_t* data;
  size_t size;
};

class Resolver {
 public:
  explicit Resolver(const std::map<std::string, Bytes>& tensors) : tensors_(tensors) {}

  const uint8_t* bytes(const std::string& name, size_t size) const {
    const auto found = tensors_.find(name);
    if (found == tensors_.end()) throw std::invalid_argument("tensor " + name + " is missing");
    if (found->second.size != size)
      throw std::invalid_argument("tensor " + name + " has " + std::to_string(found->second.size) + " bytes, expected " +
                                  std::to_string(size));
    return found->second.data;
  }

  const uint8_t* aligned(const std::string& name, size_t size, size_t alignment) const {
    const uint8_t* data = bytes(name, size);
    if (reinterpret_cast<uintptr_t>(data) % alignment) throw std::invalid_argument("tensor " + name + " is misaligned");
    return data;
  }

  template <class T>
  const T* array(const std::string& name, size_t count) const {
    return reinterpret_cast<const T*>(aligned(name, count * sizeof(T), alignof(T)));
  }

 private:
  const std::map<std::string, Bytes>& tensors_;
};

}  // namespace persimmon

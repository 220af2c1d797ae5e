// What callers hand over. Not included by per-ISA files.
#pragma once
#include <stdexcept>
#include <string>

#include "core/tensor.h"

namespace mmlm {

// Of dense numbers whose type the function that takes it knows; null: not given.
struct Address {
  void* data = nullptr;
  template <typename T>
  operator T*() const {
    return static_cast<T*>(data);
  }
};

// The enumerator of value `index`, one of `count`.
template <typename E>
E enum_of(const char* name, int index, int count) {
  if (index < 0 || index >= count) {
    throw std::invalid_argument(std::string(name) + " must be 0 to " + std::to_string(count - 1));
  }
  return static_cast<E>(index);
}

}  // namespace mmlm

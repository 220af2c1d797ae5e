// How many modalities a call takes.
#pragma once
#include <cstddef>
#include <stdexcept>

namespace mmlm {

constexpr int kMaxModalities = 16;

inline void check_modalities(size_t count) {
  if (count > kMaxModalities) throw std::invalid_argument("at most 16 modalities");
}

}  // namespace mmlm

// Tensors as plain addresses and strides, in elements; the last dimension is dense.
#pragma once
#include <cstdint>

namespace mmlm {

enum class Number { float32 = 0, bfloat16 = 1 };

// [rows, size]
struct Rows {
  void* data = nullptr;  // null: not given
  int64_t stride = 0;
};

// [batch, heads, length, size]
struct Heads {
  void* data = nullptr;
  int64_t stride_b = 0, stride_h = 0, stride_s = 0;
};

}  // namespace mmlm

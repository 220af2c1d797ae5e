// Tensors as plain addresses and strides, in elements; the last dimension is dense.
#pragma once
#include <cstdint>

namespace mmlm {

enum class Number { float32 = 0, bfloat16 = 1 };

inline int bytes_of(Number type) { return type == Number::float32 ? 4 : 2; }

// `rows<T>(arguments)` for the type of the numbers.
#define MMLM_BY_TYPE(type, rows, ...) \
  ((type) == Number::float32 ? rows<float>(__VA_ARGS__) : rows<BFloat16>(__VA_ARGS__))

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

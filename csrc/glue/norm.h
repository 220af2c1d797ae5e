// What a norm does with a row.
#pragma once

namespace mmlm {

struct Norm {
  bool is_layer = false;          // subtract the mean first
  const float* weight = nullptr;  // [size] or null: ones
  const float* bias = nullptr;    // [size] or null: zeros
  float eps = 0;
};

}  // namespace mmlm

// Rows or columns of a chunk of logits handed out to threads.
#pragma once
#include <algorithm>
#include <cstdint>

#include "core/arguments.h"
#include "core/dispatch.h"
#include "core/thread_pool.h"

namespace mmlm {

inline constexpr int64_t kSerialLoss = 16384;  // numbers below which one thread is faster than waking another
inline constexpr int64_t kTaskRows = 16;       // of a tile
inline constexpr int64_t kTaskColumns = 128;

template <typename Body>
void in_tasks(int64_t count, int64_t step, int64_t numbers, int num_threads, Body body) {
  const int64_t tasks = (count + step - 1) / step;
  parallel_for(tasks, numbers < kSerialLoss ? 1 : num_threads,
               [&](int64_t task) { body(task, task * step, std::min(count, (task + 1) * step)); });
}

}  // namespace mmlm

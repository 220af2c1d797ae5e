// A small pool that sleeps between calls: spinning workers beside torch's own pool made short calls ten
// times slower. Started on the first parallel call, forgotten in a forked child, which starts its own.
#pragma once
#include <cstdint>
#include <functional>

namespace mmlm {

// Run task(i) for every i in [0, num_tasks) on up to `num_threads` threads, the caller included.
// Returns when all are done. Safe to call from several threads at once; tasks must not throw.
void parallel_for(int64_t num_tasks, int num_threads, const std::function<void(int64_t)>& task);

}  // namespace mmlm

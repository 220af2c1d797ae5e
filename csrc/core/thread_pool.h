// Threads: those of the OpenMP that torch has loaded, where there is one. Its workers spin for a while after each of
// torch's own parallel regions: threads of ours beside them waited for a core, and a call right after a torch operator
// took twice as long. Else, and in a forked child, a small pool that sleeps between calls, started on the first
// parallel call.
#pragma once
#include <cstdint>
#include <functional>

namespace mmlm {

// Run task(i) for every i in [0, num_tasks) on up to `num_threads` threads, the caller included.
// Returns when all are done. Safe to call from several threads at once; tasks must not throw.
void parallel_for(int64_t num_tasks, int num_threads, const std::function<void(int64_t)>& task);

}  // namespace mmlm

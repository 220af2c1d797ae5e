#include "core/turns.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>

namespace mmlm {
namespace {

int num_cpus() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(CPU_COUNT(&set), 1);
#endif
  return std::max(static_cast<int>(std::thread::hardware_concurrency()), 1);
}

struct Waiter {
  std::condition_variable called;
  bool may_go = false;
};

struct Queue {
  std::mutex mutex;
  std::deque<Waiter*> waiting;
  TurnCounts counts;
};

// Never freed: threads may be within calls when the process ends. A forked child, which has none of the threads that
// run or wait here, starts anew.
Queue* g_queue = new Queue;
const int g_watching = pthread_atfork(nullptr, nullptr, [] { g_queue = new Queue; });

}  // namespace

Turn::Turn(bool is_large, int num_threads) {
  Queue& queue = *g_queue;
  std::unique_lock<std::mutex> lock(queue.mutex);
  if (queue.counts.running > 0 && (!queue.waiting.empty() || queue.counts.running >= num_cpus())) {
    Waiter self;
    queue.waiting.push_back(&self);
    ++queue.counts.waited;
    self.called.wait(lock, [&] { return self.may_go; });  // counted by who called it
  } else {
    ++queue.counts.running;
  }
  num_threads_ = is_large && queue.counts.running == 1 && queue.waiting.empty() ? num_threads : 1;
  ++queue.counts.taken;
  queue.counts.helped += num_threads_ > 1;
}

Turn::~Turn() {
  Queue& queue = *g_queue;
  std::lock_guard<std::mutex> lock(queue.mutex);
  if (queue.waiting.empty()) {
    --queue.counts.running;
    return;
  }
  Waiter* next = queue.waiting.front();
  queue.waiting.pop_front();
  next->may_go = true;
  next->called.notify_one();  // under the lock: the waiter lies on a stack that is left as soon as it may go
}

TurnCounts turn_counts() {
  Queue& queue = *g_queue;
  std::lock_guard<std::mutex> lock(queue.mutex);
  return queue.counts;
}

}  // namespace mmlm

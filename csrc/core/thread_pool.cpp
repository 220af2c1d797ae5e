#include "core/thread_pool.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

namespace mmlm {
namespace {

struct Job {
  Job(int64_t count, const std::function<void(int64_t)>& function) : num_tasks(count), task(function) {}

  void work() {
    for (int64_t i = next.fetch_add(1); i < num_tasks; i = next.fetch_add(1)) {
      task(i);
      if (done.fetch_add(1) + 1 == num_tasks) {
        std::lock_guard<std::mutex> lock(mutex);
        finished.notify_all();
      }
    }
  }

  void wait() {
    std::unique_lock<std::mutex> lock(mutex);
    finished.wait(lock, [&] { return done.load() == num_tasks; });
  }

  const int64_t num_tasks;
  // A worker that arrives late finds `next` exhausted and never touches `task`, which lives on the caller's stack.
  const std::function<void(int64_t)>& task;
  std::atomic<int64_t> next{0}, done{0};
  std::mutex mutex;
  std::condition_variable finished;
};

class Pool {
 public:
  void submit(const std::shared_ptr<Job>& job, int num_helpers) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (num_workers_ < num_helpers) {
        try {
          std::thread(&Pool::run, this).detach();
        } catch (const std::system_error&) {
          break;  // no more threads on this machine: the caller does the rest itself
        }
        ++num_workers_;
      }
      for (int i = 0; i < std::min(num_helpers, num_workers_); ++i) queue_.push_back(job);
    }
    wake_.notify_all();
  }

 private:
  void run() {
    for (;;) {
      std::shared_ptr<Job> job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return !queue_.empty(); });
        job = std::move(queue_.front());
        queue_.pop_front();
      }
      job->work();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::shared_ptr<Job>> queue_;
  int num_workers_ = 0;
};

std::atomic<Pool*> g_pool{nullptr};
std::atomic<bool> g_forked{false};

// The child of a fork has none of the parent's threads, and maybe a locked mutex: it drops the pool unopened, and keeps
// off OpenMP's, which would wait for threads that are not there.
// From the moment the library is loaded: torch may have used OpenMP before our first call.
const int g_watching = pthread_atfork(nullptr, nullptr, [] {
  g_pool.store(nullptr);
  g_forked.store(true);
});

// GOMP_parallel of the OpenMP that torch has loaded for all, whichever that is; null where there is none.
using OpenMp = void (*)(void (*member)(void*), void* data, unsigned num_threads, unsigned flags);
OpenMp openmp() {
  static const OpenMp found = reinterpret_cast<OpenMp>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
}

struct Team {
  const int64_t num_tasks;
  const std::function<void(int64_t)>& task;
  std::atomic<int64_t> next{0};

  static void member(void* data) {
    Team& team = *static_cast<Team*>(data);
    for (int64_t i = team.next.fetch_add(1); i < team.num_tasks; i = team.next.fetch_add(1)) team.task(i);
  }
};

Pool& pool() {
  Pool* current = g_pool.load();
  if (current == nullptr) {
    Pool* fresh = new Pool;  // never freed: detached workers sleep in it until the process ends
    if (g_pool.compare_exchange_strong(current, fresh)) return *fresh;
    delete fresh;
  }
  return *current;
}

}  // namespace

void parallel_for(int64_t num_tasks, int num_threads, const std::function<void(int64_t)>& task) {
  const int num_helpers = static_cast<int>(std::min<int64_t>(num_threads, num_tasks)) - 1;
  if (num_helpers <= 0) {
    for (int64_t i = 0; i < num_tasks; ++i) task(i);
    return;
  }
  if (openmp() != nullptr && !g_forked.load()) {
    Team team{num_tasks, task};
    openmp()(&Team::member, &team, static_cast<unsigned>(num_helpers + 1), 0);
    return;
  }
  auto job = std::make_shared<Job>(num_tasks, task);
  pool().submit(job, num_helpers);
  job->work();
  job->wait();
}

}  // namespace mmlm

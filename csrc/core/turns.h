// Calls of several threads take turns: as many run at a time as there are CPUs, in the order they came. With more
// threads than CPUs the system's slices of several milliseconds would decide which call ends when, and helpers of one
// call would take the CPUs from the next.
#pragma once
#include <cstdint>

namespace mmlm {

class Turn {
 public:
  // Wait for a turn; Python's lock must not be held. `num_threads` is what the call may use; a large call is one that
  // is worth more than one thread.
  Turn(bool is_large, int num_threads);
  ~Turn();
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

  // What the call should use: one where others are under way, and where it is not large.
  int num_threads() const { return num_threads_; }

 private:
  int num_threads_;
};

// Since the process began: calls under way now, calls, those of them that waited, those that used several threads.
struct TurnCounts {
  int64_t running = 0, taken = 0, waited = 0, helped = 0;
};
TurnCounts turn_counts();

}  // namespace mmlm

// Scratch memory of one thread, kept between calls: a short clip should not pay for malloc and page faults.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

namespace mmlm {
namespace {  // one copy per translation unit: some are compiled for an ISA the machine may lack

template <typename T>
class Arena {
 public:
  ~Arena() { std::free(memory_); }
  T* at_least(int64_t count) {
    if (count > capacity_) {
      std::free(memory_);
      capacity_ = 0;
      const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
      memory_ = static_cast<T*>(std::aligned_alloc(64, bytes));
      if (memory_ == nullptr) throw std::bad_alloc();
      std::memset(memory_, 0, bytes);
      capacity_ = count;
    }
    return memory_;
  }

 private:
  T* memory_ = nullptr;
  int64_t capacity_ = 0;
};

}  // namespace
}  // namespace mmlm

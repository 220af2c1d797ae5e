// Fresh memory for outputs.
#pragma once
#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mmlm {

constexpr int64_t kHugePageBytes = int64_t{1} << 21;  // worth asking for when the output spans several

// First touch of a fresh output costs more than the arithmetic of its pages: take it in 2 MiB steps.
inline void ask_for_huge_pages(void* begin, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < 2 * kHugePageBytes) return;
  const auto first = (reinterpret_cast<uintptr_t>(begin) + kHugePageBytes - 1) & ~uintptr_t(kHugePageBytes - 1);
  const auto last = (reinterpret_cast<uintptr_t>(begin) + bytes) & ~uintptr_t(kHugePageBytes - 1);
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)begin;
  (void)bytes;
#endif
}

}  // namespace mmlm

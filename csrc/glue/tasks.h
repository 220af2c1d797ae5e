// Rows handed out to threads, and sums over rows in fixed parts, so that the bits do not depend on the number of
// threads.
#pragma once
#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "core/arguments.h"
#include "core/dispatch.h"
#include "core/memory.h"
#include "core/thread_pool.h"

namespace mmlm {

inline constexpr int64_t kChunk = 16384;                   // numbers of a task: fewer, and handing out tasks shows
inline constexpr int64_t kSerial = 32768;                  // below so many one thread is faster than waking another
inline constexpr int64_t kStreamBytes = int64_t{8} << 20;  // of all outputs of a call (measured, CONTRIBUTING)
inline constexpr int64_t kTerms = 8;       // of a sum before it is added to the others: sums of sums err less
inline constexpr int64_t kPartRows = 32;   // rows of a part of a sum over rows
inline constexpr int64_t kMaxParts = 256;  // bounds the memory of the parts

inline int threads_for(int64_t rows, int64_t size, int num_threads) { return rows * size < kSerial ? 1 : num_threads; }

// Prepares fresh outputs of rows * size numbers; whether to write them past the caches.
inline bool expect_outputs(Number type, int64_t rows, int64_t size, std::initializer_list<void*> outputs) {
  const int64_t bytes = rows * size * bytes_of(type);
  int64_t total = 0;
  for (void* data : outputs) {
    if (data == nullptr) continue;
    ask_for_huge_pages(data, bytes);
    total += bytes;
  }
  return total >= kStreamBytes;
}

// Stores past the caches are ordered with nothing: all are done before a task is.
inline void finish_stores() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

template <typename Body>
void for_rows(int64_t rows, int64_t size, int num_threads, Body body) {
  const int64_t step = std::max<int64_t>(1, kChunk / std::max<int64_t>(1, size));
  parallel_for((rows + step - 1) / step, threads_for(rows, size, num_threads), [&](int64_t task) {
    body(task * step, std::min(rows, (task + 1) * step));
    finish_stores();
  });
}

// Rows in fixed parts, each with an array of `width` sums for every one of `sums`; body adds to them, `terms` terms a
// row. The totals go to sums[k] where that is wanted.
template <typename Body>
void sum_rows(int64_t rows, int64_t size, int64_t width, int64_t terms, std::initializer_list<float*> sums,
              int num_threads, Body body) {
  const bool wanted = std::any_of(sums.begin(), sums.end(), [](float* s) { return s != nullptr; });
  if (!wanted) {
    for_rows(rows, size, num_threads, [&](int64_t first, int64_t last) { body(first, last, nullptr); });
    return;
  }
  const int64_t all = static_cast<int64_t>(sums.size()) * width, few = std::max<int64_t>(1, kTerms / terms);
  const int64_t step = std::max(kPartRows, (rows + kMaxParts - 1) / kMaxParts), parts = (rows + step - 1) / step;
  std::vector<float> partial(2 * parts * all, 0.f);
  parallel_for(parts, threads_for(rows, size, num_threads), [&](int64_t part) {
    float *sum = partial.data() + 2 * part * all, *inner = sum + all;
    const int64_t end = std::min(rows, (part + 1) * step);
    for (int64_t first = part * step; first < end; first += few) {
      body(first, std::min(end, first + few), inner);
      for (int64_t i = 0; i < all; ++i) {
        sum[i] += inner[i];
        inner[i] = 0;
      }
    }
    finish_stores();
  });
  std::vector<double> total(width);
  int64_t k = 0;
  for (float* sum : sums) {
    if (sum != nullptr) {
      std::fill(total.begin(), total.end(), 0.);
      for (int64_t part = 0; part < parts; ++part) {
        const float* p = partial.data() + 2 * part * all + k * width;
        for (int64_t i = 0; i < width; ++i) total[i] += p[i];
      }
      for (int64_t i = 0; i < width; ++i) sum[i] = static_cast<float>(total[i]);
    }
    ++k;
  }
}

}  // namespace mmlm

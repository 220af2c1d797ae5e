#include "loss/loss.h"

#include <algorithm>
#include <array>
#include <vector>

#include "core/isa.h"
#include "core/thread_pool.h"

namespace mmlm {

#define MMLM_DECLARE(isa)                                                                       \
  void token_loss_##isa(const TokenLoss&, int64_t, int64_t);                                    \
  void clip_rows_##isa(const Pairs&, const Running&, int64_t, int64_t);                         \
  void clip_columns_##isa(const Pairs&, const Running&, int64_t, int64_t);                      \
  void clip_gradients_##isa(const Pairs&, const Side&, const Side&, int64_t, int64_t, double*); \
  void siglip_pairs_##isa(const Pairs&, bool, int64_t, int64_t, double*);
MMLM_EACH_ISA(MMLM_DECLARE)

namespace {

constexpr int64_t kSerial = 16384;  // numbers below which one thread is faster than waking another
constexpr int64_t kTaskRows = 16;   // of a tile
constexpr int64_t kTaskColumns = 128;

template <typename Body>
void in_tasks(int64_t count, int64_t step, int64_t numbers, int num_threads, Body body) {
  const int64_t tasks = (count + step - 1) / step;
  parallel_for(tasks, numbers < kSerial ? 1 : num_threads,
               [&](int64_t task) { body(task, task * step, std::min(count, (task + 1) * step)); });
}

// body(first, last, sums of this task); the tasks' sums are added to `sums` in order.
template <int N, typename Body>
void sum_tasks(const Pairs& p, double* sums, int num_threads, Body body) {
  std::vector<std::array<double, N>> parts((p.rows + kTaskRows - 1) / kTaskRows, std::array<double, N>{});
  in_tasks(p.rows, kTaskRows, p.rows * p.columns, num_threads,
           [&](int64_t task, int64_t first, int64_t last) { body(first, last, parts[task].data()); });
  for (const auto& part : parts) {
    for (int k = 0; k < N; ++k) sums[k] += part[k];
  }
}

}  // namespace

void token_loss(const TokenLoss& t, int num_threads) {
  const auto run = MMLM_PICK(token_loss);
  in_tasks(t.rows, 1, t.rows * t.vocab, num_threads,
           [&](int64_t, int64_t first, int64_t last) { run(t, first, last); });
}

void clip_statistics(const Pairs& p, const Running& rows, const Running& columns, int num_threads) {
  const auto along_rows = MMLM_PICK(clip_rows), along_columns = MMLM_PICK(clip_columns);
  in_tasks(p.rows, kTaskRows, p.rows * p.columns, num_threads,
           [&](int64_t, int64_t first, int64_t last) { along_rows(p, rows, first, last); });
  in_tasks(p.columns, kTaskColumns, p.rows * p.columns, num_threads,
           [&](int64_t, int64_t first, int64_t last) { along_columns(p, columns, first, last); });
}

void clip_gradients(const Pairs& p, const Side& rows, const Side& columns, double* sums, int num_threads) {
  const auto run = MMLM_PICK(clip_gradients);
  sum_tasks<2>(p, sums, num_threads,
               [&](int64_t first, int64_t last, double* part) { run(p, rows, columns, first, last, part); });
}

void siglip_pairs(const Pairs& p, bool gradients, double* sums, int num_threads) {
  const auto run = MMLM_PICK(siglip_pairs);
  sum_tasks<3>(p, sums, num_threads,
               [&](int64_t first, int64_t last, double* part) { run(p, gradients, first, last, part); });
}

}  // namespace mmlm

#include "glue/glue.h"

#include <algorithm>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "core/isa.h"
#include "core/memory.h"
#include "core/thread_pool.h"

namespace mmlm {

#define MMLM_DECLARE(isa)                                                                                    \
  void add_norm_forward_##isa(const AddNorm&, int64_t, int64_t);                                             \
  void add_norm_backward_##isa(const AddNorm&, const AddNormGradient&, int64_t, int64_t, float*, float*);    \
  void glu_forward_##isa(const Glu&, int64_t, int64_t);                                                      \
  void glu_backward_##isa(const Glu&, const Rows&, const Rows&, const Rows&, int64_t, int64_t, float*);      \
  void gated_add_forward_##isa(const GatedAdd&, int64_t, int64_t);                                           \
  void gated_add_backward_##isa(const GatedAdd&, const Rows&, const Rows&, int64_t, int64_t, float*);        \
  void rope_forward_##isa(const Rope&, int64_t, int64_t);                                                    \
  void rope_backward_##isa(const Rope&, const Heads&, int64_t, int64_t, float*);                             \
  void merge_forward_##isa(const Merge&, int64_t, int64_t);                                                  \
  void merge_backward_##isa(const Merge&, int64_t, int64_t);                                                 \
  void fuse_forward_##isa(const Fuse&, int64_t, int64_t);                                                    \
  void fuse_backward_##isa(const Fuse&, const Rows*, float*, int64_t, int64_t, float*);                      \
  void mix_forward_##isa(const Mix&, int64_t, int64_t);                                                      \
  void mix_backward_##isa(const Mix&, const Rows&, const Rows&, const Rows&, const Rows&, int64_t, int64_t); \
  void gather_forward_##isa(const Gather&, int64_t, int64_t);                                                \
  void gather_backward_##isa(const Gather&, const Rows&, const Rows&, int64_t, int64_t, float*, float*);     \
  void patchify_##isa(const Patchify&, int64_t, int64_t);
MMLM_EACH_ISA(MMLM_DECLARE)

namespace {

constexpr int64_t kChunk = 16384;                   // numbers of a task: fewer, and handing out tasks shows
constexpr int64_t kSerial = 32768;                  // below so many one thread is faster than waking another
constexpr int64_t kStreamBytes = int64_t{8} << 20;  // of all outputs of a call (measured, CONTRIBUTING)
constexpr int64_t kTerms = 8;                       // of a sum before it is added to the others: sums of sums err less
constexpr int64_t kPartRows = 32;                   // rows of a part of a sum over rows
constexpr int64_t kMaxParts = 256;                  // bounds the memory of the parts

int threads_for(int64_t rows, int64_t size, int num_threads) { return rows * size < kSerial ? 1 : num_threads; }

int bytes_of(Number type) { return type == Number::float32 ? 4 : 2; }

// Prepares fresh outputs of rows * size numbers; whether to write them past the caches.
bool expect_outputs(Number type, int64_t rows, int64_t size, std::initializer_list<void*> outputs) {
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
void finish_stores() {
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

}  // namespace

void add_norm_forward(const AddNorm& given, int num_threads) {
  const auto run = MMLM_PICK(add_norm_forward);
  AddNorm a = given;
  a.stream = expect_outputs(a.type, a.rows, a.size, {a.sum.data, a.out.data});
  for_rows(a.rows, a.size, num_threads, [&](int64_t first, int64_t last) { run(a, first, last); });
}

void add_norm_backward(const AddNorm& given, const AddNormGradient& g, int num_threads) {
  const auto run = MMLM_PICK(add_norm_backward);
  AddNorm a = given;
  a.stream = expect_outputs(a.type, a.rows, a.size, {g.dx.data});
  sum_rows(a.rows, a.size, a.size, 1, {g.dweight, g.dbias}, num_threads, [&](int64_t first, int64_t last, float* sums) {
    run(a, g, first, last, sums, sums == nullptr ? nullptr : sums + a.size);
  });
}

void glu_forward(const Glu& given, int num_threads) {
  const auto run = MMLM_PICK(glu_forward);
  Glu g = given;
  g.stream = expect_outputs(g.type, g.rows, g.size, {g.out.data});
  for_rows(g.rows, g.size, num_threads, [&](int64_t first, int64_t last) { run(g, first, last); });
}

void glu_backward(const Glu& given, const Rows& grad, const Rows& dgate, const Rows& dup, float* dbias,
                  int num_threads) {
  const auto run = MMLM_PICK(glu_backward);
  Glu g = given;
  g.stream = expect_outputs(g.type, g.rows, g.size, {dgate.data, dup.data});
  sum_rows(g.rows, g.size, g.size, 1, {dbias}, num_threads,
           [&](int64_t first, int64_t last, float* sums) { run(g, grad, dgate, dup, first, last, sums); });
}

void gated_add_forward(const GatedAdd& given, int num_threads) {
  const auto run = MMLM_PICK(gated_add_forward);
  GatedAdd a = given;
  a.stream = expect_outputs(a.type, a.rows, a.size, {a.out.data});
  for_rows(a.rows, a.size, num_threads, [&](int64_t first, int64_t last) { run(a, first, last); });
}

void gated_add_backward(const GatedAdd& given, const Rows& grad, const Rows& dx, float* sums, int num_threads) {
  const auto run = MMLM_PICK(gated_add_backward);
  GatedAdd a = given;
  a.stream = expect_outputs(a.type, a.rows, a.size, {dx.data});
  sum_rows(a.rows, a.size, a.size, 1, {sums}, num_threads,
           [&](int64_t first, int64_t last, float* part) { run(a, grad, dx, first, last, part); });
}

void rope_forward(const Rope& given, int num_threads) {
  const auto run = MMLM_PICK(rope_forward);
  Rope r = given;
  r.stream = expect_outputs(r.type, r.batch * r.length, r.heads * r.size, {r.out.data});
  for_rows(r.batch * r.length, r.heads * r.size, num_threads,
           [&](int64_t first, int64_t last) { run(r, first, last); });
}

void rope_backward(const Rope& given, const Heads& grad, float* dweight, int num_threads) {
  const auto run = MMLM_PICK(rope_backward);
  Rope r = given;
  r.stream = expect_outputs(r.type, r.batch * r.length, r.heads * r.size, {r.out.data});
  sum_rows(r.batch * r.length, r.heads * r.size, r.size, r.heads, {dweight}, num_threads,
           [&](int64_t first, int64_t last, float* sums) { run(r, grad, first, last, sums); });
}

void merge_forward(const Merge& given, int num_threads) {
  const auto run = MMLM_PICK(merge_forward);
  Merge m = given;
  m.stream = expect_outputs(m.type, m.rows, m.size, {m.out.data});
  for_rows(m.rows, m.size, num_threads, [&](int64_t first, int64_t last) { run(m, first, last); });
}

void merge_backward(const Merge& m, int num_threads) {
  const auto run = MMLM_PICK(merge_backward);
  for_rows(m.rows, m.size, num_threads, [&](int64_t first, int64_t last) { run(m, first, last); });
}

void fuse_forward(const Fuse& given, int num_threads) {
  const auto run = MMLM_PICK(fuse_forward);
  Fuse f = given;
  f.stream = expect_outputs(f.type, f.rows, f.size, {f.out.data});
  for_rows(f.rows, f.size * f.num, num_threads, [&](int64_t first, int64_t last) { run(f, first, last); });
}

void fuse_backward(const Fuse& given, const Rows* dfeatures, float* dscores, float* dquery, int num_threads) {
  const auto run = MMLM_PICK(fuse_backward);
  Fuse f = given;
  f.stream = f.rows * f.size * f.num * bytes_of(f.type) >= kStreamBytes;
  sum_rows(f.rows, f.size * f.num, f.size, f.num, {dquery}, num_threads,
           [&](int64_t first, int64_t last, float* sums) { run(f, dfeatures, dscores, first, last, sums); });
}

void mix_forward(const Mix& given, int num_threads) {
  const auto run = MMLM_PICK(mix_forward);
  Mix m = given;
  m.stream = expect_outputs(m.type, m.rows, m.size, {m.out.data, m.gate.data});
  for_rows(m.rows, m.size, num_threads, [&](int64_t first, int64_t last) { run(m, first, last); });
}

void mix_backward(const Mix& given, const Rows& grad, const Rows& dfirst, const Rows& dsecond, const Rows& dlogits,
                  int num_threads) {
  const auto run = MMLM_PICK(mix_backward);
  Mix m = given;
  m.stream = expect_outputs(m.type, m.rows, m.size, {dfirst.data, dsecond.data, dlogits.data});
  for_rows(m.rows, m.size, num_threads,
           [&](int64_t first, int64_t last) { run(m, grad, dfirst, dsecond, dlogits, first, last); });
}

void gather_forward(const Gather& given, int num_threads) {
  const auto run = MMLM_PICK(gather_forward);
  Gather g = given;
  g.stream = expect_outputs(g.type, g.rows, g.size * g.parts, {g.out.data});
  for_rows(g.rows, g.size * g.parts, num_threads, [&](int64_t first, int64_t last) { run(g, first, last); });
}

void gather_backward(const Gather& given, const Rows& grad, const Rows& dx, float* dweight, float* dbias,
                     int num_threads) {
  const auto run = MMLM_PICK(gather_backward);
  Gather g = given;
  g.stream = expect_outputs(g.type, g.rows, g.size * g.parts, {dx.data});
  const int64_t width = g.norm_at == NormAt::after ? g.size * g.parts : g.size;
  const int64_t terms = g.norm_at == NormAt::after ? 1 : g.parts;
  sum_rows(g.rows, g.size * g.parts, width, terms, {dweight, dbias}, num_threads,
           [&](int64_t first, int64_t last, float* sums) {
             run(g, grad, dx, first, last, sums, sums == nullptr ? nullptr : sums + width);
           });
}

void patchify(const Patchify& p, int num_threads) {
  const auto run = MMLM_PICK(patchify);
  const int64_t rows = p.batch * (p.height / p.patch) * (p.width / p.patch);
  const int64_t size = p.channels * p.repeats * p.patch * p.patch;
  expect_outputs(p.type, rows, size, {p.out});
  for_rows(rows, size, num_threads, [&](int64_t first, int64_t last) { run(p, first, last); });
}

}  // namespace mmlm

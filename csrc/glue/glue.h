// What lies between encoders, attention and decoder, on CPUs: one pass over memory where plain tensor code takes
// several. What each means: the reference in mmlm_fast/ops/<name>.py. float32 and bfloat16; arithmetic in float32, one
// rounding at the end. `stream`, set by the functions here: outputs too large for the caches are written past them.
// Sums over rows are made in fixed parts, so the bits do not depend on the number of threads.
#pragma once
#include <cstdint>

#include "core/tensor.h"

namespace mmlm {

// ---- add_norm ------------------------------------------------------------------------------------------------------

struct Norm {
  bool is_layer = false;          // subtract the mean first
  const float* weight = nullptr;  // [size] or null: ones
  const float* bias = nullptr;    // [size] or null: zeros
  float eps = 0;
};

struct AddNorm {
  Number type = Number::float32;
  int64_t rows = 0, size = 0;
  Norm norm;
  Rows x, residual;  // residual may be null
  Rows sum, out;     // sum = x + residual where there is one
  bool stream = false;
};
void add_norm_forward(const AddNorm& a, int num_threads);

struct AddNormGradient {
  Rows sum;                  // of the forward pass, or x
  Rows grad, grad_sum;       // of out and of sum; either may be null
  Rows dx;                   // of x and of the residual
  float* dweight = nullptr;  // [size], or null; written
  float* dbias = nullptr;
};
void add_norm_backward(const AddNorm& a, const AddNormGradient& g, int num_threads);

// ---- glu -----------------------------------------------------------------------------------------------------------

enum class Activation { silu = 0, gelu = 1, gelu_tanh = 2, quick_gelu = 3, relu = 4 };

struct Glu {
  Number type = Number::float32;
  Activation activation = Activation::silu;
  int64_t rows = 0, size = 0;
  Rows gate, up;                // up may be null: the activation alone
  const float* bias = nullptr;  // [size] or null, added to gate
  Rows out;
  bool stream = false;
};
void glu_forward(const Glu& g, int num_threads);
void glu_backward(const Glu& g, const Rows& grad, const Rows& dgate, const Rows& dup, float* dbias, int num_threads);

// ---- gated_add -----------------------------------------------------------------------------------------------------

struct GatedAdd {
  Number type = Number::float32;
  int64_t rows = 0, size = 0;
  Rows x, residual;
  const float* gate = nullptr;    // [size]: out = residual + gate * x
  const uint8_t* keep = nullptr;  // [rows] or null: where 0, out = residual
  Rows out;
  bool stream = false;
};
void gated_add_forward(const GatedAdd& a, int num_threads);
// sums [size]: of grad * x over the rows kept.
void gated_add_backward(const GatedAdd& a, const Rows& grad, const Rows& dx, float* sums, int num_threads);

// ---- qk_norm_rope --------------------------------------------------------------------------------------------------

struct Rope {
  Number type = Number::float32;
  int64_t batch = 0, heads = 0, length = 0;
  int size = 0, half = 0;                      // of a head; pairs that rotate, 2 * half <= size
  bool interleaved = false;                    // pairs are neighbours, else half a rotary size apart
  bool inverse = false;                        // rotate the other way
  const float *cos = nullptr, *sin = nullptr;  // [1 or batch, length, half] dense
  int64_t table_stride = 0;                    // 0 where one table serves all samples
  bool has_norm = false;
  const float* weight = nullptr;  // [size]
  float eps = 0;
  Heads x, out;
  bool stream = false;
};
void rope_forward(const Rope& r, int num_threads);
// r.x is the input of the forward pass (unused without a norm), r.out its gradient, written; `grad` that of the output.
void rope_backward(const Rope& r, const Heads& grad, float* dweight, int num_threads);

// ---- merge_embeddings ----------------------------------------------------------------------------------------------

constexpr int kMaxModalities = 16;

struct Merge {
  Number type = Number::float32;
  int64_t rows = 0, size = 0;
  const int64_t* source = nullptr;  // [rows]: row of the table, or -1 - row of the features, counted over all of them
  Rows base;                        // table[source[i]], or where `base_is_rows` base[i]
  bool base_is_rows = false, add = false;  // add: features are added to the base
  float scale = 1;                         // of the base
  int num_features = 0;
  Rows features[kMaxModalities];
  int64_t first[kMaxModalities + 1] = {};  // row at which each begins, and their number
  Rows out;
  bool stream = false;
};
void merge_forward(const Merge& m, int num_threads);
// out is the gradient of the output, read; features are written.
void merge_backward(const Merge& m, int num_threads);

// ---- fuse_modalities -----------------------------------------------------------------------------------------------

struct Fuse {
  Number type = Number::float32;
  int64_t rows = 0, size = 0, tokens = 0;
  int num = 0;
  Rows features[kMaxModalities];
  bool broadcast[kMaxModalities] = {};  // one row serves `tokens` rows
  const float* query = nullptr;         // [size], scaled: attention; null: the weights are given
  const uint8_t* present = nullptr;     // [rows, num] or null
  float* weights = nullptr;             // [rows, num]; written where there is a query
  Rows out;
  bool stream = false;
};
void fuse_forward(const Fuse& f, int num_threads);
// f.out is the gradient of the output, read. dscores [rows, num] is written where given; dfeatures have all rows.
void fuse_backward(const Fuse& f, const Rows* dfeatures, float* dscores, float* dquery, int num_threads);

struct Mix {
  Number type = Number::float32;
  int64_t rows = 0, size = 0;
  Rows first, second, logits;
  const uint8_t* present = nullptr;  // [rows, 2] or null
  Rows out, gate;
  bool stream = false;
};
void mix_forward(const Mix& m, int num_threads);
void mix_backward(const Mix& m, const Rows& grad, const Rows& dfirst, const Rows& dsecond, const Rows& dlogits,
                  int num_threads);

// ---- norm_pixel_shuffle, patch_merge -------------------------------------------------------------------------------

enum class NormAt { none = 0, before = 1, after = 2 };

struct Gather {
  Number type = Number::float32;
  int64_t rows = 0, size = 0;      // of the output and of one input row
  int parts = 1;                   // input rows of an output row
  const int64_t* index = nullptr;  // [rows, parts]
  bool channels_first = false;     // [size, parts] within an output row, else [parts, size]
  NormAt norm_at = NormAt::none;   // of each input row or of the whole output row
  Norm norm;
  Rows x, out;
  bool stream = false;
};
void gather_forward(const Gather& g, int num_threads);
void gather_backward(const Gather& g, const Rows& grad, const Rows& dx, float* dweight, float* dbias, int num_threads);

// ---- patchify ------------------------------------------------------------------------------------------------------

struct Patchify {
  Number type = Number::float32;
  int64_t batch = 0, channels = 0, height = 0, width = 0;  // in pixels
  int64_t stride_b = 0, stride_c = 0, stride_y = 0, stride_x = 0;
  int patch = 1, merge = 1, repeats = 1;  // merge x merge patches follow each other; repeats: frames in time
  const uint8_t* pixels = nullptr;
  const float *scale = nullptr, *shift = nullptr;  // [channels]
  void* out = nullptr;                             // [batch, patches, channels, repeats, patch, patch] dense
};
void patchify(const Patchify& p, int num_threads);

}  // namespace mmlm

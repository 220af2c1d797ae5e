#include "glue/ops.h"
#include "python/arguments.h"

namespace mmlm {

void bind_glue(pybind11::module_& m) {
  bind(m, "add_norm_fwd", &add_norm_fwd);
  bind(m, "add_norm_bwd", &add_norm_bwd);
  bind(m, "fuse_modalities_fwd", &fuse_modalities_fwd);
  bind(m, "fuse_modalities_bwd", &fuse_modalities_bwd);
  bind(m, "gated_add_fwd", &gated_add_fwd);
  bind(m, "gated_add_bwd", &gated_add_bwd);
  bind(m, "gated_mix_fwd", &gated_mix_fwd);
  bind(m, "gated_mix_bwd", &gated_mix_bwd);
  bind(m, "glu_fwd", &glu_fwd);
  bind(m, "glu_bwd", &glu_bwd);
  bind(m, "merge_embeddings_fwd", &merge_embeddings_fwd);
  bind(m, "merge_embeddings_bwd", &merge_embeddings_bwd);
  bind(m, "norm_pixel_shuffle_fwd", &norm_pixel_shuffle_fwd);
  bind(m, "norm_pixel_shuffle_bwd", &norm_pixel_shuffle_bwd);
  bind(m, "qk_norm_rope_fwd", &qk_norm_rope_fwd);
  bind(m, "qk_norm_rope_bwd", &qk_norm_rope_bwd);
  bind(m, "patchify", &patchify);
}

}  // namespace mmlm

// Included once per ISA with MMLM_ISA naming the symbols' suffix.
#include <algorithm>
#include <cmath>

#include "glue/rows.inl"

#define MMLM_JOIN_(a, b) a##_##b
#define MMLM_JOIN(a, b) MMLM_JOIN_(a, b)

#include "glue/add_norm.inl"
#include "glue/fuse_modalities.inl"
#include "glue/gated_add.inl"
#include "glue/glu.inl"
#include "glue/merge_embeddings.inl"
#include "glue/patches.inl"
#include "glue/qk_norm_rope.inl"

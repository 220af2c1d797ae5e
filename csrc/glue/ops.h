// What lies between encoders, attention and decoder, on CPUs: one pass over memory where plain tensor code takes
// several. What each op means: the reference in mmlm_fast/ops/<name>.py. float32 and bfloat16; arithmetic in float32,
// one rounding at the end. An op's file holds what its kernel is told, the kernel, compiled where MMLM_ISA names an
// instruction set, and elsewhere the function that shares its rows out among threads. `stream`: outputs too large for
// the caches are written past them.
#pragma once

#include "glue/add_norm.inl"
#include "glue/fuse_modalities.inl"
#include "glue/gated_add.inl"
#include "glue/gated_mix.inl"
#include "glue/glu.inl"
#include "glue/merge_embeddings.inl"
#include "glue/norm_pixel_shuffle.inl"
#include "glue/patch_embed.inl"
#include "glue/qk_norm_rope.inl"

// The losses on CPUs: what lies between the matrix products. Logits come a chunk or a tile at a time, in float32; they
// are overwritten by their gradients, which the next products read. What each loss means: the reference in
// mmlm_fast/ops/<name>.py. Sums are made in a fixed order, so the bits do not depend on the number of threads. The
// files are made like those of glue/ops.h.
#pragma once

#include "loss/clip_loss.inl"
#include "loss/linear_cross_entropy.inl"
#include "loss/siglip_loss.inl"

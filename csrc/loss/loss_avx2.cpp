#define MMLM_ISA avx2
#include "loss/loss_kernel.inl"

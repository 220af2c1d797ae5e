#define MMLM_ISA avx512
#include "loss/loss_kernel.inl"

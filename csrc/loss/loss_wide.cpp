#define MMLM_ISA wide
#include "loss/loss_kernel.inl"

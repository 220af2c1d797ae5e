#define MMLM_ISA baseline
#include "loss/loss_kernel.inl"

#define MMLM_ISA avx2
#include "attention/interval_attention_kernel.inl"

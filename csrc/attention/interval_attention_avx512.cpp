#define MMLM_ISA avx512
#include "attention/interval_attention_kernel.inl"

#define MMLM_ISA wide
#include "attention/interval_attention_kernel.inl"

#define MMLM_ISA baseline
#include "attention/interval_attention_kernel.inl"

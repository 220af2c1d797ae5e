#define MMLM_ISA avx512
#include "glue/glue_kernel.inl"

#define MMLM_ISA avx2
#include "glue/glue_kernel.inl"

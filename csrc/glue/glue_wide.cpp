#define MMLM_ISA wide
#include "glue/glue_kernel.inl"

#define MMLM_ISA baseline
#include "glue/glue_kernel.inl"

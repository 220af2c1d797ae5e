#define MMLM_ISA avx512
#include "audio/spectral_kernel.inl"

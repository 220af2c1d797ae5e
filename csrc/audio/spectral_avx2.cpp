#define MMLM_ISA avx2
#include "audio/spectral_kernel.inl"

#define MMLM_ISA wide
#include "audio/spectral_kernel.inl"

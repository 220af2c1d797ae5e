#define MMLM_ISA baseline
#include "audio/spectral_kernel.inl"

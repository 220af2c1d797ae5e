#define MMLM_LOG_MEL_FRAMES log_mel_frames_avx512
#include "audio/log_mel_kernel.inl"

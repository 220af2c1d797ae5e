#define MMLM_LOG_MEL_FRAMES log_mel_frames_baseline
#include "audio/log_mel_kernel.inl"
